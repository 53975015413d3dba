"""What a decode step reads of the rows of a policy with `attend`, counted without running it.

Takes a plan, lengths and the entries that rows hold; gives `ReadFacts` by readers, and the bytes of a step. Guarantees:
a number is exact where it says so, else never too small; time follows the number of units, not of entries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

from kvcompile.kernels.counts import count_value
from kvcompile.kernels.marks import asked, dense_below, layout_of
from kvcompile.kernels.plan import ClassPlan, PolicyPlan, ReadPlan, ReadRule, Region, Selection
from kvcompile.passes.covers import Cover
from kvcompile.passes.held import Held

_LONGEST = 1 << 20  # tokens up to which a length is looked for
_LOOSE = ("frozen", "span", "random", "picked")  # regions whose members positions do not tell


@dataclass(frozen=True, slots=True)
class ReadFacts:
    """What the queries of some KV heads read in the decode step after all lengths.

    attend: the clauses, a line each. entries: most of what a query head reads of each KV head's `resident` ones, means
    over these heads; `exact` is False where that is a bound. landmark_bytes: of each resident entry, what choosing
    reads. reads_less_from: the shortest row of which less than all is read, None where none is known. pays_from: from
    how many entries on that moves fewer bytes than reading all of them.
    """

    name: str
    heads: int
    attend: str
    entries: float
    exact: bool
    resident: float
    landmark_bytes: float
    reads_less_from: int | None
    pays_from: int | None

    @property
    def share(self) -> float:
        """Part of what is resident."""
        return self.entries / self.resident if self.resident else 1.0

    def to_dict(self) -> dict[str, object]:
        """Plain values, fit for JSON."""
        return {
            "heads": self.heads,
            "attend": self.attend,
            "entries": self.entries,
            "exact": self.exact,
            "resident": self.resident,
            "share": self.share,
            "landmark_bytes": self.landmark_bytes,
            "reads_less_from": self.reads_less_from,
            "pays_from": self.pays_from,
        }

    def lines(self) -> list[str]:
        """The reads as text, their name first."""
        most = "" if self.exact else "at most "
        out = [f"{self.name}: {self.heads} KV heads", *self.attend.splitlines()]
        chosen = f", by {self.landmark_bytes:.4g} bytes of landmarks for each resident one" * (self.landmark_bytes > 0)
        out.append(
            f"a decode step reads {most}{self.entries:.6g} of {self.resident:.6g} entries ({self.share:.1%}){chosen}"
        )
        if self.reads_less_from is None and not self.exact:
            out.append("no length is known from which less than all is read")
        elif self.reads_less_from is not None:
            pays = f"; it moves fewer bytes from {self.pays_from} on" if self.pays_from else ""
            out.append(f"less than all is read of rows of {self.reads_less_from} entries and more{pays}")
        return out


@dataclass(frozen=True, slots=True)
class StepReads:
    """One sequence's decode step: entries of all rows that it reads at the least, and bytes of landmarks."""

    reads: tuple[ReadFacts, ...]
    entries: float
    landmark_bytes: int


@dataclass(frozen=True, slots=True)
class _Size:
    n: int
    sure: bool


def step_reads(
    plan: PolicyPlan, resident: Mapping[tuple[int, int], float], prompt: int, generate: int, clauses: Mapping[str, str]
) -> StepReads:
    """What a decode step reads after a prompt and `generate` steps. resident: entries of each (layer, KV head);
    clauses: by name of the readers, as written."""
    everything = sum(resident.values())
    if not plan.reads:
        return StepReads((), everything, 0)
    facts: list[ReadFacts] = []
    known: dict[tuple[int, int, float], _Size] = {}
    less, landmarks = 0.0, 0
    for index, read in enumerate(plan.reads):
        rows = [row for row in resident if plan.reading(row[0])[row[1]] == index]
        if not rows:
            continue
        sizes = []
        for row in rows:
            key = index, plan.facts.reach(row[0]), resident[row]
            if key not in known:
                known[key] = _of_row(plan, read, key[1], resident[row], prompt, generate)
            sizes.append(known[key])
        held, most = sum(resident[row] for row in rows), sum(size.n for size in sizes)
        less += held - most
        marks = _landmark_bytes(plan, read, prompt + generate)
        landmarks += marks * len(rows)
        reach = max(plan.facts.reach(layer) for layer, _ in rows)
        facts.append(
            ReadFacts(
                read.name,
                len(rows),
                clauses.get(read.name, ""),
                most / len(rows),
                all(size.sure for size in sizes),
                held / len(rows),
                marks * len(rows) / held if held else 0.0,
                less_from := _reads_less_from(plan, read, reach),
                None if less_from is None else _pays_from(plan, read, reach),
            )
        )
    return StepReads(tuple(facts), everything - less, landmarks)


def residents(plan: PolicyPlan, memory: Held) -> dict[tuple[int, int], float]:
    """Entries of each (layer, KV head) at the end, means where only sums are known."""
    out: dict[tuple[int, int], float] = {}
    for group, by_layer in memory.groups:
        owner = next(rule for rule in group.rules if plan.classes[rule].rows_of is None)
        for layer, entries in zip(group.layers, by_layer, strict=True):
            heads = plan.heads(layer, owner)
            out |= {(layer, head): entries / len(heads) for head in heads}
    return dict(sorted(out.items()))


def idle_weights(plan: PolicyPlan) -> int:
    """Bytes of the projections of layers that are off, which no step reads."""
    facts = plan.facts
    each = 2 * (facts.q_heads + facts.kv_heads) * facts.head_dim * facts.hidden
    return min(facts.weight_bytes, len(plan.off) * each * (facts.entry_bytes // (2 * facts.head_dim)))


def _of_row(plan: PolicyPlan, read: ReadPlan, reach: int, resident: float, prompt: int, generate: int) -> _Size:
    """At most what a query head reads in the step after all lengths, of a row with so many entries."""
    seen = prompt + generate
    size = _in_step(plan, read, reach, prompt, generate, seen)
    whole = resident == min(seen, reach or seen)  # nothing was ever dropped
    return _Size(min(size.n, int(resident)), size.sure and (whole or size.n >= seen))


def _in_step(plan: PolicyPlan, read: ReadPlan, reach: int, prompt: int, step: int, seen: int) -> _Size:
    """The same of a row that holds all, by the rule that says what a step reads."""
    sets = [rule for rule in read.rules if rule.pick is None]
    everything = _Size(min(seen, reach or seen), not sets)
    if not sets:
        return everything
    for rule in sets:
        if not rule.triggers or any(t.kind == "step" and t.cond is None for t in rule.triggers):
            return _of_rule(plan, rule, reach, prompt, step, seen)
    found: list[_Size] = []
    sure = all(t.cond is None for rule in sets for t in rule.triggers)
    for rule in sets:
        waits = [_since(t.kind, t.n or 0, step) for t in rule.triggers]
        if None in waits or not waits:
            continue
        ago = min(wait for wait in waits if wait is not None)
        size = _of_rule(plan, rule, reach, prompt, step - ago, seen - ago)
        found.append(_Size(min(size.n + ago, everything.n), size.sure))
    if not found or not sure:
        return _Size(everything.n, False)
    if len(found) == 1 == len(sets):
        return found[0]
    return _Size(max(size.n for size in found), False)


def _since(kind: str, n: int, step: int) -> int | None:
    """Steps since a trigger without a condition last fired; None where it never did, or nobody knows."""
    match kind:
        case "step":
            return 0
        case "every":
            return step % n if step >= n else None
        case "chunk" | "prefill.end":
            return step
    return None


# ---------------------------------------------------------------- one set


def _of_rule(plan: PolicyPlan, rule: ReadRule, reach: int, prompt: int, step: int, seen: int) -> _Size:
    """At most what the newest query of `seen` reads by a rule, of a row that holds all that its window leaves."""
    low = max(0, seen - reach) if reach else 0
    scalars = {"prompt": prompt, "now": seen - 1, "chunk": min(plan.chunk or prompt, prompt), "step": step, "len": seen}
    counts = {i: count_value(count, scalars, ()) for i, count in enumerate(plan.counts) if _asked(rule, i)}
    cover = _cover(plan, rule, counts, seen, prompt)
    regions = [term for term in rule.terms if isinstance(term, Region)]
    loose = sum(_loose(plan, term, counts, seen - low) for term in regions)
    own = not cover.count(seen - 1, seen)  # a query reads its own entry, whatever it chooses
    taken = cover.count(low, seen)
    sure, open_ = not loose, seen - low - taken
    for term in rule.selections:
        n, known = _chosen(plan, term, counts, cover, low, seen, open_)
        taken, open_, sure = taken + n, open_ - n, sure and known and len(rule.selections) == 1
        unit = plan.unit(term.unit or term.whole or "") if term.unit or term.whole else None
        # The newest entry is in no unit that is full before it, so it is read with the others that wait.
        own = own and unit is None
    if own and open_:
        taken, sure = taken + 1, sure and not rule.selections
    return _Size(min(taken + loose, seen - low), sure)


def _asked(rule: ReadRule, count: int) -> bool:
    return any(term.count == count for term in rule.terms)


def _cover(plan: PolicyPlan, rule: ReadRule, counts: Mapping[int, int], seen: int, prompt: int) -> Cover:
    """The positions that regions take for the newest query."""
    keep = tuple(
        Region("newest", unit=term.unit) if isinstance(term, Region) and term.kind == "own" else term
        for term in rule.terms
        if not (isinstance(term, Region) and term.kind in _LOOSE)
    )
    cover = Cover(plan, ClassPlan("", keep, ()), counts, seen, prompt)
    far = []
    for term in rule.terms:
        if isinstance(term, Region) and term.kind == "pow2":
            unit = plan.unit(term.unit or "")
            own = (seen - 1 - unit.offset) // unit.size
            at = [own - (1 << k) for k in range(own.bit_length())]
            far += [(unit.offset + u * unit.size, unit.offset + (u + 1) * unit.size) for u in at if u >= 0]
    return cover.beside(far)


def _loose(plan: PolicyPlan, term: Region, counts: Mapping[int, int], everything: int) -> int:
    """At most the entries of a region that positions do not tell."""
    if term.kind not in _LOOSE:
        return 0
    if term.count is not None:
        return min(counts[term.count], everything)
    if term.kind != "picked":
        return everything
    picks = [rule for read in plan.reads for rule in read.rules if rule.pick == term.pick]
    sizes = [size if (size := _picked(plan, rule)) is not None else everything for rule in picks]
    return min(everything, max(sizes, default=everything))


def _picked(plan: PolicyPlan, rule: ReadRule) -> int | None:
    """The most that a pick by plain numbers takes, entries of units that are not full among them."""
    total = 0
    for term in rule.selections:
        if term.count is None or term.unit is not None:
            return None
        try:
            n = count_value(plan.counts[term.count], {}, ())
        except LookupError:
            return None
        unit = plan.unit(term.whole) if term.whole else None
        total += n if unit is None else (n + 1) * unit.size + unit.offset
    return total


def _chosen(
    plan: PolicyPlan, term: Selection, counts: Mapping[int, int], cover: Cover, low: int, seen: int, open_: int
) -> tuple[int, bool]:
    """At most what a selection reads of what regions leave open, and whether that is known."""
    name = term.unit or term.whole
    if name is None:
        if term.rank in ("cover", "where"):
            return open_, False
        n = counts[term.count] if term.count is not None else _floor(term.fraction, open_)
        return min(n, open_), True
    if term.whole is None or term.rank in ("cover", "where"):
        return open_, False
    unit = plan.unit(name)
    starts = (unit.offset + u * unit.stride for u in range(unit.full(seen - 1)))
    sizes = [unit.size - cover.count(max(low, at), at + unit.size) - max(0, low - at) for at in starts]
    sizes = sorted((size for size in sizes if size > 0), reverse=True)
    waiting = open_ - sum(sizes)
    n = counts[term.count] if term.count is not None else _floor(term.fraction, len(sizes))
    known = n >= len(sizes) or len(set(sizes)) < 2
    return waiting + sum(sizes[:n]), known


def _floor(part: Fraction | None, of: int) -> int:
    assert part is not None
    return of * part.numerator // part.denominator


# ---------------------------------------------------------------- landmarks and lengths


def _landmark_bytes(plan: PolicyPlan, read: ReadPlan, seen: int) -> int:
    """Bytes of landmarks that choosing reads of one row, for the newest of `seen` tokens: of units full before it."""
    layout, names = layout_of(plan), asked(plan, _of_steps(read))
    kinds = [kind for kind in layout.kinds if kind.unit.name in names]
    return sum(kind.unit.full(seen - 1) * kind.channels * layout.itemsize for kind in kinds)


def _reads_less_from(plan: PolicyPlan, read: ReadPlan, reach: int) -> int | None:
    """The shortest row, held whole, of which a step reads less than all; None where it never does, up to a limit."""
    return _first(lambda seen: _after(plan, read, reach, seen) < min(seen, reach or seen))


def _pays_from(plan: PolicyPlan, read: ReadPlan, reach: int) -> int | None:
    """The same of which a step moves fewer bytes, by what it reads of a row of that length."""
    own = _of_steps(read)
    return _first(lambda seen: min(seen, reach or seen) > dense_below(plan, own, _after(plan, read, reach, seen)))


def _of_steps(read: ReadPlan) -> ReadPlan:
    """The rules that are asked in some step; those of prompts alone read nothing there."""
    return replace(read, rules=tuple(rule for rule in read.rules if rule.fires_in_steps))


def _after(plan: PolicyPlan, read: ReadPlan, reach: int, seen: int) -> int:
    """What the first step reads, the prompt and its own entry being `seen` tokens."""
    return _in_step(plan, read, reach, max(1, seen - 1), 1, seen).n


def _first(holds: Callable[[int], bool]) -> int | None:
    """The least number from which on it holds, up to a limit."""
    sizes = [1 << k for k in range(_LONGEST.bit_length())]
    top = next((size for size in sizes if holds(size)), None)
    if top is None:
        return None
    low, high = top // 2, top
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
