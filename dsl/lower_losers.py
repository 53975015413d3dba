"""What becomes of losers, as kv operations.

Takes the `else` actions of a `keep`; gives SSA values of type `!kv.loser`, in the order in which they are tried.
Guarantees: an action that this version cannot run is refused with K908 at its span.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

from xdsl.ir import SSAValue

from kvcompile.dsl import ast
from kvcompile.dsl import dialect as kv
from kvcompile.dsl.dialect_losers import LoserOp
from kvcompile.dsl.lower_expr import Builder, Scope
from kvcompile.dsl.lower_numbers import part, refuse, whole


def lower_losers(builder: Builder, losers: tuple[ast.Loser, ...], scope: Scope) -> list[SSAValue]:
    """The actions of a clause; none where all losers are dropped."""
    if all(isinstance(loser, ast.Drop) for loser in losers):
        return []
    scope = replace(scope, place="loser")
    return [builder.add(_loser(builder, loser, scope), loser.span).res for loser in losers]


def _loser(builder: Builder, loser: ast.Loser, scope: Scope) -> LoserOp:
    match loser:
        case ast.Drop():
            return LoserOp("drop")
        case ast.Merge():
            return _merge(builder, loser, scope)
        case ast.Fold():
            return _fold(loser)
    return refuse("K908", f"`{loser.span.text}`", loser.span, "losers can be dropped, merged or folded")


def _merge(builder: Builder, loser: ast.Merge, scope: Scope) -> LoserOp:
    if loser.into != "nearest":
        refuse("K908", f"merging into `{loser.into}`", loser.span, "merge into nearest")
    values = [_per_loser(builder, node, scope) if node is not None else None for node in (loser.when, loser.weight)]
    match loser.by:
        case ast.Call(fn="cos" | "dot", args=(ast.Name(id="k" | "v" as of),), named=()):
            return LoserOp("merge", loser.by.fn, of, when=values[0], weight=values[1])
        case ast.Call(fn="distance", args=(ast.Name(id="pos"),), named=()):
            return LoserOp("merge", "distance", when=values[0], weight=values[1])
    return refuse("K908", f"merging by `{loser.by.span.text}`", loser.by.span,
                  "by cos(k), dot(k), cos(v), dot(v) or distance(pos)")  # fmt: skip


def _per_loser(builder: Builder, node: ast.Expr, scope: Scope) -> SSAValue:
    for inner in node.walk():
        if isinstance(inner, ast.Reduce) and any(axis.name == "h" for axis in inner.axes):
            refuse("K908", f"`{inner.span.text}` of losers", inner.span, "each head has its own losers: leave out [h]")
    value = builder.expr(node, scope)
    if kv.axes_of(value) not in ("", "i"):
        refuse("K908", f"`{node.span.text}` of losers", node.span, "give one number per loser, such as `sim`")
    return value


def _fold(loser: ast.Fold) -> LoserOp:
    if loser.weight is not None and not (loser.fn == "mean" and loser.weight == ast.Name("count")):
        refuse("K908", f"`{loser.span.text}`", loser.span, "a mean weighs by count, other folds take no weight")
    match loser.fn, loser.args:
        case "mean", ():
            return LoserOp("fold", "mean")
        case "dct", (share,) if not loser.named:
            return LoserOp("fold", "dct", part=part(share, "what a transform leaves", "such as dct(50%)"))
        case "pool", (run,) if not loser.named:
            return LoserOp("fold", "pool", part=Fraction(1, whole(run, 1)))
    return refuse("K908", f"`{loser.span.text}`", loser.span, "fold mean, dct(50%) or pool(4)")
