"""Narrowed reads: a step over chosen pages against one over all, and a prompt by chosen blocks against SDPA."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import peers
import torch
from measuring import Bench, Cell, Figures, Part
from rows import Rows, a_prompt, facts_of
from torch import Tensor

from kvcompile.kernels.marks import layout_of
from kvcompile.kernels.triton_backend.reads import PieceReading, Reading
from kvcompile.sequences import Piece, Sequences

PAGES = """
policy pages(page=16, budget=1024):
    unit page(page) with lo = min[i] k, hi = max[i] k
    score s = sum[d] max(q * lo, q * hi)
    attend newest page | top(budget / page) pages by s per query_head
    at step
"""
BLOCKS = """
policy blocks(size=128, n=8):
    unit block(size) with c = mean[i] k
    attend own block | top(n) blocks by dot(q, c) per query_head
    at chunk, step
"""
STEPS = {
    "full": ((32768, 8), (65536, 1), (65536, 8), (65536, 16), (131072, 8)),
    "quick": ((65536, 8),),
    "dry": ((100, 2),),
}
PROMPTS = {
    "full": ((16384, 90), (65536, 50), (65536, 80), (65536, 90), (65536, 95)),
    "quick": ((65536, 90),),
    "dry": ((96, 50),),
}


def step_cells(size: str) -> list[Cell]:
    """Entries of a row and sequences."""
    return [{"entries": entries, "batch": batch} for entries, batch in STEPS[size]]


def prompt_cells(size: str) -> list[Cell]:
    """Tokens of the prompt and per cent of the causal pairs that are not read."""
    return [{"tokens": tokens, "sparse": sparse} for tokens, sparse in PROMPTS[size]]


def site_of(rows: Rows, tokens: int, piece: Piece, seen: int) -> Any:
    """The tensors of `layout.Site` that a read takes, over the rows' pools; `seen` tokens came before the forward."""
    plan, device, layout = rows.plan, rows.bench.device, layout_of(rows.plan)
    sequences = Sequences(plan, rows.batch)
    for each in sequences.each:
        each.seen, each.prompt, each.prefilled = seen, max(seen, tokens), piece.step
    clock, counts = sequences.numbers([piece] * rows.batch)
    fires = torch.tensor(sequences.fires([piece] * rows.batch, None), dtype=torch.uint8)
    kept = layout.count, rows.batch, layout.blocks(tokens + 1)
    dtype = getattr(torch, str(layout.dtype).removeprefix("torch."))
    pools = {
        name: getattr(rows, name) for name in ("k", "v", "pos", "frozen", "state", "table", "length", "free", "top")
    }
    return SimpleNamespace(
        **pools,
        layer=rows.layer,
        batch=rows.batch,
        clock=clock.to(device),
        counts=counts.to(device),
        fires=fires.to(device),
        marks=torch.zeros(*kept, layout.width, dtype=dtype, device=device),
        edges=torch.zeros(*kept, layout.edges, 2, dtype=torch.int32, device=device),
        marked=torch.zeros(*kept[:2], len(layout.kinds), dtype=torch.int32, device=device),
    )


def measure_step(bench: Bench, cell: Cell) -> Figures:
    """Microseconds of one layer's step. moved: bytes that choosing and reading move at most, as a part of all."""
    entries, batch = cell["entries"], cell["batch"]
    facts = facts_of(bench)
    many = batch * facts.kv_heads
    params = {"page": 4, "budget": 8} if bench.dry else {}
    dense = Rows(bench, "keep_all", [entries] * many, batch)
    figures: Figures = {"mib": dense.bytes / (1 << 20)}
    step, q, k, v = dense.decode()
    bench.attempt(
        figures, "dense", lambda: bench.seconds(lambda: dense.decode_once(step, q, k, v), dense.put_back) * 1e6
    )
    rows = Rows(bench, PAGES, [entries] * many, batch, **params)
    site = site_of(rows, entries, Piece(1, step=True), entries)
    capacity = 1 << (rows.table.shape[1] * rows.plan.page - 1).bit_length()
    reading = Reading.prepare(rows.plan, site, capacity)
    once = lambda: reading(site, q, k, v, facts.head_dim**-0.5)  # noqa: E731
    bench.attempt(figures, "pages", lambda: bench.seconds(once, rows.put_back) * 1e6)
    read = (params or {"budget": 1024})["budget"] * facts.group
    landmarks = site.marks.numel() * site.marks.element_size()
    figures["moved"] = (landmarks + many * min(read, entries) * facts.entry_bytes) / rows.bytes
    known = figures["dense"] is not None and figures["pages"]
    figures["over_dense"] = figures["dense"] / figures["pages"] if known else None
    return figures


def measure_prompt(bench: Bench, cell: Cell) -> Figures:
    """Milliseconds of each contestant. live: pairs that are read, as a part of the causal ones."""
    tokens, facts = cell["tokens"], facts_of(bench)
    size = 16 if bench.dry else 128
    sides = tokens // size
    n = max(1, round((100 - cell["sparse"]) / 100 * sides / 2))
    rows, k, v = a_prompt(bench, BLOCKS, tokens, size=size, n=n)
    site = site_of(rows, tokens, Piece(tokens, ends=True), 0)
    # Queries of a block ask alike, so that what is sparse for each of them is sparse for their block.
    q = bench.noise(1, facts.q_heads, sides, facts.head_dim).repeat_interleave(size, 2)
    piece = PieceReading.prepare(rows.plan, site, tokens)
    ours = lambda: piece(site, q, k, v, facts.head_dim**-0.5)  # noqa: E731
    bits = torch.cat([lists["bits"].clone() for lists in piece.choose(site, q, k)], 2)[:, :, :tokens]
    reads = chosen(bits, facts.q_heads, size, sides)
    live = int(reads.sum()) * size * size - facts.q_heads * sides * size * (size - 1) // 2
    figures: Figures = {"live": live / (facts.q_heads * tokens * (tokens + 1) // 2)}

    def again() -> None:  # a prompt that has just come in has no landmarks
        site.marked.zero_()

    bench.attempt(figures, "ours", lambda: bench.seconds(ours, again) * 1e3)
    bench.attempt(
        figures, "choice", lambda: bench.seconds(lambda: deque(piece.choose(site, q, k), maxlen=0), again) * 1e3
    )
    peers.of_a_prompt(bench, figures, ours, q, k, v, lambda: peers.flex_blocks(bench, q, k, v, reads, size))
    return figures


def chosen(bits: Tensor, heads: int, size: int, sides: int) -> Tensor:
    """Which blocks a block of queries reads, its own among them: bool [Hq, sides, sides], from bits of each query."""
    words = bits.reshape(heads, -1, bits.shape[-1])[:, ::size]  # of the first query of each block
    units = torch.arange(sides, device=bits.device)
    named = (words[:, :, units // 32] >> (units % 32) & 1) != 0
    own, older = units[None] == units[:, None], units[None] < units[:, None]
    return (named & older) | own


PAGED = Part(
    "pages",
    "A step that reads chosen pages",
    "One layer of one step, Llama-3.1-8B's heads (32 on 8, 128), bf16, Quest's choice: pages of 16 by the bounds of "
    "their keys, 1024 tokens for each query head. dense: the same step over all entries. pages: landmarks, choice and "
    "read together. moved: bytes of landmarks and of what is read if no two query heads agree, as a part of all.",
    step_cells,
    measure_step,
    (
        ("mib", "keys and values", "MiB"),
        ("moved", "bytes moved, at most", ""),
        ("dense", "dense", "us"),
        ("pages", "pages", "us"),
        ("over_dense", "times faster than dense", ""),
    ),
)
BLOCKED = Part(
    "blocks",
    "A prompt that reads chosen blocks",
    "One layer, one sequence, Llama-3.1-8B's heads, bf16; each query head reads its own block of 128 and the best by "
    "their mean key; queries of a block ask alike. ours: landmarks, choice and read together; choice: the first two. "
    "SDPA reads every head densely; FlexAttention has the same blocks as a mask that is made beforehand.",
    prompt_cells,
    measure_prompt,
    (
        ("live", "live", ""),
        ("ours", "ours", "ms"),
        ("choice", "choice", "ms"),
        ("flash", "SDPA flash, dense", "ms"),
        ("cudnn", "SDPA cuDNN, dense", "ms"),
        ("flex", "Flex, same blocks", "ms"),
        ("over_dense", "times faster than the better SDPA", ""),
        ("error", "error against Flex", ""),
    ),
)
