"""Formulas over entries, as plans hold them: nodes, and whose queries they ask for. Free of torch.

Axes of an expression, always written in the order of `AXES`:
`h` KV heads of the layer, `g` query heads of one KV head, `q` queries, `u` units,
`i` entries of a row (or of a unit, where `u` is open too), `d` channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

AXES = "hgquid"


@dataclass(frozen=True, slots=True)
class QuerySource:
    """Whose queries a `q` axis ranges over.

    `forward`: the queries of this forward; `last`: the row's `width` newest; `peek`: the prompt's
    last `width`, run along with each piece; `sample`: of this forward's queries the part `part`, those at positions p
    where floor(p * part) is more than floor((p - 1) * part); `previous`: the one before the newest; `own`: in `attend`,
    the query that reads.
    """

    kind: Literal["forward", "last", "peek", "sample", "previous", "own"]
    width: int = 0
    part: Fraction = Fraction(0)


@dataclass(frozen=True, slots=True)
class Expr:
    """One node of a formula over entries; evaluated in float32 (counts: in exact rationals).

    op        value                          args   meaning
    const     Fraction                       0      a number
    scalar    name                           0      a number of the sequence: prompt now chunk step; of the row: len
    share     index into PolicyPlan.shares   0      in a count: the layer's part of a share
    field     "k" "v" "pos" "age" "raw.k" "count" "next.k" "next.v"  0  what an entry has; count: its tokens
    queries   QuerySource                    0      axes g, q, d: the queries themselves, rotated
    evidence  ("attn" | "logit", QuerySource)  0    axes g, q, i: attention of each query to each entry
    noise     (seed, QuerySource)            0      axes g, q, i: Gumbel noise of seed, layer, head, query and entry
    learned   key of Program.weights         1..    on insert: a trained score of each entry from its own q, k, v;
                                                    in `attend` (axis u): of each unit, from the query and landmarks
    state     name                           0      the entry's own state
    sim       -                              0      of a loser of `merge`: likeness to its nearest survivor
    ema       (row scalar's index, beta)     1      beta * before + (1 - beta) * now of a row's number; at first now
    landmark  (unit, name)                   0      a unit's landmark
    regroup   (unit, unit)                   1      from units to others: the largest of those that overlap with each
    reduce    (fn, axis)                     1      sum mean max min var std softmax over one axis (softmax keeps it)
    pool      ("max" | "avg", width)         1      centred pooling over the candidates in position order
    unary     neg exp log sqrt abs sigmoid norm   1  elementwise; norm reduces d
    binary    + - * / max min < <= > >= == != and or   2   elementwise, x / 0 is 0
    pair      dot cos                        2      reduces d
    """

    op: str
    args: tuple[Expr, ...] = ()
    value: object = None
    axes: str = ""

    def walk(self) -> list[Expr]:
        """This node and all below it, operands first, repeated nodes once."""
        seen: dict[Expr, None] = {}

        def visit(node: Expr) -> None:
            if node in seen:
                return
            for arg in node.args:
                visit(arg)
            seen[node] = None

        visit(self)
        return list(seen)


def words_of(expr: Expr) -> tuple[str, str]:
    """(function, axis) of a reduce, (unit, name) of a landmark."""
    assert isinstance(expr.value, tuple)
    first, second = expr.value
    return str(first), str(second)


def evidence_of(expr: Expr) -> tuple[str, QuerySource]:
    """("attn" or "logit", whose queries) of an evidence."""
    assert isinstance(expr.value, tuple)
    kind, source = expr.value
    assert isinstance(source, QuerySource)
    return str(kind), source


def source_of(expr: Expr) -> QuerySource | None:
    """Whose queries a node asks for, or None."""
    if expr.op == "queries":
        assert isinstance(expr.value, QuerySource)
        return expr.value
    if expr.op in ("evidence", "noise"):
        assert isinstance(expr.value, tuple) and isinstance(expr.value[1], QuerySource)
        return expr.value[1]
    return None
