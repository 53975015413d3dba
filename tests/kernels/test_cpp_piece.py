"""What follows a piece's attention in generated C++ (columns, keys, pooling, winners) against the definition."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcompile.kernels.choose import select_spec, state_spec
from kvcompile.kernels.compete import Contest, Place, budget
from kvcompile.kernels.cpp_backend import piece
from kvcompile.kernels.cpp_backend.build import NoCompiler, compiler
from kvcompile.kernels.cpp_backend.library import cpp_library
from kvcompile.kernels.evaluate import score
from kvcompile.kernels.gather import Fresh
from kvcompile.kernels.plan import Expr, PolicyPlan, QuerySource, Region, Selection, StatePlan
from kvcompile.kernels.rows import Queries, Rows
from kvcompile.kernels.select import Plainly
from kvcompile.kernels.states import growth
from tests.kernels.triton_interpreted.plans import H2O, PREFILL_END, attn, binary, const, named, plan, reduce, varied

try:
    compiler()
except NoCompiler as error:
    pytest.skip(f"needs a C++ compiler: {error}", allow_module_level=True)

quick = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
CLOSE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
K, POS = Expr("field", (), "k"), Expr("field", (), "pos")
WINDOW = QuerySource("last", 8)
SUM_Q = reduce("sum", "q", attn("last", 8))


def pooled(kind: str, width: int, x: Expr) -> Expr:
    return Expr("pool", (x,), (kind, width))


def bound(term: Selection, states: tuple[StatePlan, ...] = (), **facts: object) -> PolicyPlan:
    """A policy that keeps the winners of one selection at the end of a prompt."""
    return plan((Region("recent", 0), term), states, triggers=(PREFILL_END,), layers=1, by_position=True, **facts)  # type: ignore[arg-type]


def rows_of(
    seed: int,
    n: int,
    heads: int,
    size: int,
    dtype: str = "float32",
    group: int = 1,
    window: int = 0,
    sequences: int = 1,
) -> Rows:
    """Rows in position order; some columns hold nothing, some entries are peeked ones, queries may be absent."""
    draw = torch.Generator().manual_seed(seed)
    count = heads * sequences
    pos = torch.stack([torch.randperm(3 * n, generator=draw)[:n].sort().values for _ in range(count)])
    pos[:, : n // 8] = -1
    readable = pos >= 0
    resident = readable & (torch.rand(count, n, generator=draw) < 0.9)
    k = torch.randn(count, n, size, generator=draw).to(getattr(torch, dtype))
    at = torch.arange(3 * n - window, 3 * n)
    queries = Queries(
        torch.randn(count, group, window, size, generator=draw).to(k), at.masked_fill(at < 0, -1).expand(count, -1)
    )
    whole = torch.full((count,), 3 * n - 1)
    return Rows(
        pos=pos, resident=resident, readable=readable, frozen=~readable, now=whole, prompt=whole + 1,
        state={"acc": torch.zeros(count, n)}, scale=0.3, k=k, queries={WINDOW: queries}, sequences=sequences,
    )  # fmt: skip


SCORES = {
    "snapkv": reduce("mean", "g", SUM_Q),
    "snapkv, pooled": pooled("max", 7, reduce("mean", "g", SUM_Q)),
    "mean of queries, smoothed": pooled("avg", 5, reduce("max", "g", reduce("mean", "q", attn("last", 8)))),
    "squares": reduce("sum", "g", binary("*", SUM_Q, SUM_Q)),
    "highest logit": reduce("max", "g", reduce("max", "q", attn("last", 8, "logit"))),
    "norm, halved": binary("/", Expr("unary", (K,), "norm"), const(2)),
    "spread": binary("/", reduce("std", "d", K), binary("+", reduce("max", "d", K), const(Fraction(1, 2)))),
    "cosine, aged": binary("+", Expr("pair", (K, binary("*", K, K)), "cos"), binary("/", POS, const(100))),
}


@pytest.mark.parametrize("name", SCORES)
@quick
@given(n=st.integers(1, 40) | st.integers(250, 540), seed=st.integers(0, 99), sequences=st.sampled_from([1, 2]))
def test_scores_are_those_of_the_definition(name, n, seed, sequences):
    term = Selection("top", SCORES[name], 1)
    p = bound(term, kv_heads=2, group=3, head_dim=32)
    means = piece.means_of(p, 0)
    assert means._stages(term) is not None
    rows = rows_of(seed, n, 2, 32, group=3, window=8, sequences=sequences)
    candidates = rows.resident & (rows.pos % 3 != 0)
    found, truth = (m.score(term, rows, candidates, None) for m in (means, Plainly()))
    torch.testing.assert_close(found[candidates], truth[candidates], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["snapkv", "snapkv, pooled", "highest logit"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_keys_that_are_no_numbers_say_what_they_say_in_the_definition(name, bad):
    """A query that sees one says attn 0 of all entries."""
    term = Selection("top", SCORES[name], 1)
    means = piece.means_of(bound(term, kv_heads=2, group=3, head_dim=32), 0)
    for n in (30, 700):
        rows = rows_of(n, n, 2, 32, group=3, window=8)
        assert rows.k is not None
        rows.k[0, n // 2, 5] = bad
        found, truth = (m.score(term, rows, rows.resident, None) for m in (means, Plainly()))
        torch.testing.assert_close(found[rows.resident], truth[rows.resident], rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    ("group", "size", "dtype"), [(1, 80, "float16"), (16, 96, "bfloat16"), (5, 256, "float32"), (2, 16, "bfloat16")]
)
def test_columns_of_other_sizes(group, size, dtype):
    term = Selection("top", SCORES["snapkv"], 1)
    means = piece.means_of(bound(term, kv_heads=2, group=group, head_dim=size, dtype=dtype), 0)
    assert means._stages(term) is not None
    for n in (3, 300):
        rows = rows_of(n, n, 2, size, dtype, group, 8)
        found, truth = (m.score(term, rows, rows.resident, None) for m in (means, Plainly()))
        torch.testing.assert_close(found[rows.resident], truth[rows.resident], rtol=1e-5, atol=1e-5)


@quick
@given(
    past=st.integers(0, 300),
    n=st.integers(1, 40) | st.integers(250, 300),
    seed=st.integers(0, 99),
    threads=st.sampled_from([1, 2]),
)
def test_what_a_whole_piece_adds_to_a_state(past, n, seed, threads):
    p = bound(Selection("top", named("state", "acc"), 1), (H2O,), kv_heads=2, group=2, head_dim=32)
    assert cpp_library(p).find(state_spec, H2O) is not None
    rows = rows_of(seed, past + n + 2, 2, 32)
    total = past + n + 2  # two of the entries are peeked tokens, whose queries add nothing
    pos = torch.arange(total).expand(2, -1)
    rows = replace(rows, pos=pos, readable=pos >= 0, resident=pos < past + n)
    q = torch.randn(2, 2, n + 2, 32, generator=torch.Generator().manual_seed(seed))
    assert rows.k is not None
    fresh = Fresh(q, rows.k[:, past:], rows.k[:, past:], torch.zeros(1, 2, n), n, past)
    was = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = piece.growth_of(p)((H2O,), rows, fresh)["acc"]
    finally:
        torch.set_num_threads(was)
    truth = growth((H2O,), rows, fresh)["acc"]
    torch.testing.assert_close(found[rows.resident], truth[rows.resident], rtol=1e-5, atol=1e-5)


def test_columns_with_a_cap_sinks_and_a_limit_of_reach():
    term = Selection("top", SCORES["snapkv"], 1)
    p = varied(bound(term, kv_heads=2, group=3, head_dim=32), 0.8, True, (70,))
    means = piece.means_of(p, 0)
    rows = rows_of(1, 90, 2, 32, group=3, window=8)
    assert rows.k is not None and rows.queries is not None and means._stages(term) is not None
    q, qpos = rows.queries[WINDOW].q, rows.queries[WINDOW].pos[0]
    sink = torch.linspace(-1, 1, 6)
    for reach in (0, 70):
        given = replace(rows, cap=0.8, sink=sink.view(2, 3), reach=reach)
        found = means.score(term, given, rows.resident, None)
        logits = 0.8 * torch.tanh(torch.einsum("hgqd,hnd->hgqn", q, rows.k) * 0.3 / 0.8)
        sees = rows.readable[:, None] & (rows.pos[:, None] <= qpos[:, None])
        # What the newest query is too far from counts for none.
        sees &= (rows.pos > (rows.now - reach)[:, None])[:, None] if reach else sees
        logits = logits.masked_fill(~sees[:, None], float("-inf"))
        extra = sink.view(2, 3, 1, 1).expand(-1, -1, 8, 1)
        truth = torch.cat([logits, extra], -1).softmax(-1)[..., :-1].sum(2).mean(1)
        torch.testing.assert_close(found[rows.readable], truth[rows.readable], rtol=1e-5, atol=1e-5)


RULES = {
    "head": Selection("top", named("state", "acc"), 0),
    "lowest": Selection("bottom", named("state", "acc"), 0),
    "shared": Selection("top", named("state", "acc"), 0, scope="shared"),
    "across": Selection("top", named("state", "acc"), 0, scope="across", floor=Fraction(1, 5)),
    "part of all": Selection("top", named("state", "acc"), None, Fraction(1, 3), scope="across"),
    "part of each": Selection("top", named("state", "acc"), None, Fraction(2, 3)),
}


@pytest.mark.parametrize("name", RULES)
@quick
@given(
    n=st.integers(1, 60), wanted=st.integers(0, 70), seed=st.integers(0, 99), steps=st.sampled_from([1, 3, 1000]),
    broken=st.booleans(), sequences=st.sampled_from([1, 2]),
)  # fmt: skip
def test_winners_are_those_of_a_stable_sort(name, n, wanted, seed, steps, broken, sequences):
    """Scores with many ties, infinities, NaN and -0; fewer candidates than wanted."""
    term = RULES[name]
    p = bound(term, (H2O,), kv_heads=3)
    assert cpp_library(p).find(select_spec, 0, term) is not None
    rows = rows_of(seed, n, 3, 16, sequences=sequences)
    if term.scope == "shared":  # heads that decide once hold the same entries
        rows = replace(
            rows, **{x: getattr(rows, x)[::3].repeat_interleave(3, 0) for x in ("pos", "resident", "readable")}
        )
    values = _ties(seed, len(rows.pos), n, steps)
    if broken:
        values[:, ::5], values[0, 1::7], values[:, 2::9] = float("nan"), float("inf"), float("-inf")
    heads, sequence = [h % 3 for h in range(3 * sequences)], [h // 3 for h in range(3 * sequences)]
    place = Place(0, (0,) * len(heads), tuple(heads), tuple(sequence))
    versus = Contest.of(term, place, values.device)
    number = budget(term, versus, rows.resident, torch.full((len(heads),), wanted))
    found, truth = (
        m.choose(term, rows, values, rows.resident, number, versus) for m in (piece.means_of(p, 0), Plainly())
    )
    assert torch.equal(found, truth)


def _ties(seed: int, rows: int, n: int, steps: int) -> Tensor:
    values = torch.randn(rows, n, generator=torch.Generator().manual_seed(seed)).mul(steps).round() / steps
    return values * torch.where(values == 0, -1.0, 1.0)  # zeros become -0 here and there


def test_a_norm_of_wide_keys_is_left_to_torch_and_of_narrow_ones_is_not():
    term = Selection("top", Expr("unary", (K,), "norm"), 1)
    for dtype, kernel in (("float32", False), ("bfloat16", True)):
        means = piece.means_of(bound(term, kv_heads=2, group=1, head_dim=16, dtype=dtype), 0)
        rows = rows_of(3, 50, 2, 16, dtype)
        assert (means._stages(term) is not None) == kernel
        found, truth = (m.score(term, rows, rows.resident, None) for m in (means, Plainly()))
        torch.testing.assert_close(found[rows.resident], truth[rows.resident], rtol=1e-5, atol=1e-5)


def test_what_has_no_kernel_is_left_to_the_definition():
    entropy = Expr("reduce", (attn("last", 8),), ("softmax", "i"))
    term = Selection("top", reduce("mean", "g", reduce("sum", "q", entropy)), 1)
    p = bound(term, kv_heads=2, group=3, head_dim=32)
    rows = rows_of(5, 30, 2, 32, group=3, window=8)
    means = piece.means_of(p, 0)
    assert means._stages(term) is None
    assert torch.equal(means.score(term, rows, rows.resident, None), score(term.score, rows, rows.resident))
