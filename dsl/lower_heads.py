"""Which scores and selections read all heads of a layer at once, and which let heads keep different entries.

Takes lowered values of a policy and the block that declares its states and landmarks; gives yes or no. Such a score
or selection goes through the rows of a layer column by column, so every row must hold the same entries.
"""

from __future__ import annotations

from collections.abc import Iterable

from xdsl.ir import Operation, SSAValue

from kvcompile.dsl import dialect as kv
from kvcompile.dsl.dialect_policy import StateOp, UnitOp, UpdateOp
from kvcompile.dsl.dialect_sets import PickOp, RegionOp, TopOp, UnionOp
from kvcompile.dsl.dialect_sources import LearnedOp, NoiseOp, QueriesOp

_Landmarks = dict[tuple[str, str], tuple[SSAValue, ...]]
_OF_HEADS = (kv.EvidenceOp, QueriesOp, NoiseOp, LearnedOp)


def below(value: SSAValue) -> list[Operation]:
    """All operations that a value is computed from by its operands."""
    seen: dict[Operation, None] = {}
    todo = [value.owner]
    while todo:
        op = todo.pop()
        if isinstance(op, Operation) and op not in seen:
            seen[op] = None
            todo += [operand.owner for operand in op.operands]
    return list(seen)


def reads_all_heads(value: SSAValue, ops: Iterable[Operation]) -> bool:
    """Whether a value, or a landmark that it reads, is reduced over `h`."""
    landmarks = _landmarks(ops)
    todo, seen = [value], set()
    while todo:
        here = todo.pop()
        for op in below(here):
            if isinstance(op, kv.ReduceOp) and op.axis.data == "h":
                return True
            if isinstance(op, kv.LandmarkOp) and (key := (op.unit.data, op.landmark.data)) not in seen:
                seen.add(key)
                todo += landmarks.get(key, ())
    return False


def decides_for_all(top: TopOp, ops: Iterable[Operation]) -> bool:
    """Whether a selection needs every head of the layer to hold the same entries."""
    ops = list(ops)
    read = [top.score, *((top.count,) if top.count is not None else ())]
    return top.scope.data == "shared" or any(reads_all_heads(value, ops) for value in read)


def parts_heads(term: Operation, ops: Iterable[Operation]) -> bool:
    """Whether a term of a set may take other entries in one head than in another, from rows that hold the same ones."""
    ops = list(ops)
    match term:
        case RegionOp():
            if term.kind.data == "picked" and term.pick is not None:
                name = term.pick.data
                unions = [op.set.owner for op in ops if isinstance(op, PickOp) and op.label.data == name]
                tops = [t.owner for union in unions if isinstance(union, UnionOp) for t in union.terms]
                return not tops or any(isinstance(top, TopOp) and parts_heads(top, ops) for top in tops)
            return term.kind.data == "random"
        case TopOp():
            alone = term.scope.data in ("head", "query_head")
            return term.scope.data == "across" or (alone and _differs(term.score, _changes(ops), _landmarks(ops)))
    return False


def _differs(value: SSAValue, changes: dict[str, list[SSAValue]], landmarks: _Landmarks) -> bool:
    """Whether a value can differ between heads: it comes from keys, values or queries, and no mean over `h`."""
    seen: set[SSAValue] = set()
    todo = [value]
    while todo:
        op = (here := todo.pop()).owner
        if here in seen or not isinstance(op, Operation):
            continue
        seen.add(here)
        match op:
            case kv.ReduceOp() if op.axis.data == "h" and op.fn.data != "softmax":
                continue
            case _ if isinstance(op, _OF_HEADS):
                return True
            case kv.FieldOp() if op.what.data not in ("pos", "age"):
                return True
            case kv.ReadOp():
                todo += changes.get(op.state.data, [])
            case kv.LandmarkOp():
                todo += landmarks.get((op.unit.data, op.landmark.data), ())
        todo += op.operands
    return False


def _changes(ops: Iterable[Operation]) -> dict[str, list[SSAValue]]:
    """What each state grows by or is set to, conditions included."""
    found: dict[str, list[SSAValue]] = {}
    for op in ops:
        if isinstance(op, StateOp) and op.add is not None:
            found.setdefault(op.label.data, []).append(op.add)
        elif isinstance(op, UpdateOp):
            where = [op.where] if op.where is not None else []
            for name, value in zip(op.states, op.values, strict=True):
                found.setdefault(name.data, []).extend([value, *where])
    return found


def _landmarks(ops: Iterable[Operation]) -> _Landmarks:
    """What landmarks are made of; nothing of those of a unit that has been refused."""
    units = [op for op in ops if isinstance(op, UnitOp)]
    return {
        (op.label.data, name.data): (value,) for op in units for name, value in zip(op.names, op.landmarks, strict=True)
    }
