"""Decisions that wait for all layers, measured shares, conditions, several rules for the same rows, slots: the parts
that end-to-end tests do not see one by one. Truth: plain loops, or the same thing asked another way."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvcompile
from kvcompile import reserve
from kvcompile.extents import ExtentStore
from kvcompile.kernels import evict, span
from kvcompile.kernels.layout import Clock, Site, write
from kvcompile.kernels.plan import (
    ClassPlan,
    Count,
    Expr,
    ModelFacts,
    PolicyPlan,
    Region,
    Selection,
    Share,
    StatePlan,
    Trigger,
)
from kvcompile.kernels.shares import by_cover, by_softmax
from kvcompile.pages import PagedStore
from kvcompile.sequences import Piece, Sequences
from tests.driving import drive, one_by_one
from tests.models import random_model, tokens

QUIET = settings(max_examples=150, deadline=None, derandomize=True)
SCORE = Expr("state", (), "s", "i")
ZERO = Expr("const", (), Fraction(0))
CPU = torch.device("cpu")


def const(x: int | Fraction) -> Expr:
    return Expr("const", (), Fraction(x))


def scalar(name: str) -> Expr:
    return Expr("scalar", (), name)


def binary(op: str, a: Expr, b: Expr) -> Expr:
    return Expr("binary", (a, b), op)


# -- shares ----------------------------------------------------------------------------------------------------------

VALUES = st.sampled_from([0.0, 0.5, 1.0, 1.0, 3.0, -2.0, math.nan, -math.inf])


@QUIET
@given(st.lists(VALUES, min_size=1, max_size=6), st.integers(0, 50))
def test_a_share_by_softmax_keeps_its_sum_and_follows_the_numbers(values: list[float], total: int) -> None:
    parts = by_softmax(total, values)
    weights = [0.0 if math.isnan(x) else math.exp(x) for x in values]
    weights = weights if sum(weights) else [1.0] * len(values)
    exact = [total * len(values) * w / sum(weights) for w in weights]
    assert sum(parts) == total * len(values)
    assert all(math.floor(x - 1e-9) <= part <= math.ceil(x + 1e-9) for part, x in zip(parts, exact, strict=True))
    for x in set(values):
        same = [part for part, y in zip(parts, values, strict=True) if x == y]
        assert same == sorted(same, reverse=True)  # remainders go to lower layers first


@QUIET
@given(st.lists(st.lists(VALUES, min_size=1, max_size=7), min_size=1, max_size=4), st.integers(0, 9))
def test_a_share_by_cover_takes_what_needs_the_least_mass(layers: list[list[float]], total: int) -> None:
    needs = []
    for layer, scores in enumerate(layers):
        mass = [x if x > 0 else 0.0 for x in scores]
        mass = [x / sum(mass) for x in mass] if sum(mass) else [1 / len(mass)] * len(mass)
        before = 0.0
        for k, x in enumerate(sorted(mass, reverse=True)):
            needs.append((before, layer, k))
            before += x
    taken = sorted(needs)[: total * len(layers)]
    found = by_cover(total, [torch.tensor(scores) for scores in layers])
    assert list(found) == [sum(layer == i for _, layer, _ in taken) for i in range(len(layers))]


# -- what the host counts --------------------------------------------------------------------------------------------


def plan_of(*classes: ClassPlan, layers: int = 2, heads: int = 1, **fields: object) -> PolicyPlan:
    facts = ModelFacts(layers, heads, heads, 4)
    return PolicyPlan("test", "0" * 16, facts, classes, ((0,) * heads,) * layers, **fields)  # type: ignore[arg-type]


def test_each_condition_has_a_bit_of_its_own_and_the_unconditioned_share_one() -> None:
    one = const(1)
    triggers = (Trigger("step"), Trigger("every", 2, cond=one), Trigger("prefill.end"), Trigger("when", cond=one))
    plan = plan_of(ClassPlan("all", (Region("sink", 0),), triggers), counts=(Count("1", one),))
    sequences = Sequences(plan, 2)
    sequences.begin_prefill([3, 3])
    pieces = [Piece(3, ends=True), Piece(2)]
    assert sequences.fires(pieces, None) == [[1 | 4, 4]]
    sequences.advance(pieces, sequences.fires(pieces, None))
    steps = [Piece(1, step=True), Piece(0)]
    fired = []
    for _ in range(4):
        fires = sequences.fires(steps, None)
        fired.append(fires)
        sequences.advance(steps, fires)
    assert fired == [[[5, 0]], [[7, 0]], [[5, 0]], [[7, 0]]]
    with pytest.raises(kvcompile.KvCompileError, match="six"):
        Sequences(replace(plan, classes=(replace(plan.classes[0], triggers=(Trigger("when", cond=one),) * 8),)), 1)


def test_filled_counts_from_the_last_decision_of_any_trigger_and_over_prompts() -> None:
    triggers = (Trigger("filled", 5), Trigger("every", 4))
    plan = plan_of(ClassPlan("all", (Region("sink", 0),), triggers), counts=(Count("1", const(1)),))
    sequences = Sequences(plan, 1)
    fired = []
    for piece in [Piece(3, ends=True), *[Piece(1, step=True)] * 5, Piece(3, ends=True), Piece(4, ends=True)]:
        if piece.ends:
            sequences.begin_prefill([piece.new])
        fires = sequences.fires([piece], None)
        fired.append(fires[0][0])
        sequences.advance([piece], fires)
    #             3 in  4  5 in  1  2 in, 4th step  1 in  4 in  8 in
    assert fired == [0, 0, 1, 0, 1, 0, 0, 1]


def test_measured_shares_hold_until_the_next_prompt_ends() -> None:
    share = Share("b", const(4), "softmax", score=const(0))
    term = Selection("top", SCORE, count=0)
    plan = plan_of(
        ClassPlan("all", (term, Region("recent", 1)), (Trigger("chunk"), Trigger("prefill.end"))),
        counts=(Count("b / 2", binary("/", Expr("share", (), 0), const(2))), Count("len", scalar("len"))),
        shares=(share,),
    )
    sequences = Sequences(plan, 2)
    sequences.begin_prefill([6, 6])
    # [layer][count, then share][sequence]; a count that reads len is the logical length, which no row exceeds
    assert sequences.numbers([Piece(6, ends=True), Piece(2)])[1].tolist() == [[[2, 2], [6, 2], [4, 4]]] * 2
    parts = torch.tensor([[[7, 0], [1, 0]]])
    sequences.measure(parts, [Piece(6, ends=True), Piece(2)])
    assert sequences.numbers([Piece(1, step=True)] * 2)[1].tolist() == [
        [[3, 2], [1, 1], [7, 4]],
        [[0, 2], [1, 1], [1, 4]],
    ]


# -- decisions in the pools ------------------------------------------------------------------------------------------


def filled(
    plan: PolicyPlan, store: ExtentStore | PagedStore, held: dict[tuple[int, int, int], list[int]]
) -> list[Site]:
    """Sites whose rows (layer, sequence, head) hold these positions; keys and values are the position."""
    heads = plan.facts.kv_heads
    for layer in range(plan.facts.layers):
        store.reserve(layer, [64] * store.rows)
    if isinstance(store, PagedStore):
        store.commit()
    for layer in range(plan.facts.layers):
        site = store.site(layer)
        for b in range(store.batch):
            for h in range(heads):
                pos = torch.tensor(held[layer, b, h])
                k = pos[:, None].expand(-1, 4).float()
                state = torch.zeros(len(plan.states), len(pos))
                write(site, [site.base(heads) + b * heads + h], [len(pos)], k, k, pos, torch.zeros_like(pos), state)
    return store.sites()


def set_states(plan: PolicyPlan, sites: list[Site], name: str, value) -> None:  # type: ignore[no-untyped-def]
    """value(layer, sequence, head, pos) of every entry."""
    state, heads = [s.name for s in plan.states].index(name), plan.facts.kv_heads
    for layer, site in enumerate(sites):
        for row in range(site.batch * heads):
            at = site.base(heads) + row
            slots = site.slots(at, 0, int(site.length[at]))
            for slot in slots.tolist():
                site.state[state, slot] = value(layer, row // heads, row % heads, int(site.pos[slot]))


def positions(store: ExtentStore | PagedStore) -> dict[tuple[int, int, int], list[int]]:
    return {
        (layer, b, h): pos.tolist()
        for layer in range(store.plan.facts.layers)
        for b in range(store.batch)
        for h, pos in enumerate(store.positions(layer, b))
    }


def clock(store: ExtentStore | PagedStore, sites: list[Site], now: int, step: int = 1) -> None:
    for b in range(store.batch):
        for column, value in ((Clock.NEW, 1), (Clock.START, now), (Clock.PROMPT, 4), (Clock.STEP, step)):
            sites[0].clock[b, column] = value


@pytest.mark.parametrize("layout", [ExtentStore, PagedStore])
def test_rows_whose_condition_fails_keep_all_unless_another_trigger_fired(layout: type) -> None:
    longer = binary(">", scalar("len"), const(4))
    part = ClassPlan("all", (Region("recent", 0),), (Trigger("every", 2, cond=longer), Trigger("step")))
    plan = plan_of(part, layers=1, heads=2, counts=(Count("2", const(2)),))
    for bits, kept in ((2, [[2, 3, 4, 5], [4, 5]]), (3, [[4, 5], [4, 5]]), (0, [[2, 3, 4, 5], [1, 2, 3, 4, 5]])):
        store = layout(plan, 1, torch.float32, CPU)
        sites = filled(plan, store, {(0, 0, 0): [2, 3, 4, 5], (0, 0, 1): [1, 2, 3, 4, 5]})
        clock(store, sites, 5)
        sites[0].counts.fill_(2)
        sites[0].fires.fill_(bits)
        evict.evict_step(plan, sites, 1.0)
        assert list(positions(store).values()) == kept, bits


def test_a_condition_that_is_nan_holds_for_no_row() -> None:
    nan = Expr("unary", (const(-1),), "sqrt")
    part = ClassPlan("all", (Region("recent", 0),), (Trigger("when", cond=nan),))
    plan = plan_of(part, layers=1, counts=(Count("1", const(1)),))
    store = ExtentStore(plan, 1, torch.float32, CPU)
    sites = filled(plan, store, {(0, 0, 0): [2, 3]})
    clock(store, sites, 3)
    sites[0].counts.fill_(1)
    sites[0].fires.fill_(2)
    evict.evict_step(plan, sites, 1.0)
    assert positions(store)[0, 0, 0] == [2, 3]


@QUIET
@given(st.data())
def test_a_count_of_len_is_exact_for_every_row(data: st.DataObject) -> None:
    """recent(30% of len + b / 3): two rows of different lengths, a part of a share inside."""
    amount = binary(
        "+", binary("*", const(Fraction(3, 10)), scalar("len")), binary("/", Expr("share", (), 0), const(3))
    )
    share = Share("b", const(5), "pyramid")
    part = ClassPlan("all", (Region("recent", 0),), (Trigger("step"),))
    plan = plan_of(part, layers=1, heads=2, counts=(Count("n", amount),), shares=(share,))
    store = ExtentStore(plan, 2, torch.float32, CPU)
    held = {(0, b, h): sorted(data.draw(st.sets(st.integers(0, 20), min_size=1))) for b in range(2) for h in range(2)}
    sites = filled(plan, store, held)
    clock(store, sites, 20)
    parts = data.draw(st.lists(st.integers(0, 9), min_size=2, max_size=2))
    sites[0].counts[0, 1] = torch.tensor(parts)
    sites[0].fires.fill_(1)
    evict.evict_step(plan, sites, 1.0)
    for (_, b, _), (before, after) in zip(
        held, zip(held.values(), positions(store).values(), strict=True), strict=True
    ):
        n = int(Fraction(3 * len(before), 10) + Fraction(parts[b], 3))
        assert after == [p for p in before if p > 20 - n]


@pytest.mark.parametrize("layout", [ExtentStore, PagedStore])
def test_rules_of_the_same_rows_judge_one_after_the_other(layout: type) -> None:
    """top(4) by s, then bottom(2) by s of what is left; a pick between them drops nothing."""
    first = ClassPlan("all", (Selection("top", SCORE, count=0),), (Trigger("step"),), ("s",))
    pick = replace(first, keep=(Selection("top", SCORE, count=1, pick=0),), rows_of=0, only_picks=True)
    second = replace(first, keep=(Selection("bottom", SCORE, count=1),), rows_of=0)
    plan = plan_of(first, pick, second, counts=(Count("4", const(4)), Count("2", const(2))), picks=1,
                   states=(StatePlan("s", ZERO, None),))  # fmt: skip
    store = layout(plan, 1, torch.float32, CPU)
    sites = filled(plan, store, {(layer, 0, 0): list(range(8)) for layer in range(2)})
    store.cover(8)
    sites = store.sites()
    set_states(plan, sites, "s", lambda layer, b, h, p: p * 3 % 8 + layer * 0)  # 0 3 6 1 4 7 2 5
    clock(store, sites, 7)
    sites[0].counts[:, 0], sites[0].counts[:, 1] = 4, 2
    sites[0].fires.copy_(torch.tensor([[1], [1], [0]]))
    evict.evict_step(plan, sites, 1.0)
    assert positions(store)[1, 0, 0] == [2, 4, 5, 7]
    assert store.picked[0, 0, 0].nonzero().flatten().tolist() == [2, 5]
    sites[0].fires.fill_(1)
    evict.evict_step(plan, sites, 1.0)
    assert positions(store)[1, 0, 0] == [4, 7]


def test_slots_grow_with_the_sequence_and_count_as_memory() -> None:
    plan = plan_of(ClassPlan("all", (Region("all"),), ()), heads=2, picks=3)
    store = ExtentStore(plan, 2, torch.float32, CPU)
    assert store.picked.numel() == 0
    store.cover(3)
    store.picked[1, 0, 1, 2] = 1
    before = store.bytes_allocated()
    store.cover(65)
    assert store.picked.shape == (3, 2, 2, 128)
    assert store.picked.nonzero().tolist() == [[1, 0, 1, 2]]
    assert store.bytes_allocated() - before == 3 * 2 * 2 * 64 * 4
    store.cover(100)
    assert store.picked.shape[3] == 128


@QUIET
@given(st.data())
def test_layers_compete_after_a_step_in_either_layout(data: st.DataObject) -> None:
    """top(n) across heads across layers by a state, rows of unequal length: n times the rows, best of all."""
    layers, heads, batch, n = (
        data.draw(st.integers(1, 3)),
        data.draw(st.integers(1, 2)),
        2,
        data.draw(st.integers(0, 4)),
    )
    term = Selection("top", SCORE, count=0, scope="across", layers="across")
    part = ClassPlan("all", (Region("recent", 1), term), (Trigger("step"),), ("s",))
    hidden = StatePlan("@score:0:0", ZERO, None)
    plan = plan_of(part, layers=layers, heads=heads, counts=(Count("n", const(n)), Count("1", const(1))),
                   states=(StatePlan("s", ZERO, None), hidden))  # fmt: skip
    rows = [(layer, b, h) for layer in range(layers) for b in range(batch) for h in range(heads)]
    held = {row: sorted({9, *data.draw(st.sets(st.integers(0, 9)))}) for row in rows}
    values = {(*row, p): data.draw(st.sampled_from([0.0, 1.0, 2.0])) for row in rows for p in held[row]}
    fires = data.draw(st.sampled_from([[1, 1], [0, 1], [1, 0]]))
    expected = {}
    for b in range(batch):
        open_ = [
            (-values[layer, b, h, p], p, h, layer) for layer, s, h in rows if s == b for p in held[layer, b, h] if p < 9
        ]
        best = {(layer, h, p) for _, p, h, layer in sorted(open_)[: n * layers * heads]}
        for layer, s, h in rows:
            if s == b:
                kept = [p for p in held[layer, b, h] if p == 9 or (layer, h, p) in best]
                expected[layer, b, h] = kept if fires[b] else held[layer, b, h]
    for layout in (ExtentStore, PagedStore):
        store = layout(plan, batch, torch.float32, CPU)
        sites = filled(plan, store, held)
        set_states(plan, sites, "s", lambda *place: values[place])
        clock(store, sites, 9)
        sites[0].counts[:, 0], sites[0].counts[:, 1] = n, 1
        sites[0].fires.copy_(torch.tensor([fires]))
        evict.evict_step(plan, sites, 1.0)
        assert positions(store) == held  # no layer decides before the last one is done
        assert span.evict_span(plan, sites, 1.0, step=True).shape == (0, layers, batch)
        assert positions(store) == {row: expected[row] for row in rows}


# -- a model ---------------------------------------------------------------------------------------------------------

LAST = "    score s = mean[g] sum[q in last(4)] attn\n"
WAITING = {
    "across layers": LAST
    + "    keep recent(2) | top(5) by s across heads across layers\n    at prefill.end, every(2)\n",
    "a share by cover": "    state acc = 0\n    on attend: acc += mean[g] sum[q] attn\n    score s = mean[h] acc\n"
    "    share b = 8 by cover(s)\n    keep recent(2) | top(b) by s shared heads\n    at chunk(9), prefill.end, step\n",
    "a share by softmax": "    state acc = 0\n    on attend: acc += mean[g] sum[q] attn\n"
    "    share b = 8 by softmax(-var[i] acc)\n    keep recent(2) | top(b) by acc per head\n    at prefill.end, step\n",
    "shared layers": LAST
    + "    keep recent(2) | top(5) by s shared heads shared layers(2)\n    at prefill.end, step\n",
    "random": "    keep recent(2) | random(8, 3)\n    at prefill.end, step\n",
    "a condition": LAST + "    keep recent(2) | top(5) by s per query_head\n    at prefill.end, every(2) if len > 12\n",
}


@pytest.mark.parametrize("name", WAITING)
def test_opened_graphs_do_what_plain_anchors_do(name: str) -> None:
    """And they have no break, though the last word is spoken outside of them."""
    seen = {}
    for mode in ("off", "eager"):
        model = kvcompile.optimize(random_model(), f"policy p():\n{WAITING[name]}", backend="reference", compile=mode)
        seen[mode] = drive(model, tokens(23, seed=3), *one_by_one(tokens(5, seed=4)), tokens(11, seed=5), [7])
        layers = vars(model)["_kvcompile"].forward.engine.layers
        assert not layers.breaks
        assert bool(layers.records) == (mode == "eager")
    for plain, opened in zip(seen["off"], seen["eager"], strict=True):
        assert plain.kept == opened.kept
        assert torch.allclose(plain.logits, opened.logits, atol=1e-5)
    assert any(len(head) < 20 for layer in seen["off"][0].kept[0] for head in layer)


COVERED = (
    "    score s = mean[h] sum[q in last(3)] attn\n    share b = 8 by cover(s)\n"
    "    keep recent(2) | top(b) by s shared heads\n    at prefill.end, step\n"
)


def test_a_share_is_measured_at_the_end_of_each_prompt_and_then_stays() -> None:
    text = f"policy p():\n{COVERED}"
    model = kvcompile.optimize(random_model(), text, backend="reference", compile="off")
    cache, parts = None, []
    for turn in (tokens(31, seed=6), [5], [9], tokens(24, seed=8), [6]):
        with torch.no_grad():
            cache = model(torch.tensor([turn]), past_key_values=cache).past_key_values
        parts.append(cache.sequences.each[0].shares[0])
        lengths = [len(cache.positions(layer)[0]) for layer in range(3)]
        assert lengths == [part + 2 for part in parts[-1]]
        assert sum(parts[-1]) == 8 * 3
    assert parts[0] == parts[1] == parts[2]
    assert parts[3] == parts[4]
    assert len(set(parts)) == 2  # prompts as these differ, or this shows nothing


@pytest.mark.parametrize("name", ["snapkv_chunked", "h2o", "adakv", "lagkv"])
def test_rows_that_take_a_piece_first_are_judged_as_those_that_do_not(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peeked tokens still read and are read, though the piece's own are in the pools by then."""
    params = {
        "snapkv_chunked": {"c": 9, "observe": 4},
        "h2o": {"heavy": "25% of prompt"},
        "adakv": {"budget": 12, "observe": 4},
        "lagkv": {"lag": 6, "n_sink": 2},
    }[name]
    seen = []
    for first in (False, True):
        if first:
            monkeypatch.setattr(evict, "in_place", lambda plan, cls: True)
            monkeypatch.setattr(reserve, "most_entries", lambda *_: [[64] * 2] * 3)
        model = kvcompile.optimize(random_model(), name, backend="reference", compile="off", **params)
        seen.append(drive(model, tokens(40, seed=3), *one_by_one(tokens(3, seed=4))))
    for after, before in zip(*seen, strict=True):
        assert after.kept == before.kept
        assert torch.allclose(after.logits, before.logits, atol=1e-5)
    assert len(seen[0][0].kept[0][0][0]) < 40
