"""Numbers of entries at run time: counts of a plan evaluated in exact rationals, and shares over the layers.

Takes counts and the run-time numbers of a sequence (prompt now chunk step, of the row: len); gives integers.
Guarantees: truncated once, never negative, and a share's sum over its layers is the total times their number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache

from kvcompile.kernels.plan import Count, Expr, PolicyPlan, Share


def number(expr: Expr, scalars: Mapping[str, int], parts: Sequence[int] = ()) -> Fraction:
    """The exact value of a formula over constants, run-time numbers and a layer's `parts` of the policy's shares.

    KeyError for a number not given.
    """
    if expr.op == "const":
        return Fraction(str(expr.value))
    if expr.op == "scalar":
        return Fraction(scalars[str(expr.value)])
    if expr.op == "share":
        assert isinstance(expr.value, int)
        return Fraction(parts[expr.value])
    args = [number(arg, scalars, parts) for arg in expr.args]
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


def count_value(count: Count, scalars: Mapping[str, int], parts: Sequence[int] = ()) -> int:
    """A count, truncated; what is negative at run time is zero (rule 10)."""
    return max(0, int(number(count.expr, scalars, parts)))


def scalars_of(count: Count) -> frozenset[str]:
    """The run-time numbers that a count reads."""
    return frozenset(str(node.value) for node in count.expr.walk() if node.op == "scalar")


def layer_counts(
    plan: PolicyPlan, index: int, scalars: Mapping[str, int], parts: Sequence[Sequence[int]]
) -> tuple[int, ...]:
    """Count `index` in every layer; parts: [share][layer], as `layer_shares` gives them."""
    count = plan.counts[index]
    if not any(node.op == "share" for node in count.expr.walk()):
        return (count_value(count, scalars),) * plan.facts.layers
    return tuple(count_value(count, scalars, [part[layer] for part in parts]) for layer in range(plan.facts.layers))


def layer_shares(
    plan: PolicyPlan, scalars: Mapping[str, int], measured: Mapping[int, Sequence[int]]
) -> tuple[tuple[int, ...], ...]:
    """Every share's part in every layer, [share][layer]; 0 in layers that do not use it.

    scalars must hold `prompt`. measured: parts that followed from the entries, by share; before they are known
    a layer counts with the whole total.
    """
    return tuple(
        tuple(measured[index]) if index in measured else _divided(plan, index, share, scalars)
        for index, share in enumerate(plan.shares)
    )


def layers_of_share(plan: PolicyPlan, index: int) -> tuple[int, ...]:
    """The layers that use a share, in order."""
    using = [cls for cls in range(len(plan.classes)) if index in plan.shares_of(cls)]
    return tuple(sorted({layer for cls in using for layer in plan.class_layers(cls)}))


def share_total(share: Share, scalars: Mapping[str, int]) -> int:
    """What a share divides: a mean per layer, truncated once, never negative."""
    return max(0, int(number(share.total, scalars)))


def _divided(plan: PolicyPlan, index: int, share: Share, scalars: Mapping[str, int]) -> tuple[int, ...]:
    using = layers_of_share(plan, index)
    total = share_total(share, scalars)
    if share.by == "pyramid":
        set_aside = sum(count_value(plan.counts[other], scalars) for other in share.reserve)
        groups = -(-len(using) // share.sharing)
        of_group = pyramid(total, groups, share.beta, scalars["prompt"], set_aside)
        parts = [of_group[place // share.sharing] for place in range(len(using))]
    elif share.by == "table":
        parts = list(weighted(total * len(using), tuple(share.weights[layer] for layer in using)))
    else:
        parts = [total] * len(using)
    by_layer = dict(zip(using, parts, strict=True))
    return tuple(by_layer.get(layer, 0) for layer in range(plan.facts.layers))


@lru_cache(maxsize=256)
def weighted(total: int, weights: tuple[Fraction, ...]) -> tuple[int, ...]:
    """`total` divided in proportion to weights, none negative; the sum is kept, largest remainders first."""
    everything = sum(weights, Fraction(0))
    if not everything:
        weights, everything = (Fraction(1),) * len(weights), Fraction(len(weights))
    exact = [total * weight / everything for weight in weights]
    return _rounded(exact, total)


def _rounded(exact: Sequence[Fraction], total: int) -> tuple[int, ...]:
    """Whole numbers with the sum `total`: largest remainders first, lower layers on ties."""
    parts = [int(value) for value in exact]
    order = sorted(range(len(exact)), key=lambda layer: (parts[layer] - exact[layer], layer))
    for layer in order[: total - sum(parts)]:
        parts[layer] += 1
    return tuple(parts)


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
    return _rounded(exact, total * layers)  # never rises with depth
