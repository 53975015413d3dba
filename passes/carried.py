"""States that entries carry once a policy is bound: those that something reads, and the compiler's own.

Takes a bound kv module; gives names. Guarantees: what no set reads, directly or through another state, is not among
them; the order is that of the declarations, hidden states last.
"""

from __future__ import annotations

from collections.abc import Iterable

from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Operation, SSAValue

from kvcompile.dsl import dialect as kv
from kvcompile.dsl.dialect_counts import ShareOp
from kvcompile.dsl.dialect_losers import LoserOp
from kvcompile.dsl.dialect_policy import ClassOp, StateOp, UnitOp, UpdateOp
from kvcompile.dsl.dialect_sets import AnySet, AttendOp, Decision, KeepOp, PickOp, RegionOp, TopOp, UnionOp
from kvcompile.dsl.lower_heads import below
from kvcompile.dsl.module import ops_of


def read_states(module: ModuleOp) -> list[str]:
    """The declared states that sets read, themselves or through updates."""
    ops = list(ops_of(module))
    found = {name for op in ops if isinstance(op, AnySet) for name in _names(op.operands)}
    while more := {name for op in ops for name in _names(_made_of(op, found))} - found:
        found |= more
    return [op.label.data for op in ops if isinstance(op, StateOp) and op.label.data in found]


def hidden_states(module: ModuleOp) -> list[str]:
    """`@count` where entries stand for several tokens or a formula asks, `@score:C:I` of class C's selection I and
    `@share:S` where rows can be decided only once all layers have read, `@read` where steps go on with what an earlier
    forward has read."""
    ops = list(ops_of(module))
    read = set(read_states(module))
    values = [v for op in ops for v in (op.operands if isinstance(op, AnySet) else _made_of(op, read))]
    live = {op for value in values for op in below(value)}
    live |= {op for unit in ops if isinstance(unit, UnitOp) for value in unit.landmarks for op in below(value)}
    found: list[str] = []
    counts = any(isinstance(op, kv.FieldOp) and op.what.data == "count" for op in live)
    if counts or any(isinstance(op, LoserOp) and op.kind.data != "drop" for op in live):
        found.append("@count")
    for index, decision in enumerate(decisions(module)):
        if decision is not None and spans(decision):
            tops = [term for term in terms_of(decision) if isinstance(term, TopOp)]
            found += [f"@score:{index}:{place}" for place in range(len(tops))]
    found += [f"@share:{place}" for place, share in enumerate(shares_of(module)) if share.measured]
    return found + ["@read"] * _holds(ops)


def _holds(ops: list[Operation]) -> bool:
    """Whether some rows have sets of what is read, of which none is computed in every step."""
    sets: dict[str, list[AttendOp]] = {}
    for op in ops:
        if isinstance(op, AttendOp):
            sets.setdefault(op.of.root_reference.data, []).append(op)

    def sure(op: AttendOp) -> bool:
        return not op.triggers or any(t.kind.data == "step" and t.cond.value.data < 0 for t in op.triggers)

    return any(not any(map(sure, mine)) for mine in sets.values())


def _made_of(op: Operation, states: set[str]) -> list[SSAValue]:
    """What an operation makes some of these states of."""
    if isinstance(op, StateOp) and op.label.data in states:
        return list(op.operands)
    if not isinstance(op, UpdateOp):
        return []
    values = [value for name, value in zip(op.states, op.values, strict=True) if name.data in states]
    return [*values, *([op.where] if values and op.where is not None else [])]


def decisions(module: ModuleOp) -> list[Decision | None]:
    """What becomes the plan's classes, in order; None for rows that keep all before their own picks.

    The first of a class is the one that inserts entries, so picks come second; where the class drops anything itself,
    that is decided after its picks, on rows that so far keep all.
    """
    found: list[Decision | None] = []
    ops = list(ops_of(module))
    for cls in ops:
        if not isinstance(cls, ClassOp):
            continue
        name = cls.sym_name.data
        mine = [op for op in ops if isinstance(op, KeepOp | PickOp) and op.of.root_reference.data == name]
        keeps: list[Decision | None] = [op for op in mine if isinstance(op, KeepOp)]
        picks = [op for op in mine if isinstance(op, PickOp)]
        first = keeps[0]
        if picks and isinstance(first, KeepOp) and not keeps_all(first):
            keeps.insert(0, None)
        found += [keeps[0], *picks, *keeps[1:]]
    return found


def keeps_all(keep: KeepOp) -> bool:
    """Whether a clause drops nothing, ever."""
    whole = any(isinstance(term, RegionOp) and term.kind.data == "all" for term in terms_of(keep))
    return whole or not keep.triggers


def terms_of(decision: AnySet) -> list[Operation]:
    """Regions and selections of a clause, in the order written."""
    union = decision.set.owner
    assert isinstance(union, UnionOp)
    return [term.owner for term in union.terms if isinstance(term.owner, Operation)]


def spans(decision: Decision) -> bool:
    """Whether a clause can be decided only once all layers have read."""
    if isinstance(decision, PickOp):
        return False
    terms = terms_of(decision)
    across = any(isinstance(t, TopOp) and t.layers is not None and t.layers.data == "across" for t in terms)
    return across or any(share.measured for term in terms for share in _shares_below(term))


def shares_of(module: ModuleOp) -> list[ShareOp]:
    """The shares that decisions read, in the order in which they come."""
    used = {share for op in ops_of(module) if isinstance(op, KeepOp | PickOp) for share in _shares_below(op)}
    return [op for op in ops_of(module) if isinstance(op, ShareOp) and op in used]


def _shares_below(op: Operation) -> list[ShareOp]:
    return [found for operand in op.operands for found in below(operand) if isinstance(found, ShareOp)]


def _names(values: Iterable[SSAValue]) -> set[str]:
    return {op.state.data for value in values for op in below(value) if isinstance(op, kv.ReadOp)}
