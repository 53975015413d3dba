"""How many entries each row can hold after a forward, known before it runs: what the pools are sized by.

An upper bound from the plan and the host's counts; the run-time answer to `passes.memory`'s proof.
"""

from __future__ import annotations

import copy

import torch

from kvcompile.cache import KvCache
from kvcompile.kernels.extent import SLACK
from kvcompile.kernels.plan import ClassPlan, PolicyPlan, Region, Selection, UnitPlan
from kvcompile.kernels.select import reads_next
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
        before = [dict(seq.judged) for seq in ahead.each]
        ahead.advance(pieces, fires)
        for layer, b in ((layer, b) for layer in range(plan.facts.layers) for b in range(len(pieces))):
            numbers = counts[layer, :, b].tolist()
            for index in plan.site_classes(layer):
                heads = plan.heads(layer, index)
                held = [lengths[layer][b][h] for h in heads]
                grown = [n + pieces[b].new for n in held]
                if fires[index, b]:
                    judged = {
                        unit: now - before[b].get((c, unit), 0)
                        for (c, unit), now in ahead.each[b].judged.items()
                        if c == index
                    }
                    seq = ahead.each[b]
                    grown = row_bounds(plan, plan.classes[index], held, grown, numbers, judged, seq.seen, seq.prompt)
                for h, bound in zip(heads, grown, strict=True):
                    lengths[layer][b][h] = bound
                    most[layer][b][h] = max(most[layer][b][h], bound)
    for layer, rows in enumerate(most):
        store.reserve(layer, torch.tensor(rows).flatten().tolist())
    if isinstance(store, PagedStore):
        store.commit()


def row_bounds(
    plan: PolicyPlan, cls: ClassPlan, held: list[int], grown: list[int], numbers: list[int], judged: dict[str, int],
    seen: int, prompt: int,
) -> list[int]:  # fmt: skip
    """Bounds for the rows of one class in one layer and sequence, once its trigger has fired.

    held, grown: their entries before the forward and with all it brings; numbers: the policy's counts, evaluated;
    judged: how many units have their turn now; seen, prompt: the logical length and that of the prompt. Where heads
    compete the rows' sum is bounded, not each row: the sum is spread evenly, what a row holds beyond it another lacks.
    """
    if any(t.unit for t in cls.selections):
        # Several selections may all keep of one unit; then nothing is sure to go.
        alone = len(cls.selections) == 1
        return [n - _unit_losers(plan, cls, numbers, judged) for n in grown] if alone else grown
    fixed = [0] * len(held)
    pooled = 0
    for term in cls.keep:
        if isinstance(term, Region):
            bounds = [_region(plan, term, numbers, h, g, seen, prompt) for h, g in zip(held, grown, strict=True)]
        elif term.count is not None:
            bounds = [max(numbers[term.count], term.observed)] * len(held)
        else:
            fraction = term.fraction or 1
            bounds = [max(int(n * fraction) + 1, term.observed) for n in grown]
        if isinstance(term, Selection) and term.scope == "across":
            pooled += sum(bounds)
        else:
            fixed = [a + b for a, b in zip(fixed, bounds, strict=True)]
    if pooled:
        total = min(sum(grown), sum(fixed) + pooled)
        return [-(-total // len(held)) + SLACK] * len(held)  # uneven rows round up unevenly
    return [min(a, b) for a, b in zip(grown, fixed, strict=True)]


def _region(plan: PolicyPlan, region: Region, numbers: list[int], held: int, grown: int, seen: int, prompt: int) -> int:
    count = numbers[region.count] if region.count is not None else 0
    match region.kind:
        case "sink" | "recent":
            return count
        case "frozen":
            return held
        case "newest":
            assert region.unit is not None
            return plan.unit(region.unit).size
        case "stride":
            return seen // count + 1 if count else grown
        case "prompt":
            return prompt
        case "generated":
            return seen - prompt
    return grown


def _unit_losers(plan: PolicyPlan, cls: ClassPlan, numbers: list[int], judged: dict[str, int]) -> int:
    """Entries that a row surely loses: of each unit judged now all but the best and what regions may protect in it."""
    lost = 0
    for term in cls.selections:
        if term.unit is None:
            continue
        unit = plan.unit(term.unit)
        best = numbers[term.count] if term.count is not None else unit.size * (term.fraction or 1)
        lost += judged.get(term.unit, 0) * max(0, unit.size - int(best))
        for region in (t for t in cls.keep if isinstance(t, Region)):
            lost -= _protected(region, unit, numbers, needs_next=reads_next(term, unit))
    return max(0, lost)


def _protected(region: Region, unit: UnitPlan, numbers: list[int], needs_next: bool) -> int:
    if region.kind == "sink" and region.count is not None:
        return max(0, numbers[region.count] - unit.offset)
    if region.kind == "newest":
        return 0 if needs_next else unit.size
    return 0 if region.kind == "frozen" else 1 << 40
