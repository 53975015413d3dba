"""Schedule: how forwards run, and in which phases each class decides.

Takes a bound kv module; adds `kv.schedule` and, to every set, its phases, to `kv.keep` and `kv.pick` the order that
their rows need. Guarantees: prompts are cut by the smallest `chunk(c)`; scores that look at the prompt's end are never
asked for in a step; all sets of the same rows agree on their order, and what reads these rows by units has it, too.
"""

from __future__ import annotations

from dataclasses import dataclass

from xdsl.dialects.builtin import ArrayAttr, ModuleOp, StringAttr
from xdsl.ir import Block, Operation

from kvcompile.dsl import dialect as kv
from kvcompile.dsl.diagnostics import fail
from kvcompile.dsl.dialect_losers import LoserOp
from kvcompile.dsl.dialect_policy import PositionsOp, ScheduleOp, SiteOp, StateOp, UnitOp, UpdateOp
from kvcompile.dsl.dialect_sets import AnySet, AttendOp, RegionOp, TopOp
from kvcompile.dsl.dialect_sources import LearnedOp
from kvcompile.dsl.module import ops_of, policy_of
from kvcompile.passes.context import Context

_PHASES = {
    "chunk": ("chunk", "prefill.end"),
    "prefill.end": ("prefill.end",),
    "step": ("step",),
    "every": ("step",),
    "filled": ("chunk", "prefill.end", "step"),
    "full": ("chunk", "prefill.end", "step"),
    "when": ("chunk", "prefill.end", "step"),
}


@dataclass(frozen=True, slots=True)
class Schedule:
    """`page`: tokens per page, a power of two."""

    page: int = 16
    name: str = "schedule"

    def __call__(self, module: ModuleOp, context: Context) -> None:
        policy = policy_of(module)
        sets = [op for op in ops_of(module) if isinstance(op, AnySet)]
        rows = _rows_read(module)
        compact = any(isinstance(op, PositionsOp) for op in ops_of(module))
        peek = window = 0
        ordered: set[str] = set()  # classes whose rows stay in position order
        for each in sets:
            ops = below_set(each, module)
            widths = {kind: _width(ops, kind) for kind in ("peek", "last")}
            phases = _phases(each)
            if widths["peek"] and "step" in phases:
                raise fail("K705", "`peek` looks at the end of the prompt, and this set is also computed in steps",
                           context.places.span(each), "use `last`, or triggers of the prompt alone")  # fmt: skip
            if compact or any(_by_position(op) for op in ops):
                name = each.of.root_reference.data
                ordered |= rows.get(name, {name})
            each.phases = ArrayAttr([StringAttr(phase) for phase in phases])
            peek, window = max(peek, widths["peek"]), max(window, widths["last"])
        for each in sets:
            if isinstance(each, AttendOp) or each.of.root_reference.data in rows:
                continue
            each.order = StringAttr("position" if each.of.root_reference.data in ordered else "any")
        pieces = [t.n.value.data for each in sets for t in each.triggers if t.kind.data == "chunk" and t.n.value.data]
        schedule = ScheduleOp(min(pieces, default=0), peek, window, self.page)
        schedule.location = policy.location
        policy.body.block.add_op(schedule)


def _rows_read(module: ModuleOp) -> dict[str, set[str]]:
    """The classes of the rows of all readers."""
    found: dict[str, set[str]] = {}
    for site in ops_of(module):
        if isinstance(site, SiteOp):
            for readers, cls in zip(site.reading(), site.classes, strict=True):
                if readers is not None:
                    found.setdefault(readers, set()).add(cls.root_reference.data)
    return found


def _phases(each: AnySet) -> list[str]:
    found = {phase for trigger in each.triggers for phase in _PHASES[trigger.kind.data]}
    always = isinstance(each, AttendOp) and not each.triggers
    return [phase for phase in ("chunk", "prefill.end", "step") if always or phase in found]


def below_set(decision: AnySet, module: ModuleOp) -> list[Operation]:
    """All operations that a decision is computed from, through states, their updates and units too."""
    declared: dict[str, list[Operation]] = {}
    for fact in ops_of(module):
        if isinstance(fact, StateOp | UnitOp):
            declared.setdefault(fact.label.data, []).append(fact)
        elif isinstance(fact, UpdateOp):
            for state in fact.states:
                declared.setdefault(state.data, []).append(fact)
    seen: dict[Operation, None] = {}
    todo: list[Operation | Block] = [operand.owner for operand in decision.operands]
    while todo:
        op = todo.pop()
        if not isinstance(op, Operation) or op in seen:
            continue
        seen[op] = None
        if not isinstance(op, LearnedOp):  # its queries are those of the entry itself, at hand when it comes in
            todo += [operand.owner for operand in op.operands]
        name = op.state.data if isinstance(op, kv.ReadOp) else op.unit.data if isinstance(op, kv.LandmarkOp) else None
        if name is not None:
            todo += declared.get(name, [])
    return list(seen)


def _width(ops: list[Operation], kind: str) -> int:
    sources = [op for op in ops if isinstance(op, kv.SourcedOp) and op.source.data == kind]
    return max((op.width.value.data for op in sources), default=0)


def _by_position(op: Operation) -> bool:
    """Whether an operation goes through a row's entries in the order of their positions."""
    if isinstance(op, LoserOp):
        return op.fn is not None and op.fn.data in ("dct", "pool")
    by_unit = isinstance(op, RegionOp | TopOp) and op.unit is not None
    return by_unit or isinstance(op, kv.PoolOp | kv.LandmarkOp) or (isinstance(op, TopOp) and op.whole is not None)
