"""States of a policy and what changes them, as kv operations.

Takes the `state` and `on` clauses; gives `kv.state` and `kv.update`. Guarantees: what is a sum over queries that
reads no state becomes the state's `add`, which may run over all queries of a forward at once with the same result;
everything else is an update, query by query (rule 19).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

from xdsl.ir import SSAValue

from kvcompile.dsl import ast
from kvcompile.dsl import dialect as kv
from kvcompile.dsl.dialect_policy import StateOp, UpdateOp
from kvcompile.dsl.lower_expr import Builder, Place, Scope, reads, without
from kvcompile.dsl.lower_numbers import constant, refuse
from kvcompile.dsl.resolve import Placed, Resolved

_READ_AT_ONCE = ("attn", "k", "v", "pos", "prompt", "step")  # the same for all queries of a forward
_FINITE = ("dot", "cos", "norm", "abs", "sigmoid", "sqrt", "min", "max")
_EVENTS: dict[str, Place] = {"attend": "attend", "insert": "insert", "step": "step"}


@dataclass(frozen=True, slots=True)
class Change:
    """One assignment of an `on` clause."""

    clause: ast.On
    update: ast.Update
    scope: Scope

    @property
    def expressions(self) -> list[ast.Expr]:
        return [self.update.value, *([self.clause.where] if self.clause.where is not None else [])]


def lower_states(
    builder: Builder, resolved: Resolved, scope: Callable[[Placed], Scope]
) -> list[tuple[ast.Node, SSAValue]]:
    """Declare states and their updates. Returns what changes them: the place in the policy and the value."""
    changes = _changes(resolved, scope)
    linear = _linear_states(changes)
    found: list[tuple[ast.Node, SSAValue]] = []
    started: list[UpdateOp] = []
    for placed in resolved.of(ast.State):
        assert isinstance(placed.clause, ast.State)
        assign = placed.clause.assigns[0]
        init, first = _initial(builder, assign, scope(placed))
        add = None
        if assign.name in linear:
            change = linear[assign.name]
            inside = replace(change.scope, place="attend", states=frozenset())
            add = builder.over("g", builder.expr(change.update.value, inside), change.update.value.span)
            add = builder.over("q", add, change.update.value.span, "sum")
            found.append((change.update.value, add))
        builder.add(StateOp(assign.name, init, add), assign.span)
        if first is not None:
            found.append((assign.value, first))
            started.append(builder.add(UpdateOp("insert", [(assign.name, first)]), assign.span))
    for placed in resolved.of(ast.On):
        assert isinstance(placed.clause, ast.On)
        mine = [c for c in changes if c.clause is placed.clause and linear.get(c.update.name) is not c]
        if mine:
            found += _update(builder, placed.clause, mine)
    return found


def _changes(resolved: Resolved, scope: Callable[[Placed], Scope]) -> list[Change]:
    out: list[Change] = []
    places: dict[str, Placed] = {}
    for placed in resolved.of(ast.On):
        clause = placed.clause
        assert isinstance(clause, ast.On)
        if clause.event not in _EVENTS:
            refuse("K906", f"`on {clause.event}`", clause.span, "on attend, on insert and on step can be run")
        for update in clause.updates:
            if places.setdefault(update.name, placed).prefixes != placed.prefixes:
                refuse("K906", f"updates of `{update.name}` under different prefixes", update.span,
                       "give each prefix a state of its own")  # fmt: skip
            out.append(Change(clause, update, scope(placed)))
    return out


def _initial(builder: Builder, assign: ast.Assign, scope: Scope) -> tuple[SSAValue, SSAValue | None]:
    """The first value of a state, and what `on insert` makes of it where it is no constant and no position."""
    value = constant(assign.value)
    if value is not None:
        return builder.add(kv.ConstOp(value), assign.value.span).res, None
    if isinstance(assign.value, ast.Name) and assign.value.id in ("now", "pos"):  # a new entry is the newest
        return builder.add(kv.FieldOp("pos"), assign.value.span).res, None
    zero = builder.add(kv.ConstOp(Fraction(0)), assign.value.span).res
    return zero, builder.change(assign.value, replace(scope, place="insert", state=assign.name))


def _update(builder: Builder, clause: ast.On, changes: list[Change]) -> list[tuple[ast.Node, SSAValue]]:
    where: SSAValue | None = None
    found: list[tuple[ast.Node, SSAValue]] = []
    assigns: list[tuple[str, SSAValue]] = []
    for change in changes:
        scope = replace(change.scope, place=_EVENTS[clause.event], state=change.update.name)
        if where is None and clause.where is not None:
            where = builder.change(clause.where, replace(scope, decides=True))
            found.append((clause.where, where))
        value = builder.change(change.update.value, scope)
        if change.update.op == "+=":
            before = builder.add(kv.ReadOp(change.update.name), change.update.span).res
            value = builder.add(kv.BinaryOp("+", before, value), change.update.span).res
        assigns.append((change.update.name, value))
        found.append((change.update.value, value))
    builder.add(UpdateOp(clause.event, assigns, where), clause.span)
    return found


# ---------------------------------------------------------------- sums over queries


def _linear_states(changes: list[Change]) -> dict[str, Change]:
    """The one change of each state that grows by a plain sum and that no update reads on its way."""
    found: dict[str, Change] = {}
    for change in changes:
        same = [c for c in changes if c.update.name == change.update.name and c.clause.event == "attend"]
        plain = change.clause.where is None and change.update.op == "+="
        if same == [change] and plain and _is_sum(change.update.value, change.scope):
            found[change.update.name] = change
    # An update that runs query by query sees what the queries before it left, so what it reads must run so, too.
    sequential = [c for c in changes if c.clause.event == "attend" and found.get(c.update.name) is not c]
    read = {
        part.id
        for change in sequential
        for expr in change.expressions
        for part in reads(expr, change.scope)
        if isinstance(part, ast.Name)
    }
    return {name: change for name, change in found.items() if name not in read}


def _is_sum(node: ast.Expr, scope: Scope) -> bool:
    """Whether an update is a sum over queries of what each of them sees by itself, times constants."""
    match node:
        case ast.Reduce(fn="sum", axes=(ast.Axis(name="q", source=None),)):
            return _plain(node.body, scope, softened=False) and _vanishes(node.body, scope)
        case ast.Reduce(fn="mean" | "sum", axes=axes) if all(axis.name in "gh" for axis in axes):
            return _is_sum(node.body, scope)
        case ast.Binary(op="*", left=left, right=right) if constant(left) is not None:
            return _is_sum(right, scope)
        case ast.Binary(op="*" | "/", left=left, right=right) if constant(right) is not None:
            return _is_sum(left, scope)
        case ast.Name(id=name) if name in scope.scores:
            return _is_sum(scope.scores[name].value, without(scope, name))
    return False


def _plain(node: ast.Expr, scope: Scope, softened: bool) -> bool:
    """Whether a term is the same for a query whichever others run beside it, and finite for entries it cannot read.

    A logit of -inf may not be summed, but where a softmax over the entries has made a share of it (`softened`).
    """
    match node:
        case ast.Number() | ast.Portion(of="prompt"):
            return True
        case ast.Name(id=name) if name in scope.scores:
            return _plain(scope.scores[name].value, without(scope, name), softened)
        case ast.Name(id=name):
            own = name in scope.states or name in scope.landmarks
            return not own and (name in _READ_AT_ONCE or (softened and name == "logit"))
        case ast.Unary(op="-", operand=operand):
            return _plain(operand, scope, softened)
        case ast.Binary(op="+" | "-" | "*" | "/", left=left, right=right):
            return _plain(left, scope, softened) and _plain(right, scope, softened)
        case ast.Reduce(fn="softmax", axes=(ast.Axis(name="i"),), body=body):
            return _plain(body, scope, softened=True)
        case ast.Reduce(axes=axes, body=body):
            return all(axis.name in "ghd" for axis in axes) and _plain(body, scope, softened)
        case ast.Call(fn="gumbel"):
            return softened
        case ast.Call(fn=fn, args=args) if fn in _FINITE or (softened and fn in ("exp", "log")):
            return all(_plain(arg, scope, softened) for arg in args)
    return False


def _vanishes(node: ast.Expr, scope: Scope) -> bool:
    """Whether a term is 0 for entries that a query cannot read."""
    match node:
        case ast.Name(id="attn"):
            return True
        case ast.Name(id=name) if name in scope.scores:
            return _vanishes(scope.scores[name].value, without(scope, name))
        case ast.Unary(op="-", operand=operand):
            return _vanishes(operand, scope)
        case ast.Binary(op="*", left=left, right=right):
            return _vanishes(left, scope) or _vanishes(right, scope)
        case ast.Binary(op="/", left=left):
            return _vanishes(left, scope)
        case ast.Binary(op="+" | "-", left=left, right=right):
            return _vanishes(left, scope) and _vanishes(right, scope)
        case ast.Reduce(fn="softmax", axes=(ast.Axis(name="i"),)):
            return True
        case ast.Reduce(fn="sum" | "mean", axes=axes, body=body):
            return all(axis.name in "ghd" for axis in axes) and _vanishes(body, scope)
        case ast.Call(fn="abs" | "sqrt", args=(arg,)):
            return _vanishes(arg, scope)
    return False
