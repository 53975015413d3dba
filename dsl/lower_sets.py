"""Sets and triggers of a policy as kv operations.

Takes the terms of a `keep` and the triggers of its `at`; gives one SSA value of type `!kv.set`, and attributes.
Guarantees: every region, selection, scope and trigger that this version cannot run is refused at its span.
"""

from __future__ import annotations

from fractions import Fraction

from xdsl.ir import SSAValue

from kvcompile.dsl import ast
from kvcompile.dsl import dialect as kv
from kvcompile.dsl.diagnostics import fail
from kvcompile.dsl.dialect_sets import COUNTED, RegionOp, TopOp, TriggerAttr, UnionOp
from kvcompile.dsl.lower_expr import Builder, Scope, constant, fraction, refuse, whole

_PLAIN = ("all", "prompt", "generated", "frozen")


def lower_set(builder: Builder, node: ast.SetUnion, scope: Scope, units: frozenset[str]) -> SSAValue:
    """The union of a set's terms, in the order written."""
    terms = [_term(builder, term, scope, units) for term in node.terms]
    return builder.add(UnionOp(terms), node.span).res


def _term(builder: Builder, term: ast.Term, scope: Scope, units: frozenset[str]) -> SSAValue:
    match term:
        case ast.Region():
            return _region(builder, term, scope, units)
        case ast.Selection():
            return _selection(builder, term, scope, units)
        case ast.Ref():
            return refuse("K902", f"the set `{term.name}`", term.span)
        case ast.Where():
            return refuse("K902", "`where` as a term of a set", term.span)


def _region(builder: Builder, term: ast.Region, scope: Scope, units: frozenset[str]) -> SSAValue:
    kind, args = term.kind, term.args
    if kind in _PLAIN and not args and not term.named:
        return builder.add(RegionOp(kind), term.span).res
    if kind == "newest" and term.unit is not None:
        return builder.add(RegionOp("newest", unit=_unit(term.unit, term, units)), term.span).res
    if kind != "random" and kind in COUNTED and len(args) == 1 and not term.named:
        if kind == "stride":
            whole(args[0], scope, 1)
        if isinstance(args[0], ast.Number) and args[0].kind == "percent":
            raise fail("K210", f"`{args[0].span.text}` does not say of what", args[0].span, "such as `10% of prompt`")
        return builder.add(RegionOp(kind, builder.count(args[0], scope)), term.span).res
    return refuse("K902", f"the region `{term.span.text or kind}`", term.span)


def _unit(name: str, node: ast.Node, units: frozenset[str]) -> str:
    singular = name if name in units else name.removesuffix("s")
    if singular not in units:
        raise fail("K110", f"no unit `{name}`", node.span, f"units here: {', '.join(sorted(units)) or 'none'}")
    return singular


def _selection(builder: Builder, term: ast.Selection, scope: Scope, units: frozenset[str]) -> SSAValue:
    if term.rank == "cover":
        refuse("K901", "`cover`, whose number of entries is known at run time only,", term.span, "use top(n)")
    if term.unit is not None:
        refuse("K913", f"choosing whole units (`{term.unit}`)", term.span, "choose entries, such as `top(n) by s`")
    competing, floor, unit = _scopes(term, units)
    score = builder.score(term.by, scope)
    if "u" in kv.axes_of(score) and unit is None:
        refuse("K913", "a score over units that compete together", term.span, "let entries compete `per UNIT`")
    part = fraction(term.amount)
    amount = builder.count(term.amount, scope) if part is None else part
    return builder.add(
        TopOp(term.rank, score, amount, competing, floor, unit, observed=_observed(score)), term.span
    ).res


def _scopes(term: ast.Selection, units: frozenset[str]) -> tuple[str, Fraction | None, str | None]:
    """Who competes, the floor of each head, and the unit whose entries compete among themselves."""
    competing, floor, unit = "head", None, None
    for scope in term.scopes:
        match scope.kind, scope.what:
            case "per", "head":
                pass
            case "per", what if what not in ("query_head", "layer"):
                unit = _unit(what, scope, units)
            case "shared", "heads" if scope.size is None:
                competing = _exclusive(competing, "shared", scope)
            case "across", "heads":
                competing = _exclusive(competing, "across", scope)
                floor = _floor(scope)
            case _:
                refuse("K904", f"`{scope.span.text}`", scope.span, "per head, per UNIT, shared heads, across heads")
    if competing == "shared" and unit is not None:
        refuse("K904", "one decision for all heads and per unit at once", term.span, "leave out one of the two scopes")
    if competing == "across" and unit is not None:
        refuse("K904", "competing across heads and per unit at once", term.span, "leave out one of the two scopes")
    return competing, floor, unit


def _exclusive(before: str, now: str, scope: ast.Scope) -> str:
    if before not in ("head", now):
        raise fail("K208", "heads cannot share one decision and compete at once", scope.span, "name one of the two")
    return now


def _floor(scope: ast.Scope) -> Fraction | None:
    if scope.floor is None:
        return None
    value = constant(scope.floor)
    if value is None or not 0 <= value <= 1:
        raise fail("K210", "a floor is a fraction between 0% and 100%", scope.floor.span, "such as `floor 20%`")
    return value


def _observed(score: SSAValue) -> int:
    """The widest `q in peek(w)` below a score: in the last piece those w entries are kept (rule 21)."""
    seen: set[SSAValue] = set()
    todo, width = [score], 0
    while todo:
        value = todo.pop()
        if value in seen:
            continue
        seen.add(value)
        if isinstance(value.owner, kv.EvidenceOp) and value.owner.source.data == "peek":
            width = max(width, value.owner.width.value.data)
        todo += (
            value.owner.operands if not isinstance(value.owner, SSAValue) and hasattr(value.owner, "operands") else ()
        )
    return width


def lower_triggers(triggers: tuple[ast.Trigger, ...], units: frozenset[str]) -> list[TriggerAttr]:
    """The triggers of an `at`. PolicyError for conditions and for numbers that are not known before running."""
    out: list[TriggerAttr] = []
    for trigger in triggers:
        if trigger.cond is not None or trigger.name == "when":
            refuse("K903", f"the condition of `{trigger.span.text}`", trigger.span)
        out.append(_trigger(trigger, units))
    return list(dict.fromkeys(out))


def _trigger(node: ast.Trigger, units: frozenset[str]) -> TriggerAttr:
    nowhere = Scope()
    match node.name, node.args:
        case (("prefill.end" | "step" | "chunk"), ()):
            return TriggerAttr(node.name)
        case (("chunk" | "every" | "full" | "filled"), (n,)) if not node.named:
            if isinstance(n, ast.Name):
                refuse("K903", f"`{node.span.text}`", node.span, "give a number")
            if constant(n) is None:
                refuse("K903", f"`{node.span.text}`, whose number is known at run time only,", node.span)
            return TriggerAttr(node.name, whole(n, nowhere, 1))
        case "filled", (ast.Name() as unit, n) if not node.named:
            return TriggerAttr("filled", whole(n, nowhere, 1), _unit(unit.id, unit, units))
    return refuse("K903", f"`{node.span.text}`", node.span)
