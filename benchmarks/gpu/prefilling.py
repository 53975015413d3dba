"""Attention of a prompt with 0 to 100 % local heads, against dense SDPA and FlexAttention with the same masks."""

from __future__ import annotations

import peers
import torch
from measuring import Bench, Cell, Figures, Part
from rows import a_prompt, facts_of

from kvcompile.kernels.triton_backend.library import At, library

SINK, WINDOW = 128, 1024
TOKENS = {"full": (8192, 32768, 65536, 131072), "quick": (8192, 65536), "dry": (96,)}
SHARES = {"full": (0, 25, 50, 75, 100), "quick": (0, 50, 100), "dry": (0, 50, 100)}


def cells(size: str) -> list[Cell]:
    """Tokens of the prompt and per cent of KV heads that are local."""
    return [{"tokens": n, "local": share} for n in TOKENS[size] for share in SHARES[size]]


def pairs(tokens: int, sink: int, window: int) -> tuple[int, int]:
    """(query, entry) pairs of a dense and of a local head."""
    dense = tokens * (tokens + 1) // 2
    near = min(window, tokens)
    inside = near * (near + 1) // 2 + (tokens - near) * near
    # A query at p also reads sink entries, but for those that its window reaches already.
    beyond = sum(min(sink, p - window + 1) for p in range(window, min(tokens, window + sink)))
    return dense, inside + beyond + max(0, tokens - window - sink) * sink


def measure(bench: Bench, cell: Cell) -> Figures:
    """Milliseconds of each contestant; live: pairs that are read, as a part of all; ours_rate: operations a second."""
    tokens, facts = cell["tokens"], facts_of(bench)
    sink, window = (8, 16) if bench.dry else (SINK, WINDOW)
    count = facts.kv_heads * cell["local"] // 100
    rows, k, v = a_prompt(bench, "keep_all", tokens)
    q = bench.noise(1, tokens, facts.q_heads, facts.head_dim).transpose(1, 2)
    whole = [torch.tensor([n], dtype=torch.int32, device=bench.device) for n in (tokens, 0, 0)]
    heads = torch.arange(facts.kv_heads, device=bench.device) < count
    first, reads = ((heads * n).int() for n in (sink, window))
    module = library(rows.plan).prefill(At(bench.device, facts.kv_heads, tokens))
    pools = (rows.k, rows.v, rows.pos, rows.table, rows.length, rows.layer)

    def ours() -> torch.Tensor:
        return module.launch(q, k, v, *whole, *pools, facts.head_dim**-0.5, first=first, window=reads)

    dense, local = pairs(tokens, sink, window)
    live = count * local + (facts.kv_heads - count) * dense
    figures: Figures = {"live": live / (facts.kv_heads * dense)}
    bench.attempt(figures, "ours", lambda: bench.seconds(ours) * 1e3)
    if figures["ours"] is not None:
        figures["ours_rate"] = 4 * facts.head_dim * facts.group * live / figures["ours"] / 1e9
    marks = heads.int().repeat_interleave(facts.group)
    masked = lambda: peers.flex_prefill(bench, q, k, v, marks, sink, window)  # noqa: E731
    peers.of_a_prompt(bench, figures, ours, q, k, v, masked)
    return figures


PART = Part(
    "prefill",
    "Attention of a prompt",
    f"One layer, one sequence, Llama-3.1-8B's heads, bf16; local heads read the first {SINK} and the {WINDOW} newest "
    "entries. SDPA reads every head densely; FlexAttention skips blocks by a mask of each head. live: pairs of query "
    "and entry that are read, as a part of the dense ones.",
    cells,
    measure,
    (
        ("live", "live", ""),
        ("ours", "ours", "ms"),
        ("ours_rate", "ours", "TFLOP/s"),
        ("flash", "SDPA flash, dense", "ms"),
        ("cudnn", "SDPA cuDNN, dense", "ms"),
        ("flex", "Flex, same masks", "ms"),
        ("over_dense", "times faster than the better SDPA", ""),
        ("error", "error against Flex", ""),
    ),
)
