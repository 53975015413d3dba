"""What one rule keeps of some rows when it decides: regions, then selections from left to right.

Takes the state of the rows and the forward; changes the state. Guarantees: the new total is exact where the state
was and nothing but lengths tells, else never too small.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from kvcompile.kernels.counts import scalars_of
from kvcompile.kernels.plan import ClassPlan, Region, Selection, UnitPlan
from kvcompile.passes.counting import Event, State, ready_units
from kvcompile.passes.covers import Cover
from kvcompile.passes.limits import measured_in


@dataclass(frozen=True, slots=True)
class _Held:
    """What regions hold: positions by layer, and `extra` entries that positions do not tell, such as frozen ones."""

    covers: tuple[tuple[int, Cover], ...]  # rows, and what regions take in each
    low: int  # positions below are gone
    seen: int
    extra: int
    sure: bool  # all of it is still there, and nothing is counted twice
    plain: bool  # positions tell all

    def open(self, start: int, stop: int) -> int:
        """Positions of all rows from start up to but without stop that no region takes; at most."""
        start = max(start, self.low)
        if stop <= start:
            return 0
        return sum(rows * (stop - start - cover.count(start, stop)) for rows, cover in self.covers)

    @property
    def total(self) -> int:
        return sum(rows * cover.count(self.low, self.seen) for rows, cover in self.covers) + self.extra


@dataclass(frozen=True, slots=True)
class _Limit:
    """The most that a selection takes, whether that is known, and whether rows stay equally long."""

    n: int
    sure: bool = False
    even: bool = False


def decide(state: State, cls: ClassPlan, event: Event) -> None:
    """A rule keeps what it keeps; losers leave behind what they leave."""
    unit = _tracked(state, cls)
    before = state.total
    if unit is None:
        _decide_rows(state, cls, event)
    else:
        _decide_units(state, cls, event, unit)
    _leave(state, cls, before - state.total)
    state.frozen = min(state.frozen, state.total)


def winners(state: State, cls: ClassPlan, event: Event) -> list[tuple[Selection, int]]:
    """For each selection the most that it takes of all rows, if nothing is dropped."""
    held = _regions(state, cls, event)
    open_ = state.total - min(state.total, held.total) if held.sure and state.exact else state.total
    return [(term, min(open_, _limit(state, cls, term, event, held, open_, state.even).n)) for term in cls.selections]


# ---------------------------------------------------------------- rows


def _decide_rows(state: State, cls: ClassPlan, event: Event) -> None:
    held = _regions(state, cls, event)
    kept = min(state.total, held.total)
    open_ = state.total - kept
    won, sure, even = 0, state.exact and held.sure, state.even
    for term in cls.selections:
        if (unit := term.unit or term.whole) is not None:
            waiting, known = _waiting(state, cls, state.plan.unit(unit), held)
            waiting = min(open_, waiting)
            kept, open_, sure = kept + waiting, open_ - waiting, sure and known and not won
        limit = _limit(state, cls, term, event, held, open_, even)
        taken = min(open_, limit.n)
        # Where less may be held than was counted, more may win.
        room = open_ if sure else state.total
        won += taken if sure else min(room, _limit(state, cls, term, event, held, room, even).n)
        kept, open_ = kept + taken, open_ - taken
        sure, even = sure and limit.sure, even and limit.even
    if not (cls.selections or held.extra):
        state.kept, state.kept_at = held.covers, state.seen
    elif kept < state.total or not sure:
        state.kept = None
    state.total = kept
    state.frozen += won
    state.exact = sure
    state.even = even and sure


def _regions(state: State, cls: ClassPlan, event: Event) -> _Held:
    plan, everything = state.plan, state.rows * (state.seen - state.low)
    regions = dict.fromkeys(t for t in cls.keep if isinstance(t, Region))
    by_position: list[int] = []
    extra = 0
    sure = state.intact or _same_regions(state)
    for term in regions:
        if term.kind == "frozen":
            extra += state.frozen
        elif term.kind == "picked":
            assert term.pick is not None
            extra += min(everything, event.picks.get(term.pick, 0) * state.rows)
            sure = False
        elif term.kind == "random" or (term.count is not None and _measured(state, term.count)):
            assert term.count is not None
            n = state.over_rows(term.count, event) if term.kind != "stride" else None
            extra += everything if n is None else min(n, everything)
            sure &= len(regions) == 1 and not _measured(state, term.count) and not state.low
        elif term.count is not None:
            by_position.append(term.count)
        if term.count is not None:
            moves = scalars_of(plan.counts[term.count]) - {"prompt"}
            sure &= not moves or (state.intact and state.certain(term.count, event))
    covers = []
    for member in state.group.members:
        counts = {index: state.value(index, event, member.parts) for index in by_position}
        covers.append((member.rows, Cover(plan, cls, counts, state.seen, state.prompt)))
    return _Held(tuple(covers), state.low, state.seen, extra, sure, plain=not extra)


def _measured(state: State, index: int) -> bool:
    return bool(measured_in(state.plan, state.plan.counts[index].expr))


def _same_regions(state: State) -> bool:
    """Whether what one rule's regions hold, no other rule over these rows has dropped."""
    sets = {frozenset(t for t in cls.keep if isinstance(t, Region)) for cls in state.keeping}
    return len(sets) == 1


def _waiting(state: State, cls: ClassPlan, unit: UnitPlan, held: _Held) -> tuple[int, bool]:
    """Entries that are no candidates yet, because their unit is not full; whether all of them are still there."""
    end = min(state.seen, unit.offset + ready_units(cls, unit, state.seen) * unit.size)
    waiting = held.open(0, min(unit.offset, state.seen)) + held.open(end, state.seen)
    return waiting, held.plain and (state.intact or (len(state.keeping) == 1 and len(cls.selections) == 1))


def _limit(state: State, cls: ClassPlan, term: Selection, event: Event, held: _Held, open_: int, even: bool) -> _Limit:
    """The most that a selection takes of `open_` candidates. even: all rows have equally many of them."""
    if not open_:
        return _Limit(0, True, True)
    if term.rank == "where":
        return _Limit(open_)
    if term.unit is not None:
        unit = state.plan.unit(term.unit)
        units = len(_present(state, cls, unit))
        return _Limit(_of_unit(state, term, event, unit.size)[0] * units * state.rows)
    if term.whole is not None:
        return _whole(state, cls, term, event, held, even)
    n = state.over_rows(term.count, event, term) if term.count is not None else _part(state, term, open_, even)
    if n is None:
        return _Limit(open_)
    everything = n >= open_  # for each query head alone, too
    n, watched = _observed(state, cls, term, event, held, n * _voices(state, term), even)
    # Each layer draws its own random positions, so that one that follows another may lack what that one chose.
    apart = term.layers == "shared" and any(isinstance(t, Region) and t.kind == "random" for t in cls.keep)
    known = watched and not apart and _known(state, term, event, everything, even)
    return _Limit(n, known, not _pools(term) or everything)


def _voices(state: State, term: Selection) -> int:
    """How many choose from the same candidates, and what each chooses is kept."""
    return state.plan.facts.group if term.scope == "query_head" else 1


def _pools(term: Selection) -> bool:
    return "across" in (term.scope, term.layers)


def _known(state: State, term: Selection, event: Event, everything: bool, even: bool) -> bool:
    """Whether a selection's number of winners follows from lengths. everything: every candidate may win."""
    if term.rank == "cover" or not state.certain(term.count, event):
        return False
    if term.layers == "shared" and not (_follows(state, term) and all(m.alike for m in state.group.members)):
        return False
    if not _pools(term):
        return even and state.uniform and (_voices(state, term) == 1 or everything)
    if term.scope == "across" and (term.layers == "across") == state.group.pooled:
        return True  # one pool
    if term.fraction is not None:
        return False
    same = all((t.scope, t.layers) == (term.scope, term.layers) for c in state.keeping for t in c.selections)
    return state.uniform and (even or same)


def _follows(state: State, term: Selection) -> bool:
    """Whether a layer that follows another one's choice holds what that one holds: nothing else tells them apart."""
    return all((t.layers, t.sharing) == ("shared", term.sharing) for c in state.keeping for t in c.selections)


def _part(state: State, term: Selection, candidates: int, even: bool) -> int:
    """A fraction of candidates: of each row, or of all that compete. `cover` may take one more for what crosses."""
    assert term.fraction is not None
    if _pools(term) or not even:
        return _floor(term.fraction, candidates) + (term.rank == "cover") * state.rows
    return state.rows * (_floor(term.fraction, candidates // state.rows) + (term.rank == "cover"))


def _floor(part: Fraction, of: int) -> int:
    return of * part.numerator // part.denominator


def _observed(
    state: State, cls: ClassPlan, term: Selection, event: Event, held: _Held, n: int, even: bool
) -> tuple[int, bool]:
    """A budget with the newest entries of the last piece, which count within it; whether their number is known."""
    if not term.observed or event.phase != "prefill.end":
        return n, True
    # Frozen ones are no candidates, and what was not frozen is gone: only this piece can be watched.
    settled = any(isinstance(t, Region) and t.kind == "frozen" for t in cls.keep) and len(state.keeping) == 1
    width = min(term.observed, event.tokens if settled else state.seen)
    watched = held.open(state.seen - width, state.seen)
    known = settled or (held.plain and (state.intact or width <= event.tokens))
    if not state.uniform or not (even if term.count is None else not _measured(state, term.count)):
        return n + watched, False
    return max(n, watched), watched <= n or (known and term is cls.selections[0])


def _present(state: State, cls: ClassPlan, unit: UnitPlan) -> list[tuple[int, int]]:
    """The units whose entries may be judged, as far as a sliding window has not left them: first position, and end."""
    gone = max(0, state.low - unit.offset) // unit.size
    starts = (unit.offset + u * unit.size for u in range(gone, ready_units(cls, unit, state.seen)))
    return [(max(start, state.low), start + unit.size) for start in starts]


def _whole(state: State, cls: ClassPlan, term: Selection, event: Event, held: _Held, even: bool) -> _Limit:
    """Units that are taken whole: the largest ones, where it is not known which."""
    assert term.whole is not None
    unit = state.plan.unit(term.whole)
    present = _present(state, cls, unit)
    clear = state.intact and state.uniform and held.plain and len(cls.selections) == 1
    sizes = [stop - start for start, stop in present]
    if clear:
        cover = held.covers[0][1]
        sizes = sorted((stop - start - cover.count(start, stop) for start, stop in present), reverse=True)
        sizes = [size for size in sizes if size]
    everyone = len(sizes) * state.rows
    if term.count is not None:
        found = state.over_rows(term.count, event, term)
        n = everyone if found is None else found
    else:
        n = _part(state, term, everyone, even or clear)
    everything = n >= everyone
    n = min(everyone, n * _voices(state, term))
    if not clear:
        return _Limit(n * unit.size)
    each, over = divmod(n, state.rows)
    most = sum(sizes[:each]) * state.rows + sum(sizes[each : each + 1]) * over
    alike = everything or len(set(sizes)) == 1
    known = alike and _known(state, term, event, everything, even)
    return _Limit(most, known, not _pools(term) or everything)


# ---------------------------------------------------------------- each unit a group of its own


def _tracked(state: State, cls: ClassPlan) -> UnitPlan | None:
    """The unit whose groups are counted one by one: where every selection is over it, and nothing else decides."""
    names = {term.unit for term in cls.selections}
    regions = [t for t in cls.keep if isinstance(t, Region)]
    beside = any(t.kind in ("random", "picked") or (t.count is not None and _measured(state, t.count)) for t in regions)
    alone = len(state.keeping) == 1 and not state.group.competes and not state.reach
    if len(names) != 1 or None in names or beside or cls.moves or not alone:
        return None
    return state.plan.unit(str(names.pop()))


def _decide_units(state: State, cls: ClassPlan, event: Event, unit: UnitPlan) -> None:
    held = _regions(state, cls, event)
    ready = ready_units(cls, unit, state.seen)
    base = max(0, -(-(state.first - unit.offset) // unit.size))  # units before hold some that were there before
    state.units += [(unit.size, 0)] * (ready - base - len(state.units))
    frozen_too = any(isinstance(t, Region) and t.kind == "frozen" for t in cls.keep)
    cover = held.covers[0][1]
    sure = held.sure and all(state.certain(term.count, event) for term in cls.selections)
    for index, (residents, frozen) in enumerate(state.units):
        start = unit.offset + (base + index) * unit.size
        kept = min(residents, cover.count(start, start + unit.size) + frozen_too * frozen)
        open_, left, won = residents - kept, kept, 0
        for term in cls.selections:
            each, plain = _of_unit(state, term, event, open_)
            # Where less may be held than was counted, more may win.
            best = each if sure and state.exact else min(residents, _of_unit(state, term, event, residents)[0])
            sure &= plain or not open_
            left, won, open_ = left + each, won + best, open_ - each
        state.units[index] = left, min(left, frozen + won)
    beside = state.seen - state.first - len(state.units) * unit.size  # before the first unit, and in those to come
    state.total = state.rows * (beside + sum(residents for residents, _ in state.units)) + state.lump
    state.exact &= sure
    state.even &= sure


def _of_unit(state: State, term: Selection, event: Event, candidates: int) -> tuple[int, bool]:
    """At most what a selection takes of a unit's candidates, and whether that is known."""
    if term.rank == "where":
        return candidates, False
    if term.count is not None:
        n = state.over_rows(term.count, event, term)
        n = candidates if n is None else -(-n // state.rows) if state.uniform else n
    else:
        assert term.fraction is not None
        n = _floor(term.fraction, candidates) + (term.rank == "cover")
    plain = term.rank != "cover" and (_voices(state, term) == 1 or n >= candidates)
    return min(candidates, n * _voices(state, term)), plain


# ---------------------------------------------------------------- losers


def _leave(state: State, cls: ClassPlan, lost: int) -> None:
    """What losers leave: merging nothing, folding into one an entry for ever, folding into fewer some of them."""
    place, fold = next(((i, x) for i, x in enumerate(cls.losers) if x.kind == "fold"), (0, None))
    if fold is None or (state.exact and not lost):
        return
    plain = place == 0 and state.even
    if fold.fn == "mean":
        state.exact &= plain or state.folded == state.rows
        state.folded = state.rows
        return
    state.total += _fewer(state, fold.fn, fold.part, lost)
    state.exact &= plain
    state.even &= plain


def _fewer(state: State, fn: str, part: Fraction, lost: int) -> int:
    """Entries that a fold leaves of all rows' losers."""
    each = lost // state.rows if state.even else lost
    left = max(1, _floor(part, each)) if fn == "dct" else -_floor(-part, each)
    return min(lost, left * state.rows if state.even else left + state.rows)
