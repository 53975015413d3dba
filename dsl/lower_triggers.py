"""Triggers of a policy as attributes, and their conditions as kv operations.

Takes the triggers of an `at`; gives attributes and the conditions that they number. Guarantees: what is not known
before running is refused with K903, and so are conditions that differ between rows that decide together.
"""

from __future__ import annotations

from xdsl.ir import SSAValue

from kvcompile.dsl import ast
from kvcompile.dsl import dialect as kv
from kvcompile.dsl.dialect_sets import TopOp, TriggerAttr
from kvcompile.dsl.dialect_sources import QueriesOp
from kvcompile.dsl.lower_expr import Builder, Scope
from kvcompile.dsl.lower_heads import below
from kvcompile.dsl.lower_numbers import constant, refuse, whole
from kvcompile.dsl.lower_sets import Names, unit_name


def lower_triggers(
    builder: Builder, triggers: tuple[ast.Trigger, ...], scope: Scope, names: Names, tops: list[TopOp]
) -> tuple[list[TriggerAttr], list[SSAValue]]:
    """The triggers of an `at` that governs a set with these selections, and their conditions."""
    attrs: list[TriggerAttr] = []
    conds: list[SSAValue] = []
    for trigger in triggers:
        attr = _trigger(trigger, names)
        if trigger.cond is not None:
            conds.append(builder.condition(trigger.cond, scope))
            _refuse_uneven(conds[-1], trigger.cond, tops)
            attr = TriggerAttr(attr.kind.data, attr.n.value.data, attr.unit.data, len(conds) - 1)
        attrs.append(attr)
    return list(dict.fromkeys(attrs)), conds


def _trigger(node: ast.Trigger, names: Names) -> TriggerAttr:
    match node.name, node.args:
        case "when", () if node.cond is not None:
            return TriggerAttr("when", cond=0)
        case (("prefill.end" | "step" | "chunk"), ()):
            return TriggerAttr(node.name)
        case (("chunk" | "every" | "full" | "filled"), (n,)) if not node.named:
            # `full` goes by the longest row of the class, so that it needs no length that a share or a competition
            # of heads leaves open.
            if isinstance(n, ast.Name):
                refuse("K903", f"`{node.span.text}`", node.span, "give a number")
            if constant(n) is None:
                refuse(
                    "K903", f"`{node.span.text}`, whose number is known at run time only,", node.span, "give a number"
                )
            return TriggerAttr(node.name, whole(n, 1))
        case "filled", (ast.Name() as unit, n) if not node.named:
            return TriggerAttr("filled", whole(n, 1), unit_name(unit.id, unit, names))
    return refuse("K903", f"`{node.span.text}`", node.span, "such as `every(64)`, `filled(128)` or `step`")


def _refuse_uneven(cond: SSAValue, node: ast.Expr, tops: list[TopOp]) -> None:
    """Rows that decide together fire together: their condition may read only what is the same for all of them."""
    ops = below(cond)
    by_query = any(isinstance(op, QueriesOp) for op in ops)
    by_length = any(isinstance(op, kv.ScalarOp) and op.what.data == "len" for op in ops)
    for top in tops:
        shared = top.scope.data == "shared"
        compete = top.scope.data == "across" or top.layers is not None
        if (shared or compete) and by_query:
            refuse("K903", "a condition that reads queries, for rows that decide together,", node.span,
                   "queries differ by head and layer: compare now, prompt or step, or decide per head")  # fmt: skip
        if compete and by_length:
            refuse("K903", "a condition that reads `len`, for rows that compete or share across layers,", node.span,
                   "their lengths differ: compare now, prompt or step, such as `now > 4096`")  # fmt: skip


def reads_queries(conds: list[SSAValue]) -> bool:
    """Whether a condition differs between heads."""
    return any(isinstance(op, QueriesOp) for cond in conds for op in below(cond))
