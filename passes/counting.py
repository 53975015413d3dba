"""The rows that are counted together, and the numbers that their rules read.

Takes a group of rows and what has happened to them; gives counts and lengths. Guarantees: a number is exact where
`certain` says so, else never too small; None where there is no bound.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kvcompile.kernels.counts import count_value, scalars_of
from kvcompile.kernels.plan import ClassPlan, PolicyPlan, Region, Selection, UnitPlan
from kvcompile.passes.covers import Cover
from kvcompile.passes.groups import Group, Member
from kvcompile.passes.limits import is_len, measured_in, shape, summed


@dataclass(frozen=True, slots=True)
class Event:
    """One forward: tokens, phase (chunk, prefill.end, step), steps since the prompt, and what slots hold at most."""

    tokens: int
    phase: str
    step: int
    picks: dict[int, int] = field(default_factory=dict)


@dataclass(slots=True)
class State:
    """What is known of a group's rows. Numbers of entries are totals over `group.rows` rows, positions are per row."""

    plan: PolicyPlan
    group: Group
    prompt: int
    seen: int = 0  # tokens so far: now + 1
    total: int = 0  # entries, without those that `fold mean` has made
    folded: int = 0  # entries without position
    frozen: int = 0
    exact: bool = True  # the total is no bound
    even: bool = True  # all rows are equally long
    units: list[tuple[int, int]] = field(default_factory=list)  # residents and frozen ones of each unit, per row
    first: int = 0  # positions below are not told apart: they were there before counting began
    lump: int = 0  # entries at them
    low: int = 0  # positions below have left a sliding window, and are gone
    kept: tuple[tuple[int, Cover], ...] | None = ()  # which positions below `kept_at` so many rows hold; None: unknown
    kept_at: int = 0  # from here on they hold all
    _known: dict[tuple[object, ...], int] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return self.group.rows

    @property
    def held(self) -> int:
        return self.total + self.folded

    @property
    def intact(self) -> bool:
        """Whether nothing was ever dropped, but for what a sliding window has left."""
        return self.exact and self.total == self.rows * (self.seen - self.low)

    @property
    def reach(self) -> int:
        """The sliding window of these rows' layers; 0: none."""
        return self.plan.facts.reach(self.group.layers[0])

    @property
    def uniform(self) -> bool:
        """Whether every layer that is counted here counts with the same numbers."""
        return len(set(self.group.members)) == 1

    @property
    def keeping(self) -> list[ClassPlan]:
        """The rules that drop something."""
        rules = [self.plan.classes[rule] for rule in self.group.rules]
        return [cls for cls in rules if not cls.only_picks and not cls.keeps_all]

    def slide(self, *, sure: bool) -> None:
        """What no later query can read goes: exactly, where the positions of entries are known. sure: in all rows."""
        low = self.seen + 1 - self.reach
        if low <= self.low:
            return
        if not sure:
            self.exact = self.even = False
            return
        marked = any(isinstance(t, Region) and t.kind == "frozen" for cls in self.keeping for t in cls.keep)
        if self.frozen and marked:  # nobody knows how many of those are left
            self.exact = self.even = False
        intact, known = self.intact, self.kept if self.exact else None
        self.low, most = low, self.rows * (self.seen - low)
        if intact:
            self.total = most
        elif known is None:
            self.total = min(self.total, most)
            self.exact = self.even = False
        else:
            start = max(low, self.kept_at)
            below = sum(rows * cover.count(low, start) for rows, cover in known) if start > low else 0
            self.total = below + self.rows * (self.seen - start)
        self.frozen = min(self.frozen, self.total)

    def scalars(self, event: Event) -> dict[str, int]:
        """The run-time numbers; `len` only where all rows are known to be equally long."""
        out = {"prompt": self.prompt, "now": self.seen - 1, "chunk": event.tokens, "step": event.step}
        return out | {"len": self.held // self.rows} if self.exact and self.even else out

    def certain(self, index: int | None, event: Event) -> bool:
        """Whether a count is known, and not only bounded."""
        if index is None:
            return True
        count = self.plan.counts[index]
        return not measured_in(self.plan, count.expr) and scalars_of(count) <= set(self.scalars(event))

    def value(self, index: int, event: Event, parts: tuple[int, ...]) -> int | None:
        """At most what a count is in one row, in a layer with these parts of the shares."""
        count = self.plan.counts[index]
        scalars, reads = self.scalars(event), scalars_of(count)
        if reads - set(scalars):  # len
            if shape(count.expr, is_len, scalars)[0] not in (0, 1):
                return None
            scalars["len"] = min(self.seen, self.total) + bool(self.folded)
        key = (index, parts, *(scalars[name] for name in sorted(reads)))
        if key not in self._known:
            self._known[key] = count_value(count, scalars, parts)
        return self._known[key]

    def over_rows(self, index: int, event: Event, term: Selection | None = None) -> int | None:
        """At most the sum of a count over all rows. term: the selection that asks, where layers decide for others."""
        members = self.group.members

        def parts_of(member: Member) -> tuple[int, ...]:
            return member.parts if term is None else member.of(term)

        count = self.plan.counts[index]
        if measured_in(self.plan, count.expr):
            scalars = self.scalars(event)
            if scalars_of(count) - set(scalars):
                return None
            found = summed(self.plan, count.expr, scalars, parts_of(members[0]), len(members))
            return None if found is None else found * max(member.rows for member in members)
        out = 0
        for member in members:
            value = self.value(index, event, parts_of(member))
            if value is None:
                return None
            out += value * member.rows
        return out


def full_units(unit: UnitPlan, seen: int) -> int:
    """Units that have been seen whole."""
    return max(0, seen - unit.offset) // unit.size


def ready_units(cls: ClassPlan, unit: UnitPlan, seen: int) -> int:
    """Units whose entries may be judged: full, and followed by a full one where the score reads it."""
    return max(0, full_units(unit, seen) - reads_next(cls, unit))


def reads_next(cls: ClassPlan, unit: UnitPlan) -> bool:
    """Whether a selection over the unit reads the unit after it."""
    formulas = [term.score for term in cls.selections if unit.name in (term.unit, term.whole)]
    formulas += [expr for _, expr in unit.landmarks] if formulas else []
    return any(n.op == "field" and str(n.value).startswith("next.") for f in formulas for n in f.walk())
