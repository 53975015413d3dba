"""Budgets: counts down to constants or named run-time numbers, and what a union sets aside before a share.

Takes a kv module; folds arithmetic on constants, exactly. Guarantees: no operation on constants alone is left
below a count; a count that is negative by constants alone is refused at its place; every share lists the counts
that its union takes first.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Operation, SSAValue
from xdsl.pattern_rewriter import PatternRewriter, PatternRewriteWalker, RewritePattern
from xdsl.transforms.common_subexpression_elimination import cse
from xdsl.transforms.dead_code_elimination import region_dce

from kvcompile.dsl import dialect as kv
from kvcompile.dsl.diagnostics import fail
from kvcompile.dsl.dialect_sets import RegionOp, TopOp, UnionOp
from kvcompile.dsl.lower_expr import arithmetic
from kvcompile.dsl.module import ops_of, policy_of
from kvcompile.passes.context import Context


@dataclass(frozen=True, slots=True)
class Budgets:
    """Folds counts and completes shares; no options."""

    name: str = "budgets"

    def __call__(self, module: ModuleOp, context: Context) -> None:
        PatternRewriteWalker(_Fold(), apply_recursively=True).rewrite_module(module)
        for op in list(ops_of(module)):
            if isinstance(op, kv.CountOp):
                _check(op, context)
        for op in list(ops_of(module)):
            if isinstance(op, UnionOp):
                _reserve(op)
        cse(module)
        region_dce(policy_of(module).body)


class _Fold(RewritePattern):
    """An exact operation on constants becomes a constant at the same place."""

    def match_and_rewrite(self, op: Operation, rewriter: PatternRewriter, /) -> None:
        value: Fraction | None = None
        if isinstance(op, kv.UnaryOp) and op.fn.data in ("neg", "abs"):
            arg = _constant(op.arg)
            if arg is not None:
                value = -arg if op.fn.data == "neg" else abs(arg)
        elif isinstance(op, kv.BinaryOp) and op.fn.data in ("+", "-", "*", "/", "min", "max"):
            left, right = _constant(op.lhs), _constant(op.rhs)
            if left is not None and right is not None:
                value = arithmetic(op.fn.data, left, right)
        if value is not None:
            folded = kv.ConstOp(value)
            folded.location = op.location
            rewriter.replace(op, folded)


def _constant(value: SSAValue) -> Fraction | None:
    return kv.rational(value.owner.value) if isinstance(value.owner, kv.ConstOp) else None


def _check(op: kv.CountOp, context: Context) -> None:
    value = _constant(op.amount)
    if value is not None and value < 0:
        message = f"`{op.label.data}` is {float(value):g}: the budget is smaller than what is set aside from it"
        raise fail("K205", message, context.places.span(op), "raise the budget, or lower what is subtracted")


def _reserve(union: UnionOp) -> None:
    """What `sink` and `recent` of a union take is not there for a share of the same union."""
    regions = [term.owner for term in union.terms if isinstance(term.owner, RegionOp)]
    first = [op.count for op in regions if op.count is not None and op.kind.data in ("sink", "recent")]
    for term in union.terms:
        top = term.owner
        if not isinstance(top, TopOp) or top.count is None:
            continue
        count = top.count.owner
        if not isinstance(count, kv.CountOp) or count.share is None or count.parameter is None:
            continue
        share = count.share.data, kv.rational(count.parameter)
        beside = kv.CountOp(count.label.data, count.amount, share, [c for c in first if c is not top.count])
        beside.location = count.location
        block = top.parent
        assert block is not None
        block.insert_op_before(beside, top)
        top.operands[1] = beside.res
