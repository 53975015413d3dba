"""How many entries a policy keeps, forward by forward, without running it: the one place that counts them.

Takes a plan, a prompt length and a number of steps; gives `Forward`s with totals per group of rows, or walks rows
that already hold something (`Rows`, for what the run time reserves). Guarantees: never less than is really held, and
exactly that where `exact` says so; time is linear in forwards, whatever the prompt's length.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from kvcompile.kernels.plan import ClassPlan, PolicyPlan, Trigger
from kvcompile.passes.counting import Event, State, full_units, ready_units
from kvcompile.passes.decisions import decide, winners
from kvcompile.passes.groups import Group, groups
from kvcompile.passes.limits import holds

# Why counting needs no scores: a region never takes an entry back that it once let go (`sink` and `prompt` never
# change, `recent` and `newest` only move on, from `random` positions only leave), so its members are all still
# resident, and each selection keeps min(n, candidates). Frozen entries were candidates once, so no other region holds
# them. Where that fails (counts that move, rules with different regions over the same rows) the sum is a bound.
# Why a bound can be carried on: a rule never leaves less of a longer row. Only `full(n)` does, and says so.


@dataclass(frozen=True, slots=True)
class Forward:
    """One forward: new and peeked tokens, phase, and the totals of each group over all its rows and layers.

    `peak` is the most that stands in the rows at once: where a piece is inserted before it is judged, all of it.
    `known` says of each group whether that is exact: False from the first forward on whose totals are bounds.
    """

    tokens: int
    peeked: int
    phase: str  # chunk, prefill.end, step
    before: tuple[int, ...]
    peak: tuple[int, ...]
    after: tuple[int, ...]
    known: tuple[bool, ...]

    @property
    def exact(self) -> bool:
        """Of all groups."""
        return all(self.known)


def forwards(plan: PolicyPlan, prompt: int, steps: int) -> Iterator[Forward]:
    """The forwards of one prompt and `steps` decode steps; totals in the order of `groups(plan, prompt)`."""
    rows = [Rows(plan, group, prompt) for group in groups(plan, prompt)]
    size = plan.chunk or prompt
    pieces = [min(size, prompt - start) for start in range(0, prompt, size)] if prompt else []
    for index, tokens in enumerate(pieces):
        last = index + 1 == len(pieces)
        peeked = 0 if last else min(plan.peek, prompt)
        yield _forward(rows, tokens, peeked, "prefill.end" if last else "chunk", 0)
    for step in range(1, steps + 1):
        yield _forward(rows, 1, 0, "step", step)


def _forward(rows: Sequence[Rows], tokens: int, peeked: int, phase: str, step: int) -> Forward:
    before = tuple(row.held * row.group.times for row in rows)
    advance(rows, tokens, phase, step)
    peak = tuple(row.peak * row.group.times for row in rows)
    after = tuple(row.held * row.group.times for row in rows)
    return Forward(tokens, peeked, phase, before, peak, after, tuple(row.exact for row in rows))


def advance(rows: Sequence[Rows], tokens: int, phase: str, step: int) -> None:
    """One forward of all rows of a sequence: first what later layers pick up, then what is kept."""
    for row in rows:
        row.insert(Event(tokens, phase, step))
        row.judge(Event(tokens, phase, step), only_picks=True)
    picks: dict[int, int] = {}
    for row in rows:
        for pick, n in row.picked.items():
            picks[pick] = max(n, picks.get(pick, 0))
    for row in rows:
        row.judge(Event(tokens, phase, step, picks), only_picks=False)
        row.peak = max(row.peak, row.held)


@dataclass(slots=True)
class Rows(State):
    """Rows that are counted as one, with what their rules remember."""

    arrived: dict[int, int] = field(default_factory=dict)  # by rule: entries since it last decided
    judged: dict[tuple[int, str], int] = field(default_factory=dict)  # by rule and unit: units that had their turn
    picked: dict[int, int] = field(default_factory=dict)  # by slot: most positions that a row has put there
    fired: dict[int, list[tuple[Trigger, bool]]] = field(default_factory=dict)  # in this forward; False: in some rows
    doubtful: set[int] = field(default_factory=set)  # rules of which it is not known when they last decided
    peak: int = 0  # most entries at once in the latest forward

    @classmethod
    def holding(
        cls, plan: PolicyPlan, group: Group, prompt: int, seen: int, total: int,
        arrived: Mapping[int, int], judged: Mapping[tuple[int, str], int],
    ) -> Rows:  # fmt: skip
        """Rows that hold `total` entries of `seen` positions already, nobody knows which; any may be frozen."""
        if not seen:
            return cls(plan, group, prompt)
        slots = [term.pick for rule in group.rules for term in plan.classes[rule].selections]
        return cls(
            plan, group, prompt, seen, total, frozen=total, exact=False, even=group.rows == 1, first=seen, lump=total,
            arrived=dict(arrived), judged=dict(judged), picked={pick: seen for pick in slots if pick is not None},
            kept=None,
        )  # fmt: skip

    def insert(self, event: Event) -> None:
        """New entries come in, and may set triggers off.

        A step's stand in the rows before they are judged, a piece's where the rules need it.
        """
        rules = self.group.rules
        self.peak = self.held
        self.total += event.tokens * self.rows
        self.seen += event.tokens
        for rule in rules:
            self.arrived[rule] = self.arrived.get(rule, 0) + event.tokens
            found = [(t, self._fires(rule, t, event)) for t in self.plan.classes[rule].triggers]
            self.fired[rule] = [(t, bool(yes)) for t, yes in found if yes is not False]
        in_place = len(rules) > 1 or any(self.plan.classes[rule].moves or self.plan.spans(rule) for rule in rules)
        if event.phase == "step" or in_place:
            self.peak = self.held

    def judge(self, event: Event, *, only_picks: bool) -> None:
        """The rules that fire decide, one after the other: those that only pick, or those that keep.

        Those that wait for the last layer come after the others.
        """
        for rule in sorted(self.group.rules, key=self.plan.spans):
            cls = self.plan.classes[rule]
            if cls.only_picks != only_picks or cls.keeps_all:
                continue
            # A pick drops nothing, but what a window has left is no candidate either.
            rows = copy.copy(self) if only_picks else self
            if self.reach and self.fired[rule]:
                rows.slide(sure=any(yes for _, yes in self.fired[rule]))
            rows._judge(rule, cls, event)

    def _judge(self, rule: int, cls: ClassPlan, event: Event) -> None:
        fired = [(t, yes) for t, yes in self.fired[rule] if t.kind != "slide"]
        scalars = self.scalars(event)
        said = [(t, yes, True if t.cond is None else holds(t.cond, scalars)) for t, yes in fired]
        hold = [(t, yes and cond is True) for t, yes, cond in said if cond is not False]
        if hold:
            self._decide(cls, event, [] if any(sure for _, sure in hold) else [t for t, _ in hold])
        if any(yes for _, yes in fired):  # whatever its conditions say
            self.arrived[rule] = 0
            for name in {t.unit for t in cls.triggers if t.unit}:
                self.judged[rule, name] = ready_units(cls, self.plan.unit(name), self.seen)
        elif fired:
            self.doubtful.add(rule)

    def _fires(self, rule: int, trigger: Trigger, event: Event) -> bool | None:
        """Whether a trigger fires; None: in some rows it may."""
        n = trigger.n or 0
        match trigger.kind:
            case "chunk":
                return event.phase in ("chunk", "prefill.end")
            case "every":
                return event.phase == "step" and event.step % n == 0
            case "when":
                return True
            case "slide":
                return self.seen >= self.reach and (event.phase != "step" or event.step % n == 0)
            case "full" if self.exact and self.even:
                return self.held >= n * self.rows
            case "full":
                return None if self.held >= n else False
            case "filled" if rule in self.doubtful:
                return None
            case "filled" if trigger.unit is None:
                return self.arrived[rule] >= n
            case "filled":
                assert trigger.unit is not None
                done = self.judged.get((rule, trigger.unit), 0)
                return full_units(self.plan.unit(trigger.unit), self.seen) - done >= n
            case kind:
                return kind == event.phase

    def _decide(self, cls: ClassPlan, event: Event, doubts: list[Trigger]) -> None:
        """A rule decides. doubts: the triggers that may have fired, or whose conditions may hold; none: it does."""
        if cls.only_picks:
            for term, won in winners(self, cls, event):
                if term.pick is not None:
                    most = min(self.seen, won if self.group.competes else -(-won // self.rows))
                    self.picked[term.pick] = max(most, self.picked.get(term.pick, 0)) if doubts else most
            return
        before, units = self.total, list(self.units)
        decide(self, cls, event)
        if doubts:
            # A row that did not decide holds all that it had; had it been full, it would have decided.
            sizes = [t.n for t in doubts if t.kind == "full" and t.cond is None and t.n is not None]
            waits = min(before, self.rows * (min(sizes) - 1)) if len(sizes) == len(doubts) else before
            self.total, self.units = max(self.total, waits), units
            self.exact = self.even = False
