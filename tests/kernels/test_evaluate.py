"""What formulas and selections mean at their edges: absent queries, padding, infinities, fractions of a group."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
import torch

import kvcompile
from kvcompile.kernels.evaluate import Queries, Rows, score
from kvcompile.kernels.plan import ClassPlan, Expr, ModelFacts, PolicyPlan, QuerySource, Selection
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
