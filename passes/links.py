"""Links between layers: picks that later layers read, and decisions that several layers share.

Takes a bound policy and the rows of its classes and readers; gives nothing. Guarantees: when it returns, every pick
that is kept or read has been filled by then for the same KV head, no pick is made of itself, and layers that share a
decision hold the same heads.
"""

from __future__ import annotations

import networkx as nx
from xdsl.ir import Operation, SSAValue

from kvcompile.dsl.diagnostics import fail
from kvcompile.dsl.dialect import BinaryOp, ConstOp, ScalarOp, UnaryOp
from kvcompile.dsl.dialect_policy import PolicyOp
from kvcompile.dsl.dialect_sets import AnySet, AttendOp, PickOp, RegionOp, TopOp, TriggerAttr
from kvcompile.passes.carried import terms_of
from kvcompile.passes.context import Context

Owned = dict[str, list[tuple[int, int]]]  # class or readers -> their rows as (layer, KV head)
_PHASES = ("chunk", "prefill.end", "step")  # in the order of time


def check_links(policy: PolicyOp, owned: Owned, context: Context) -> None:
    """Refuse picks that are used before they are filled, and groups of layers that differ in their heads."""
    decisions = [op for op in policy.body.block.ops if isinstance(op, AnySet)]
    _refuse_cycles(decisions, context)
    picks: dict[str, list[PickOp]] = {}
    for op in decisions:
        if isinstance(op, PickOp):
            picks.setdefault(op.label.data, []).append(op)
    for op in decisions:
        rows = owned.get(op.of.root_reference.data, [])
        for term in terms_of(op):
            if isinstance(term, RegionOp) and term.pick is not None:
                writers = picks.get(term.pick.data, [])
                filled = {row for writer in writers for row in owned.get(writer.of.root_reference.data, ())}
                _check_filled(term, "reads" if isinstance(op, AttendOp) else "keeps", rows, filled, context)
                _check_in_time(term, op, writers, context)
            if isinstance(term, TopOp) and term.sharing is not None:
                _check_groups(term, term.sharing.value.data, rows, context)


def _refuse_cycles(decisions: list[AnySet], context: Context) -> None:
    """A pick is made of selections; what is made of other picks could be made of itself."""
    graph: nx.DiGraph[str] = nx.DiGraph()
    first: dict[str, tuple[PickOp, Operation]] = {}
    for op in decisions:
        for term in terms_of(op) if isinstance(op, PickOp) else ():
            if isinstance(op, PickOp) and isinstance(term, RegionOp) and term.pick is not None:
                graph.add_edge(op.label.data, term.pick.data)
                first.setdefault(op.label.data, (op, term))
    if not first:
        return
    op, term = next(iter(first.values()))
    try:
        cycle = [source for source, _ in nx.find_cycle(graph)]
    except nx.NetworkXNoCycle:
        raise fail("K902", "a pick that is made of another pick cannot be run by this version yet",
                   context.places.span(term), "write the selections of the other one") from None  # fmt: skip
    raise fail("K108", f"picks are made of each other: {' <- '.join([*cycle, cycle[0]])}",
               context.places.span(first[cycle[0]][0]), "let one of them stand on selections alone")  # fmt: skip


def _check_filled(
    term: RegionOp, verb: str, rows: list[tuple[int, int]], filled: set[tuple[int, int]], context: Context
) -> None:
    name = term.pick.data if term.pick is not None else ""
    for layer, head in rows:
        if not any(other == head and before <= layer for before, other in filled):
            layers = sorted({before for before, _ in filled})
            where = f"layers {', '.join(map(str, layers))} do" if layers else "no layer of this model does"
            raise fail("K707", f"layer {layer} {verb} the pick `{name}` before any layer fills it for KV head {head}",
                       context.places.span(term),
                       f"{where}: name later layers, or let an earlier one pick")  # fmt: skip


def _check_in_time(term: RegionOp, reader: AnySet, writers: list[PickOp], context: Context) -> None:
    """A pick that is read in an earlier phase than any in which it is sure to be filled would be empty there."""
    never = 0 if isinstance(reader, AttendOp) else len(_PHASES)  # without a trigger: in every forward
    needed = min((_PHASES.index(phase) for t in reader.triggers for phase in _may_fire(t)), default=never)
    for writer in writers:
        sure = [_PHASES.index(t.kind.data) for t in writer.triggers if t.kind.data in _PHASES and t.cond.value.data < 0]
        if min(sure, default=len(_PHASES)) > needed and not _fires_with(writer, reader):
            raise fail("K707", f"the pick `{writer.label.data}` may be read at `{_PHASES[needed]}` before it is filled",
                       context.places.span(term),
                       f"let it be picked at `{_PHASES[needed]}`, too, without a condition")  # fmt: skip


def _fires_with(writer: PickOp, reader: AnySet) -> bool:
    """Whether a pick is made whenever it is read: the same triggers, their conditions the same for all rows."""

    def times(decision: AnySet) -> set[tuple[str, int, str, SSAValue | None]]:
        found = set()
        for t in decision.triggers:
            cond = decision.conds[t.cond.value.data] if t.cond.value.data >= 0 else None
            found.add((t.kind.data, t.n.value.data, t.unit.data, cond))
        return found

    conditions = [cond for *_, cond in times(reader) if cond is not None]
    return times(reader) <= times(writer) and not any(_by_row(cond) for cond in conditions)


def _by_row(cond: SSAValue) -> bool:
    """Whether a condition may differ between rows: it reads their length or their queries."""
    if isinstance(cond.owner, ScalarOp):
        return cond.owner.what.data == "len"
    return not isinstance(cond.owner, ConstOp | UnaryOp | BinaryOp) or any(map(_by_row, cond.owner.operands))


def _may_fire(trigger: TriggerAttr) -> tuple[str, ...]:
    """The earliest phases in which a trigger may fire."""
    kind = trigger.kind.data
    return (kind,) if kind in _PHASES else ("step",) if kind == "every" else ("chunk",)


def _check_groups(term: TopOp, size: int, rows: list[tuple[int, int]], context: Context) -> None:
    layers = sorted({layer for layer, _ in rows})
    heads = {layer: [head for where, head in rows if where == layer] for layer in layers}
    for start in range(0, len(layers), size):
        group = layers[start : start + size]
        odd = next((layer for layer in group if heads[layer] != heads[group[0]]), None)
        if odd is not None:
            raise fail("K904", f"layer {odd} shares the decision of layer {group[0]}, which has other KV heads of "
                       "this class", context.places.span(term), "share among layers with the same heads")  # fmt: skip
