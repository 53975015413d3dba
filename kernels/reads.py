"""What each query reads of what is resident: the meaning of `attend`, query by query.

Takes rows in position order (`gather`) and the triggers that fire; gives `Rows.narrow`, and fills picks and the held
set `@read`. Guarantees: a query reads its own entry, what has no position, and nothing that it could not read anyway;
what a query chooses does not depend on how the prompt was cut, unless its score reads other queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kvcompile.kernels.compete import Contest, Place, budget, in_query_heads, winners
from kvcompile.kernels.evaluate import FORWARD, score
from kvcompile.kernels.formulas import sources_of
from kvcompile.kernels.gather import Fresh, with_queries
from kvcompile.kernels.judge import fired, numbers_of_terms
from kvcompile.kernels.layout import Clock, Site
from kvcompile.kernels.plan import PolicyPlan, QuerySource, ReadPlan, ReadRule, Region, Selection
from kvcompile.kernels.rows import Queries, Rows, readable_by
from kvcompile.kernels.select import region_mask
from kvcompile.kernels.spans import all_without
from kvcompile.kernels.units import Units, full, of_units, reads_next

OWN = QuerySource("own")
HELD = "@read"  # the hidden state: which query heads of its KV head go on reading an entry, as bits


def holds_sets(plan: PolicyPlan) -> bool:
    """Whether some rows go on with the set of an earlier forward."""
    return any(read.holds for read in plan.reads)


def narrows(plan: PolicyPlan, site: Site) -> bool:
    """Whether some rule of a layer's rows narrows them in this forward, for some sequence, or did for a held set."""
    if not plan.reads:  # asked for in every layer of every step
        return False
    here = set(plan.reading(int(site.layer))) - {-1}
    if not here:
        return False
    if any(plan.reads[index].holds for index in here):
        return True
    rules = [(line, rule) for line, index, rule in rules_of(plan) if index in here and rule.narrows]
    always = any(not rule.triggers and not all_without(rule) for _, rule in rules)
    return always or any(bool(site.fires[line].any()) for line, _ in rules)


def rules_of(plan: PolicyPlan) -> Iterator[tuple[int, int, ReadRule]]:
    """Every rule as (line of `Site.fires`, index of its `ReadPlan`, rule)."""
    line = len(plan.classes)
    for index, read in enumerate(plan.reads):
        for rule in read.rules:
            yield line, index, rule
            line += 1


def chooses_once(term: Selection) -> bool:
    """Whether a selection is made once in a forward for all of its queries: its score is of some of them together."""
    return any(source.kind in ("forward", "sample", "last") for source in sources_of([term.score]))


def with_reads(
    plan: PolicyPlan, site: Site, sequences: list[int], heads: list[int], rows: Rows, fresh: Fresh | None
) -> Rows:
    """Rows of sequences that are equally far, with what this forward's queries read of them as `Rows.narrow`."""
    reading = plan.reading(int(site.layer))
    if all(reading[h] < 0 for h in heads):
        return rows
    return replace(rows, narrow=Reads.of(plan, site, sequences, heads, rows, fresh))


@dataclass(frozen=True)
class Reads:
    """The sets of a layer's rows in one forward. reading: by row, the index of its `ReadPlan` or -1; fires: by rule,
    bool [rows]; numbers int64 [counts, rows]; once: what rules chose for all queries, by (line, term), bool
    [rows, group or 1, n]; forward: all queries of the forward, where a trained gate asks for them."""

    plan: PolicyPlan
    place: Place
    reading: list[int]
    numbers: dict[int, Tensor]
    fires: dict[int, Tensor]
    step: bool
    forward: Queries | None = None
    once: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls, plan: PolicyPlan, site: Site, sequences: list[int], heads: list[int], rows: Rows, fresh: Fresh | None
    ) -> Reads:
        of_layer = plan.reading(int(site.layer))
        reading = [of_layer[h] for _ in sequences for h in heads]
        fires, numbers = {}, {}
        for line, index, rule in rules_of(plan):
            if index not in reading:
                continue
            numbers[line] = numbers_of_terms(plan, rule.terms, site, sequences, heads, rows)
            conds = [t.cond for t in rule.triggers if t.cond is not None]
            asked = with_queries(plan, site, sequences, heads, rows, sources_of(conds), fresh)
            bits = site.fires[line, sequences].repeat_interleave(len(heads)).long()
            everyone = torch.ones_like(bits, dtype=torch.bool)
            fires[line] = fired(rule.triggers, bits, asked) if rule.triggers else everyone
            if not rule.triggers and all_without(rule):  # the host knows whose tokens are in no stretch
                fires[line] = bits != 0
        count = len(sequences) * len(heads)
        who = tuple(heads) * len(sequences), tuple(b for b in sequences for _ in heads)
        place = Place(0, (int(site.layer),) * count, *who, site.picked, None, plan.first_head, site.segment, site.links)
        known = cls(plan, place, reading, numbers, fires, fresh is None and _steps(site, sequences))
        gates = any(n.op == "learned" for _, _, rule in rules_of(plan) for t in rule.selections for n in t.score.walk())
        if gates and fresh is not None:
            found = with_queries(plan, site, sequences, heads, rows, {FORWARD}, fresh).queries
            known = replace(known, forward=(found or {})[FORWARD])
        for line, index, rule in rules_of(plan):
            if line in fires and bool(fires[line].any()) and any(map(chooses_once, rule.selections)):
                for b in sequences:
                    lines = [i for i, r in enumerate(reading) if r == index and who[1][i] == b]
                    known._choose_once(site, sequences, heads, line, rule, rows, lines, fresh)
        return known

    def __call__(self, rows: Rows, queries: Queries) -> Tensor:
        """What each query reads: bool [rows, group, q, n]."""
        group = self.plan.facts.group
        out = readable_by(rows, queries.pos)[:, None].repeat(1, group, 1, 1)
        kinds: dict[tuple[int, int], list[int]] = {}
        for i, row in enumerate(_index(rows).tolist()):
            kinds.setdefault((self.place.sequence[row], self.reading[row]), []).append(i)
        for (_, index), lines in kinds.items():
            if index >= 0:
                part = Queries(queries.q[lines], queries.pos[lines])
                out[lines] &= self._read(index, self.plan.reads[index], rows.some(lines), part)
        return out

    def _read(self, index: int, read: ReadPlan, rows: Rows, queries: Queries) -> Tensor:
        group, at = self.plan.facts.group, _index(rows)
        out = torch.ones(len(at), group, queries.pos.shape[1], rows.pos.shape[1], dtype=torch.bool, device=at.device)
        if self.step and read.holds:
            out &= _bits(rows.state[HELD], group)[:, :, None]
        for line, owner, rule in rules_of(self.plan):
            if owner == index and rule.pick is None and bool(self.fires[line][at].any()):
                chosen = torch.stack(
                    [self._set(line, rule, one).expand(-1, group, -1) for one in self._each(rows, queries)], 2
                )
                out = torch.where(self.fires[line][at][:, None, None, None], chosen, out)
        own = rows.pos[:, None] == queries.pos[:, :, None]
        return out | (own | (rows.pos < 0)[:, None])[:, None]

    def _each(self, rows: Rows, queries: Queries) -> Iterator[Rows]:
        """The rows as each query sees them."""
        for j in range(queries.pos.shape[1]):
            at = queries.pos[:, j]
            this = Queries(queries.q[:, :, j : j + 1], at[:, None])
            forward = this if self.forward is None else self.forward
            if self.forward is not None:
                lines = _index(rows)
                forward = Queries(self.forward.q[lines], self.forward.pos[lines])
            seen = readable_by(rows, at[:, None])[:, 0] & (rows.pos >= 0)
            yield replace(
                rows, now=at, resident=seen, queries={OWN: this, FORWARD: forward}, asking=True, narrow=None, attn=None
            )

    # -- the set of one query ------------------------------------------------------------------------------------

    def _set(self, line: int, rule: ReadRule, rows: Rows) -> Tensor:
        """Regions and selections of a rule, for the query of these rows: bool [rows, group or 1, n]."""
        at = _index(rows)
        numbers, place = self.numbers[line][:, at], self._place(at)
        taken = torch.zeros_like(rows.resident)[:, None]
        for term in rule.terms:
            if isinstance(term, Region):
                taken = taken | self._region(term, rows, numbers, place)
        for i, term in enumerate(rule.terms):
            if isinstance(term, Selection) and (line, i) in self.once:
                taken = taken | self.once[line, i][at][:, :, : rows.pos.shape[1]]
                taken = taken | _waiting(self.plan, term, rows)[:, None]  # of this query, not of the newest one
        for i, term in enumerate(rule.terms):
            if isinstance(term, Selection) and (line, i) not in self.once:
                taken = taken | _chosen(self.plan, term, rows, taken, numbers, place)
        return taken

    def _region(self, term: Region, rows: Rows, numbers: Tensor, place: Place) -> Tensor:
        if term.kind != "picked":
            return region_mask(self.plan, term, rows, numbers, place)[:, None]
        assert term.pick is not None
        marks = place.marks(term.pick, rows.pos)
        return _bits(marks, self.plan.facts.group) & rows.resident[:, None]

    def _place(self, at: Tensor) -> Place:
        rows, place = at.tolist(), self.place
        layer, head, of = (tuple(x[i] for i in rows) for x in (place.layer, place.head, place.sequence))
        return replace(place, layer=layer, head=head, sequence=of)

    # -- sets of all queries together ----------------------------------------------------------------------------

    def _choose_once(
        self, site: Site, sequences: list[int], heads: list[int], line: int, rule: ReadRule, rows: Rows,
        lines: list[int], fresh: Fresh | None,
    ) -> None:  # fmt: skip
        """Selections by scores of several queries: among all that is resident, as the newest token finds it."""
        sources = sources_of([t.score for t in rule.selections if chooses_once(t)])
        asked = with_queries(self.plan, site, sequences, heads, rows, sources, fresh).some(lines)
        asked = replace(asked, asking=True)
        numbers, place = self.numbers[line][:, lines], self._place(torch.tensor(lines))
        taken = torch.zeros_like(asked.resident)[:, None]
        for term in rule.terms:
            if isinstance(term, Region):
                taken = taken | self._region(term, asked, numbers, place)
        for i, term in enumerate(rule.terms):
            if isinstance(term, Selection) and chooses_once(term):
                found = _chosen(self.plan, term, asked, taken, numbers, place)
                taken = taken | found
                everyone = self.once.setdefault((line, i), found.new_zeros(len(rows.pos), *found.shape[1:]))
                everyone[lines] = found


def _steps(site: Site, sequences: list[int]) -> bool:
    """Whether these sequences are in a step; those of a call are equally far."""
    return bool(site.clock[sequences[0], Clock.STEP] > 0)


def _index(rows: Rows) -> Tensor:
    assert rows.index is not None
    return rows.index


def _bits(values: Tensor, group: int) -> Tensor:
    """Numbers [rows, n] as bits: bool [rows, group, n]."""
    heads = torch.arange(group, device=values.device)
    return (values.long()[:, None] >> heads[:, None] & 1) != 0


def _number(mask: Tensor) -> Tensor:
    """bool [rows, group, n] as numbers, int64 [rows, n]: bit g for query head g."""
    return (mask.long() << torch.arange(mask.shape[1], device=mask.device)[:, None]).sum(1)


def _chosen(plan: PolicyPlan, term: Selection, rows: Rows, taken: Tensor, numbers: Tensor, place: Place) -> Tensor:
    """What a selection adds, bool [rows, group or 1, n]: its winners, and entries of units that are not full."""
    if taken.shape[1] == 1:
        return _won(plan, term, rows, rows.resident & (rows.pos >= 0) & ~taken[:, 0], numbers, place)
    # Query heads differ in what they have taken before, so each has candidates of its own.
    each = [
        _won(plan, term, rows, rows.resident & (rows.pos >= 0) & ~taken[:, g], numbers, place)
        for g in range(taken.shape[1])
    ]
    return torch.stack([won[:, min(g, won.shape[1] - 1)] for g, won in enumerate(each)], 1)


def _waiting(plan: PolicyPlan, term: Selection, rows: Rows) -> Tensor:
    """What is no candidate because its unit is not full yet, bool [rows, n]."""
    name = term.unit or term.whole
    there = rows.resident & (rows.pos >= 0)
    return there & ~full(rows, plan.unit(name), reads_next(term, plan.unit(name))) if name else torch.zeros_like(there)


def _won(plan: PolicyPlan, term: Selection, rows: Rows, candidates: Tensor, numbers: Tensor, place: Place) -> Tensor:
    name = term.unit or term.whole
    unit = plan.unit(name) if name else None
    waiting = candidates & _waiting(plan, term, rows)
    candidates = candidates & ~waiting
    heads = term.scope == "query_head"
    count = torch.zeros_like(rows.now) if term.count is None else numbers[term.count]
    contest = None if heads else Contest.of(term, place, rows.pos.device)
    if unit is None:
        values = score(term.score, rows, candidates, None, groups=heads)
        won = _compete(term, contest, values, rows.pos, candidates, count)
        return won | waiting[:, None]
    units = Units.of(rows, unit)
    if term.whole is None:
        values = units.values(score(term.score, rows, candidates, unit, groups=heads))
        there = units.spread(candidates)
        won = _within(term, contest, values, there, count)
        spread = torch.stack([units.back(won[:, g]) for g in range(won.shape[1])], 1)
    else:
        judged = replace(term, score=of_units(term.score))
        values = units.of_unit(score(judged.score, rows, candidates, unit, groups=heads))
        there = units.spread(candidates).any(2)
        age = torch.arange(there.shape[1], device=there.device).expand_as(there)
        won = _compete(term, contest, values, age, there, count)
        spread = torch.stack([units.back(won[:, g, :, None].expand_as(units.columns)) for g in range(won.shape[1])], 1)
    return (spread & candidates[:, None]) | waiting[:, None]


def _compete(
    term: Selection, contest: Contest | None, values: Tensor, age: Tensor, candidates: Tensor, count: Tensor
) -> Tensor:
    """Winners [rows, group or 1, contestants]; values [rows, contestants] or [rows, group, contestants]."""
    n = budget(term, contest, candidates, count)
    if values.ndim == 3:
        return in_query_heads(term, values, candidates, n)
    return winners(term, contest, values, age, candidates, n)[:, None]


def _within(term: Selection, contest: Contest | None, values: Tensor, there: Tensor, count: Tensor) -> Tensor:
    """Each unit a contest of its own: values [rows, units, size], there bool alike; [rows, 1, units, size]."""
    shape = there.shape
    lines = None if contest is None else contest.by_unit(shape[1])
    flat, mask = values.flatten(0, 1), there.flatten(0, 1)
    n = budget(term, lines, mask, count.repeat_interleave(shape[1]))
    age = torch.arange(shape[2], device=there.device).expand_as(mask)
    return winners(term, lines, flat, age, mask, n).view(shape)[:, None]


# -- what stays of a read ------------------------------------------------------------------------------------------


def fill_picks(plan: PolicyPlan, rows: Rows, queries: Queries) -> None:
    """Put what this layer's rows pick into slots, before they read: of the newest query, or of all together."""
    known = rows.narrow
    if not isinstance(known, Reads):
        return
    newest = Queries(queries.q[:, :, -1:], queries.pos[:, -1:])
    for line, index, rule in rules_of(plan):
        lines = [i for i, r in enumerate(known.reading) if r == index]
        if rule.pick is None or not lines or not bool(known.fires[line][lines].any()):
            continue
        part = Queries(newest.q[lines], newest.pos[lines])
        (one,) = known._each(rows.some(lines), part)
        chosen = known._set(line, rule, one).expand(-1, plan.facts.group, -1)
        known._place(_index(one)).mark(rule.pick, rows.pos[lines], _number(chosen), known.fires[line][lines])


def held_set(plan: PolicyPlan, rows: Rows, newest: Queries) -> Tensor:
    """What steps go on with after this forward, float32 [rows, n]: the set of the newest query where a rule fired."""
    everything = torch.full_like(rows.state[HELD], float((1 << plan.facts.group) - 1))
    known = rows.narrow
    if not isinstance(known, Reads):
        return everything
    fires = torch.zeros(len(rows.pos), dtype=torch.bool, device=rows.pos.device)
    for line, index, rule in rules_of(plan):
        if rule.pick is None and line in known.fires:
            fires |= known.fires[line] & torch.tensor([r == index for r in known.reading], device=fires.device)
    if not bool(fires.any()):
        return rows.state[HELD] if known.step else everything
    found = _number(known(rows, newest)[:, :, 0]).float()
    return torch.where(fires[:, None], found, rows.state[HELD] if known.step else everything)
