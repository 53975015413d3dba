"""How many entries each row can hold after a forward, known before it runs: what the pools are sized by.

An upper bound from the plan and the host's counts; the run-time answer to `passes.memory`'s proof.
"""

from __future__ import annotations

import copy

import torch

from kvcompile.cache import KvCache
from kvcompile.kernels.extent import SLACK
from kvcompile.kernels.plan import ClassPlan, PolicyPlan, Region, Selection
from kvcompile.sequences import Piece
from kvcompile.store import PagedStore


def reserve_prefill(cache: KvCache, forwards: list[list[Piece]]) -> None:
    """Make room for a whole prefill before its first piece, so that no pool grows between pieces.

    forwards: what each forward brings to each sequence. Walks them ahead on a copy of the host's account.
    """
    plan, store = cache.plan, cache.store
    ahead = cache.sequences.ahead()
    lengths = store.lengths().tolist()
    most = copy.deepcopy(lengths)
    for pieces in forwards:
        _, counts = ahead.numbers(pieces)
        fires = ahead.fires(pieces, None)
        for layer, b in ((layer, b) for layer in range(plan.facts.layers) for b in range(len(pieces))):
            numbers = counts[layer, :, b].tolist()
            for cls in plan.site_classes(layer):
                heads = plan.heads(layer, cls)
                held = [lengths[layer][b][h] for h in heads]
                bounds = row_bounds(plan, plan.classes[cls], held, pieces[b].new, bool(fires[cls, b]), numbers)
                for h, bound in zip(heads, bounds, strict=True):
                    lengths[layer][b][h] = bound
                    most[layer][b][h] = max(most[layer][b][h], bound)
        ahead.advance(pieces, fires)
    for layer, rows in enumerate(most):
        store.reserve(layer, torch.tensor(rows).flatten().tolist())
    if isinstance(store, PagedStore):
        store.commit()


def row_bounds(
    plan: PolicyPlan, cls: ClassPlan, lengths: list[int], new: int, fires: bool, numbers: list[int]
) -> list[int]:
    """Bounds for the rows of one class in one layer and sequence.

    lengths: their entries now; new: tokens that this forward brings; numbers: the policy's counts, evaluated.
    Where heads compete the rows' sum is bounded, not each row: the sum is spread evenly, what a row holds
    beyond it another lacks.
    """
    grown = [n + new for n in lengths]
    if not fires:
        return grown
    fixed = [0] * len(lengths)
    pooled = 0
    for term in cls.keep:
        bound = _region(plan, term, numbers) if isinstance(term, Region) else _selection(plan, term, numbers, new)
        if bound is None:
            return grown
        if isinstance(term, Region) and term.kind == "frozen":
            fixed = [a + b for a, b in zip(fixed, lengths, strict=True)]
        elif isinstance(term, Selection) and term.scope == "across":
            pooled += bound * len(lengths)
        else:
            fixed = [a + bound for a in fixed]
    if pooled:
        total = min(sum(grown), sum(fixed) + pooled)
        return [-(-total // len(lengths)) + SLACK] * len(lengths)  # uneven rows round up unevenly
    return [min(a, b) for a, b in zip(grown, fixed, strict=True)]


def _region(plan: PolicyPlan, region: Region, numbers: list[int]) -> int | None:
    if region.kind in ("sink", "recent"):
        assert region.count is not None
        return numbers[region.count]
    if region.kind == "newest":
        assert region.unit is not None
        return plan.unit(region.unit).size
    return 0 if region.kind == "frozen" else None


def _selection(plan: PolicyPlan, term: Selection, numbers: list[int], new: int) -> int | None:
    if term.unit is None:
        return None if term.count is None else numbers[term.count]
    size = plan.unit(term.unit).size
    best = numbers[term.count] if term.count is not None else size * term.fraction if term.fraction else size
    # Units judged now, and the two newest, which are no candidates yet.
    return int(best) * (new // size + 2) + 2 * size
