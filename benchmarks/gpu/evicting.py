"""Eviction: all layers in one launch, in place, against topk and gather of every layer."""

from __future__ import annotations

import peers
import torch
from measuring import Bench, Cell, Figures, Part
from rows import SMALL, Rows, facts_of

HEAVY = """
policy heavy(n=64):
    state acc = 0
    on attend: acc += mean[g] sum[q] attn
    keep top(n) by acc per head
    at step
"""


def cells(size: str) -> list[Cell]:
    """Layers, sequences, entries of a row before and after; one over its budget, or three quarters too many."""
    if size == "dry":
        return [{"layers": 2, "batch": 1, "entries": 33, "keep": n} for n in (32, 8)]
    steps = [(32, 1, 4097, 4096), (32, 16, 4097, 4096), (32, 1, 32769, 32768)]
    pieces = [(32, 1, 32768, 8192), (32, 4, 32768, 8192)]
    some = (steps[:2], pieces[:1]) if size == "quick" else (steps, pieces)
    names = ("layers", "batch", "entries", "keep")
    return [dict(zip(names, sizes, strict=True)) for group in some for sizes in group]


def measure(bench: Bench, cell: Cell) -> Figures:
    """Microseconds for all layers together."""
    layers, batch, entries, keep = (cell[name] for name in ("layers", "batch", "entries", "keep"))
    heads, width = facts_of(bench).kv_heads, facts_of(bench).head_dim
    rows = Rows(bench, HEAVY, [entries] * (layers * batch * heads), batch, layers, n=keep)
    figures: Figures = {}
    left = _ours(bench, figures, rows)
    if figures["ours"] is not None and left != [keep]:
        figures["ours"], figures["notes"] = None, [f"ours: rows hold {left} entries instead of {keep}"]
    del rows
    k, v = (bench.noise(batch, heads, entries, width) for _ in range(2))
    score = torch.rand(batch, heads, entries, device=bench.device)
    one = peers.topk_gather(k, v, score, keep)
    bench.attempt(figures, "topk_gather", lambda: bench.seconds(lambda: [one() for _ in range(layers)]) * 1e6)
    both = figures["ours"] and figures["topk_gather"]
    figures["part"] = figures["ours"] / figures["topk_gather"] if both else None
    return figures


def _ours(bench: Bench, figures: Figures, rows: Rows) -> list[int]:
    """Times our launch; gives the lengths that rows have after it."""
    step, numbers = rows.eviction()

    def run() -> None:
        step(rows, **numbers, score=None)

    bench.attempt(figures, "ours", lambda: bench.seconds(run, lambda: rows.put_back(*SMALL)) * 1e6)
    return rows.length.unique().tolist()


PART = Part(
    "evict",
    "Eviction",
    "All layers of one step, Llama-3.1-8B's heads, bf16: the best entries of each row by a float32 score stay. ours "
    "is one launch in place, pages given back; the other makes new keys and values, layer by layer, and is not asked "
    "to give memory back.",
    cells,
    measure,
    (("ours", "ours", "us"), ("topk_gather", "topk + gather", "us"), ("part", "ours, part of the other", "")),
)
