"""Schedule: how forwards run, and in which phases each class decides.

Takes a bound kv module; adds `kv.schedule` and, to every `kv.keep`, the order that its scores need and its phases.
Guarantees: prompts are cut by the smallest `chunk(c)`; scores that look at the prompt's end are never asked
for in a step.
"""

from __future__ import annotations

from dataclasses import dataclass

from xdsl.dialects.builtin import ArrayAttr, ModuleOp, StringAttr
from xdsl.ir import Operation, SSAValue

from kvcompile.dsl import dialect as kv
from kvcompile.dsl.diagnostics import fail
from kvcompile.dsl.dialect_policy import ScheduleOp, StateOp, UnitOp
from kvcompile.dsl.dialect_sets import KeepOp, RegionOp, TopOp, TriggerAttr
from kvcompile.dsl.module import ops_of, policy_of
from kvcompile.passes.context import Context

_PHASES = {
    "chunk": ("chunk", "prefill.end"),
    "prefill.end": ("prefill.end",),
    "step": ("step",),
    "every": ("step",),
    "filled": ("chunk", "prefill.end", "step"),
    "full": ("chunk", "prefill.end", "step"),
}


@dataclass(frozen=True, slots=True)
class Schedule:
    """`page`: tokens per page, a power of two."""

    page: int = 16
    name: str = "schedule"

    def __call__(self, module: ModuleOp, context: Context) -> None:
        policy = policy_of(module)
        keeps = [op for op in ops_of(module) if isinstance(op, KeepOp)]
        peek = window = 0
        for keep in keeps:
            below = _below(keep.set, module)
            widths = {kind: _width(below, kind) for kind in ("peek", "last")}
            phases = _phases(keep.triggers)
            if widths["peek"] and "step" in phases:
                raise fail("K705", "`peek` looks at the end of the prompt, and this set is also computed in steps",
                           context.places.span(keep), "use `last`, or triggers of the prompt alone")  # fmt: skip
            ordered = any(isinstance(op, kv.PoolOp | kv.LandmarkOp) or _by_unit(op) for op in below)
            keep.order = StringAttr("position" if ordered else "any")
            keep.phases = ArrayAttr([StringAttr(phase) for phase in phases])
            peek, window = max(peek, widths["peek"]), max(window, widths["last"])
        pieces = [t.n.value.data for keep in keeps for t in keep.triggers if t.kind.data == "chunk" and t.n.value.data]
        schedule = ScheduleOp(min(pieces, default=0), peek, window, self.page)
        schedule.location = policy.location
        policy.body.block.add_op(schedule)


def _phases(triggers: ArrayAttr[TriggerAttr]) -> list[str]:
    found = {phase for trigger in triggers for phase in _PHASES[trigger.kind.data]}
    return [phase for phase in ("chunk", "prefill.end", "step") if phase in found]


def _below(value: SSAValue, module: ModuleOp) -> list[Operation]:
    """All operations that a set is computed from, through states and units too."""
    declared = {op.label.data: op for op in ops_of(module) if isinstance(op, StateOp | UnitOp)}
    seen: dict[Operation, None] = {}
    todo: list[Operation] = [value.owner] if isinstance(value.owner, Operation) else []
    while todo:
        op = todo.pop()
        if op in seen:
            continue
        seen[op] = None
        todo += [operand.owner for operand in op.operands if isinstance(operand.owner, Operation)]
        name = op.state.data if isinstance(op, kv.ReadOp) else op.unit.data if isinstance(op, kv.LandmarkOp) else None
        if name is not None and name in declared:
            todo.append(declared[name])
    return list(seen)


def _width(ops: list[Operation], kind: str) -> int:
    found = [op.width.value.data for op in ops if isinstance(op, kv.EvidenceOp) and op.source.data == kind]
    return max(found, default=0)


def _by_unit(op: Operation) -> bool:
    return isinstance(op, RegionOp | TopOp) and op.unit is not None
