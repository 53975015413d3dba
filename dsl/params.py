"""Parameters: defaults of a lineage, overrides by the caller, and their substitution into clauses.

Takes a lineage and overrides as numbers or text of the language; gives one expression per parameter and
rewritten nodes. Guarantees: numbers stay exact (0.1 is 1/10), values fit what the default stands for, and
no value refers to a parameter any more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from decimal import Decimal
from fractions import Fraction
from numbers import Rational, Real
from typing import Any, TypeVar, cast

from kvcompile.dsl import ast
from kvcompile.dsl.diagnostics import Diagnostic, PolicyError, did_you_mean, fail, finding, outside
from kvcompile.dsl.graphs import cycles, extent, written_out
from kvcompile.dsl.load import Loaded
from kvcompile.dsl.parser import parse_value
from kvcompile.dsl.source import Span

N = TypeVar("N", bound=ast.Node)
Values = dict[str, ast.Expr]

LARGEST = 10**18
FINEST = 10**40  # the largest denominator: 1e-40 may be written
_MAX_SIZE = 100  # nodes of a value with the parameters in it written out, and its levels
_MAX_DEPTH = 50
_GIVE = "give a number, or text such as `10% of prompt`"


def bind_params(line: tuple[Loaded, ...], overrides: Mapping[str, object]) -> tuple[Values, set[str]]:
    """Values by name, the child's own parameters first, and the names that other defaults read."""
    child = line[0].policy
    defaults: dict[str, ast.Param] = {}
    for link in line:
        for param in link.policy.params:
            defaults.setdefault(param.name, param)
    unknown = [
        finding(
            "K104",
            f"policy `{child.name}` has no parameter `{name}`",
            child.header,
            did_you_mean(name, defaults, "its parameters") or "it takes no parameters",
        )
        for name in overrides
        if name not in defaults
    ]
    if unknown:
        raise PolicyError(*unknown)
    chosen = {name: param.default for name, param in defaults.items()}
    problems: list[Diagnostic] = []
    for name, value in overrides.items():
        try:
            chosen[name] = _fit(name, defaults[name].default, _expression(name, value))
        except PolicyError as error:
            problems += error.diagnostics
    if problems:
        raise PolicyError(*problems)
    for name, param in defaults.items():
        if chosen[name] is param.default:
            owner = _inherited_default(line, name)
            if owner is not None and param.default is not owner:
                chosen[name] = _fit(name, owner, param.default)
    used: set[str] = set()
    return _settled(chosen, used), used


def substitute(node: N, values: Mapping[str, ast.Expr], used: set[str]) -> N:
    """The node with every parameter name replaced by its value, at the place of the name."""
    if isinstance(node, ast.Name) and node.id in values:
        used.add(node.id)
        return cast(N, replace(values[node.id], span=node.span))
    changed: dict[str, Any] = {}
    for spec in fields(node):
        old = getattr(node, spec.name)
        if isinstance(old, ast.Node):
            new: object = substitute(old, values, used)
        elif isinstance(old, tuple):
            items = [substitute(item, values, used) if isinstance(item, ast.Node) else item for item in old]
            new = tuple(items) if any(a is not b for a, b in zip(items, old, strict=True)) else old
        else:
            continue
        if new is not old:
            changed[spec.name] = new
    if isinstance(node, ast.Portion) and isinstance(changed.get("fraction"), ast.Portion):
        inner = cast(ast.Portion, changed["fraction"])
        raise fail(
            "K109",
            f"`{_portion(inner)}` cannot be taken `of {node.of}` again",
            node.span,
            "give a bare percentage here",
        )
    return replace(node, **changed) if changed else node


def _inherited_default(line: tuple[Loaded, ...], name: str) -> ast.Expr | None:
    """The oldest default of a parameter: it says what the clauses take the parameter for."""
    found = [p.default for link in line for p in link.policy.params if p.name == name]
    return found[-1] if found else None


def _settled(chosen: Values, used: set[str]) -> Values:
    """The values with all parameters in them replaced, in the order of `chosen`."""
    edges = {
        name: [(part.id, part) for part in value.walk() if isinstance(part, ast.Name) and part.id in chosen]
        for name, value in chosen.items()
    }
    for path, _ in cycles(edges)[:1]:
        place = chosen[path[-2]].span
        raise fail("K108", f"parameters refer to each other: {' -> '.join(path)}", place, "give one of them a number")
    order = written_out(edges, {name: extent(value) for name, value in chosen.items()})
    values: Values = {}
    for name, (size, depth) in order.items():
        if size > _MAX_SIZE or depth > _MAX_DEPTH:
            message = f"the value of `{name}`, with the parameters in it written out, is too large"
            raise fail("K008", message, chosen[name].span, "say it in fewer steps")
        values[name] = substitute(chosen[name], values, used)
    return {name: values[name] for name in chosen}


def _expression(name: str, value: object) -> ast.Expr:
    """An override as an expression of the language."""
    where = outside(f"<{name}>")
    if isinstance(value, str):
        if value.strip():
            return parse_value(value, f"<{name}>")
        raise fail("K109", f"the value of `{name}` is empty", where, _GIVE)
    if isinstance(value, bool) or not isinstance(value, Real | Decimal):
        raise fail("K109", f"`{name}` cannot be a {type(value).__name__}", where, _GIVE)
    number = _exact(value)
    if number is None:
        raise fail("K109", f"the value of `{name}` is no finite number", where, "give a finite number")
    if abs(number) > LARGEST or number.denominator > FINEST:
        raise fail(
            "K007", f"the value of `{name}` is too large or too fine to be meant", where, "numbers go up to 1e18"
        )
    return ast.Number(number, "int" if number.denominator == 1 else "float", span=where)


def _exact(value: Real | Decimal) -> Fraction | None:
    """The number as it is written: 0.1 is 1/10. None for what is not finite."""
    if isinstance(value, Rational):
        return Fraction(int(value.numerator), int(value.denominator))
    if isinstance(value, Decimal):
        if not value.is_finite():
            return None
        # Beyond this the number is refused anyway, and its exact form would fill memory.
        return Fraction(value) if abs(value.adjusted()) < 60 else Fraction(10) ** 60
    return Fraction(str(value)) if math.isfinite(float(value)) else None


def _fit(name: str, default: ast.Expr, value: ast.Expr) -> ast.Expr:
    """`value` as what `default` stands for. Percentages may be given as plain fractions; counts may not."""
    where = value.span
    if isinstance(default, ast.Text) != isinstance(value, ast.Text):
        wants, got = ("a string", "a number") if isinstance(default, ast.Text) else ("a number", "a string")
        raise fail("K109", f"`{name}` stands for {wants}, not {got}", where, "its default is " + _shown(default))
    if not isinstance(value, ast.Number):
        return value
    if isinstance(default, ast.Number) and default.kind == "percent":
        return _as_percent(name, value, where)
    plain_count = isinstance(default, ast.Number) and default.kind in ("int", "size", "bytes")
    if plain_count and value.kind == "percent":
        raise fail(
            "K109",
            f"`{name}` counts tokens, and {_shown(value)} does not say of what",
            where,
            f"write `{_shown(value)} of prompt`, or of len or chunk",
        )
    if plain_count and value.value.denominator != 1:
        raise fail(
            "K109",
            f"`{name}` is a whole number, not {_shown(value)}",
            where,
            "for a part of the prompt write text such as `30% of prompt`",
        )
    if isinstance(default, ast.Portion) and value.value.denominator != 1:
        raise fail(
            "K109",
            f"`{name}` counts tokens, and {_shown(value)} does not say of what",
            where,
            f"write `{float(value.value * 100):g}% of {default.of}`, or a whole number of tokens",
        )
    return value


def _as_percent(name: str, value: ast.Number, where: Span) -> ast.Number:
    if value.kind != "percent" and value.value > 1:
        raise fail(
            "K109",
            f"`{name}` is a percentage, not {_shown(value)}",
            where,
            f'write "{_shown(value)}%" or {float(value.value / 100):g}',
        )
    return ast.Number(value.value, "percent", span=where)


def _shown(node: ast.Expr) -> str:
    if isinstance(node, ast.Number):
        return f"{float(node.value * 100):g}%" if node.kind == "percent" else f"{float(node.value):g}"
    return node.span.text or type(node).__name__.lower()


def _portion(node: ast.Portion) -> str:
    return f"{_shown(node.fraction)} of {node.of}"
