"""What queries read, as kv operations: `attend`, the picks that it names, and layers that are off.

Takes clauses with their prefixes; gives `kv.readers`, `kv.attend`, `kv.pick` and `kv.off`. Guarantees: at most one set
of the same rows is computed in a forward; where all is read anyway there is no operation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from xdsl.ir import Operation

from kvcompile.dsl import ast
from kvcompile.dsl import dialect as kv
from kvcompile.dsl.diagnostics import Diagnostic, PolicyError, fail
from kvcompile.dsl.dialect_policy import UnitOp
from kvcompile.dsl.dialect_reads import PREFIX, OffOp, ReadersOp
from kvcompile.dsl.dialect_sets import AttendOp, PickOp, TopOp, TriggerAttr
from kvcompile.dsl.lower_classes import Classes
from kvcompile.dsl.lower_expr import Builder, Scope
from kvcompile.dsl.lower_heads import below
from kvcompile.dsl.lower_numbers import refuse
from kvcompile.dsl.lower_rows import (
    RowsOf,
    enclosing,
    layer_ranges,
    over_heads,
    refuse_apart,
    refuse_pick,
    row_name,
)
from kvcompile.dsl.lower_sets import Names, lower_set
from kvcompile.dsl.lower_triggers import lower_triggers, reads_queries
from kvcompile.dsl.resolve import Placed, Resolved

# Trigger -> the forwards in which it may fire; without a trigger all of them.
_FORWARDS = {"prefill.end": {"prefill"}, "chunk": {"prefill"}, "step": {"step"}, "every": {"step"}}
_ALL = {"prefill", "step"}


def lower_off(builder: Builder, placed: Placed) -> None:
    """Layers whose attention does not run."""
    if placed.heads is not None or placed.layers is None:
        whom = f"the heads `{placed.heads}`" if placed.heads is not None else "every layer"
        refuse("K912", f"`off` of {whom}", placed.clause.span, "name whole layers, such as `layers 21..27: off`")
    builder.add(OffOp(layer_ranges(placed.layers)), placed.prefixes[-1].span)


@dataclass(slots=True)
class Reads:
    """One run over the clauses that say what is read. kept: the classes, of which some heads may hold other entries
    than others of their layer."""

    resolved: Resolved
    builder: Builder
    scope: Callable[[Placed], Scope]
    names: Names
    picks: frozenset[str]
    kept: Classes

    def lower(self) -> list[Diagnostic]:
        """Add all readers; returns what is wrong with their clauses."""
        attends = self.resolved.of(ast.Attend)
        picks = [p for p in self.resolved.of(ast.Pick) if getattr(p.clause, "name", "") in self.picks]
        findings: list[Diagnostic] = []
        rows: dict[str, RowsOf] = {}
        for placed in (*attends, *picks):
            part = rows.setdefault(row_name(placed, attends), RowsOf(placed))
            try:
                if isinstance(placed.clause, ast.Pick):
                    part.add_pick(placed, placed.clause)
                else:
                    part.sets.append(placed)
            except PolicyError as error:
                findings += error.diagnostics
        for part in rows.values():
            part.sets = part.sets or enclosing(part.place, attends)
        if all(not part.picks and all(map(_reads_all, part.sets)) for part in rows.values()):
            return findings
        for name, part in rows.items():
            try:
                self._rows(PREFIX + name, part)
            except PolicyError as error:
                findings += error.diagnostics
        return findings

    def _rows(self, name: str, rows: RowsOf) -> None:
        _refuse_together(rows.sets)
        sets = [placed for placed in rows.sets if not _needless(placed, rows.sets)]
        found = [self._set(name, placed) for placed in (*rows.picks, *sets)]
        place = rows.place
        layers = layer_ranges(place.layers) if place.layers is not None else None
        span = (place.prefixes[-1] if place.prefixes else place.clause).span
        self.builder.add(ReadersOp(name, place.heads, layers), span)
        for add in found:
            add()

    def _set(self, name: str, placed: Placed) -> Callable[[], object]:
        """Lower a clause's set; returns what adds the clause itself, once its readers are there."""
        node = placed.clause
        assert isinstance(node, ast.Attend | ast.Pick)
        chooses = next((t for t in node.set.terms if isinstance(t, ast.Selection | ast.Where)), None)
        if chooses is not None and not placed.triggers:
            refuse("K903", "a selection of what is read that no `at` times", chooses.span,
                   "say when it is computed, such as `at chunk, step` below it")  # fmt: skip
        plain = self.scope(placed)
        scope = replace(plain, source=kv.OWN, reads=True, steps=_forwards(placed) == {"step"})
        union = lower_set(self.builder, node.set, scope, self.names)
        here = [
            (term.owner, written)
            for term, written in zip(union.terms, node.set.terms, strict=True)
            if isinstance(term.owner, Operation)
        ]
        tops = [(term, written) for term, written in here if isinstance(term, TopOp)]
        triggers, conds = lower_triggers(self.builder, placed.triggers, plain, self.names, [top for top, _ in tops])
        for attr, written in zip(triggers, dict.fromkeys(placed.triggers), strict=False):
            _refuse_trigger(attr, written)
        for top, term in tops:
            self._refuse_landmarks(top, term)
        _refuse_order(tops)
        uneven = list(placed.triggers) if reads_queries(conds) else []
        refuse_apart(here, uneven, self._ops)
        self._refuse_over_heads(over_heads(here, self._ops))
        if isinstance(node, ast.Pick):
            refuse_pick(node, here)
            _refuse_each(node, tops, placed)
            return partial(self.builder.add, PickOp(node.name, name, union.res, triggers, conds), node.span)
        return partial(self.builder.add, AttendOp(name, union.res, triggers, conds), node.span)

    @property
    def _ops(self) -> list[Operation]:
        return list(self.builder.block.ops)

    def _refuse_over_heads(self, terms: list[ast.Node]) -> None:
        """A choice over all heads of a layer needs rows that hold the same entries."""
        classes = any(placed.heads is not None for placed in self.resolved.of(ast.Keep))
        if terms and (classes or self.kept.apart):
            why = "head classes" if classes else "selections in which heads differ"
            refuse("K904", f"a choice over all heads of a layer, in a policy whose `keep` has {why},", terms[0].span,
                   "choose `per head`, without `[h]`")  # fmt: skip

    def _refuse_landmarks(self, top: TopOp, term: ast.Term) -> None:
        """Landmarks are made once, when their unit is full: nothing in them may change afterwards."""
        named = {op.unit.data for op in below(top.score) if isinstance(op, kv.LandmarkOp)}
        for unit in self._ops:
            if not isinstance(unit, UnitOp) or unit.label.data not in named:
                continue
            for op in {op for value in unit.landmarks for op in below(value)}:
                what = op.what.data if isinstance(op, kv.FieldOp | kv.ScalarOp) else ""
                if isinstance(op, kv.ScalarOp) or what == "age" or what.startswith("next."):
                    refuse("K913", f"a choice by a landmark of `{unit.label.data}` over `{what}`, which is not known "
                           "when the unit is full or changes later,", term.span,
                           "make landmarks of k, v, raw.k, pos and other landmarks")  # fmt: skip


def _reads_all(placed: Placed) -> bool:
    clause = placed.clause
    assert isinstance(clause, ast.Attend)
    return any(isinstance(term, ast.Region) and term.kind == "all" for term in clause.set.terms)


def _forwards(placed: Placed) -> set[str]:
    """The forwards in which a set may be computed."""
    if not placed.triggers:
        return _ALL
    return set().union(*(_FORWARDS.get(trigger.name, _ALL) for trigger in placed.triggers))


def _needless(placed: Placed, beside: list[Placed]) -> bool:
    """Whether an `attend all` says only what holds without it: alone, or in prefills, which read all if nothing fires.

    In steps a set of earlier would go on without it.
    """
    return _reads_all(placed) and (all(map(_reads_all, beside)) or _forwards(placed) == {"prefill"})


def _refuse_together(sets: list[Placed]) -> None:
    """Two sets of the same rows in one forward would contradict each other."""
    for place, second in enumerate(sets):
        for first in sets[:place]:
            if both := _forwards(first) & _forwards(second):
                when = " and ".join("steps" if which == "step" else "prompts" for which in sorted(both))
                raise fail("K705", f"two `attend` of the same rows may be computed in the same forward, in {when}",
                           second.clause.span,
                           "join the sets by `|`, or give one `at chunk`, the other `at step`")  # fmt: skip


def _refuse_trigger(attr: TriggerAttr, written: ast.Trigger) -> None:
    if attr.kind.data in ("filled", "full"):
        refuse("K903", f"`{written.span.text}` of what is read", written.span,
               "such as `chunk`, `step`, `every(64)` or `when now > 4096`")  # fmt: skip


def _refuse_order(tops: list[tuple[TopOp, ast.Term]]) -> None:
    """A choice made once for all queries cannot leave out what each of them chose before it (rule 13)."""
    alone: ast.Term | None = None
    for top, term in tops:
        if {op.source.data for op in below(top.score) if isinstance(op, kv.SourcedOp)} <= {"own"}:
            alone = alone or term
        elif alone is not None:
            refuse("K905", "a choice of all queries together, to the right of one that each query makes for itself,",
                   term.span, f"write it to the left of `{alone.span.text}`")  # fmt: skip


def _refuse_each(node: ast.Pick, tops: list[tuple[TopOp, ast.Term]], placed: Placed) -> None:
    """What each query of a prompt picks for itself would be a set for each of them."""
    for top, term in tops:
        own = any(isinstance(op, kv.SourcedOp) and op.source.data == "own" for op in below(top.score))
        if own and _forwards(placed) != {"step"}:
            refuse("K903", f"a pick of each query, `{node.name}`, in prompts", term.span,
                   "pick at `step` or `every(n)`, or by queries together, as in `sum[q in last(64)] attn`")  # fmt: skip
