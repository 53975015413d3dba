"""The meaning of `keep`: which entries of some rows stay, by regions and selections, ties included.

Takes rows in position order (`evaluate.Rows`), gives a keep mask and the winners of its selections. An entry
without position (`fold mean`) is kept always, is in no region and competes for nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from kvcompile.kernels.compete import Contest, Place, budget, winners
from kvcompile.kernels.evaluate import score
from kvcompile.kernels.noise import hashed
from kvcompile.kernels.plan import ClassPlan, PolicyPlan, Region, Selection, UnitPlan
from kvcompile.kernels.ranks import Table, table
from kvcompile.kernels.rows import Rows
from kvcompile.kernels.spans import span_mask
from kvcompile.kernels.units import Units, full, of_units, reads_next

__all__ = ["Means", "Place", "Plainly", "keep_mask", "reads_next", "region_mask"]


class Means(Protocol):
    """How scores are computed and winners chosen; a backend may bring its own, with the same meaning."""

    def score(self, term: Selection, rows: Rows, candidates: Tensor, unit: UnitPlan | None) -> Tensor: ...
    def choose(
        self, term: Selection, rows: Rows, values: Tensor, candidates: Tensor, n: Tensor, versus: Contest | None
    ) -> Tensor: ...


class Plainly:
    """The definition: `evaluate.score` and stable sorts."""

    @staticmethod
    def score(term: Selection, rows: Rows, candidates: Tensor, unit: UnitPlan | None) -> Tensor:
        """float32 [rows, n], for `query_head` [rows, group, n]; meaningless outside `candidates`."""
        return score(term.score, rows, candidates, unit, groups=term.scope == "query_head")

    @staticmethod
    def choose(
        term: Selection, rows: Rows, values: Tensor, candidates: Tensor, n: Tensor, versus: Contest | None
    ) -> Tensor:
        """The winners, bool [rows, n].

        n int64 [rows]: of each row's candidates; where rows compete, the number of all of them, on each row.
        """
        return winners(term, versus, values, rows.pos, candidates, n)


def keep_mask(
    plan: PolicyPlan,
    cls: ClassPlan,
    rows: Rows,
    numbers: Tensor,
    ends: Tensor,
    means: Means,
    place: Place | None = None,
) -> tuple[Tensor, Tensor]:
    """Decide one class's rows.

    numbers int64 [counts, rows]: the policy's counts for each row; ends bool [rows]: the row's prompt ends
    with this piece; place: where the rows stand, without it the heads of one layer. Returns (keep, won),
    bool [rows, n]: `won` are the winners of selections. What goes to a slot for later layers is put there.
    """
    place = place or heads_of_a_layer(len(rows.pos))
    taken = torch.zeros_like(rows.resident)
    for term in cls.keep:
        if isinstance(term, Region):
            taken |= region_mask(plan, term, rows, numbers, place)
    won = torch.zeros_like(taken)
    picked: dict[int, Tensor] = {}
    for term in cls.keep:
        if isinstance(term, Selection):
            taken, chosen = _select(plan, term, rows, taken, numbers, ends, means, place)
            won |= chosen
            if term.pick is not None and term.layers != "shared":
                picked[term.pick] = picked[term.pick] | chosen if term.pick in picked else chosen
    for slot, chosen in picked.items():
        place.choose(slot, rows.pos, chosen, list(range(len(rows.pos))))
    return (taken | (rows.pos < 0)) & rows.resident, won


def heads_of_a_layer(heads: int) -> Place:
    """The rows of the first heads of one layer of one sequence."""
    return Place(0, (0,) * heads, tuple(range(heads)), (0,) * heads)


def region_mask(plan: PolicyPlan, region: Region, rows: Rows, numbers: Tensor, place: Place) -> Tensor:
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
            mask = torch.where(count > 0, pos % count.clamp(min=1) == 0, False)
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
        case "own" | "pow2":
            assert region.unit is not None
            mask = _by_distance(region.kind, plan.unit(region.unit), pos, now)
        case "span":
            mask = span_mask(plan, region, pos, rows.now, place)
        case "random":
            mask = _at_random(region, rows, count, place)
        case "picked":
            assert region.pick is not None
            mask = place.chosen(region.pick, pos)
        case other:
            raise NotImplementedError(f"region {other}")
    return mask & rows.resident & (pos >= 0)


def _by_distance(kind: str, unit: UnitPlan, pos: Tensor, query: Tensor) -> Tensor:
    """Entries in the unit of the query, or in units that are 1, 2, 4, 8, ... before it."""
    own, of = ((x - unit.offset).div(unit.size, rounding_mode="floor") for x in (query, pos))
    far = own - of
    return (far == 0) if kind == "own" else (far > 0) & (far & (far - 1) == 0)


def _at_random(region: Region, rows: Rows, count: Tensor, place: Place) -> Tensor:
    """Entries at the `count` positions up to `now` of smallest hash, the older on ties: bool [rows, n].

    Whatever else is resident, so a position that is out stays out only until `now` has grown.
    """
    device = rows.pos.device
    layer, head = (torch.tensor(x, device=device)[:, None] for x in (place.layer, place.head))
    head = head + place.first
    at = torch.arange(int(rows.now.max()) + 1 if len(rows.now) else 0, device=device)[None]

    there = torch.where(at <= rows.now[:, None], random_order(region, layer, head, at), torch.iinfo(torch.int64).max)
    there = there.sort(1).values
    n = count.clamp(max=there.shape[1])
    if not there.shape[1]:
        return torch.zeros_like(rows.resident)
    own = random_order(region, layer, head, rows.pos.clamp(min=0))
    return (own <= there.gather(1, (n - 1).clamp(min=0))) & (n > 0)


def random_order(region: Region, layer: int | Tensor, head: int | Tensor, pos: Tensor) -> Tensor:
    """What a `random` region ranks positions by, int64, no two alike: the smallest stay."""
    return hashed(region.seed, layer, head, pos) << 31 | pos


def _select(
    plan: PolicyPlan,
    term: Selection,
    rows: Rows,
    taken: Tensor,
    numbers: Tensor,
    ends: Tensor,
    means: Means,
    place: Place,
) -> tuple[Tensor, Tensor]:
    """One selection, after `taken` (bool [rows, n]). Returns what is taken now, and the winners."""
    name = term.unit or term.whole
    unit = plan.unit(name) if name else None
    candidates = rows.resident & (rows.pos >= 0) & ~taken
    if unit is not None:
        ready = full(rows, unit, needs_next=reads_next(term, unit))
        taken = taken | (candidates & ~ready)
        candidates &= ready
    watched = torch.zeros_like(candidates)
    if term.observed:
        # They count within n, so they are winners like the others.
        watched = candidates & ends[:, None] & (rows.pos > (rows.now - term.observed)[:, None])
    if term.layers != "shared":
        won = watched | _compete(plan, term, rows, candidates, watched, numbers, means, place)
        return taken | won, won
    assert term.pick is not None
    leads = place.leads(plan, term.sharing)
    joint = _table(plan, term, place)
    won = watched
    if any(leads if joint is None else joint.place(place.cls).leads(plan, term.sharing)):
        own = watched | _compete(plan, term, rows, candidates, watched, numbers, means, place)
        won = torch.where(torch.tensor(leads, device=own.device)[:, None], own, won)
        # Where a leading row does not decide, it keeps all that it has, and so do those that follow it.
        everything = rows.resident & (rows.pos >= 0)
        given = own if place.judged is None else torch.where(place.judged[:, None], own, everything)
        replace(place, judged=None).choose(term.pick, rows.pos, given, [r for r, lead in enumerate(leads) if lead])
    if not all(leads):
        follows = ~torch.tensor(leads, device=won.device)[:, None]
        won = won | (place.chosen(term.pick, rows.pos) & candidates & follows)
    return taken | won, won


def _compete(
    plan: PolicyPlan,
    term: Selection,
    rows: Rows,
    candidates: Tensor,
    watched: Tensor,
    numbers: Tensor,
    means: Means,
    place: Place,
) -> Tensor:
    """The winners among the candidates that are not watched: bool [rows, n]."""
    joint = _table(plan, term, place)
    versus = Contest.of(term, place if joint is None else joint.place(place.cls), rows.pos.device)
    count = torch.zeros_like(rows.now) if term.count is None else numbers[term.count]
    if term.unit is None and term.whole is None:
        open_ = candidates & ~watched
        values = means.score(term, rows, open_, None)
        if joint is None:
            n = _less(budget(term, versus, candidates, count), watched.sum(1), term, versus)
            return means.choose(term, rows, values, open_, n, versus)
        values, age, candidates, watched, count = joint.bring(values, rows.pos, candidates, watched, count, front=True)
        n = _less(budget(term, versus, candidates, count), watched.sum(1), term, versus)
        return joint.mine(winners(term, versus, values, age, candidates & ~watched, n), open_, front=True)
    unit = plan.unit(term.unit or term.whole or "")
    units = Units.of(rows, unit)
    if term.whole is None:
        return _within_units(term, versus, joint, units, rows, candidates, watched, count, means, unit)
    there = mine = units.spread(candidates).any(2)
    used = -(-watched.sum(1) // unit.size)
    candidates = candidates & ~watched
    values = units.of_unit(means.score(replace(term, score=of_units(term.score)), rows, candidates, unit))
    open_ = units.spread(candidates).any(2)
    if joint is not None:
        values, there, open_, used, count = joint.bring(values, there, open_, used, count)
    n = _less(budget(term, versus, there, count), used, term, versus)
    age = torch.arange(open_.shape[1], device=rows.pos.device).expand_as(open_)
    won = winners(term, versus, values, age, open_, n)
    won = won if joint is None else joint.mine(won, mine)
    return units.back(won[:, :, None].expand_as(units.columns)) & candidates


def _table(plan: PolicyPlan, term: Selection, place: Place) -> Table | None:
    """With whom in other processes the rows of a place decide; None: nobody."""
    spans = plan.shard is not None and plan.spans(place.cls)
    layers = plan.class_layers(place.cls) if spans else tuple(dict.fromkeys(place.layer))
    return table(plan, term, place.cls, layers, tuple(dict.fromkeys(place.sequence)))


def _less(n: Tensor, used: Tensor, term: Selection, versus: Contest | None) -> Tensor:
    """What is left of a group's number once what was watched counts within it, int64 [rows]."""
    if not term.observed:
        return n
    return (n - (used if versus is None else versus.total(used))).clamp(min=0)


def _within_units(
    term: Selection,
    versus: Contest | None,
    joint: Table | None,
    units: Units,
    rows: Rows,
    candidates: Tensor,
    watched: Tensor,
    count: Tensor,
    means: Means,
    unit: UnitPlan,
) -> Tensor:
    """Each unit is a contest of its own: its lines are (row, unit) in place of rows."""
    there, seen = units.spread(candidates), units.spread(watched)
    candidates = candidates & ~watched
    values = units.values(means.score(term, rows, candidates, unit))
    if joint is not None:
        values, there, seen, count = joint.bring(values, there, seen, count)
    shape = there.shape
    lines = None if versus is None else versus.by_unit(shape[1])
    values, there, seen = (x.flatten(0, 1) for x in (values, there, seen))
    n = budget(term, lines, there, count.repeat_interleave(shape[1]))
    n = _less(n, seen.sum(1), term, lines)
    there = there & ~seen
    age = torch.arange(unit.size, device=rows.pos.device).expand_as(there)
    won = winners(term, lines, values, age, there, n).view(shape)
    won = won if joint is None else joint.mine(won, units.columns)
    return units.back(won) & candidates
