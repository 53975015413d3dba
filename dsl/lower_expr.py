"""Expressions and counts of a policy as kv operations.

Takes expressions of a resolved policy and the names around them; gives SSA values in the block of a builder.
Guarantees: what this version cannot run is refused with a K9 code at its span; a left-over `g` is averaged;
numbers stay exact; every operation carries the place that it comes from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import NoReturn, TypeVar

from xdsl.ir import Block, Operation, SSAValue

from kvcompile.dsl import ast
from kvcompile.dsl import dialect as kv
from kvcompile.dsl.context import WHOLE_COUNT, broken_count
from kvcompile.dsl.diagnostics import fail
from kvcompile.dsl.module import Places
from kvcompile.dsl.source import Span

Op = TypeVar("Op", bound=Operation)

FUNCTIONS = ("exp", "log", "sqrt", "abs", "sigmoid", "norm")
# Counts are evaluated on the host, before a row's length is known; scores on the device, per row.
_IN_SCORES = frozenset({"prompt", "now", "len"})
_IN_COUNTS = frozenset({"prompt", "now", "chunk", "step"})
_TOGETHER = ("sum", "mean", "max", "min")  # over g and h at once they are what they are one after the other


@dataclass(frozen=True, slots=True)
class Scope:
    """What names mean at one place: scores, states, landmarks as (unit, axes), and the shares."""

    scores: Mapping[str, ast.Score] = field(default_factory=dict)
    states: frozenset[str] = frozenset()
    landmarks: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    shares: Mapping[str, ast.Share] = field(default_factory=dict)
    source: tuple[str, int] = ("forward", 0)  # whose queries `attn` and `logit` are of
    per_unit: bool = False  # inside a landmark, entries are those of each unit
    units: bool = False  # the policy has units, so `[i]` runs over the tokens of a unit
    numbers: frozenset[str] = _IN_SCORES  # run-time numbers that may be read


@dataclass(slots=True)
class Builder:
    """Appends operations to a block, each with its location."""

    block: Block
    places: Places

    def add(self, op: Op, span: Span) -> Op:
        op.location = self.places.location(span)
        self.block.add_op(op)
        return op

    # ------------------------------------------------------------ scores

    def score(self, node: ast.Expr, scope: Scope) -> SSAValue:
        """One value per entry, axes "i" or "ui"; a left-over g is averaged."""
        value = self.over_group(self.expr(node, scope), node.span)
        axes = kv.axes_of(value)
        if "q" in axes:
            raise fail("K204", "the score leaves the queries open", node.span, "reduce them, such as `sum[q] attn`")
        if axes not in ("i", "ui"):
            code, what = (
                ("K202", f"leaves `{axes.replace('i', '')}` open") if "i" in axes else ("K203", "is of no entry")
            )
            raise fail(code, f"the score {what}", node.span, "a score is one value per entry")
        return value

    def over_group(self, value: SSAValue, span: Span) -> SSAValue:
        """The mean over g where it is left over."""
        if "g" not in kv.axes_of(value):
            return value
        return self.add(kv.ReduceOp("mean", "g", value), span).res

    def expr(self, node: ast.Expr, scope: Scope) -> SSAValue:
        """Any expression. PolicyError K9xx for what is not lowered, K1xx and K2xx for what is wrong."""
        match node:
            case ast.Number():
                if node.kind == "bytes":
                    raise fail("K905", "budgets in bytes are not lowered yet", node.span, "give tokens or a percentage")
                return self.add(kv.ConstOp(node.value), node.span).res
            case ast.Name():
                return self._name(node, scope)
            case ast.Field():
                return self._field(f"{node.owner}.{node.name}", node.span, scope)
            case ast.Portion():
                if node.of not in scope.numbers:
                    refuse("K905", f"`of {node.of}` here", node.span, f"use {', '.join(sorted(scope.numbers))}")
                part = self.expr(node.fraction, scope)
                whole = self.add(kv.ScalarOp(node.of), node.span).res
                return self.add(kv.BinaryOp("*", part, whole), node.span).res
            case ast.Unary(op="-"):
                return self.add(kv.UnaryOp("neg", self.expr(node.operand, scope)), node.span).res
            case ast.Binary():
                left, right = self.expr(node.left, scope), self.expr(node.right, scope)
                return self.add(kv.BinaryOp(node.op, left, right), node.span).res
            case ast.Call():
                return self._call(node, scope)
            case ast.Reduce():
                return self._reduce(node, scope)
        return refuse("K905", f"`{node.span.text}`", node.span)

    def _name(self, node: ast.Name, scope: Scope) -> SSAValue:
        name = node.id
        if name in scope.scores:
            return self.expr(scope.scores[name].value, _without(scope, name))
        if name in scope.states:
            return self.add(kv.ReadOp(name), node.span).res
        if name in scope.landmarks:
            unit, axes = scope.landmarks[name]
            return self.add(kv.LandmarkOp(unit, name, axes), node.span).res
        if name in scope.shares:
            raise fail("K914", f"the share `{name}` inside an expression is not lowered yet", node.span,
                       f"use it as it is, such as `top({name})`")  # fmt: skip
        if name in kv.EVIDENCE:
            if scope.per_unit:
                refuse("K913", f"a landmark over `{name}`", node.span)
            return self.add(kv.EvidenceOp(name, *scope.source), node.span).res
        if name in kv.SCALARS:
            if name not in scope.numbers:
                refuse("K905", f"`{name}` here", node.span, f"use {', '.join(sorted(scope.numbers))}")
            return self.add(kv.ScalarOp(name), node.span).res
        return self._field(name, node.span, scope)

    def _field(self, name: str, span: Span, scope: Scope) -> SSAValue:
        if name not in kv.FIELDS:
            refuse("K905", f"`{name}`", span, "scores may use attn, logit, k, v, next.k, next.v, pos and age")
        if name.startswith("next.") and not scope.units:
            raise fail("K110", f"`{name}` is the next unit's, and the policy has no unit", span, "declare a unit")
        return self.add(kv.FieldOp(name, scope.per_unit), span).res

    def _call(self, node: ast.Call, scope: Scope) -> SSAValue:
        if node.named:
            refuse("K905", f"`{node.fn}` with named arguments", node.span)
        match node.fn, node.args:
            case (("maxpool" | "avgpool"), (body, width)):
                value = self.expr(body, scope)
                if kv.axes_of(value) not in ("i", "gi"):
                    refuse("K905", f"`{node.fn}` over `{kv.axes_of(value)}`", node.span, "pool one value per entry")
                return self.add(kv.PoolOp(node.fn[:3], whole(width, scope, 1), value), node.span).res
            case (("dot" | "cos"), (left, right)):
                operands = [self._vector(arg, scope, node.fn) for arg in (left, right)]
                return self.add(kv.PairOp(node.fn, *operands), node.span).res
            case "norm", (arg,):
                return self.add(kv.UnaryOp("norm", self._vector(arg, scope, "norm")), node.span).res
            case fn, (arg,) if fn in FUNCTIONS:
                return self.add(kv.UnaryOp(fn, self.expr(arg, scope)), node.span).res
            case (("min" | "max"), (first, *others)) if others:
                value = self.expr(first, scope)
                for other in others:
                    value = self.add(kv.BinaryOp(node.fn, value, self.expr(other, scope)), node.span).res
                return value
        return refuse("K905", f"`{node.fn}` with {len(node.args)} arguments", node.span)

    def _vector(self, node: ast.Expr, scope: Scope, fn: str) -> SSAValue:
        value = self.expr(node, scope)
        if "d" not in kv.axes_of(value):
            raise fail("K203", f"`{fn}` needs vectors, this has no axis d", node.span, "use keys or values")
        return value

    def _reduce(self, node: ast.Reduce, scope: Scope) -> SSAValue:
        for axis in node.axes:
            if axis.source is not None:
                scope = replace(scope, source=_source(axis, scope))
            elif axis.name == "q":
                scope = replace(scope, source=("forward", 0))
        value = self.expr(node.body, scope)
        if len(node.axes) > 1 and node.fn not in _TOGETHER:
            refuse("K905", f"`{node.fn}` over several axes at once", node.span)
        for axis in node.axes:
            if axis.name == "h" and "g" in kv.axes_of(value):  # `[h]` means all heads, so the group first
                if node.fn not in _TOGETHER:
                    refuse("K905", f"`{node.fn}[h]` over grouped heads", node.span, "reduce g first")
                value = self.add(kv.ReduceOp(node.fn, "g", value), node.span).res
            if axis.name != "h" and axis.name not in kv.axes_of(value):
                raise fail("K203", f"`{node.fn}[{axis.name}]` needs an axis `{axis.name}`, this has "
                           f"`{kv.axes_of(value) or 'none'}`", node.span, "reduce an axis that is open")  # fmt: skip
            if axis.name == "q" and node.fn in ("var", "std", "softmax"):
                refuse("K905", f"`{node.fn}[q]`", node.span, "sum, mean, max and min run over queries")
            if axis.name == "i" and scope.units and "u" not in kv.axes_of(value):
                refuse("K913", "a reduction over the tokens of a unit without a landmark of it", node.span)
            value = self.add(kv.ReduceOp(node.fn, axis.name, value), node.span).res
        return value

    # ------------------------------------------------------------ counts

    def count(self, node: ast.Expr, scope: Scope) -> SSAValue:
        """A number of entries. PolicyError where it is no number of the sequence."""
        label = " ".join(node.span.text.split()) or "n"
        scope = replace(scope, numbers=_IN_COUNTS)
        if isinstance(node, ast.Name) and node.id in scope.shares:
            share = scope.shares[node.id]
            _refuse_total(share, scope)
            amount = self.expr(share.total, replace(scope, shares={}))
            return self.add(kv.CountOp(label, amount, _share(share, scope)), node.span).res
        broken = broken_count(node)
        if broken is not None:
            raise fail("K205", f"`{node.span.text}` is no whole number of entries", node.span, WHOLE_COUNT)
        amount = self.expr(node, scope)
        if kv.axes_of(amount):
            raise fail("K211", "a count is one number per row", node.span, "use constants and run-time numbers")
        return self.add(kv.CountOp(label, amount), node.span).res


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


def whole(node: ast.Expr, scope: Scope, least: int) -> int:
    """A whole number known before running. PolicyError for anything else."""
    if any(isinstance(part, ast.Name) and part.id in scope.scores for part in node.walk()):
        refuse("K905", "a score used as a size", node.span)
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


def _source(axis: ast.Axis, scope: Scope) -> tuple[str, int]:
    source = axis.source
    known = isinstance(source, ast.Call) and source.fn in ("last", "peek") and len(source.args) == 1
    if axis.name != "q" or not known or not isinstance(source, ast.Call):
        refuse("K905", f"`{axis.name} in {source.span.text if source else ''}`", axis.span, "use last(n) or peek(n)")
    return source.fn, whole(source.args[0], scope, 1)


def _share(share: ast.Share, scope: Scope) -> tuple[str, Fraction]:
    if share.by.fn != "pyramid" or len(share.by.args) != 1 or share.by.named:
        refuse("K914", f"a share by `{share.by.fn}`", share.by.span, "pyramid(beta) can be run")
    beta = constant(share.by.args[0])
    if beta is None or beta < 1:
        raise fail("K109", "pyramid takes a number of at least 1", share.by.span, "such as pyramid(20)")
    return "pyramid", beta


def _refuse_total(share: ast.Share, scope: Scope) -> None:
    """A share is divided once, when the prompt is there: its total cannot move afterwards."""
    for part in reads(share.total, scope):
        name = part.of if isinstance(part, ast.Portion) else part.id if isinstance(part, ast.Name) else "prompt"
        if name != "prompt" and name not in scope.scores:
            refuse("K914", f"a share whose total reads `{name}`", part.span, "use numbers and `of prompt`")


def reads(node: ast.Expr, scope: Scope) -> Iterator[ast.Node]:
    """The nodes of an expression and of the scores that it names."""
    for part in node.walk():
        yield part
        if isinstance(part, ast.Name) and part.id in scope.scores:
            yield from reads(scope.scores[part.id].value, _without(scope, part.id))


def _without(scope: Scope, name: str) -> Scope:
    """The scope inside a score's own definition: a cycle then ends as an unknown name."""
    return replace(scope, scores={key: value for key, value in scope.scores.items() if key != name})
