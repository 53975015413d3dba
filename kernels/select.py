"""The meaning of `keep`: which entries of some rows stay, by regions and selections, ties included.

Takes rows in position order (`evaluate.Rows`), gives a keep mask and the winners of its selections.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kvcompile.kernels.evaluate import Rows, score, unit_columns
from kvcompile.kernels.plan import ClassPlan, PolicyPlan, Region, Selection, UnitPlan


class Means(Protocol):
    """How scores are computed and winners chosen; a backend may bring its own, with the same meaning."""

    def score(self, term: Selection, rows: Rows, candidates: Tensor, unit: UnitPlan | None) -> Tensor: ...
    def choose(self, term: Selection, rows: Rows, values: Tensor, candidates: Tensor, n: Tensor) -> Tensor: ...


class Plainly:
    """The definition: `evaluate.score` and stable sorts."""

    @staticmethod
    def score(term: Selection, rows: Rows, candidates: Tensor, unit: UnitPlan | None) -> Tensor:
        """float32 [rows, n], meaningless outside `candidates`."""
        return score(term.score, rows, candidates, unit)

    @staticmethod
    def choose(term: Selection, rows: Rows, values: Tensor, candidates: Tensor, n: Tensor) -> Tensor:
        """The winners, bool [rows, n], as the scope says.

        n int64 [rows]: of each row's candidates; where rows compete (`across`), the number of all of them, on each row.
        """
        values = -values if term.rank == "bottom" else values
        if term.scope == "head":
            return best(values, candidates, n)
        if term.scope == "shared":
            # The sharers hold the same entries, so one row's mask stands for all.
            return best(values.mean(0, keepdim=True), candidates[:1], n[:1]).expand_as(candidates)
        return _across(term, rows, values, candidates, n)


def keep_mask(
    plan: PolicyPlan, cls: ClassPlan, rows: Rows, numbers: Tensor, ends: Tensor, means: Means
) -> tuple[Tensor, Tensor]:
    """Decide one class's rows.

    numbers int64 [counts, rows]: the policy's counts for each row; ends bool [rows]: the row's prompt ends
    with this piece. Returns (keep, won), bool [rows, n]: `won` are the winners of selections.
    """
    taken = torch.zeros_like(rows.resident)
    for term in cls.keep:
        if isinstance(term, Region):
            taken |= region_mask(plan, term, rows, numbers)
    won = torch.zeros_like(taken)
    for term in cls.keep:
        if isinstance(term, Selection):
            taken, chosen = _select(plan, term, rows, taken, numbers, ends, means)
            won |= chosen
    return taken & rows.resident, won


def region_mask(plan: PolicyPlan, region: Region, rows: Rows, numbers: Tensor) -> Tensor:
    """Entries of a region, by original position or history, whatever else is resident: bool [rows, n]."""
    pos, now = rows.pos, rows.now[:, None]
    count = torch.zeros_like(now) if region.count is None else numbers[region.count][:, None]
    match region.kind:
        case "all":
            mask = torch.ones_like(rows.resident)
        case "sink":
            mask = pos < count
        case "recent":
            mask = pos > now - count
        case "stride":
            mask = pos % count == 0
        case "prompt":
            mask = pos < rows.prompt[:, None]
        case "generated":
            mask = pos >= rows.prompt[:, None]
        case "frozen":
            mask = rows.frozen
        case "newest":
            assert region.unit is not None
            unit = plan.unit(region.unit)
            mask = (pos - unit.offset).div(unit.size, rounding_mode="floor") == (now - unit.offset).div(
                unit.size, rounding_mode="floor"
            )
        case other:
            raise NotImplementedError(f"region {other}")
    return mask & rows.resident


def _select(
    plan: PolicyPlan, term: Selection, rows: Rows, taken: Tensor, numbers: Tensor, ends: Tensor, means: Means
) -> tuple[Tensor, Tensor]:
    candidates = rows.resident & ~taken
    unit = plan.unit(term.unit) if term.unit else None
    if unit is not None:
        ready = _full(rows, unit, needs_next=reads_next(term, unit))
        taken = taken | (candidates & ~ready)
        candidates &= ready
    together = term.scope == "across" and unit is None
    count = torch.zeros_like(rows.now) if term.count is None else numbers[term.count]
    budget = _group_budget(term, _of_group(candidates.sum(1), together), _of_group(count, together))
    watched = torch.zeros_like(candidates)
    if term.observed:
        # They count within n, so they are winners like the others.
        watched = candidates & ends[:, None] & (rows.pos > (rows.now - term.observed)[:, None])
        candidates &= ~watched
        budget = (budget - _of_group(watched.sum(1), together)).clamp(min=0)
    values = means.score(term, rows, candidates, unit)
    if unit is not None:
        chosen = _per_unit(term, rows, values, candidates, unit, budget)
    else:
        chosen = means.choose(term, rows, values, candidates, budget)
    return taken | watched | chosen, watched | chosen


def _of_group(numbers: Tensor, together: bool) -> Tensor:
    """One number per row, int64 [rows]; of rows that compete, their sum on each row."""
    return numbers.sum().expand_as(numbers) if together else numbers


def _group_budget(term: Selection, candidates: Tensor, budget: Tensor) -> Tensor:
    """A bare fraction is of the group's own `candidates` (how many there are), exact and truncated once."""
    if term.fraction is None:
        return budget
    return candidates * term.fraction.numerator // term.fraction.denominator


def best(values: Tensor, candidates: Tensor, n: Tensor) -> Tensor:
    """The n [rows] highest of each row's candidates; ties to the earlier column, NaN last: bool [rows, columns]."""
    rank = torch.empty(values.shape, dtype=torch.int64, device=values.device)
    columns = torch.arange(values.shape[1], device=values.device).expand_as(rank)
    rank.scatter_(1, _order(values, candidates), columns)
    return candidates & (rank < n[:, None])


def _order(values: Tensor, candidates: Tensor) -> Tensor:
    """Columns from best to worst: real scores first, then NaN, then what is no candidate; stable throughout."""
    broken = values.isnan()
    key = torch.where(candidates & ~broken, values, float("-inf"))
    order = torch.argsort(key, dim=1, descending=True, stable=True)
    place = torch.where(candidates, broken.to(torch.uint8), 2)
    if not bool((place == 1).any()) and bool((key > float("-inf")).sum() == candidates.sum()):
        return order
    return order.gather(1, torch.argsort(place.gather(1, order), dim=1, stable=True))


def _across(term: Selection, rows: Rows, values: Tensor, candidates: Tensor, n: Tensor) -> Tensor:
    """Heads compete for n, the same on each row: floors first, then raw scores; ties to the older, the lower head."""
    floor = n * term.floor.numerator // (term.floor.denominator * len(n))  # of the equal share, truncated once
    safe = best(values, candidates, floor)
    left = int(n[0] - safe.sum())
    order = torch.argsort(rows.pos.flatten(), stable=True)
    open_ = (candidates & ~safe).flatten()[order]
    chosen = best(values.flatten()[order][None], open_[None], torch.tensor([left], device=values.device))[0]
    return safe | torch.zeros_like(open_).scatter(0, order, chosen).reshape(safe.shape)


def _per_unit(
    term: Selection, rows: Rows, values: Tensor, candidates: Tensor, unit: UnitPlan, budget: Tensor
) -> Tensor:
    columns = unit_columns(rows.pos, rows.resident, unit)
    heads, units, size = columns.shape
    flat = columns.reshape(heads, -1)
    there = flat >= 0
    index = flat.clamp(min=0)
    group = (candidates.gather(1, index) & there).reshape(heads * units, size)
    n = _group_budget(term, group.sum(1), budget.repeat_interleave(units))
    values = -values if term.rank == "bottom" else values
    chosen = best(values.gather(1, index).reshape(heads * units, size), group, n).reshape(heads, -1)
    out = torch.zeros(heads, candidates.shape[1] + 1, dtype=torch.bool, device=values.device)
    return out.scatter(1, torch.where(there, index, candidates.shape[1]), chosen)[:, :-1]


def _full(rows: Rows, unit: UnitPlan, needs_next: bool) -> Tensor:
    """Entries whose unit, and the next one where the score reads it, has been seen whole: bool [rows, n]."""
    which = (rows.pos - unit.offset).div(unit.size, rounding_mode="floor")
    last = unit.offset + (which + (2 if needs_next else 1)) * unit.size - 1
    return (which >= 0) & (last <= rows.now[:, None])


def reads_next(term: Selection, unit: UnitPlan) -> bool:
    """Whether a unit can be judged only once the one after it is full."""
    formulas = [term.score, *(expr for _, expr in unit.landmarks)]
    return any(n.op == "field" and str(n.value).startswith("next.") for f in formulas for n in f.walk())
