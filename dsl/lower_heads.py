"""Which scores and selections read all heads of a layer at once, and which let heads keep different entries.

Takes lowered values of a policy and the block that declares its states and landmarks; gives yes or no. Such a score
or selection goes through the rows of a layer column by column, so every row must hold the same entries.
"""

from __future__ import annotations

from collections.abc import Iterable

from xdsl.ir import Operation, SSAValue

from kvcompile.dsl import dialect as kv
from kvcompile.dsl.dialect_policy import StateOp, UnitOp
from kvcompile.dsl.dialect_sets import TopOp


def reads_all_heads(value: SSAValue, ops: Iterable[Operation]) -> bool:
    """Whether a value, or a landmark that it reads, is reduced over `h`."""
    landmarks = _landmarks(ops)
    seen: set[SSAValue] = set()
    todo = [value]
    while todo:
        op = (here := todo.pop()).owner
        if here in seen or not isinstance(op, Operation):
            continue
        seen.add(here)
        if isinstance(op, kv.ReduceOp) and op.axis.data == "h":
            return True
        todo += op.operands
        if isinstance(op, kv.LandmarkOp):
            todo.append(landmarks[op.unit.data, op.landmark.data])
    return False


def decides_for_all(top: TopOp, ops: Iterable[Operation]) -> bool:
    """Whether a selection needs every head of the layer to hold the same entries."""
    return top.scope.data == "shared" or reads_all_heads(top.score, list(ops))


def parts_heads(top: TopOp, ops: Iterable[Operation]) -> bool:
    """Whether a selection may take other entries in one head than in another, from rows that hold the same ones."""
    ops = list(ops)
    adds = {op.label.data: op.add for op in ops if isinstance(op, StateOp)}
    return top.scope.data == "across" or (top.scope.data == "head" and _differs(top.score, adds, _landmarks(ops)))


def _differs(value: SSAValue, adds: dict[str, SSAValue | None], landmarks: dict[tuple[str, str], SSAValue]) -> bool:
    """Whether a value can differ between heads: it comes from keys, values or attention, and no mean over `h`."""
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
            case kv.EvidenceOp():
                return True
            case kv.FieldOp() if op.what.data not in ("pos", "age"):
                return True
            case kv.ReadOp():
                add = adds.get(op.state.data)
                todo += [add] if add is not None else []
            case kv.LandmarkOp():
                todo.append(landmarks[op.unit.data, op.landmark.data])
        todo += op.operands
    return False


def _landmarks(ops: Iterable[Operation]) -> dict[tuple[str, str], SSAValue]:
    units = [op for op in ops if isinstance(op, UnitOp)]
    return {
        (op.label.data, name.data): value for op in units for name, value in zip(op.names, op.landmarks, strict=True)
    }
