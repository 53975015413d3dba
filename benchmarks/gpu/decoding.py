"""Decode attention: one layer's step over rows of many lengths, alone and against SDPA, FlexAttention and a copy."""

from __future__ import annotations

from typing import Any

import peers
import torch
from measuring import Bench, Cell, Figures, Part
from rows import Rows, facts_of, spread

LENGTHS = {"full": (512, 2048, 8192, 32768, 131072), "quick": (2048, 32768, 131072), "dry": (40,)}
BATCHES = {"full": (1, 4, 16, 32), "quick": (1, 16), "dry": (2,)}
# FlexAttention compiles for every shape, which takes seconds.
FLEX = {"full": ((32768, 131072), (1, 16)), "quick": ((32768,), (1, 16)), "dry": ((40,), (2,))}


def cells(size: str) -> list[Cell]:
    """Entries of a row (ragged: their mean) and sequences."""
    lengths, batches = FLEX[size]
    return [
        {"entries": n, "batch": b, "flex": n in lengths and b in batches} for n in LENGTHS[size] for b in BATCHES[size]
    ]


def measure(bench: Bench, cell: Cell) -> Figures:
    """Microseconds of each contestant. of_copy: the step's bytes a second as a part of the copy's in this run."""
    batch, entries = cell["batch"], cell["entries"]
    many = batch * facts_of(bench).kv_heads
    plain = Rows(bench, "keep_all", [entries] * many, batch)
    figures: Figures = {"mib": plain.bytes / (1 << 20), "copy": plain.bytes / bench.copy_rate(plain.bytes) * 1e6}
    _ours(bench, figures, "ours", plain)
    k, v = plain.dense()
    q = bench.noise(batch, plain.facts.kv_heads, plain.facts.group, plain.facts.head_dim)
    figures["error"] = _error(bench, plain, k, v)
    for name in peers.KERNELS:
        forms = (q, q.reshape(batch, plain.facts.q_heads, 1, -1))  # heads of a group as queries, or as heads

        def best(name: str = name, forms: Any = forms) -> float:
            return peers.fastest(bench, [peers.sdpa(bench, name, form, k, v) for form in forms]) * 1e6

        bench.attempt(figures, name, best)
    if cell["flex"]:
        bench.attempt(figures, "flex", lambda: bench.seconds(peers.flex_decode(bench, q, k, v, None)) * 1e6)
    del plain, k, v
    for key, policy in (("scored", "h2o"), ("tova", "tova")):
        _ours(bench, figures, key, Rows(bench, policy, [entries] * many, batch))
    lengths = spread(entries, many)
    ragged = Rows(bench, "keep_all", lengths, batch)
    _ours(bench, figures, "ragged", ragged)
    if cell["flex"]:
        k, v = ragged.dense()
        held = torch.tensor(lengths, device=bench.device).view(batch, -1)
        bench.attempt(figures, "flex_ragged", lambda: bench.seconds(peers.flex_decode(bench, q, k, v, held)) * 1e6)
    figures["of_copy"] = None if figures["ours"] is None else figures["copy"] / figures["ours"]
    return figures


def _ours(bench: Bench, figures: Figures, key: str, rows: Rows) -> None:
    step, q, k, v = rows.decode()
    bench.attempt(figures, key, lambda: bench.seconds(lambda: rows.decode_once(step, q, k, v), rows.put_back) * 1e6)


def _error(bench: Bench, rows: Rows, k: Any, v: Any) -> float:
    """Largest difference of our output from SDPA's over the same entries, relative to the largest output."""
    rows.put_back()
    step, q, new_k, new_v = rows.decode()
    mine = rows.decode_once(step, q, new_k, new_v)[:, 0].float()
    rows.put_back()
    keys, values = (torch.cat([old, new[:, :, None]], 2) for old, new in ((k, new_k), (v, new_v)))
    theirs = torch.nn.functional.scaled_dot_product_attention(q[:, :, None], keys, values, enable_gqa=True)[:, :, 0]
    return float((mine - theirs.float()).abs().max() / theirs.float().abs().max())


PART = Part(
    "decode",
    "Decode attention",
    "One layer of one step, Llama-3.1-8B's heads (32 on 8, 128), bf16. copy: a copy that reads and writes as many "
    "bytes together as keys and values have. ours appends, too; scored: with H2O's accumulated attention; tova: with "
    "TOVA's; ragged: rows of 10 to 190 % of the mean, the same bytes. SDPA: the faster of heads of a group as queries "
    "and as heads. FlexAttention is compiled for the shape, and only at some.",
    cells,
    measure,
    (
        ("mib", "keys and values", "MiB"),
        ("copy", "copy", "us"),
        ("ours", "ours", "us"),
        ("of_copy", "ours, part of copy's bytes/s", ""),
        ("scored", "scored", "us"),
        ("tova", "tova", "us"),
        ("ragged", "ragged", "us"),
        ("flash", "SDPA flash", "us"),
        ("cudnn", "SDPA cuDNN", "us"),
        ("flex", "Flex", "us"),
        ("flex_ragged", "Flex ragged", "us"),
        ("error", "error", ""),
    ),
)
