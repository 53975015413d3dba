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


def leaders_of_share(plan: PolicyPlan, index: int) -> tuple[int, ...]:
    """The layers that decide with a share, in order: of those that share one decision the first."""
    return layers_of_share(plan, index)[:: plan.shares[index].sharing]


def spread(plan: PolicyPlan, index: int, parts: Sequence[int]) -> tuple[int, ...]:
    """Parts of a share, one for each of its leaders, as one for each layer of the model; 0 where it is not used."""
    using = layers_of_share(plan, index)
    by_layer = {layer: parts[place // plan.shares[index].sharing] for place, layer in enumerate(using)}
    return tuple(by_layer.get(layer, 0) for layer in range(plan.facts.layers))


def _divided(plan: PolicyPlan, index: int, share: Share, scalars: Mapping[str, int]) -> tuple[int, ...]:
    leaders = leaders_of_share(plan, index)
    total = share_total(share, scalars)
    if share.by == "pyramid":
        set_aside = sum(count_value(plan.counts[other], scalars) for other in share.reserve)
        return spread(plan, index, pyramid(total, len(leaders), share.beta, scalars["prompt"], set_aside))
    if share.by == "table":
        return spread(plan, index, weighted(total * len(leaders), tuple(share.weights[layer] for layer in leaders)))
    return spread(plan, index, [total] * len(leaders))


def all_numbers(
    plan: PolicyPlan, scalars: Mapping[str, int], measured: Mapping[int, Sequence[int]]
) -> list[tuple[int, ...]]:
    """The counts of every layer, then the parts of the shares: [counts + shares][layer].

    scalars must hold what counts and shares read, `len` aside; measured as for `layer_shares`. A count that reads
    `len` differs from row to row and is left to whoever has the rows: here it is `now` + 1, which no row exceeds.
    """
    parts = layer_shares(plan, scalars, measured) if plan.shares else ()
    found = [
        (scalars["now"] + 1,) * plan.facts.layers
        if "len" in scalars_of(count)
        else layer_counts(plan, index, scalars, parts)
        for index, count in enumerate(plan.counts)
    ]
    return [*found, *parts]


def asked_of(plan: PolicyPlan) -> tuple[str, ...]:
    """The run-time numbers of a sequence that `all_numbers` reads, sorted."""
    asked = {name for count in plan.counts for name in scalars_of(count)}
    if plan.shares:
        asked |= {"prompt"}
    if "len" in asked:
        asked = asked - {"len"} | {"now"}
    return tuple(sorted(asked))


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

    The last layer gets total / beta, the first what makes the mean right, but no more than the prompt leaves beside
    `reserve`. A prompt shorter than twice the total, or one that fits, gets the total everywhere, as published.
    """
    limit = max(0, prompt - reserve)
    if prompt < 2 * total or layers < 2 or total >= limit:
        return (total,) * layers
    low = int(total / beta)
    high = 2 * total - low
    if high > limit:
        high, low = limit, 2 * total - limit
    exact = [high - Fraction(layer * (high - low), layers - 1) for layer in range(layers)]
    return _rounded(exact, total * layers)  # never rises with depth
