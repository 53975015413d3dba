"""Counts and shares of a policy as kv operations.

Takes the numbers of regions and selections, and the shares that they name; gives SSA values of type `!kv.count`.
Guarantees: a share's total is known before the prompt has been read; what cannot be divided is refused with K914.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

from xdsl.ir import SSAValue

from kvcompile.dsl import ast
from kvcompile.dsl import dialect as kv
from kvcompile.dsl.context import WHOLE_COUNT, broken_count
from kvcompile.dsl.diagnostics import fail
from kvcompile.dsl.dialect_counts import ShareOp
from kvcompile.dsl.lower_expr import Builder, Scope, reads
from kvcompile.dsl.lower_numbers import constant, refuse


def lower_count(builder: Builder, node: ast.Expr, scope: Scope) -> SSAValue:
    """A number of entries. PolicyError where it is no number of the row."""
    label = " ".join(node.span.text.split()) or "n"
    broken = broken_count(node)
    if broken is not None:
        raise fail("K205", f"`{node.span.text}` is no whole number of entries", node.span, WHOLE_COUNT)
    named = {part.id for part in node.walk() if isinstance(part, ast.Name)} & scope.shares.keys()
    if named and scope.reads:
        refuse("K914", f"a share, `{min(named)}`, of what queries read", node.span, "give `attend` a number")
    parts = {name: _share(builder, scope.shares[name], scope) for name in sorted(named)}
    amount = builder.expr(node, replace(scope, place="count", parts=parts))
    if kv.axes_of(amount):
        raise fail("K211", "a count is one number per row", node.span, "use constants and run-time numbers")
    return builder.add(kv.CountOp(label, amount), node.span).res


def _share(builder: Builder, share: ast.Share, scope: Scope) -> SSAValue:
    _refuse_total(share, scope)
    total = builder.expr(share.total, replace(scope, shares={}, place="count"))
    if kv.axes_of(total):
        raise fail("K211", "the total of a share is one number", share.total.span, "such as `budget - observe`")
    beta: Fraction | None = None
    score: SSAValue | None = None
    table: str | None = None
    match share.by:
        case ast.Call(fn="pyramid", args=(node,), named=()):
            beta = constant(node)
            if beta is None or beta < 1:
                raise fail("K109", "pyramid takes a number of at least 1", share.by.span, "such as pyramid(20)")
        case ast.Call(fn="softmax", args=(node,), named=()):
            score = builder.over("g", builder.expr(node, scope), node.span)
            if kv.axes_of(score):
                refuse("K914", f"a share by softmax over axes `{kv.axes_of(score)}`", node.span,
                       "give one number per row, such as `-var[i] acc`")  # fmt: skip
        case ast.Call(fn="cover", args=(node,), named=()):
            score = builder.score(node, scope)
            if "u" in kv.axes_of(score):
                refuse("K914", "a share by cover over units", node.span, "give one number per entry")
        case ast.Call(fn="table", args=(ast.Text() as path,), named=()):
            table = path.value
        case _:
            refuse("K914", f"`{share.by.span.text}`", share.by.span,
                   'divide by pyramid(20), softmax(x), cover(s) or table("f.tsv")')  # fmt: skip
    op = ShareOp(share.name, total, share.by.fn, beta=beta, score=score, table=table)
    return builder.add(op, share.span).res


def _refuse_total(share: ast.Share, scope: Scope) -> None:
    """A share is divided once, when the prompt is there: its total cannot move afterwards."""
    for part in reads(share.total, scope):
        name = part.of if isinstance(part, ast.Portion) else part.id if isinstance(part, ast.Name) else "prompt"
        if name != "prompt" and name not in scope.scores:
            refuse("K914", f"a share whose total reads `{name}`", part.span, "use numbers and `of prompt`")
