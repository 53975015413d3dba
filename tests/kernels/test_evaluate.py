"""What formulas and selections mean at their edges: absent queries, padding, infinities, fractions of a group."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
import torch

import kvcompile
from kvcompile.kernels import evaluate
from kvcompile.kernels.evaluate import number, score
from kvcompile.kernels.plan import (
    ClassPlan,
    Expr,
    ModelFacts,
    PolicyPlan,
    QuerySource,
    Selection,
    UnitPlan,
)
from kvcompile.kernels.rows import Queries, Rows
from kvcompile.kernels.select import Plainly, keep_mask
from tests.kernels.triton_interpreted.plans import ACC, attn, binary, const, named, reduce
from tests.models import random_model, tokens

LAST_8, LAST_2 = QuerySource("last", 8), QuerySource("last", 2)


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows_of(n: int, heads: int = 1, absent: int = 0) -> Rows:
    """Entries 0 to n - 1 of each head; 8 - absent queries at the newest positions, and the newest two again."""
    there = torch.ones(heads, n, dtype=torch.bool)
    q, at = draw(heads, 2, 8, 4, seed=1), torch.arange(n - 8, n).clamp(min=-1).expand(heads, -1)
    assert int((at < 0).sum()) == absent * heads
    return Rows(
        pos=torch.arange(n).expand(heads, n).contiguous(),
        resident=there,
        readable=there,
        frozen=~there,
        now=torch.full((heads,), n - 1),
        prompt=torch.full((heads,), n),
        state={"acc": draw(heads, n, seed=2).abs() + 0.1},
        k=draw(heads, n, 4, seed=3),
        v=draw(heads, n, 4, seed=4),
        queries={LAST_8: Queries(q, at), LAST_2: Queries(q[:, :, 6:], at[:, 6:])},
    )


def value(formula: Expr, rows: Rows) -> torch.Tensor:
    return score(formula, rows, rows.resident)


def only_present(rows: Rows, absent: int) -> Rows:
    assert rows.queries is not None
    asked = rows.queries[LAST_8]
    return replace(rows, queries=rows.queries | {LAST_8: Queries(asked.q[:, :, absent:], asked.pos[:, absent:])})


SMALL = binary("<", attn("last", 8), const(Fraction(1, 2)))


@pytest.mark.parametrize("fn", ["sum", "mean", "min", "max", "var", "std"])
@pytest.mark.parametrize("inner", [attn("last", 8), SMALL, binary("max", attn("last", 8, "logit"), const(-3))])
def test_queries_that_a_short_prompt_lacks_count_in_no_reduction(fn: str, inner: Expr) -> None:
    rows = rows_of(3, absent=5)
    formula = reduce("mean", "g", reduce(fn, "q", inner))
    got = value(formula, rows)
    assert got.isfinite().all()
    assert torch.allclose(got, value(formula, only_present(rows, 5)))


def test_the_largest_logit_of_absent_queries_is_none() -> None:
    rows = rows_of(3, absent=5)
    assert rows.queries is not None and rows.k is not None
    got = value(reduce("mean", "g", reduce("max", "q", attn("last", 8, "logit"))), rows)
    logits = torch.einsum("hgqd,hnd->hgqn", rows.queries[LAST_8].q[:, :, 5:], rows.k)
    hidden = torch.ones(3, 3, dtype=torch.bool).triu(1)  # [query, entry]
    assert torch.allclose(got, logits.masked_fill(hidden, float("-inf")).amax(2).mean(1))


def test_a_reduction_asks_for_its_own_queries_and_not_for_those_inside() -> None:
    rows = rows_of(3, absent=5)
    inside = reduce("sum", "q", attn("last", 2))  # both of its queries are there, and it comes first in the walk
    formula = reduce("mean", "g", reduce("mean", "q", binary("+", inside, SMALL)))
    got = value(formula, rows)
    assert torch.allclose(got, value(formula, only_present(rows, 5)))
    parts = (reduce("mean", "g", part) for part in (inside, reduce("mean", "q", SMALL)))
    assert torch.allclose(got, sum(value(part, rows) for part in parts))


@pytest.mark.parametrize("fn", ["sum", "mean", "min", "max", "var", "std"])
def test_what_padding_holds_reaches_no_reduction_over_entries(fn: str) -> None:
    alone = rows_of(9)
    padded = replace(
        alone,
        pos=torch.cat([torch.full((1, 2), -1), alone.pos], 1),
        resident=torch.cat([torch.zeros(1, 2, dtype=torch.bool), alone.resident], 1),
        state={"acc": torch.cat([torch.zeros(1, 2), alone.state["acc"]], 1)},
    )
    formula = binary("+", ACC, reduce(fn, "i", Expr("unary", (ACC,), "log")))  # log 0 is -inf
    assert torch.allclose(value(formula, padded)[:, 2:], value(formula, alone), atol=1e-6)


def test_numbers_stand_where_the_rows_do() -> None:
    rows = rows_of(9)
    there = replace(
        rows,
        **{name: getattr(rows, name).to("meta") for name in ("pos", "resident", "readable", "frozen", "now", "prompt")},
        state={"acc": rows.state["acc"].to("meta")},
    )
    assert value(binary("+", binary("*", ACC, const(2)), const(1)), there).device.type == "meta"
    assert value(const(3), there).device.type == "meta"


def chosen(rows: Rows, term: Selection, **numbers: list[int]) -> torch.Tensor:
    heads = len(rows.pos)
    part = ClassPlan("all", (term,), ())
    plan = PolicyPlan("test", "0" * 16, ModelFacts(1, heads, heads, 4), (part,), ((0,) * heads,))
    counts = torch.tensor(list(numbers.values()), dtype=torch.int64).reshape(-1, 1).expand(-1, heads)
    return keep_mask(plan, part, rows, counts, torch.ones(heads, dtype=torch.bool), Plainly())[0]


def test_a_fraction_of_competing_heads_is_truncated_once() -> None:
    rows = replace(rows_of(15, heads=2), state={"acc": torch.stack([torch.arange(15.0), -torch.arange(15.0)])})
    half = Selection("top", ACC, fraction=Fraction(1, 2), scope="across")
    assert chosen(rows, half).sum(1).tolist() == [15, 0]  # of 30; the tie at 0 goes to the lower head
    assert chosen(rows, replace(half, floor=Fraction(1, 5))).sum(1).tolist() == [14, 1]  # 15 * 1/5 / 2 is 1 each
    assert chosen(rows, replace(half, floor=Fraction(1, 2))).sum(1).tolist() == [12, 3]  # 15 * 1/2 / 2 is 3 each


def test_a_count_of_competing_heads_is_per_head() -> None:
    rows = replace(rows_of(15, heads=2), state={"acc": torch.stack([torch.arange(15.0), -1 - torch.arange(15.0)])})
    five = Selection("top", ACC, count=0, scope="across")
    assert chosen(rows, five, n=[5]).sum(1).tolist() == [10, 0]
    assert chosen(rows, replace(five, floor=Fraction(1, 2)), n=[5]).sum(1).tolist() == [8, 2]


def test_the_watched_entries_of_competing_heads_count_within_their_number() -> None:
    rows = replace(rows_of(15, heads=2), state={"acc": torch.stack([torch.arange(15.0), -1 - torch.arange(15.0)])})
    half = Selection("top", ACC, fraction=Fraction(1, 2), scope="across", observed=2)
    got = chosen(rows, half)
    assert got[:, 13:].all()
    assert got.sum(1).tolist() == [13, 2]


GROWN = """
policy grown():
    state acc = 0
    on attend: acc += mean[g] sum[q] {}
    keep top(4) by acc
    at every(999)
"""


def kept_states(policy: str, prompt: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(state of the first head's entries after a prompt, their values) on layer 0, under the reference."""
    model = kvcompile.optimize(random_model(), policy, compile="off", backend="reference")
    with torch.no_grad():
        site = model(torch.tensor([tokens(prompt)])).past_key_values.store.site(0)
    slots = site.slots(0, 0, prompt)
    return site.state[0, slots], site.v[slots]


def test_a_state_reads_values_in_a_prompt_too() -> None:
    plain, values = kept_states(GROWN.format("attn"), 12)
    weighed, _ = kept_states(GROWN.format("(attn * norm(v))"), 12)
    assert torch.allclose(weighed, plain * values.norm(dim=1), rtol=1e-4)


def test_states_of_a_16_bit_model_grow_by_float32_probabilities_on_the_cpu() -> None:
    grown = {}
    for backend in ("reference", "cpu"):
        model = kvcompile.optimize(
            random_model().to(torch.bfloat16), GROWN.format("attn"), compile="off", backend=backend
        )
        with torch.no_grad():
            cache = model(torch.tensor([tokens(40)])).past_key_values
            site = cache.store.site(0)
            before = site.state[0, site.slots(0, 0, 40)].clone()
            site = model(torch.tensor([[5]]), past_key_values=cache).past_key_values.store.site(0)
        grown[backend] = site.state[0, site.slots(0, 0, 40)] - before
    assert (grown["cpu"] / grown["reference"] - 1).abs().max() < 1e-3


def test_positions_and_lengths_are_numbers_of_the_row() -> None:
    rows = rows_of(9)
    formula = binary("/", named("field", "pos"), named("scalar", "len"))
    assert torch.allclose(value(formula, rows), torch.arange(9.0)[None] / 9)


# -- leaves ------------------------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")


def with_state(values: list[float]) -> Rows:
    rows = rows_of(max(9, len(values)))
    return replace(rows, state={"acc": torch.tensor([values + [0.0] * (9 - len(values))])})


def test_tokens_of_an_entry_are_one_unless_it_stands_for_more() -> None:
    rows, count = rows_of(9), named("field", "count")
    assert value(count, rows).tolist() == [[1.0] * 9]
    merged = replace(rows, state={"@count": torch.arange(9.0)[None]})
    assert value(count, merged).tolist() == [list(range(9))]


def test_numbers_of_the_sequence() -> None:
    rows = replace(rows_of(9, heads=2), step=torch.tensor([3, 3]), chunk=torch.tensor([5, 5]))
    for name, meant in (("step", 3), ("chunk", 5), ("now", 8), ("prompt", 9), ("len", 9)):
        assert number(named("scalar", name), rows).tolist() == [meant, meant]


@pytest.mark.parametrize("op", ["<", "<=", ">", ">=", "==", "!="])
def test_a_comparison_with_nan_is_false(op: str) -> None:
    rows = with_state([NAN, 1.0])
    assert value(binary(op, ACC, const(2)), rows)[0, 0] == 0
    assert value(binary(op, const(2), ACC), rows)[0, 0] == 0
    assert bool(value(binary(op, ACC, const(2)), rows)[0, 1]) == (op in ("<", "<=", "!="))


@pytest.mark.parametrize(("op", "meant"), [("and", [0, 0, 0, 1]), ("or", [0, 1, 1, 1])])
def test_nan_is_no_truth(op: str, meant: list[int]) -> None:
    rows = with_state([NAN, NAN, 1.0, 1.0])
    other = replace(rows, state=rows.state | {"b": torch.tensor([[0.0, 1.0, NAN, 2.0] + [0.0] * 5])})
    assert value(binary(op, ACC, named("state", "b")), other)[0, :4].tolist() == meant


@pytest.mark.parametrize(
    ("values", "meant"),
    [
        ([NAN, 0.0, 0.0], [0.0, 0.5, 0.5]),
        ([-INF, 3.0, NAN], [0.0, 1.0, 0.0]),
        ([INF, 3.0, INF], [0.5, 0.0, 0.5]),
        ([NAN, -INF, NAN], [0.0, 0.0, 0.0]),
    ],
)
def test_softmax_gives_no_mass_to_what_is_no_number(values: list[float], meant: list[float]) -> None:
    rows = rows_of(8)
    rows = replace(rows.until(3), state={"acc": torch.tensor([values])}, queries=None)
    assert value(reduce("softmax", "i", ACC), rows)[0].tolist() == meant


def test_softmax_over_all_heads_of_the_layer_is_one_softmax() -> None:
    rows = rows_of(9, heads=2)
    logits = reduce("mean", "q", attn("last", 2, "attn"))
    got = score(reduce("softmax", "h", logits), rows, rows.resident, groups=True)
    assert rows.queries is not None
    plain = evaluate.evidence(rows, LAST_2, "attn").mean(2)
    assert torch.allclose(got, torch.softmax(plain.flatten(0, 1), 0).unflatten(0, (2, 2)), atol=1e-6)


def test_the_spread_over_queries_of_what_some_may_not_read_is_no_number() -> None:
    rows = rows_of(9)
    got = value(reduce("mean", "g", reduce("var", "q", attn("last", 8, "logit"))), rows)
    assert got[0, :2].isfinite().all()
    assert got[0, 2:].isnan().all()  # the oldest of 8 queries stands at 1


def test_the_spread_of_one_value_is_0() -> None:
    rows = rows_of(9)
    assert value(reduce("var", "d", reduce("sum", "d", named("field", "k"))), rows).tolist() == [[0.0] * 9]


def test_query_heads_may_be_left_open() -> None:
    rows = rows_of(9, heads=2)
    formula = reduce("sum", "q", attn("last", 8))
    got = score(formula, rows, rows.resident, groups=True)
    assert torch.allclose(got, evaluate.evidence(rows, LAST_8, "attn").sum(2))
    assert torch.allclose(got.mean(1), value(reduce("mean", "g", formula), rows), atol=1e-6)
    assert score(ACC, rows, rows.resident, groups=True).shape == (2, 1, 9)


def test_a_number_of_the_row_is_the_mean_over_queries_that_are_there() -> None:
    rows = rows_of(3, absent=5)
    assert rows.queries is not None
    mine = Expr("queries", (), LAST_8)
    got = number(Expr("unary", (mine,), "norm"), rows)
    assert torch.allclose(got, rows.queries[LAST_8].q[:, :, 5:].norm(dim=-1).mean((1, 2)))
    assert torch.allclose(number(reduce("var", "i", ACC), rows), rows.state["acc"].var(1))


def test_the_cosine_of_the_newest_query_and_the_one_before() -> None:
    rows = rows_of(9, heads=2)
    assert rows.queries is not None
    newest, before = QuerySource("last", 1), QuerySource("previous", 1)
    q, at = rows.queries[LAST_8].q, rows.queries[LAST_8].pos
    asked = {newest: Queries(q[:, :, 7:], at[:, 7:]), before: Queries(q[:, :, 6:7], at[:, 6:7])}
    formula = Expr("pair", (Expr("queries", (), newest), Expr("queries", (), before)), "cos")
    got = number(formula, replace(rows, queries=asked))
    assert torch.allclose(got, torch.cosine_similarity(q[:, :, 7], q[:, :, 6], -1).mean(1), atol=1e-6)


def test_leaves_and_members_may_be_given() -> None:
    rows = rows_of(9, heads=2)
    some = torch.arange(9).expand(2, -1) % 2 == 0
    likeness = torch.rand(2, 9)
    sim = Expr("sim")
    got = score(binary("-", sim, reduce("mean", "i", sim)), rows, some, leaves={("sim", None): likeness}, among=some)
    assert torch.allclose(got, likeness - likeness[:, ::2].mean(1, keepdim=True), atol=1e-6)
    ema = Expr("ema", (reduce("mean", "i", sim),), (0, Fraction(1, 2)))
    given = {("sim", None): likeness, ("ema", ema.value): likeness[:, 0]}
    got = score(binary(">=", sim, ema), rows, some, leaves=given)
    assert torch.equal(got.bool(), likeness >= likeness[:, :1])


@pytest.mark.parametrize("fn", ["sum", "mean", "max", "softmax"])
def test_queries_taken_block_by_block_give_the_same(fn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(9, heads=2)
    inside = binary("*", reduce("softmax", "i", attn("last", 8, "logit")), binary("+", attn("last", 8), const(1)))
    over = reduce("sum", "q", reduce("softmax", "q", inside)) if fn == "softmax" else reduce(fn, "q", inside)
    formula = reduce("mean", "h", over)
    whole = value(formula, rows)
    for wide in (1, 50, 100):
        monkeypatch.setattr(evaluate, "WIDE", wide)
        assert torch.allclose(value(formula, rows), whole, atol=1e-6)


def test_rows_taken_one_by_one_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(9, heads=3)
    soft = reduce("softmax", "i", binary("+", attn("last", 8, "logit"), ACC))
    formula = reduce("mean", "g", reduce("sum", "q", soft))
    whole = value(formula, rows)
    monkeypatch.setattr(evaluate, "NEAR", 1)
    assert torch.equal(value(formula, rows), whole)


def test_what_is_added_to_logits_reaches_every_query() -> None:
    rows = rows_of(9)
    bias = torch.zeros(1, 9)
    bias[0, 0] = float(torch.tensor(5.0).log())
    got = evaluate.evidence(replace(rows, bias=bias), LAST_2, "attn")
    weights = evaluate.evidence(rows, LAST_2, "attn") * torch.tensor([5.0] + [1.0] * 8)
    assert torch.allclose(got, weights / weights.sum(-1, keepdim=True), atol=1e-6)


def test_pooling_runs_over_the_row_where_scores_are_of_units() -> None:
    rows, unit = rows_of(10), UnitPlan("lot", 4, 0)
    candidates = torch.tensor([[True] * 8 + [False, True]])
    pooled = Expr("pool", (binary("+", ACC, reduce("min", "i", ACC)),), ("max", 3))
    got = score(pooled, rows, candidates, unit)[0]
    acc = rows.state["acc"][0]
    plain = [float(acc[i] + acc[i // 4 * 4 : i // 4 * 4 + 4].min()) for i in range(10)]
    places = [i for i in range(10) if candidates[0, i]]
    for n, i in enumerate(places):
        near = [plain[j] for j in places[max(0, n - 1) : n + 2]]
        assert float(got[i]) == pytest.approx(max(near))
