"""Eviction after a step on the interpreter, against sorted lists; pages are counted every time."""

from __future__ import annotations

import random
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompile.kernels.choose import decode_spec, evict_spec
from kvcompile.kernels.plan import Expr, PolicyPlan, Region, Selection
from kvcompile.kernels.triton_backend.decode import DecodeStep
from kvcompile.kernels.triton_backend.evict import EvictStep
from tests.kernels.triton_interpreted.plans import ACC, H2O, Pools, attn, binary, module, named, plan, reduce, shuffled

CPU = torch.device("cpu")


def evict(p: PolicyPlan, place: Path, pools: Pools, batch: int, counts: list[int], now: int, **over: object) -> None:
    step = EvictStep.prepare(module(p, evict_spec(p, 0), place), p, 0, batch, 256, CPU)
    numbers = torch.tensor(counts)[None, :, None].expand(p.facts.layers, len(counts), batch).contiguous()
    given_ = {"fires": torch.ones(batch, dtype=torch.uint8), "prompt": torch.full((batch,), 10), "score": None} | over
    step(pools, numbers, now=torch.full((batch,), now), **given_)  # type: ignore[arg-type]


def best(scored: list[tuple[float, int, int]], n: int) -> list[tuple[float, int, int]]:
    """The n best of (score, position, head): NaN last, ties to the older, then the lower head."""
    return sorted(scored, key=lambda x: (x[0] != x[0], -x[0] if x[0] == x[0] else 0.0, x[1], x[2]))[:n]


@settings(max_examples=8, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), n=st.integers(0, 60), heavy=st.integers(0, 30), ordered=st.booleans())
def test_regions_and_winners_stay_and_nothing_else(tmp_path_factory, seed, n, heavy, ordered) -> None:  # type: ignore[no-untyped-def]
    keep = (Region("recent", 0), Region("frozen"), Selection("top", ACC, 1))
    p = plan(keep, (H2O,), layers=1, kv_heads=2, by_position=ordered)
    pools = Pools(2, 8, 64, seed=seed)
    dice = random.Random(seed)
    for row, count in enumerate((n, dice.randrange(61))):
        places = list(range(count)) if ordered else shuffled(count, seed + row)
        pools.fill(row, places, [int(dice.random() < 0.2) for _ in range(count)], ties=True)
        if count > 3:
            pools.state[0, pools.slots(row)[dice.randrange(count)]] = float("nan")
    before = [pools.entries(row) for row in (0, 1)]
    evict(p, tmp_path_factory.mktemp("k"), pools, 1, [5, heavy], now=59)
    for row in (0, 1):
        held = [e for e in before[row] if e[0] > 54 or e[1]]
        rest = [e for e in before[row] if e not in held]
        won = {at for _, at, _ in best([(e[4][0], e[0], 0) for e in rest], heavy)}
        want = {e[0]: (*e[:1], int(e[1] or e[0] in won), *e[2:]) for e in before[row] if e in held or e[0] in won}
        got = pools.entries(row)
        assert [e[0] for e in got] == sorted(want) if ordered else {e[0] for e in got} == set(want)
        assert len(got) == len(want)
        for entry in got:
            assert entry[:4] == want[entry[0]][:4]
            assert repr(entry[4]) == repr(want[entry[0]][4])  # NaN is NaN
    pools.assert_pages_conserved()


@settings(max_examples=6, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), n=st.integers(0, 20), floor=st.sampled_from(["0", "1/5", "1"]))
def test_heads_compete_with_floors(tmp_path_factory, seed, n, floor) -> None:  # type: ignore[no-untyped-def]
    keep = (Region("recent", 0), Selection("top", ACC, 1, scope="across", floor=Fraction(floor)))
    p = plan(keep, (H2O,), layers=2, kv_heads=3, class_of=((0, 0, 0), (0, 1, 0)))  # layer 1 has a head that keeps all
    pools = Pools(6, 8, 64, seed=seed)
    for row in range(6):
        pools.fill(row, shuffled(random.Random(seed + row).randrange(50), row), ties=True)
    before = [pools.entries(row) for row in range(6)]
    evict(p, tmp_path_factory.mktemp("k"), pools, 1, [4, n], now=49)
    for heads in ((0, 1, 2), (3, 5)):
        left, pool, want = 0, [], {row: {e[0] for e in before[row] if e[0] > 45} for row in heads}
        for row in heads:
            ranked = best([(e[4][0], e[0], row) for e in before[row] if e[0] <= 45], 100)
            sure = int(n * Fraction(floor))
            want[row] |= {at for _, at, _ in ranked[:sure]}
            pool += ranked[sure:]
            left += n - len(ranked[:sure])
        for _, at, row in best(pool, left):
            want[row].add(at)
        for row in heads:
            assert {e[0] for e in pools.entries(row)} == want[row]
    assert pools.entries(4) == before[4]
    pools.assert_pages_conserved()


@pytest.mark.parametrize("floor", ["0", "1/5", "1/2"])
def test_a_fraction_of_competing_heads_is_truncated_once(tmp_path: Path, floor: str) -> None:
    keep = (Region("recent", 0), Selection("top", ACC, fraction=Fraction(1, 2), scope="across", floor=Fraction(floor)))
    p = plan(keep, (H2O,), layers=1, kv_heads=3, class_of=((0, 0, 0),))
    pools = Pools(3, 8, 64)
    sizes = (15, 27, 33)
    for row, n in enumerate(sizes):
        pools.fill(row, shuffled(n, row), ties=True)
    before = [pools.entries(row) for row in range(3)]
    evict(p, tmp_path, pools, 1, [4, 0], now=36)
    ranked = [best([(e[4][0], e[0], row) for e in before[row] if e[0] <= 32], 99) for row in range(3)]
    total = (15 + 27 + 33) // 2
    assert total != sum(n // 2 for n in sizes), "truncation must show"
    sure = int(total * Fraction(floor) / 3)
    want = [x for row in ranked for x in row[:sure]]
    want += best([x for row in ranked for x in row[sure:]], total - len(want))
    for row in range(3):
        assert {e[0] for e in pools.entries(row)} == {at for _, at, head in want if head == row}
    pools.assert_pages_conserved()


def test_sharers_decide_by_their_mean_and_stay_aligned(tmp_path: Path) -> None:
    keep = (Region("sink", 0), Selection("top", ACC, 1, scope="shared"))
    p = plan(keep, (H2O,), layers=2, kv_heads=2)
    pools = Pools(8, 8, 64)
    for row in range(8):
        pools.fill(row, shuffled(45, row // 2), ties=True)
    before = [pools.entries(row) for row in range(8)]
    evict(p, tmp_path, pools, 2, [3, 9], now=44)
    for first in range(0, 8, 2):
        mean = [((a[4][0] + b[4][0]) / 2, a[0], 0) for a, b in zip(before[first], before[first + 1], strict=True)]
        want = {0, 1, 2} | {at for _, at, _ in best([m for m in mean if m[1] >= 3], 9)}
        rows = [pools.entries(first), pools.entries(first + 1)]
        assert {e[0] for e in rows[0]} == want
        assert [e[0] for e in rows[0]] == [e[0] for e in rows[1]]
    pools.assert_pages_conserved()


@pytest.mark.parametrize("kind", ["sink", "recent", "stride", "prompt", "generated"])
def test_regions_by_position(tmp_path: Path, kind: str) -> None:
    p = plan((Region(kind, None if kind in ("prompt", "generated") else 0),), layers=1, kv_heads=1)
    pools = Pools(1, 8, 64, states=0)
    pools.fill(0, shuffled(40, 1))
    evict(p, tmp_path, pools, 1, [6, 0], now=39)
    rule = {
        "sink": lambda at: at < 6,
        "recent": lambda at: at > 33,
        "stride": lambda at: at % 6 == 0,
        "prompt": lambda at: at < 10,
        "generated": lambda at: at >= 10,
    }[kind]
    assert {e[0] for e in pools.entries(0)} == {at for at in range(40) if rule(at)}
    pools.assert_pages_conserved()


def test_bottom_of_a_formula_and_a_fraction_of_the_candidates(tmp_path: Path) -> None:
    age = binary("-", named("scalar", "now"), named("field", "pos"))
    score = binary("*", ACC, Expr("unary", (binary("+", age, named("scalar", "len")),), "sqrt"))
    p = plan((Selection("bottom", score, None, fraction=Fraction(3, 10)),), (H2O,), layers=1, kv_heads=1)
    pools = Pools(1, 8, 64)
    pools.fill(0, shuffled(47, 2))
    before = pools.entries(0)
    evict(p, tmp_path, pools, 1, [0, 0], now=60)
    ranked = sorted(before, key=lambda e: (e[4][0] * (60 - e[0] + 47) ** 0.5, e[0]))
    assert {e[0] for e in pools.entries(0)} == {e[0] for e in ranked[:14]}


def test_sequences_that_do_not_fire_are_left_alone(tmp_path: Path) -> None:
    p = plan((Region("recent", 0),), layers=1, kv_heads=1)
    pools = Pools(2, 8, 64, states=0)
    for row in (0, 1):
        pools.fill(row, shuffled(40, row))
    before = pools.entries(1)
    evict(p, tmp_path, pools, 2, [4, 0], now=39, fires=torch.tensor([1, 0], dtype=torch.uint8))
    assert {e[0] for e in pools.entries(0)} == {36, 37, 38, 39}
    assert pools.entries(1) == before
    pools.assert_pages_conserved()


def test_hole_filling_moves_no_more_than_it_must(tmp_path: Path) -> None:
    p = plan((Region("frozen"),), layers=1, kv_heads=1)
    pools = Pools(1, 8, 64, states=0)
    pools.fill(0, list(range(40)), [0 if at in (3, 17, 38) else 1 for at in range(40)])
    evict(p, tmp_path, pools, 1, [0, 0], now=39)
    places = [e[0] for e in pools.entries(0)]
    assert [i for i, at in enumerate(places) if at != i] == [3, 17]
    assert {places[3], places[17]} == {37, 39}


@pytest.mark.parametrize("policy", ["h2o", "tova", "streaming"])
def test_steps_and_evictions_in_turn(tmp_path: Path, policy: str) -> None:
    """Six steps of two layers and two sequences against a list of entries per row."""
    keeps = {
        "h2o": (Region("recent", 0), Selection("top", ACC, 1)),
        "tova": (Selection("top", reduce("mean", "h", reduce("sum", "q", attn("last", 1))), 1, scope="shared"),),
        "streaming": (Region("sink", 0), Region("recent", 1)),
    }
    counts = {"h2o": [6, 9], "tova": [0, 15], "streaming": [3, 12]}[policy]
    states = (H2O,) if policy == "h2o" else ()
    p = plan(keeps[policy], states, layers=2, kv_heads=2, group=2)
    pools = Pools(8, 8, 64, states=len(states))
    for row in range(8):
        pools.fill(row, list(range(15 + row // 2)) if policy == "tova" else list(range(9 + row)))
    # Of each row: [position, key, value, accumulated attention] of each entry.
    model: dict[int, list[list[torch.Tensor]]] = {
        row: [
            [pools.pos[s].clone(), pools.k[s].clone(), pools.v[s].clone(), pools.state[:, s].double().sum()] for s in at
        ]
        for row, at in ((row, pools.slots(row).tolist()) for row in range(8))
    }
    decode = DecodeStep.prepare(module(p, decode_spec(p), tmp_path), 2, 4, 128, CPU)
    drop = EvictStep.prepare(module(p, evict_spec(p, 0), tmp_path), p, 0, 2, 128, CPU)
    numbers = torch.tensor(counts)[None, :, None].expand(2, 2, 2).contiguous()
    yes = torch.ones(2, dtype=torch.uint8)
    for t in range(6):
        now = torch.tensor([20 + t, 30 + t])
        scores: dict[int, dict[int, float]] = {}
        for layer in range(2):
            q, k, v = pools.randn(2, 4, 64), pools.randn(2, 2, 64), pools.randn(2, 2, 64)
            out, _ = decode(q, k, v, pools, now, yes, torch.tensor([layer]), 0.125)
            for b in range(2):
                for h in range(2):
                    row = (layer * 2 + b) * 2 + h
                    model[row].append([now[b], k[b, h], v[b, h], torch.zeros((), dtype=torch.float64)])
                    keys = torch.stack([e[1] for e in model[row]]).double()
                    probs = (q[b, 2 * h : 2 * h + 2].double() @ keys.T * 0.125).softmax(1)
                    want = probs @ torch.stack([e[2] for e in model[row]]).double()
                    assert (out[b, 0, 2 * h : 2 * h + 2].double() - want).abs().max() < 1e-5
                    for entry, grown in zip(model[row], probs.mean(0), strict=True):
                        entry[3] = entry[3] + grown
                    scores[row] = {int(e[0]): float(x) for e, x in zip(model[row], probs.mean(0), strict=True)}
        drop(pools, numbers, yes, now, now, decode.score)
        for row, entries in model.items():
            here = int(now[row // 2 % 2])
            if policy == "streaming":
                kept = {int(e[0]) for e in entries if e[0] < 3 or e[0] > here - 12}
            elif policy == "h2o":
                kept = {int(e[0]) for e in entries if e[0] > here - 6}
                rest = [(float(e[3]), int(e[0]), 0) for e in entries if int(e[0]) not in kept]
                kept |= {at for _, at, _ in best(rest, 9)}
            else:
                pair = (row - row % 2, row - row % 2 + 1)
                mean = [((scores[pair[0]][at] + scores[pair[1]][at]) / 2, at, 0) for at in scores[row]]
                kept = {at for _, at, _ in best(mean, 15)}
            model[row] = [e for e in entries if int(e[0]) in kept]
            assert {e[0] for e in pools.entries(row)} == kept
        pools.assert_pages_conserved()
