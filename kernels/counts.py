"""Numbers of entries at run time: counts of a plan evaluated in exact rationals, and shares over the layers.

Takes counts and the run-time numbers of a sequence (prompt now chunk step, of the row: len); gives integers.
Guarantees: truncated once, never negative, and a share's sum over its layers is the total times their number.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache

from kvcompile.kernels.plan import Count, Expr, PolicyPlan, Region, Selection


def number(expr: Expr, scalars: Mapping[str, int]) -> Fraction:
    """The exact value of a formula over constants and run-time numbers. KeyError for a number not given."""
    if expr.op == "const":
        return Fraction(str(expr.value))
    if expr.op == "scalar":
        return Fraction(scalars[str(expr.value)])
    args = [number(arg, scalars) for arg in expr.args]
    match expr.op, expr.value:
        case "unary", "neg":
            return -args[0]
        case "unary", "abs":
            return abs(args[0])
        case "binary", "+":
            return args[0] + args[1]
        case "binary", "-":
            return args[0] - args[1]
        case "binary", "*":
            return args[0] * args[1]
        case "binary", "/":
            return args[0] / args[1] if args[1] else Fraction(0)
        case "binary", "min":
            return min(args)
        case "binary", "max":
            return max(args)
    raise ValueError(f"no exact value for {expr.op} {expr.value}")


def count_value(count: Count, scalars: Mapping[str, int]) -> int:
    """A count, truncated; what is negative at run time is zero (rule 10). With a share: the mean per layer."""
    return max(0, int(number(count.expr, scalars)))


def scalars_of(count: Count) -> frozenset[str]:
    """The run-time numbers that a count reads."""
    return frozenset(str(node.value) for node in count.expr.walk() if node.op == "scalar")


def layer_counts(plan: PolicyPlan, index: int, scalars: Mapping[str, int]) -> tuple[int, ...]:
    """Count `index` in every layer; a share is divided over the layers that use it, the others get 0.

    `scalars` must hold `prompt` where the count has a share.
    """
    count = plan.counts[index]
    total = count_value(count, scalars)
    layers = range(plan.facts.layers)
    if count.share is None:
        return tuple(total for _ in layers)
    using = [layer for layer in layers if any(_uses(plan, c, index) for c in plan.site_classes(layer))]
    set_aside = sum(count_value(plan.counts[other], scalars) for other in count.reserve)
    parts = pyramid(total, len(using), count.share[1], scalars["prompt"], set_aside)
    by_layer = dict(zip(using, parts, strict=True))
    return tuple(by_layer.get(layer, 0) for layer in layers)


def _uses(plan: PolicyPlan, cls: int, index: int) -> bool:
    return any(isinstance(t, Region | Selection) and t.count == index for t in plan.classes[cls].keep)


@lru_cache(maxsize=256)
def pyramid(total: int, layers: int, beta: Fraction, prompt: int, reserve: int) -> tuple[int, ...]:
    """Budgets that fall linearly with depth, mean `total` (PyramidKV, arXiv 2406.02069).

    The last layer gets total / beta, the first what makes the mean right. A prompt shorter than twice the total
    gets the same everywhere, as published; the first layer never gets more than the prompt leaves beside `reserve`.
    """
    limit = max(0, prompt - reserve)
    if prompt < 2 * total or layers < 2 or total >= limit:
        return tuple(min(total, limit) for _ in range(layers))
    low = int(total / beta)
    high = 2 * total - low
    if high > limit:
        high, low = limit, 2 * total - limit
    exact = [high - Fraction(layer * (high - low), layers - 1) for layer in range(layers)]
    parts = [int(value) for value in exact]
    left = total * layers - sum(parts)
    # Largest remainders first, lower layers on ties: never rises with depth, and the sum is kept.
    order = sorted(range(layers), key=lambda layer: (parts[layer] - exact[layer], layer))
    for layer in order[:left]:
        parts[layer] += 1
    return tuple(parts)
