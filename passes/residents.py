"""How many entries a policy keeps, forward by forward, without running it.

Takes a plan, a prompt length and a number of steps; gives `Forward`s with resident totals per group of rows.
Guarantees: exact for every static plan (`exact(plan)`), else an upper bound, but for `full(n)` where heads compete
(an estimate); time is linear in forwards, whatever the prompt's length.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from kvcompile.kernels.counts import count_value, layer_shares, scalars_of
from kvcompile.kernels.plan import ClassPlan, PolicyPlan, Region, Selection, Trigger, UnitPlan

# Why counting needs no scores: a region never takes an entry back that it once let go (`sink` and `prompt` never
# change, `recent` and `newest` only move on), so its members are all still resident, and each selection keeps
# min(n, candidates). Frozen entries were candidates once, so no other region holds them.


@dataclass(frozen=True, slots=True)
class Group:
    """The rows of one class in layers with equal counts: `heads` rows a layer."""

    cls: int
    layers: tuple[int, ...]
    heads: int
    parts: tuple[int, ...]  # by share index: the layer's part


@dataclass(frozen=True, slots=True)
class Forward:
    """One forward: new and peeked tokens, phase, and the resident total of a layer's rows of each group."""

    tokens: int
    peeked: int
    phase: str  # chunk, prefill.end, step
    before: tuple[int, ...]
    after: tuple[int, ...]


def groups(plan: PolicyPlan, prompt: int) -> tuple[Group, ...]:
    """Layers of a class that have as many heads and equal parts of every share."""
    shares = layer_shares(plan, {"prompt": prompt}, {})
    found: dict[tuple[int, int, tuple[int, ...]], list[int]] = {}
    for layer in range(plan.facts.layers):
        parts = tuple(share[layer] for share in shares)
        for cls in plan.site_classes(layer):
            found.setdefault((cls, len(plan.heads(layer, cls)), parts), []).append(layer)
    return tuple(Group(cls, tuple(layers), heads, parts) for (cls, heads, parts), layers in found.items())


def exact(plan: PolicyPlan) -> bool:
    """Whether `forwards` counts exactly, not only from above."""
    return all(_exact_class(plan, cls) for cls in plan.classes if not cls.keeps_all)


def _exact_class(plan: PolicyPlan, cls: ClassPlan) -> bool:
    regions = [t for t in cls.keep if isinstance(t, Region)]
    moving = any(scalars_of(plan.counts[t.count]) - {"prompt"} for t in regions if t.count is not None)
    frozen = any(t.kind == "frozen" for t in regions)
    rejudged = any(t.observed for t in cls.selections) and not frozen
    mixed = len({t.unit for t in cls.selections}) > 1
    # Rows of unequal lengths: what each row does by itself no longer follows from their sum.
    alone = any(t.scope != "across" or t.count is None for t in cls.selections)
    alone |= any(t.kind == "full" for t in cls.triggers)
    uneven = _competing(cls) and alone
    return not (moving or rejudged or mixed or uneven or any(t.kind == "random" for t in regions))


def _competing(cls: ClassPlan) -> bool:
    return any(term.scope == "across" for term in cls.selections)


def forwards(plan: PolicyPlan, prompt: int, steps: int) -> Iterator[Forward]:
    """The forwards of one prompt and `steps` decode steps."""
    rows = [_Rows(plan, group, prompt) for group in groups(plan, prompt)]
    size = plan.chunk or prompt
    pieces = [min(size, prompt - start) for start in range(0, prompt, size)] if prompt else []
    for index, tokens in enumerate(pieces):
        last = index + 1 == len(pieces)
        peeked = 0 if last else min(plan.peek, prompt)
        before = tuple(row.total for row in rows)
        phase = "prefill.end" if last else "chunk"
        for row in rows:
            row.forward(tokens, phase, 0)
        yield Forward(tokens, peeked, phase, before, tuple(row.total for row in rows))
    for step in range(1, steps + 1):
        before = tuple(row.total for row in rows)
        for row in rows:
            row.forward(1, "step", step)
        yield Forward(1, 0, "step", before, tuple(row.total for row in rows))


@dataclass(slots=True)
class _Rows:
    """The rows of one group in one layer. Numbers of entries are totals over its heads, positions are per row."""

    plan: PolicyPlan
    group: Group
    prompt: int
    total: int = 0
    seen: int = 0  # tokens so far: now + 1
    frozen: int = 0
    judged: int = 0  # units judged so far
    arrived: int = 0  # entries since `filled(n)` last fired
    units: list[tuple[int, int]] = field(default_factory=list)  # residents and frozen ones of each unit, per row

    @property
    def cls(self) -> ClassPlan:
        return self.plan.classes[self.group.cls]

    def forward(self, tokens: int, phase: str, step: int) -> None:
        self.total += tokens * self.group.heads
        self.seen += tokens
        self.arrived += tokens
        if not self.cls.keeps_all and any(self._fires(trigger, phase, step) for trigger in self.cls.triggers):
            self._decide(tokens, phase, step)

    def _fires(self, trigger: Trigger, phase: str, step: int) -> bool:
        n = trigger.n or 0
        match trigger.kind:
            case "chunk":
                return phase in ("chunk", "prefill.end")
            case "every":
                return phase == "step" and step % n == 0
            case "full":
                return self.total >= n * self.group.heads
            case "filled" if trigger.unit is None:
                return self.arrived >= n
            case "filled":
                assert trigger.unit is not None
                return full_units(self.plan.unit(trigger.unit), self.seen) - self.judged >= n
            case kind:
                return kind == phase

    def _decide(self, tokens: int, phase: str, step: int) -> None:
        heads = self.group.heads
        length = -(-self.total // heads)
        scalars = {"prompt": self.prompt, "now": self.seen - 1, "chunk": tokens, "step": step, "len": length}
        counts = [count_value(count, scalars, self.group.parts) for count in self.plan.counts]
        cover = _Cover(self.plan, self.cls, counts, self.seen, self.prompt)
        units = {term.unit for term in self.cls.selections}
        if len(units) == 1 and (name := units.pop()) is not None:
            self._decide_units(self.plan.unit(name), counts, cover)
        else:
            self._decide_rows(counts, cover, tokens, phase)
        self.judged = max([self.judged, *(self._ready(self.plan.unit(t.unit)) for t in self.cls.triggers if t.unit)])
        self.arrived = 0

    def _decide_rows(self, counts: list[int], cover: _Cover, tokens: int, phase: str) -> None:
        heads = self.group.heads
        held = cover.frozen * self.frozen
        held = min(self.total, held + heads * cover.count(0, self.seen))
        open_ = self.total - held
        won = 0
        for term in self.cls.selections:
            if term.unit is not None:  # beside other selections: bounded by keeping all of it
                won += open_
                break
            watched = 0
            if term.observed and phase == "prefill.end":
                width = min(term.observed, tokens)
                watched = min(open_, heads * (width - cover.count(self.seen - width, self.seen)))
            if term.count is None and _competing(self.cls):
                n = _budget(term, counts, open_)
            else:
                n = heads * _budget(term, counts, open_ // heads)
            taken = min(open_, max(n, watched))
            won += taken
            open_ -= taken
        self.total = held + won
        self.frozen += won

    def _decide_units(self, unit: UnitPlan, counts: list[int], cover: _Cover) -> None:
        ready = self._ready(unit)
        self.units += [(unit.size, 0)] * (ready - len(self.units))
        for index in range(ready):
            start = unit.offset + index * unit.size
            residents, frozen = self.units[index]
            held = min(residents, cover.count(start, start + unit.size) + cover.frozen * frozen)
            open_ = residents - held
            won = 0
            for term in self.cls.selections:
                taken = min(open_, _budget(term, counts, open_))
                won, open_ = won + taken, open_ - taken
            self.units[index] = held + won, frozen + won
        outside = self.seen - ready * unit.size  # before the first unit, and in units that are not judged yet
        self.total = self.group.heads * (outside + sum(residents for residents, _ in self.units))

    def _ready(self, unit: UnitPlan) -> int:
        """Units whose entries may be judged: full, and followed by a full one where the score reads it."""
        return max(0, full_units(unit, self.seen) - reads_next(self.cls, unit))


def full_units(unit: UnitPlan, seen: int) -> int:
    """Units that have been seen whole."""
    return max(0, seen - unit.offset) // unit.size


def reads_next(cls: ClassPlan, unit: UnitPlan) -> bool:
    """Whether a selection over the unit reads the unit after it."""
    formulas = [term.score for term in cls.selections if term.unit == unit.name]
    formulas += [expr for _, expr in unit.landmarks] if formulas else []
    return any(n.op == "field" and str(n.value).startswith("next.") for f in formulas for n in f.walk())


def _budget(term: Selection, counts: list[int], open_: int) -> int:
    if term.count is not None:
        return counts[term.count]
    assert term.fraction is not None
    return open_ * term.fraction.numerator // term.fraction.denominator


class _Cover:
    """The positions that the regions of a class take, `frozen` aside."""

    def __init__(self, plan: PolicyPlan, cls: ClassPlan, counts: list[int], seen: int, prompt: int) -> None:
        self.frozen = False
        spans: list[tuple[int, int]] = []
        strides: set[int] = set()
        for term in cls.keep:
            if not isinstance(term, Region):
                continue
            n = counts[term.count] if term.count is not None else 0
            match term.kind:
                case "frozen":
                    self.frozen = True
                case "all" | "random":
                    spans.append((0, seen))
                case "sink":
                    spans.append((0, n))
                case "recent":
                    spans.append((seen - n, seen))
                case "prompt":
                    spans.append((0, prompt))
                case "generated":
                    spans.append((prompt, seen))
                case "newest":
                    assert term.unit is not None
                    unit = plan.unit(term.unit)
                    spans.append(((seen - 1 - unit.offset) // unit.size * unit.size + unit.offset, seen))
                case "stride":
                    strides.add(max(1, n))
        self.spans = _merged([(max(0, a), min(b, seen)) for a, b in spans])
        self.strides = sorted(strides)

    def count(self, start: int, stop: int) -> int:
        """Positions from `start` up to but without `stop` that some region takes."""
        inside = [(max(a, start), min(b, stop)) for a, b in self.spans if a < stop and b > start]
        covered = sum(b - a for a, b in inside)
        return covered + self._multiples(start, stop) - sum(self._multiples(a, b) for a, b in inside)

    def _multiples(self, start: int, stop: int) -> int:
        found = 0
        for size in range(1, len(self.strides) + 1):
            for some in itertools.combinations(self.strides, size):
                step = math.lcm(*some)
                found -= (-1) ** size * ((stop - 1) // step - (start - 1) // step)
        return found


def _merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    out: list[tuple[int, int]] = []
    for a, b in sorted(span for span in spans if span[0] < span[1]):
        if out and a <= out[-1][1]:
            out[-1] = out[-1][0], max(b, out[-1][1])
        else:
            out.append((a, b))
    return out
