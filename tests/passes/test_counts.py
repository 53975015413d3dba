"""Counts: exact, truncated once, and shares that keep their sum."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcompile.dsl import PolicyError
from kvcompile.kernels.counts import count_value, layer_counts, layer_shares, number, pyramid
from kvcompile.kernels.plan import Count, Expr, ModelFacts, PolicyPlan
from kvcompile.passes import compile_policy

FACTS = ModelFacts(4, 4, 2, 64)
PROMPT = Expr("scalar", value="prompt")


def const(value: int | Fraction) -> Expr:
    return Expr("const", value=Fraction(value))


def binary(op: str, left: Expr, right: Expr) -> Expr:
    return Expr("binary", (left, right), op)


@pytest.mark.parametrize(
    ("expr", "value"),
    [
        (binary("*", const(Fraction(1, 10)), PROMPT), 9),
        (binary("-", binary("*", const(Fraction(1, 10)), PROMPT), const(64)), 0),
        (binary("/", PROMPT, const(0)), 0),
        (binary("max", const(7), binary("/", PROMPT, const(5))), 19),
        (binary("*", const(Fraction(29, 100)), const(100)), 29),  # 0.29 * 100 is 28.999... in floats
        (Expr("unary", (binary("-", const(3), PROMPT),), "abs"), 96),
    ],
)
def test_counts_truncate_once_and_never_go_below_zero(expr: Expr, value: int) -> None:
    assert count_value(Count("n", expr), {"prompt": 99}) == value


def test_a_number_that_nobody_gives_is_an_error() -> None:
    with pytest.raises(KeyError):
        number(Expr("scalar", value="len"), {"prompt": 9})
    with pytest.raises(ValueError, match="no exact value"):
        number(Expr("unary", (const(1),), "exp"), {})


@pytest.mark.parametrize(
    ("total", "prompt", "budgets"),
    [
        (12, 64, (24, 16, 8, 0)),  # as published: capacity 16 with a window of 4
        (20, 64, (39, 26, 14, 1)),  # published drifts to a mean of 21 by integer division; ours keeps the sum
        (36, 64, (36, 36, 36, 36)),  # as published: the prompt is shorter than twice the total
        (30, 61, (57, 39, 21, 3)),  # the first layer is cut at what the prompt leaves
        (80, 64, (80, 80, 80, 80)),  # all of it fits: counts in whole units must not be cut to a part of one
    ],
)
def test_pyramid(total: int, prompt: int, budgets: tuple[int, ...]) -> None:
    assert pyramid(total, 4, Fraction(20), prompt, 4) == budgets


@given(
    st.integers(0, 400),
    st.integers(1, 40),
    st.fractions(1, 50, max_denominator=3),
    st.integers(0, 900),
    st.integers(0, 99),
)
def test_pyramid_falls_with_depth_and_keeps_its_sum(
    total: int, layers: int, beta: Fraction, prompt: int, reserve: int
) -> None:
    budgets = pyramid(total, layers, beta, prompt, reserve)
    assert len(budgets) == layers
    assert all(a >= b >= 0 for a, b in pairwise(budgets))
    assert max(budgets) <= max(total, prompt - reserve)
    assert sum(budgets) == layers * total


def test_shares_go_to_the_layers_that_use_them() -> None:
    text = (
        "policy mine():\n    score s = norm(k)\n    share b = 12 by pyramid(20)\n"
        "    layers 0, last: keep all\n    keep recent(4) | top(b) by s\n    at prefill.end\n"
    )
    plan = compile_policy(text, ModelFacts(6, 4, 2, 64)).plan
    (share,) = plan.shares
    assert [plan.counts[i].name for i in share.reserve] == ["4"]
    parts = layer_shares(plan, {"prompt": 64}, {})
    assert parts == ((0, 24, 16, 8, 0, 0),)
    by_name = {count.name: layer_counts(plan, i, {"prompt": 64}, parts) for i, count in enumerate(plan.counts)}
    assert by_name == {"b": (0, 24, 16, 8, 0, 0), "4": (4, 4, 4, 4, 4, 4)}


# ---------------------------------------------------------------- budgets


def plan_of(*lines: str, facts: ModelFacts = FACTS, **options: object) -> PolicyPlan:
    text = "policy mine():\n" + "".join(f"    {line}\n" for line in lines)
    return compile_policy(text, facts, **options).plan  # type: ignore[arg-type]


def test_bytes_count_everything_that_an_entry_holds() -> None:
    lines = ("state a = 0, b = 1", "on attend: a += sum[q] attn", "on step: b = a")
    size = 2 * 64 * 4 + 4 + 1  # key and value, position, mark
    for score, states in (("norm(k)", 0), ("a", 1), ("b", 2)):
        plan = plan_of(*lines, f"keep top(1MB) by {score}", "at step")
        assert count_value(plan.counts[0], {}) == (1 << 20) // (size + 4 * states)
        assert len(plan.states) == states
    folded = plan_of("keep recent(1kB - 1) else fold mean", "at step")
    assert folded.counts[0].expr.value == Fraction(1024, size + 4) - 1
    across = plan_of("keep top(1kB) by norm(k) across layers", "at step", facts=ModelFacts(4, 4, 2, 64, "bfloat16"))
    assert across.counts[0].expr.value == Fraction(1024, 2 * 64 * 2 + 5 + 4)


def test_what_a_union_sets_aside_follows_from_its_own_regions() -> None:
    plan = plan_of(
        "share b = 12 by pyramid(20)",
        "layers 0, 1: keep sink(2) | top(b / 2) by norm(k) | recent(b / 4)",
        "layers rest: keep top(b) by norm(k) | recent(6)",
        "at prefill.end",
    )
    assert [[plan.counts[i].name for i in share.reserve] for share in plan.shares] == [["2"], ["6"]]
    assert plan.shares_of(0) == (0,) and plan.shares_of(1) == (1,)


def test_a_table_weighs_the_layers(tmp_path: Path) -> None:
    path = tmp_path / "layers.txt"
    path.write_text("# by layer\n1\n\n0.5  # half\n0\n1e0\n")
    lines = ('share b = 10 by table("layers.txt")', "keep top(b) by norm(k)", "at prefill.end")
    plan = plan_of(*lines, base=tmp_path)
    assert plan.shares[0].weights == (1, Fraction(1, 2), 0, 1)
    assert layer_shares(plan, {"prompt": 64}, {}) == ((16, 8, 0, 16),)
    assert plan_of(*lines, tables={"b": path}) == plan
    for text, reason in (("1\n" * 3, "holds 3 numbers"), ("1\n-1\n1\n1\n", "-1"), ("1 1\n" * 4, "1 1"),
                         ("nan\n" * 4, "nan"), ("one\n" * 4, "one"), ("1e999\n" * 4, "1e999")):  # fmt: skip
        path.write_text(text)
        with pytest.raises(PolicyError, match=f"K618.*{reason}"):
            plan_of(*lines, base=tmp_path)
    with pytest.raises(PolicyError, match=r"K610.*no such table"):
        plan_of(*lines, base=tmp_path / "elsewhere")


def test_selections_of_one_share_decide_by_groups_of_one_size() -> None:
    with pytest.raises(PolicyError, match=r"K914.*different numbers of layers"):
        plan_of("share b = 4 by pyramid(2)", "keep top(b) by norm(k) shared layers(2) | top(b) by norm(v)",
                "at prefill.end")  # fmt: skip
