"""Budgets: counts down to constants or named run-time numbers, and what a union sets aside before a share.

Takes a bound kv module; folds arithmetic on constants and budgets in bytes, exactly. Guarantees: no operation on
constants alone is left below a count; a count that is negative by constants alone is refused at its place; every
pyramid lists the counts that its union takes first, every share how many layers decide together.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Block, Operation, SSAValue
from xdsl.pattern_rewriter import PatternRewriter, PatternRewriteWalker, RewritePattern
from xdsl.transforms.common_subexpression_elimination import cse
from xdsl.transforms.dead_code_elimination import region_dce

from kvcompile.dsl import dialect as kv
from kvcompile.dsl.diagnostics import fail
from kvcompile.dsl.dialect_counts import BytesOp, ShareOp
from kvcompile.dsl.dialect_sets import RegionOp, TopOp, UnionOp
from kvcompile.dsl.lower_heads import below
from kvcompile.dsl.lower_numbers import arithmetic
from kvcompile.dsl.module import ops_of, policy_of
from kvcompile.passes.carried import hidden_states, read_states
from kvcompile.passes.context import Context

_MARKS = 4 + 1  # bytes beside key and value: the position, and whether an entry is frozen


@dataclass(frozen=True, slots=True)
class Budgets:
    """Folds counts and completes shares; no options."""

    name: str = "budgets"

    def __call__(self, module: ModuleOp, context: Context) -> None:
        for op in list(ops_of(module)):
            if isinstance(op, UnionOp):
                _complete(op, context)
        cse(module)
        region_dce(policy_of(module).body)
        states = len(read_states(module)) + len(hidden_states(module))
        fold = _Fold(context.facts.entry_bytes + _MARKS + 4 * states)
        PatternRewriteWalker(fold, apply_recursively=True).rewrite_module(module)
        for op in ops_of(module):
            if isinstance(op, kv.CountOp):
                _check(op, context)
        cse(module)
        region_dce(policy_of(module).body)


@dataclass(frozen=True)
class _Fold(RewritePattern):
    """An exact operation on constants becomes a constant at the same place, so do bytes of a row."""

    entry_bytes: int

    def match_and_rewrite(self, op: Operation, rewriter: PatternRewriter, /) -> None:
        value: Fraction | None = None
        if isinstance(op, BytesOp):
            value = Fraction(op.size.value.data, self.entry_bytes)
        elif isinstance(op, kv.UnaryOp) and op.fn.data in ("neg", "abs"):
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


def _complete(union: UnionOp, context: Context) -> None:
    """Shares of a union learn what `sink` and `recent` of it take, and how many layers decide together.

    A share must follow those counts, so everything that reads it is written anew right before the union.
    """
    shares = {op for term in union.terms for op in below(term) if isinstance(op, ShareOp)}
    if not shares:
        return
    terms = [term.owner for term in union.terms]
    fixed = [
        term.count
        for term in terms
        if isinstance(term, RegionOp) and term.count is not None and term.kind.data in ("sink", "recent")
        and not any(isinstance(op, ShareOp) for op in below(term.count))
    ]  # fmt: skip
    moving = [op for count in fixed if isinstance(op := count.owner, Operation) and _moves(count)]
    pyramids = [share for share in shares if share.by.data == "pyramid"]
    if moving and pyramids:
        raise fail("K914", f"`{pyramids[0].label.data}` is divided once, beside a region whose size moves",
                   context.places.span(moving[0]), "give the region a number or a part of the prompt")  # fmt: skip
    groups = {
        term.sharing.value.data if term.sharing is not None else 1
        for term in terms
        if isinstance(term, TopOp) and any(op in shares for op in below(term.res) if isinstance(op, ShareOp))
    }
    if len(groups) > 1:
        raise fail("K914", "one share in selections that different numbers of layers decide together",
                   context.places.span(union), "say the same `shared layers(n)` at each of them")  # fmt: skip
    block = union.parent
    assert block is not None
    anew: dict[Operation, Operation] = {}
    for share in sorted(shares, key=block.get_operation_index):
        anew[share] = ShareOp(
            share.label.data,
            share.total,
            share.by.data,
            beta=kv.rational(share.beta) if share.beta is not None else None,
            score=share.score,
            table=share.table.data if share.table is not None else None,
            weights=[kv.rational(weight) for weight in share.weights or ()],
            reserve=fixed if share.by.data == "pyramid" else (),
            sharing=max(groups, default=1),
        )
        anew[share].location = share.location
        block.insert_op_before(anew[share], union)
    for index, term in enumerate(terms):
        assert isinstance(term, Operation)
        union.operands[index] = _written_anew(term, anew, union, block).results[0]


def _moves(count: SSAValue) -> bool:
    """Whether a count is not known with the prompt's length."""
    return any(isinstance(op, kv.ScalarOp) and op.what.data != "prompt" for op in below(count))


def _written_anew(op: Operation, anew: dict[Operation, Operation], before: Operation, block: Block) -> Operation:
    """The operation with everything that reads a share in `anew` below it cloned; itself where it reads none."""
    if op in anew:
        return anew[op]
    operands = [operand.owner for operand in op.operands]
    new = [_written_anew(owner, anew, before, block) if isinstance(owner, Operation) else owner for owner in operands]
    if new != operands:
        clone = op.clone({operand: owner.results[0] for operand, owner in zip(op.operands, new, strict=True)
                          if isinstance(owner, Operation)})  # fmt: skip
        clone.location = op.location
        block.insert_op_before(clone, before)
        anew[op] = clone
        return clone
    return op
