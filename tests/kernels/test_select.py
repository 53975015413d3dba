"""Selections and regions against plain loops: ranks, scopes, units, layers, slots, ties and NaN."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompile.kernels.compete import Place
from kvcompile.kernels.plan import ClassPlan, Count, Expr, ModelFacts, PolicyPlan, Region, Selection, Term, UnitPlan
from kvcompile.kernels.rows import Rows
from kvcompile.kernels.select import Plainly, keep_mask

SCORE = Expr("state", (), "s", "i")
QUIET = settings(max_examples=200, deadline=None, derandomize=True)
Winners = set[tuple[int, int]]  # (row, position)


@dataclass(frozen=True)
class Line:
    """One row: its layer and head, and the score of each position that it holds; `folded`: an entry without one."""

    layer: int
    head: int
    scores: dict[int, float]
    folded: bool = False


# -- the truth, in plain loops ---------------------------------------------------------------------------------------


def better(item: tuple[float, int, int, int]) -> tuple[bool, float, int, int, int]:
    """Sorts the best first: NaN last, ties to the older, the lower head, the lower layer."""
    score, age, head, layer = item
    return math.isnan(score), 0.0 if math.isnan(score) else -score, age, head, layer


def take(term: Selection, items: list[tuple[float, int, int, int]], n: int) -> set[tuple[int, int, int]]:
    """(age, head, layer) of those of one contest's items that win."""
    sign = -1 if term.rank == "bottom" else 1
    if term.rank == "cover":
        clipped = [(max(0.0, s) if s == s else 0.0, *rest) for s, *rest in items]
        ordered = sorted(clipped, key=better)
        total, before, chosen = math.fsum(s for s, *_ in ordered), 0.0, set()
        for score, *who in ordered:
            if before < float(term.fraction or 0) * total:
                chosen.add(tuple(who))
            before += score
        return chosen
    ordered = sorted(((sign * s, *rest) for s, *rest in items), key=better)
    return {(age, head, layer) for _, age, head, layer in ordered[: max(0, n)]}


def truth(
    term: Selection, lines: list[Line], taken: list[set[int]], n: list[int], now: int, unit: UnitPlan | None
) -> Winners:
    """The winners of one selection; `taken` grows by entries of units that are not full."""
    entries = [{p for p in line.scores if p not in taken[r]} for r, line in enumerate(lines)]
    if unit is not None:
        for r, mine in enumerate(entries):
            for p in sorted(mine):
                u = (p - unit.offset) // unit.size
                if u < 0 or unit.offset + (u + 1) * unit.size - 1 > now:
                    mine.discard(p)
                    taken[r].add(p)
    if term.rank == "where":
        scores = [(r, p, lines[r].scores[p]) for r, mine in enumerate(entries) for p in mine]
        return {(r, p) for r, p, s in scores if s != 0 and not math.isnan(s)}
    # Contestants of each row: age -> (score, entries)
    rows: list[dict[int, tuple[float, set[int]]]] = []
    for r, line in enumerate(lines):
        if term.whole is None:
            rows.append({p: (line.scores[p], {p}) for p in entries[r]})
            continue
        assert unit is not None
        units: dict[int, tuple[float, set[int]]] = {}
        for u in {(p - unit.offset) // unit.size for p in entries[r]}:
            held = [p for p in line.scores if (p - unit.offset) // unit.size == u]
            units[u] = sum(line.scores[p] for p in held) / len(held), entries[r] & set(held)
        rows.append(units)
    won: Winners = set()
    contests: dict[tuple[int, ...], list[int]] = {}
    for r, line in enumerate(lines):
        layer = -1 if term.layers == "across" else line.layer
        head = -1 if term.scope in ("across", "shared") else line.head
        contests.setdefault((layer, head), []).append(r)
    for members in contests.values():
        parts = {0} if term.unit is None else {(p - unit.offset) // unit.size for r in members for p in rows[r]}  # type: ignore[union-attr]
        for part in parts:
            inside = [
                {a: x for a, x in rows[r].items() if term.unit is None or (a - unit.offset) // unit.size == part}  # type: ignore[union-attr]
                for r in members
            ]
            won |= one_contest(term, [lines[r] for r in members], members, inside, [n[r] for r in members])
    return won


def one_contest(
    term: Selection, lines: list[Line], rows: list[int], inside: list[dict[int, tuple[float, set[int]]]], n: list[int]
) -> Winners:
    if term.scope == "shared":
        speakers = []
        for layer in sorted({line.layer for line in lines}):
            same = [i for i, line in enumerate(lines) if line.layer == layer]
            means = {a: sum(inside[i][a][0] for i in same) / len(same) for a in inside[same[0]]}
            speakers.append((layer, -1, means, same))
    else:
        speakers = [(x.layer, x.head, {a: s for a, (s, _) in inside[i].items()}, [i]) for i, x in enumerate(lines)]
    there = sum(len(scores) for _, _, scores, _ in speakers)
    total = sum(n[same[0]] for *_, same in speakers)
    if term.fraction is not None:
        total = math.floor(term.fraction * there)
    sign = -1 if term.rank == "bottom" else 1
    items = [(s, a, head, layer) for layer, head, scores, _ in speakers for a, s in scores.items()]
    chosen: set[tuple[int, int, int]] = set()
    if term.rank != "cover" and len(speakers) > 1:
        floor = math.floor(term.floor * total / len(speakers))
        for layer, head, scores, _ in speakers:
            own = sorted(((sign * s, a, head, layer) for a, s in scores.items()), key=better)
            chosen |= {(age, at, of) for _, age, at, of in own[:floor]}
    left = [item for item in items if item[1:] not in chosen]
    chosen |= take(term, left, total - len(chosen))
    return {
        (rows[i], p)
        for layer, head, scores, same in speakers
        for a in scores
        if (a, head, layer) in chosen
        for i in same
        for p in inside[i][a][1]
    }


# -- the same, as rows -----------------------------------------------------------------------------------------------


def as_rows(lines: list[Line], now: int) -> Rows:
    """Entries in position order, an entry without position first, padding behind."""
    columns = [[-1] * line.folded + sorted(line.scores) for line in lines]
    width = max(len(c) for c in columns) + 1
    pos = torch.tensor([c + [-1] * (width - len(c)) for c in columns])
    there = torch.tensor([[True] * len(c) + [False] * (width - len(c)) for c in columns])
    scores = [[line.scores.get(p, 9.0) for p in c] for line, c in zip(lines, pos.tolist(), strict=True)]
    count = len(lines)
    return Rows(
        pos=pos,
        resident=there,
        readable=there,
        frozen=torch.zeros_like(there),
        now=torch.full((count,), now),
        prompt=torch.full((count,), now + 1),
        state={"s": torch.tensor(scores)},
    )


def plan_of(
    keep: tuple[Term, ...], layers: int, heads: int, unit: UnitPlan | None = None, picks: int = 0
) -> PolicyPlan:
    counts = tuple(Count(str(i), Expr("scalar", (), "prompt")) for i in range(4))
    part = ClassPlan("all", keep, ())
    facts = ModelFacts(layers, heads, heads, 4)
    return PolicyPlan(
        "test", "0" * 16, facts, (part,), ((0,) * heads,) * layers, counts,
        units=() if unit is None else (unit,), picks=picks,
    )  # fmt: skip


def decided(
    plan: PolicyPlan, lines: list[Line], now: int, numbers: list[list[int]], place: Place | None = None
) -> tuple[Winners, Winners]:
    """(kept, won) as (row, position)."""
    rows = as_rows(lines, now)
    counts = torch.tensor([*numbers, *[[0] * len(lines)] * (4 - len(numbers))])
    where = place or Place(0, tuple(x.layer for x in lines), tuple(x.head for x in lines), (0,) * len(lines))
    ends = torch.ones(len(lines), dtype=torch.bool)
    keep, won = keep_mask(plan, plan.classes[0], rows, counts, ends, Plainly(), where)
    found = [{(r, int(rows.pos[r, c])) for r, c in mask.nonzero().tolist()} for mask in (keep, won)]
    return found[0], found[1]


@st.composite
def some_lines(draw: st.DrawFn, layers: int, heads: int, now: int, alike: bool) -> list[Line]:
    numbers = st.sampled_from([-1.0, 0.0, 0.25, 0.5, 1.0, 2.0, math.nan])
    lines = []
    for layer in range(layers):
        held = draw(st.sets(st.integers(0, now), min_size=1))
        for head in range(heads):
            mine = held if alike else draw(st.sets(st.integers(0, now), min_size=1))
            folded = draw(st.booleans()) and not alike
            lines.append(Line(layer, head, {p: draw(numbers) for p in sorted(mine)}, folded))
    return lines


@st.composite
def terms(draw: st.DrawFn, count: int) -> Selection:
    rank = draw(st.sampled_from(["top", "bottom", "cover", "where"]))
    scope = "head" if rank == "where" else draw(st.sampled_from(["head", "shared", "across"]))
    part = draw(st.sampled_from([Fraction(1, 4), Fraction(1, 2), Fraction(9, 10), Fraction(1)]))
    by = (
        draw(st.sampled_from(["entry", "unit", "whole"]))
        if rank != "where"
        else draw(st.sampled_from(["entry", "unit"]))
    )
    bare = rank == "cover" or (rank != "where" and draw(st.booleans()))
    return Selection(
        rank,  # type: ignore[arg-type]
        SCORE,
        count=None if bare or rank == "where" else count,
        fraction=part if bare else None,
        scope=scope,  # type: ignore[arg-type]
        floor=draw(st.sampled_from([Fraction(0), Fraction(1, 5), Fraction(1)])) if scope == "across" else Fraction(0),
        unit="box" if by == "unit" else None,
        whole="box" if by == "whole" else None,
        layers=draw(st.sampled_from(["each", "across"])) if rank != "where" else "each",  # type: ignore[arg-type]
    )


@QUIET
@given(st.data())
def test_selections_are_what_plain_loops_say(data: st.DataObject) -> None:
    layers, heads = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2, 4]))
    now = data.draw(st.integers(0, 14))
    first, second = data.draw(terms(1)), data.draw(terms(2))
    alike = "shared" in (first.scope, second.scope)
    if alike:  # what shares has the same entries, so it cannot follow a selection that does not
        if first.rank == "where":
            first = replace(first, rank="top", count=1)
        first = replace(first, scope="shared", layers="each", floor=Fraction(0))
    lines = data.draw(some_lines(layers, heads, now, alike))
    unit = UnitPlan("box", data.draw(st.integers(1, 4)), data.draw(st.integers(0, 3)))
    by_layer = [[data.draw(st.integers(0, 5)) for _ in range(layers)] for _ in range(3)]
    numbers = [[line[x.layer] for x in lines] for line in by_layer]
    sink = numbers[0]
    plan = plan_of((Region("sink", 0), first, second), layers, heads, unit)
    taken = [{p for p in line.scores if p < sink[r]} for r, line in enumerate(lines)]
    won: Winners = set()
    for term in (first, second):
        box = unit if term.unit or term.whole else None
        found = truth(term, lines, taken, numbers[term.count or 0], now, box)
        for r, p in found:
            taken[r].add(p)
        won |= found
    kept = {(r, p) for r, mine in enumerate(taken) for p in mine}
    kept |= {(r, -1) for r, line in enumerate(lines) if line.folded}
    assert decided(plan, lines, now, numbers) == (kept, won)


@QUIET
@given(st.data())
def test_query_heads_choose_alone_and_the_kv_head_keeps_what_any_of_them_chose(data: st.DataObject) -> None:
    now, group, n = data.draw(st.integers(0, 12)), data.draw(st.integers(1, 4)), data.draw(st.integers(0, 5))
    values = st.sampled_from([0.0, 1.0, 2.0, math.nan])
    held = sorted(data.draw(st.sets(st.integers(0, now), min_size=1)))
    scores = [[data.draw(values) for _ in held] for _ in range(group)]
    whole = data.draw(st.booleans())
    rows = as_rows([Line(0, 0, dict.fromkeys(held, 0.0))], now)

    class Given(Plainly):
        @staticmethod
        def score(term, rows, candidates, unit):  # type: ignore[no-untyped-def]
            return torch.tensor([[[*line, 0.0] for line in scores]])

    term = Selection("top", SCORE, count=1, scope="query_head", whole="box" if whole else None)
    plan = plan_of((term,), 1, 1, UnitPlan("box", 1, 0))
    counts = torch.tensor([[0], [n], [0], [0]])
    keep, won = keep_mask(plan, plan.classes[0], rows, counts, torch.ones(1, dtype=torch.bool), Given())
    best: set[int] = set()
    for line in scores:
        best |= {p for _, p, _, _ in sorted(((s, p, 0, 0) for s, p in zip(line, held, strict=True)), key=better)[:n]}
    assert {int(p) for p in rows.pos[won]} == best == {int(p) for p in rows.pos[keep]}


def mixed(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16


def hashed(*values: int) -> int:
    x = values[0] % 2**32
    for value in values[1:]:
        x = mixed(x ^ value % 2**32)
    return x


@QUIET
@given(st.data())
def test_a_random_set_is_a_hash_of_positions_whatever_is_resident(data: st.DataObject) -> None:
    now, n, seed = data.draw(st.integers(0, 30)), data.draw(st.integers(0, 40)), data.draw(st.integers(0, 2**40))
    lines = data.draw(some_lines(2, 2, now, False))
    plan = plan_of((Region("random", 0, seed=seed),), 2, 2)
    kept, won = decided(plan, lines, now, [[n] * 4])
    expected = set()
    for r, line in enumerate(lines):
        drawn = sorted(range(now + 1), key=lambda p: (hashed(seed, line.layer, line.head, p), p))[:n]
        expected |= {(r, p) for p in line.scores if p in drawn} | ({(r, -1)} if line.folded else set())
    assert kept == expected
    assert not won


@pytest.mark.parametrize("kind", ["all", "sink", "recent", "stride", "prompt", "generated", "frozen", "newest"])
def test_an_entry_without_position_is_in_no_region_and_stays(kind: str) -> None:
    plan = plan_of((Region(kind, 0, "box"),), 1, 1, UnitPlan("box", 4, 0))
    kept, _ = decided(plan, [Line(0, 0, {2: 1.0, 5: 1.0}, folded=True)], 5, [[0 if kind != "stride" else 50]])
    assert (0, -1) in kept
    # It is no candidate either: of one entry to choose, the best that has a position wins, though its own is 9.
    plan = plan_of((Selection("top", SCORE, count=0),), 1, 1)
    kept, won = decided(plan, [Line(0, 0, {2: 1.0, 5: 2.0}, folded=True)], 5, [[1]])
    assert (kept, won) == ({(0, -1), (0, 5)}, {(0, 5)})


# -- slots between layers --------------------------------------------------------------------------------------------


@QUIET
@given(st.data())
def test_the_first_of_some_layers_decides_for_the_others(data: st.DataObject) -> None:
    layers, sharing, now = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3)), data.draw(st.integers(0, 12))
    scope = data.draw(st.sampled_from(["head", "shared"]))
    held = sorted(data.draw(st.sets(st.integers(0, now), min_size=1)))
    term = Selection("top", SCORE, count=1, scope=scope, layers="shared", sharing=sharing, pick=0)
    plan = plan_of((Region("sink", 0), term), layers, 2, picks=1)
    numbers = st.sampled_from([0.0, 1.0, 2.0, 3.0, math.nan])
    picked = torch.ones(1, 1, 2, 16, dtype=torch.int32)  # what an older decision has left
    lead: list[set[int]] = [set(), set()]
    for layer in range(layers):
        lines = [Line(layer, h, {p: data.draw(numbers) for p in held}) for h in range(2)]
        n, sink = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 2))
        place = Place(0, (layer, layer), (0, 1), (0, 0), picked)
        _, won = decided(plan, lines, now, [[sink, sink], [n, n]], place)
        if layer % sharing == 0:
            taken = [{p for p in held if p < sink} for _ in range(2)]
            own = truth(replace(term, layers="each"), lines, taken, [n, n], now, None)
            lead = [{p for r, p in own if r == h} for h in range(2)]
        assert won == {(h, p) for h in range(2) for p in lead[h] if p >= sink}


def test_a_head_follows_the_first_layer_of_its_group_that_holds_it() -> None:
    term = Selection("top", SCORE, count=1, layers="shared", sharing=2, pick=0)
    plan = replace(plan_of((term,), 2, 2, picks=1), class_of=((0, 1), (0, 0)))
    plan = replace(plan, classes=(*plan.classes, ClassPlan("rest", (Region("all"),), ())))
    picked = torch.zeros(1, 1, 2, 8, dtype=torch.int32)
    numbers = [[0], [1]]
    first = decided(plan, [Line(0, 0, {0: 1.0, 3: 2.0})], 4, numbers, Place(0, (0,), (0,), (0,), picked))
    assert first[1] == {(0, 3)}
    lines = [Line(1, 0, {0: 5.0, 3: 2.0}), Line(1, 1, {0: 5.0, 3: 2.0})]
    second = decided(plan, lines, 4, [[0, 0], [1, 1]], Place(0, (1, 1), (0, 1), (0, 0), picked))
    assert second[1] == {(0, 3), (1, 0)}  # head 1 has no layer before this one


def test_a_pick_holds_the_winners_until_it_is_filled_again() -> None:
    picked = torch.zeros(2, 2, 2, 8, dtype=torch.int32)
    fills = plan_of(
        (Selection("top", SCORE, count=0, pick=1), Selection("bottom", SCORE, count=0, pick=1)), 1, 2, picks=2
    )
    lines = [Line(0, 0, {0: 1.0, 2: 3.0, 3: 2.0}), Line(0, 1, {1: 1.0, 2: 0.0})]
    place = Place(0, (0, 0), (0, 1), (1, 1), picked)
    decided(fills, lines, 5, [[1, 1]], place)
    assert picked[1, 1].nonzero().tolist() == [[0, 0], [0, 2], [1, 1], [1, 2]]
    assert not picked[0].any() and not picked[:, 0].any()
    reads = plan_of((Region("picked", pick=1), Region("sink", 1)), 1, 2, picks=2)
    later = [Line(0, 0, {2: 0.0, 3: 0.0, 4: 0.0}), Line(0, 1, {0: 0.0, 1: 0.0, 7: 0.0})]
    assert decided(reads, later, 7, [[0, 0], [1, 1]], place)[0] == {(0, 2), (1, 0), (1, 1)}
    decided(fills, later, 7, [[1, 1]], replace(place, judged=torch.tensor([True, False])))
    assert picked[1, 1].nonzero().tolist() == [[0, 2], [0, 3], [1, 1], [1, 2]]
