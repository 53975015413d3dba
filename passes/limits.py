"""What a count or a condition can come to, where it follows from more than lengths.

Takes formulas of a plan and the run-time numbers that are known; gives upper bounds, and True, False or None (not
known before it runs) for conditions. Guarantees: no bound is below what the run time finds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction

from kvcompile.kernels.counts import layers_of_share, number, share_total
from kvcompile.kernels.plan import Expr, PolicyPlan

# How a formula depends on one of its leaves, a number of at least 0: does it rise (1), fall (-1), neither (0), and
# is it convex (1), concave (-1), straight (0)? None: not known.
Shape = tuple[int | None, int | None]
_NEAR = Fraction(1, 10**5)  # the run time compares in float32
_EXACT = 1 << 24  # whole numbers below this are exact in float32


def shape(expr: Expr, is_leaf: Callable[[Expr], bool], scalars: Mapping[str, int]) -> Shape:
    """How the value of `expr` depends on its leaves. Factors and divisors must follow from constants and `scalars`."""
    if is_leaf(expr):
        return 1, 0
    if not any(is_leaf(node) for node in expr.walk()):
        return 0, 0
    parts = [shape(arg, is_leaf, scalars) for arg in expr.args]
    free = [not any(is_leaf(node) for node in arg.walk()) for arg in expr.args]
    match expr.op, expr.value:
        case "unary", "neg":
            return _turned(parts[0], -1)
        case "binary", "+":
            return _both(parts[0][0], parts[1][0]), _both(parts[0][1], parts[1][1])
        case "binary", "-":
            other = _turned(parts[1], -1)
            return _both(parts[0][0], other[0]), _both(parts[0][1], other[1])
        case "binary", "*" | "/" if free[1]:
            return _turned(parts[0], _sign(expr.args[1], scalars))
        case "binary", "*" if free[0]:
            return _turned(parts[1], _sign(expr.args[0], scalars))
        case "binary", "min" | "max":
            bend = 1 if expr.value == "max" else -1
            bends = bend if all(part[1] in (0, bend) for part in parts) else None
            return _both(parts[0][0], parts[1][0]), bends
    return None, None


def _turned(part: Shape, sign: int | None) -> Shape:
    slope, bend = part
    if sign is None:
        return None, None
    return None if slope is None else slope * sign, None if bend is None else bend * sign


def _both(a: int | None, b: int | None) -> int | None:
    if a is None or b is None or a * b < 0:
        return None
    return a or b


def _sign(expr: Expr, scalars: Mapping[str, int]) -> int | None:
    try:
        value = number(expr, scalars)
    except LookupError:  # it reads what is not known
        return None
    return (value > 0) - (value < 0)


def is_len(expr: Expr) -> bool:
    return expr.op == "scalar" and expr.value == "len"


def _is_prompt(expr: Expr) -> bool:
    return expr.op == "scalar" and expr.value == "prompt"


def measured_in(plan: PolicyPlan, expr: Expr) -> frozenset[int]:
    """Indices of the measured shares that a formula reads."""
    read = {node.value for node in expr.walk() if node.op == "share"}
    return frozenset(i for i in read if isinstance(i, int) and plan.shares[i].measured)


def summed(plan: PolicyPlan, expr: Expr, scalars: Mapping[str, int], parts: tuple[int, ...], layers: int) -> int | None:
    """At most the sum of a count over `layers` layers, whatever a measured share gives to each. None: no bound.

    parts: the layer's part of every share that is not measured. Each layer's count is truncated and never negative,
    so where it is convex one layer may have everything, and where it is concave equal parts give the most.
    """
    shares = measured_in(plan, expr)
    if len(shares) != 1:
        return None
    (share,) = shares
    if shape(plan.shares[share].total, _is_prompt, {})[0] not in (0, 1):
        return None  # an earlier, shorter prompt gave more
    per, using = plan.shares[share].sharing, len(layers_of_share(plan, share))
    everything = share_total(plan.shares[share], scalars) * -(-using // per) * per

    def at(part: int | Fraction) -> Fraction:
        given = [part if i == share else other for i, other in enumerate(parts)]
        return max(Fraction(0), number(expr, scalars, given))  # type: ignore[arg-type]

    slope, bend = shape(expr, lambda node: node.op == "share" and node.value == share, scalars)
    if bend in (0, 1):
        return int(max(layers * at(0), (layers - 1) * at(0) + at(everything)))
    if slope is None:
        return None
    if slope == 1 and bend == -1 and at(0) > 0:
        return int(layers * at(Fraction(everything, layers)))
    return int(layers * at(everything if slope == 1 else 0))


def holds(expr: Expr, scalars: Mapping[str, int]) -> bool | None:
    """Whether a trigger's condition is true of a row with these numbers; None where only running it tells."""
    nodes = expr.walk()
    whole = all(Fraction(str(n.value)).denominator == 1 for n in nodes if n.op == "const")
    whole &= not any(n.op == "binary" and n.value == "/" for n in nodes)
    value = _condition(expr, scalars, whole)
    return None if value is None else value != 0


def _condition(expr: Expr, scalars: Mapping[str, int], whole: bool) -> Fraction | None:
    if expr.op == "const":
        return Fraction(str(expr.value))
    if expr.op == "scalar":
        return Fraction(scalars[str(expr.value)]) if expr.value in scalars else None
    if expr.op not in ("unary", "binary"):
        return None
    args = [_condition(arg, scalars, whole) for arg in expr.args]
    if expr.op == "binary" and expr.value in ("and", "or"):
        return _joined(args, expr.value == "or")
    known = [arg for arg in args if arg is not None]
    if len(known) < len(args):
        return None
    if expr.value in ("<", "<=", ">", ">=", "==", "!="):
        return _compared(str(expr.value), known[0], known[1], whole)
    try:
        return number(Expr(expr.op, tuple(Expr("const", value=value) for value in known), expr.value), {})
    except ValueError:
        return None


def _joined(args: list[Fraction | None], either: bool) -> Fraction | None:
    """`or`, `and`, where one side may not be known."""
    sides = [None if arg is None else bool(arg) for arg in args]
    if either in sides:
        return Fraction(either)
    return None if None in sides else Fraction(not either)


def _compared(sign: str, a: Fraction, b: Fraction, whole: bool) -> Fraction | None:
    size = max(abs(a), abs(b))
    if not (whole and size < _EXACT) and abs(a - b) <= _NEAR * size:
        return None
    results = {"<": a < b, "<=": a <= b, ">": a > b, ">=": a >= b, "==": a == b, "!=": a != b}
    return Fraction(results[sign])
