"""How many entries each row can hold during a prefill, known before it runs: what the pools are sized by.

The bounds are those of `passes.residents`, walked from what the rows hold now.
"""

from __future__ import annotations

import torch

from kvcompile.cache import KvCache
from kvcompile.kernels.extent import SLACK
from kvcompile.kernels.plan import PolicyPlan
from kvcompile.passes.groups import Group, groups
from kvcompile.passes.residents import Rows, advance
from kvcompile.sequences import Piece, Progress
from kvcompile.store import PagedStore


def reserve_prefill(cache: KvCache, forwards: list[list[Piece]]) -> None:
    """Make room for a whole prefill before its first piece, so that no pool grows between pieces.

    forwards: what each forward brings to each sequence.
    """
    plan, store = cache.plan, cache.store
    lengths: list[list[list[int]]] = store.lengths().tolist()
    for b, seq in enumerate(cache.sequences.each):
        pieces = [some[b] for some in forwards if some[b].new]
        if pieces:
            most = most_entries(plan, seq, [layer[b] for layer in lengths], pieces)
            for layer, rows in enumerate(most):
                lengths[layer][b] = rows
    for layer, by_sequence in enumerate(lengths):
        store.reserve(layer, torch.tensor(by_sequence).flatten().tolist())
    if isinstance(store, PagedStore):
        store.commit()


def most_entries(plan: PolicyPlan, seq: Progress, lengths: list[list[int]], pieces: list[Piece]) -> list[list[int]]:
    """The most that each row of a sequence holds at a time while these pieces come in, [layer][KV head].

    lengths: entries before, [layer][KV head]. Of rows that compete the sum is bounded, not each row: it is spread
    evenly, what one holds beyond that another lacks. Where layers compete, each may come to hold what all may.
    """
    parts = groups(plan, seq.prompt)
    walks: dict[tuple[Group, int], Rows] = {}
    for group in parts:
        for start in {sum(lengths[layer][h] for layer, h in rows) for rows in _counted(plan, group)}:
            walks[group, start] = Rows.holding(plan, group, seq.prompt, seq.seen, start, seq.since, seq.judged)
    most = {key: key[1] for key in walks}
    for piece in pieces:
        advance(list(walks.values()), piece.new, "prefill.end" if piece.ends else "chunk", 0)
        most = {key: max(n, walks[key].peak) for key, n in most.items()}
    seen = seq.seen + sum(piece.new for piece in pieces)
    out = [list(layer) for layer in lengths]
    for group in parts:
        for rows in _counted(plan, group):
            total = most[group, sum(lengths[layer][h] for layer, h in rows)]
            for layer in {layer for layer, _ in rows}:
                heads = [h for at, h in rows if at == layer]
                here = min(total, len(heads) * (seen + 1)) if group.pooled else total
                for h in heads:
                    out[layer][h] = -(-here // len(heads)) + SLACK * group.competes  # uneven rows round up unevenly
    return out


def _counted(plan: PolicyPlan, group: Group) -> list[list[tuple[int, int]]]:
    """The (layer, KV head) pairs that are counted as one."""
    by_layer = [[(layer, h) for h in plan.heads(layer, group.rules[0])] for layer in group.layers]
    if group.pooled:
        return [[pair for layer in by_layer for pair in layer]]
    return by_layer if group.competes else [[pair] for layer in by_layer for pair in layer]
