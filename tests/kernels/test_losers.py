"""What merging and folding leave in the pools, against plain loops over the entries of a row."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvcompile.kernels.layout import Site, compact
from kvcompile.kernels.losers import settle
from kvcompile.kernels.plan import Expr, Loser
from tests.kernels.rows import Entry, entries, plan_of, rope_table, site_of, turned

SIM, COUNTS = Expr("sim", (), None, "i"), Expr("field", (), "count", "i")
DROP, FOLD = Loser("drop"), Loser("fold", "mean")
quick = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def number(x: float) -> Expr:
    return Expr("const", (), Fraction(x))


def binary(op: str, a: Expr, b: Expr) -> Expr:
    return Expr("binary", (a, b), op, "i")


MEAN_SIM = Expr("reduce", (SIM,), ("mean", "i"))
D2O = Loser(
    "merge", "cos", "k", when=binary(">=", SIM, Expr("ema", (MEAN_SIM,), (0, Fraction(1, 2)))), weight=SIM
)  # fmt: skip


# -- the truth ---------------------------------------------------------------------------------------------------------


def likeness(loser: Loser, a: Entry, b: Entry) -> float:
    if loser.fn == "pos":
        return -abs(a.pos - b.pos)
    x, y = ((e.k if loser.of == "k" else e.v).double() for e in (a, b))
    dot = float((x * y).sum())
    norms = math.sqrt(float((x * x).sum())) * math.sqrt(float((y * y).sum()))
    return dot if loser.fn == "dot" else dot / norms if norms else 0.0


def merged(loser: Loser, losers: list[Entry], row: list[Entry], takes, weight) -> tuple[dict[int, list], list[Entry]]:
    """position of a survivor -> what it takes, as (entry, weight); and who is refused. takes: of (sim, sims)."""
    old = sorted((e for e in row if e.pos >= 0), key=lambda e: e.pos)
    if not old:
        return {}, losers
    best = []
    for e in losers:
        sims = [likeness(loser, e, s) for s in old]
        best.append((max(sims), old[sims.index(max(sims))].pos))
    into: dict[int, list] = {}
    left = []
    for e, (sim, pos) in zip(losers, best, strict=True):
        if takes(sim, [s for s, _ in best]):
            into.setdefault(pos, []).append((e, max(0.0, weight(sim, e))))
        else:
            left.append(e)
    return into, left


def after_merge(e: Entry, gains: list) -> Entry:
    k, v, total = e.k.double(), e.v.double(), 1.0
    for other, w in gains:
        k, v, total = k + w * other.k.double(), v + w * other.v.double(), total + w
    return Entry(e.pos, k / total, v / total, e.count + sum(other.count for other, _ in gains))


def folded(members: list[Entry]) -> Entry:
    total = sum(e.count for e in members)
    k = sum(e.count * e.k.double() for e in members) / total
    v = sum(e.count * e.v.double() for e in members) / total
    return Entry(-1, k, v, total)


def low_frequencies(x: torch.Tensor, m: int) -> torch.Tensor:
    """The formula of the DCT-II and of its inverse, term by term, in float64."""
    n = len(x)
    spectrum = torch.zeros(m, x.shape[1]).double()
    for f in range(m):
        for j in range(n):
            spectrum[f] += x[j].double() * math.cos(math.pi * (2 * j + 1) * f / (2 * n))
        spectrum[f] *= math.sqrt((1 if f == 0 else 2) / n)
    out = torch.zeros(m, x.shape[1]).double()
    for j in range(m):
        for f in range(m):
            level = math.sqrt((1 if f == 0 else 2) / m)
            out[j] += level * spectrum[f] * math.cos(math.pi * (2 * j + 1) * f / (2 * m))
    return out * math.sqrt(m / n)


# -- the product -------------------------------------------------------------------------------------------------------


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def rows(draw: st.DrawFn, fold: bool = False) -> tuple[list[list[Entry]], list[list[bool]], bool]:
    """Two rows in some order, what of them is kept, and whether they lie in pages."""
    out, keep = [], []
    for r in range(2):
        n = draw(st.integers(0, 12), "entries")
        order = draw(st.permutations(range(n)), "order")
        x = noise(draw(st.integers(0, 99), "seed"), n, 2, 8)
        row = [Entry(3 * p + r, x[p, 0], x[p, 1], draw(st.integers(1, 5))) for p in order]
        if fold and draw(st.booleans(), "a fold entry"):
            row.insert(draw(st.integers(0, n)), Entry(-1, *noise(7, 2, 8), draw(st.integers(1, 40))))
        out.append(row)
        keep.append([draw(st.booleans()) for _ in row])
    return out, keep, draw(st.booleans(), "paged")


def run(losers: tuple[Loser, ...], state: list[list[Entry]], keep: list[list[bool]], paged: bool) -> Site:
    plan = plan_of(losers)
    site = site_of(plan, state, paged=paged)
    decide(site, losers, keep)
    return site


def decide(site: Site, losers: tuple[Loser, ...], keep: list[list[bool]]) -> None:
    plan = plan_of(losers)
    index = torch.arange(2)
    width = int(site.length.max())
    mask = torch.tensor([row + [False] * (width - len(row)) for row in keep]).reshape(2, width).bool()
    stays = settle(plan, plan.classes[0], site, index, mask)
    assert stays.shape == mask.shape and not bool((stays & (torch.arange(width) >= site.length[:, None])).any())
    compact(site, index, stays, False)


def same(site: Site, row: int, truth: list[Entry]) -> None:
    found = sorted(entries(site, row), key=lambda e: e.pos)
    truth = sorted(truth, key=lambda e: e.pos)
    assert [e.pos for e in found] == [e.pos for e in truth]
    assert [e.count for e in found] == pytest.approx([e.count for e in truth])
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a.k.double(), b.k.double(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a.v.double(), b.v.double(), rtol=1e-4, atol=1e-5)


def split(row: list[Entry], keep: list[bool]) -> tuple[list[Entry], list[Entry]]:
    """(stays, loses in position order): an entry without position never loses."""
    stays = [e for e, kept in zip(row, keep, strict=True) if kept or e.pos < 0]
    return stays, sorted((e for e in row if all(e is not s for s in stays)), key=lambda e: e.pos)


@pytest.mark.parametrize(
    ("fn", "of"), [("cos", "k"), ("dot", "k"), ("cos", "v"), ("pos", "")], ids=["cos k", "dot k", "cos v", "distance"]
)
@pytest.mark.parametrize("weighted", [False, True])
@quick
@given(drawn=rows())
def test_merge_goes_into_the_nearest_survivor(fn, of, weighted, drawn):
    state, keep, paged = drawn
    loser = Loser("merge", fn, of, weight=COUNTS if weighted else None)
    site = run((loser, DROP), state, keep, paged)
    for r in range(2):
        stays, lost = split(state[r], keep[r])
        into, _ = merged(loser, lost, stays, lambda *_: True, lambda _, e: e.count if weighted else 1.0)
        same(site, r, [after_merge(e, into.get(e.pos, [])) for e in stays])


@quick
@given(drawn=rows(), threshold=st.sampled_from([-0.25, 0.125, 0.5]))
def test_what_when_refuses_goes_to_the_next_action(drawn, threshold):
    """By keys above the threshold, the rest by position where it stands for several tokens, the rest is folded."""
    state, keep, paged = drawn
    first = Loser("merge", "cos", "k", when=binary(">", SIM, number(threshold)), weight=SIM)
    second = Loser("merge", "pos", "", when=binary(">", COUNTS, number(2)))
    site = run((first, second, FOLD), state, keep, paged)
    for r in range(2):
        stays, lost = split(state[r], keep[r])
        by_key, left = merged(first, lost, stays, lambda sim, _: sim > threshold, lambda sim, _: sim)
        by_place: dict[int, list] = {}
        for e in left if stays else ():
            if e.count > 2:
                gap = [abs(e.pos - s.pos) for s in sorted(stays, key=lambda s: s.pos)]
                into = sorted(stays, key=lambda s: s.pos)[gap.index(min(gap))]
                by_place.setdefault(into.pos, []).append((e, 1.0))
        taken = [id(e) for gains in by_place.values() for e, _ in gains]
        left = [e for e in left if id(e) not in taken]
        truth = [after_merge(e, by_key.get(e.pos, []) + by_place.get(e.pos, [])) for e in stays]
        same(site, r, truth + ([folded(left)] if left else []))


@pytest.mark.parametrize("paged", [False, True])
def test_d2o_merges_above_a_mean_that_each_row_remembers(paged):
    """Three decisions: the threshold is first the mean likeness of the losers, then half the old and half the new."""
    state = [[Entry(p, *noise(50 * r + p, 2, 8)) for p in range(20)] for r in range(2)]
    site = site_of(plan_of((D2O, DROP)), state, paged=paged)
    before: list[float | None] = [None, None]
    for lost in ({3, 4, 9, 11}, {0, 7}, set(), {13, 14, 15}):
        keep = [[e.pos not in lost for e in entries(site, r)] for r in range(2)]
        truth = []
        for r in range(2):
            stays, losers = split(entries(site, r), keep[r])
            if losers:
                old = before[r]

                def takes(sim, sims, old=old):
                    mean = sum(sims) / len(sims)
                    return sim >= (mean if old is None else 0.5 * old + 0.5 * mean)

                into, _ = merged(D2O, losers, stays, takes, lambda sim, _: sim)
                sims = [max(likeness(D2O, e, s) for s in stays) for e in losers]
                mean = sum(sims) / len(sims)
                before[r] = mean if old is None else 0.5 * old + 0.5 * mean
                stays = [after_merge(e, into.get(e.pos, [])) for e in stays]
            truth.append(stays)
        decide(site, (D2O, DROP), keep)
        for r in range(2):
            same(site, r, truth[r])
        assert site.scalar[0].tolist() == pytest.approx(before, rel=1e-5)
    assert site.scalar[1].isnan().all()


@quick
@given(drawn=rows(fold=True))
def test_fold_mean_weighs_by_counts_and_is_one_entry_for_ever(drawn):
    state, keep, paged = drawn
    site = run((FOLD,), state, keep, paged)
    for r in range(2):
        stays, lost = split(state[r], keep[r])
        members = [e for e in stays if e.pos < 0] + lost
        truth = [e for e in stays if e.pos >= 0] + ([folded(members)] if lost else [e for e in stays if e.pos < 0])
        same(site, r, truth)
        marks = [int(site.frozen[s]) for s in site.slots(r, 0, int(site.length[r])).tolist()]
        assert marks == [0] * len(truth)


def test_a_fold_entry_is_no_survivor_and_no_row_is_without_tokens():
    """Everything but the fold entry is lost: merging finds nobody, and the fold takes all of it."""
    row = [Entry(-1, *noise(1, 2, 8), 5.0), *(Entry(p, *noise(2 + p, 2, 8)) for p in range(6))]
    site = run((Loser("merge", "cos", "k"), FOLD), [row, []], [[False] * 7, []], False)
    same(site, 0, [folded(row)])
    assert entries(site, 0)[0].count == 11


@pytest.mark.parametrize("part", [Fraction(1, 2), Fraction(1, 3), Fraction(1)])
@quick
@given(drawn=rows())
def test_fold_dct_keeps_the_lowest_frequencies(part, drawn):
    state, keep, paged = drawn
    site = run((Loser("fold", "dct", part=part),), state, keep, paged)
    for r in range(2):
        stays, lost = split(state[r], keep[r])
        n = len(lost)
        m = max(1, int(n * part)) if n else 0
        k, v = (low_frequencies(torch.stack([getattr(e, x) for e in lost]), m) if n else None for x in "kv")
        count = sum(e.count for e in lost)
        same(site, r, stays + [Entry(lost[j * n // m].pos, k[j], v[j], count / m) for j in range(m)])


def test_dct_of_a_long_row_and_of_a_level():
    """4080 entries to half: a slow wave stays what it is, sampled at half the rate; a constant stays itself."""
    at = torch.arange(4080).float() + 0.5
    wave = torch.cos(math.pi * at / 4080 * 5)
    x = torch.stack([wave, torch.full_like(wave, 3.0)] * 4, 1)
    row = [Entry(p, x[p], x[p]) for p in range(4080)]
    site = run((Loser("fold", "dct", part=Fraction(1, 2)),), [row, []], [[False] * 4080, []], False)
    found = torch.stack([e.k for e in sorted(entries(site, 0), key=lambda e: e.pos)])
    assert sorted(e.pos for e in entries(site, 0)) == list(range(0, 4080, 2))
    shorter = torch.cos(math.pi * (torch.arange(2040).float() + 0.5) / 2040 * 5)
    torch.testing.assert_close(found[:, 0], shorter, rtol=0, atol=1e-4)
    torch.testing.assert_close(found[:, 1], torch.full_like(shorter, 3.0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("run_length", [1, 2, 3, 5])
@quick
@given(drawn=rows())
def test_fold_pool_takes_means_of_runs(run_length, drawn):
    state, keep, paged = drawn
    site = run((Loser("fold", "pool", part=Fraction(1, run_length)),), state, keep, paged)
    for r in range(2):
        stays, lost = split(state[r], keep[r])
        runs = [lost[i : i + run_length] for i in range(0, len(lost), run_length)]
        left = [
            Entry(
                lost[j * len(lost) // len(runs)].pos,
                sum(e.k.double() for e in one) / len(one),
                sum(e.v.double() for e in one) / len(one),
                sum(e.count for e in one),
            )
            for j, one in enumerate(runs)
        ]
        same(site, r, stays + left)


def test_merges_of_one_decision_read_what_was_there_before_it():
    """Two actions put losers into the same survivor: both weigh against its own key, not against a mean of it."""
    row = [Entry(p, torch.full((8,), float(p + 1)), torch.full((8,), float(p))) for p in range(3)]
    near = Loser("merge", "pos", "", when=binary("<", COUNTS, number(2)))
    row[2] = replace(row[2], count=4.0)
    site = run((near, Loser("merge", "dot", "k")), [row, []], [[True, False, False], []], False)
    (only,) = entries(site, 0)
    assert only.k.tolist() == pytest.approx([2.0] * 8) and only.v.tolist() == pytest.approx([1.0] * 8)
    assert only.count == 6


NAN = Expr("unary", (number(-1),), "log")


@pytest.mark.parametrize(
    ("weight", "value"), [(None, 4 / 3), (number(-1), 1.0), (NAN, 1.0), (binary("/", number(1), number(0)), 1.0)]
)
def test_broken_numbers_do_no_harm(weight, value):
    """A key of zeros is like nothing (0), one with NaN draws no loser; weights below 0, NaN and 1 / 0 count 0."""
    ones, zeros, broken = torch.ones(8), torch.zeros(8), torch.full((8,), float("nan"))
    row = [Entry(0, broken, ones), Entry(1, -ones, ones), Entry(2, ones, 2 * ones), Entry(3, zeros, ones)]
    site = run((Loser("merge", "cos", "k", weight=weight),), [row, []], [[True, True, False, False], []], False)
    kept = {e.pos: e for e in entries(site, 0)}
    assert kept[0].k.isnan().all() and (kept[0].count, kept[1].count) == (1, 3)
    assert kept[1].v.tolist() == pytest.approx([value] * 8)


def test_a_condition_that_is_not_a_number_refuses():
    row = [Entry(p, torch.ones(8), torch.ones(8)) for p in range(4)]
    for when in (NAN, binary(">", NAN, number(0)), number(0)):
        losers = (Loser("merge", "cos", "v", when=when), DROP)
        site = run(losers, [row, []], [[True, True, False, False], []], False)
        assert [e.count for e in entries(site, 0)] == [1, 1]


def test_sixteen_bit_entries_are_rounded_once():
    losers = (Loser("merge", "pos", ""),)
    plan = plan_of(losers, dtype="bfloat16")
    row = [Entry(p, noise(p, 8).bfloat16(), noise(9 + p, 8).bfloat16()) for p in range(40)]
    site = site_of(plan, [row, []])
    keep = torch.zeros(2, 40, dtype=torch.bool)
    keep[0, 0] = True
    compact(site, torch.arange(2), settle(plan, plan.classes[0], site, torch.arange(2), keep), False)
    exact = sum(e.k.double() for e in row) / 40
    torch.testing.assert_close(entries(site, 0)[0].k, exact.bfloat16(), rtol=1e-2, atol=0)


def test_under_compact_positions_likeness_is_that_of_keys_as_they_are_read():
    """Stored keys are all alike but for their length; turned by their places they are not."""
    losers = (Loser("merge", "cos", "k"),)
    plan = plan_of(losers, compact=True)
    key = noise(5, 8)
    row = [Entry(p, key * (1 + p), noise(p, 8)) for p in (7, 2, 30, 11, 90)]
    order = sorted(e.pos for e in row)
    site = site_of(plan, [row, []], rope=rope_table(8, 8))
    keep = torch.tensor([[True, False, True, False, True], [False] * 5])
    compact(site, torch.arange(2), settle(plan, plan.classes[0], site, torch.arange(2), keep), False)
    survivors = [e for e in row if e.pos in (7, 30, 90)]
    counts = {e.pos: 1 for e in survivors}
    for lost in (2, 11):
        mine = turned(key, order.index(lost))
        sims = {e.pos: float(torch.cosine_similarity(mine, turned(key, order.index(e.pos)), 0)) for e in survivors}
        counts[max(sims, key=lambda pos: sims[pos])] += 1
    assert {e.pos: e.count for e in entries(site, 0)} == counts
