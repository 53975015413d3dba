"""Numbers of a policy that are known before it runs, and how a clause that cannot run is refused.

Takes expressions with parameters substituted; gives exact rationals or whole numbers, or None and PolicyError.
"""

from __future__ import annotations

from fractions import Fraction
from typing import NoReturn

from kvcompile.dsl import ast
from kvcompile.dsl.diagnostics import fail
from kvcompile.dsl.source import Span


def refuse(code: str, what: str, span: Span, hint: str = "") -> NoReturn:
    """Raise the refusal of something that parses but is not lowered by this version."""
    raise fail(code, f"{what} cannot be run by this version yet", span, hint)


def constant(node: ast.Expr) -> Fraction | None:
    """The exact value of an expression of constants alone, or None."""
    match node:
        case ast.Number() if node.kind != "bytes":
            return node.value
        case ast.Unary(op="-"):
            value = constant(node.operand)
            return None if value is None else -value
        case ast.Binary(op="+" | "-" | "*" | "/"):
            left, right = constant(node.left), constant(node.right)
            if left is None or right is None:
                return None
            return arithmetic(node.op, left, right)
        case ast.Call(fn="min" | "max") if node.args and not node.named:
            values = [value for arg in node.args if (value := constant(arg)) is not None]
            if len(values) != len(node.args):
                return None
            return min(values) if node.fn == "min" else max(values)
    return None


def arithmetic(op: str, left: Fraction, right: Fraction) -> Fraction:
    """An exact operation; x / 0 is 0 (rule 14)."""
    match op:
        case "+":
            return left + right
        case "-":
            return left - right
        case "*":
            return left * right
        case "/":
            return left / right if right else Fraction(0)
        case "min":
            return min(left, right)
        case "max":
            return max(left, right)
    raise ValueError(f"no exact arithmetic for '{op}'")


def whole(node: ast.Expr, least: int) -> int:
    """A whole number known before running. PolicyError for anything else."""
    value = constant(node)
    if value is None:
        refuse("K905", "a size that is known at run time only", node.span, "give a number")
    if value.denominator != 1 or value < least:
        raise fail("K704", f"`{node.span.text}` is {float(value):g}, expected a whole number of at least {least}",
                   node.span, "give a whole number")  # fmt: skip
    return int(value)


def fraction(node: ast.Expr) -> Fraction | None:
    """The value of a bare fraction such as `30%` or `0.3`, or None where the expression counts entries."""
    value = constant(node)
    if value is None:
        return None
    kinds = {part.kind for part in node.walk() if isinstance(part, ast.Number)}
    if "percent" in kinds or ("float" in kinds and value <= 1):
        if not 0 <= value <= 1:
            raise fail("K210", f"{float(value):.6g} is not between 0% and 100%", node.span, "say what part is kept")
        return value
    return None


def part(node: ast.Expr, what: str, example: str) -> Fraction:
    """A fraction above 0 and up to 1, known before running. PolicyError for anything else."""
    value = constant(node)
    if value is None or not 0 < value <= 1:
        raise fail("K210", f"{what} is above 0% and up to 100%", node.span, example)
    return value
