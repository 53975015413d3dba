"""Classes of rows and what each of them keeps and picks, as kv operations.

Takes the `keep` and `pick` clauses with their prefixes; gives `kv.class`, `kv.keep` and `kv.pick`. Guarantees: rows
that no clause names keep all; sets whose rows decide together hold the same entries, or are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from xdsl.ir import Operation, SSAValue

from kvcompile.dsl import ast
from kvcompile.dsl import dialect as kv
from kvcompile.dsl.diagnostics import Diagnostic, PolicyError
from kvcompile.dsl.dialect_counts import ShareOp
from kvcompile.dsl.dialect_policy import ClassOp
from kvcompile.dsl.dialect_sets import KeepOp, PickOp, RegionOp, TopOp, UnionOp
from kvcompile.dsl.lower_expr import Builder, Scope
from kvcompile.dsl.lower_heads import below, parts_heads
from kvcompile.dsl.lower_losers import lower_losers
from kvcompile.dsl.lower_numbers import refuse
from kvcompile.dsl.lower_rows import RowsOf, enclosing, layer_ranges, refuse_apart, refuse_pick, row_name
from kvcompile.dsl.lower_sets import Names, lower_set
from kvcompile.dsl.lower_triggers import lower_triggers, reads_queries
from kvcompile.dsl.resolve import Placed, Resolved
from kvcompile.dsl.source import Span


@dataclass(slots=True)
class Classes:
    """One run over the set clauses. read: the picks that `attend` names, which are no concern of these."""

    resolved: Resolved
    builder: Builder
    scope: Callable[[Placed], Scope]
    names: Names
    read: frozenset[str] = frozenset()
    apart: bool = False  # some selection lets the heads of a layer keep different entries

    def lower(self) -> list[Diagnostic]:
        """Add all classes; returns what is wrong with their clauses."""
        findings: list[Diagnostic] = []
        keeps = self.resolved.of(ast.Keep)
        picks = [p for p in self.resolved.of(ast.Pick) if getattr(p.clause, "name", "") not in self.read]
        rows: dict[str, RowsOf] = {}
        for placed in (*keeps, *picks):
            try:
                self._join(rows.setdefault(row_name(placed, keeps), RowsOf(placed)), placed)
            except PolicyError as error:
                findings += error.diagnostics
        for name, part in rows.items():
            part.sets = part.sets or enclosing(part.place, keeps)
            try:
                self._rows(name, part)
            except PolicyError as error:
                findings += error.diagnostics
        named = (*keeps, *picks)
        if all(item.prefixes for item in named):
            header = self.resolved.header.header
            if not any(item.heads == "rest" for item in named):
                self._class("rest" if rows else "all", None, None, header)
            elif any(item.heads not in (None, "rest") for item in self.resolved.of(ast.Attend, ast.Pick)):
                self._class("others", None, None, header)  # heads that only other verbs name are not the rest
        return findings

    def refuse_updates(self, over_heads: list[ast.Node]) -> None:
        """Updates over all heads of a layer need rows that hold the same entries."""
        classes = any(placed.heads is not None for placed in self.resolved.of(ast.Keep))
        if over_heads and (classes or self.apart):
            why = "head classes" if classes else "selections in which heads differ"
            refuse("K906", f"an update over all heads (`[h]`) in a policy that has {why}",
                   over_heads[0].span, "leave out `[h]`, or let all heads share one decision")  # fmt: skip

    # ------------------------------------------------------------ clauses to rows

    def _join(self, rows: RowsOf, placed: Placed) -> None:
        if isinstance(placed.clause, ast.Pick):
            rows.add_pick(placed, placed.clause)
            return
        if any(set(other.triggers) == set(placed.triggers) for other in rows.sets):
            refuse("K901", "a second `keep` for the same rows at the same triggers", placed.clause.span,
                   "join the sets by `|`, or give each an `at` of its own")  # fmt: skip
        rows.sets.append(placed)

    # ------------------------------------------------------------ rows to operations

    def _rows(self, name: str, rows: RowsOf) -> None:
        findings: list[Diagnostic] = []
        found: list[Callable[[], object]] = []
        terms: list[tuple[Operation, ast.Node]] = []
        uneven: list[ast.Node] = []  # conditions that differ between heads
        for placed in (*rows.picks, *rows.sets):
            try:
                found.append(self._decision(name, placed, terms, uneven, rows.sets[-1:] == [placed]))
            except PolicyError as error:
                findings += error.diagnostics
        if findings:
            raise PolicyError(*findings)
        # What these rows pick themselves is among the terms already, by its own selections.
        own = {placed.clause.name for placed in rows.picks if isinstance(placed.clause, ast.Pick)}
        others = [(term, node) for term, node in terms if not (isinstance(node, ast.Ref) and node.name in own)]
        ops = list(self.builder.block.ops)
        self.apart |= bool(uneven) or any(parts_heads(term, ops) for term, _ in others)
        refuse_apart(others, uneven, ops)
        place = rows.place
        layers = layer_ranges(place.layers) if place.layers is not None else None
        span = (place.prefixes[-1] if place.prefixes else place.clause).span
        self._class(name, place.heads, layers, span, keeps=bool(rows.sets))
        for add in found:
            add()

    def _class(
        self, name: str, heads: str | None, layers: list[tuple[int, int]] | None, span: Span, keeps: bool = False
    ) -> None:
        """A class; without a clause that says what it keeps it keeps all."""
        everything = None
        if not keeps:
            region = self.builder.add(RegionOp("all"), span).res
            everything = self.builder.add(UnionOp([region]), span).res
        self.builder.add(ClassOp(name, heads, layers), span)
        if everything is not None:
            self.builder.add(KeepOp(name, everything, []), span)

    def _decision(
        self, name: str, placed: Placed, terms: list[tuple[Operation, ast.Node]], uneven: list[ast.Node], last: bool
    ) -> Callable[[], object]:
        """Lower a clause's set; returns what adds the clause itself, once its class is there. last: of its rows."""
        node = placed.clause
        assert isinstance(node, ast.Keep | ast.Pick)
        scope = self.scope(placed)
        union = lower_set(self.builder, node.set, scope, self.names)
        here = [(term.owner, written) for term, written in zip(union.terms, node.set.terms, strict=True)]
        tops = [term for term, _ in here if isinstance(term, TopOp)]
        triggers, conds = lower_triggers(self.builder, placed.triggers, scope, self.names, tops)
        terms += [(term, written) for term, written in here if isinstance(term, Operation)]
        uneven += placed.triggers if reads_queries(conds) else ()
        if isinstance(node, ast.Pick):
            _refuse_pick(node, here)
            pick = PickOp(node.name, name, union.res, triggers, conds)
            return partial(self.builder.add, pick, node.span)
        _refuse_spanning(node, here, last)
        losers = lower_losers(self.builder, node.losers, scope)
        return partial(self.builder.add, KeepOp(name, union.res, triggers, conds, losers), node.span)


def _refuse_pick(node: ast.Pick, terms: Sequence[tuple[object, ast.Term]]) -> None:
    """A pick hands on the winners of selections, of one layer at a time."""
    refuse_pick(node, terms)
    for term, written in terms:
        if isinstance(term, TopOp) and (term.layers is not None or _measures(term.count)):
            refuse("K904", "a pick that more than one layer decides", written.span, "let each layer pick for itself")


def _refuse_spanning(node: ast.Keep, terms: Sequence[tuple[object, ast.Term]], last: bool) -> None:
    """What is decided after the last layer has scores from before, of candidates that must be known by then."""
    tops = [(term, written) for term, written in terms if isinstance(term, TopOp)]
    across = any(top.layers is not None and top.layers.data == "across" for top, _ in tops)
    if not (across or any(isinstance(term, TopOp | RegionOp) and _measures(term.count) for term, _ in terms)):
        return
    if not last:  # the others of these rows decide in each layer, so they would come first
        refuse("K904", "a `keep` that waits for all layers, with another one of the same rows after it,", node.span,
               "write it last, or join the sets by `|`")  # fmt: skip
    pooled = [written for top, written in tops if any(isinstance(op, kv.PoolOp) for op in below(top.score))]
    for place, (top, written) in enumerate(tops):
        if top.scope.data == "query_head":
            refuse("K904", "a choice per query head in a set that is decided after the last layer", written.span,
                   "let KV heads choose, `per head`")  # fmt: skip
        if place and written in pooled:
            refuse("K904", "a pooled score after another selection, in a set that is decided after the last layer,",
                   written.span, "write the pooled selection first, or leave out the pooling")  # fmt: skip
    for term, written in terms:
        if not isinstance(term, RegionOp):
            continue
        if pooled and _measures(term.count):
            refuse("K914", f"`{written.span.text}` by a share that is measured, beside a pooled score,", written.span,
                   "give the region a number, or leave out the pooling")  # fmt: skip
        if term.kind.data == "picked":
            refuse("K902", f"the pick `{written.span.text}` in a set that is decided after the last layer",
                   written.span, "keep it in layers that decide alone")  # fmt: skip


def _measures(count: SSAValue | None) -> bool:
    """Whether a count reads a share whose parts follow from the entries."""
    return count is not None and any(isinstance(op, ShareOp) and op.measured for op in below(count))
