"""Counts: exact, truncated once, and shares that keep their sum."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcompile.kernels.counts import count_value, layer_counts, layer_shares, number, pyramid
from kvcompile.kernels.plan import Count, Expr, ModelFacts
from kvcompile.passes import compile_policy

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
        (80, 64, (60, 60, 60, 60)),
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
    limit = max(0, prompt - reserve)
    assert len(budgets) == layers
    assert all(a >= b >= 0 for a, b in pairwise(budgets))
    assert max(budgets) <= limit
    assert sum(budgets) == layers * min(total, limit)


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
