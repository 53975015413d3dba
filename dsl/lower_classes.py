"""Classes of rows and what each of them keeps and picks, as kv operations.

Takes the `keep` and `pick` clauses with their prefixes; gives `kv.class`, `kv.keep` and `kv.pick`. Guarantees: rows
that no clause names keep all; sets whose rows decide together hold the same entries, or are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from xdsl.ir import Operation, SSAValue

from kvcompile.dsl import ast
from kvcompile.dsl import dialect as kv
from kvcompile.dsl.diagnostics import Diagnostic, PolicyError, fail
from kvcompile.dsl.dialect_counts import ShareOp
from kvcompile.dsl.dialect_policy import ClassOp
from kvcompile.dsl.dialect_sets import KeepOp, PickOp, RegionOp, TopOp, UnionOp
from kvcompile.dsl.lower_expr import Builder, Scope
from kvcompile.dsl.lower_heads import below, decides_for_all, parts_heads
from kvcompile.dsl.lower_losers import lower_losers
from kvcompile.dsl.lower_numbers import refuse
from kvcompile.dsl.lower_sets import Names, lower_set
from kvcompile.dsl.lower_triggers import lower_triggers, reads_queries
from kvcompile.dsl.resolve import Placed, Resolved
from kvcompile.dsl.source import Span

_LAYER_LIMIT = 100_000  # no model has more layers; keeps integers of the IR small


@dataclass(slots=True)
class _Rows:
    """What the clauses say about the rows of one class."""

    place: Placed  # the first clause, for prefix and place
    keeps: list[Placed] = field(default_factory=list)
    picks: list[Placed] = field(default_factory=list)


@dataclass(slots=True)
class Classes:
    """One run over the set clauses."""

    resolved: Resolved
    builder: Builder
    scope: Callable[[Placed], Scope]
    names: Names
    apart: bool = False  # some selection lets the heads of a layer keep different entries

    def lower(self) -> list[Diagnostic]:
        """Add all classes; returns what is wrong with their clauses."""
        findings: list[Diagnostic] = []
        keeps, picks = self.resolved.of(ast.Keep), self.resolved.of(ast.Pick)
        rows: dict[str, _Rows] = {}
        for placed in (*keeps, *picks):
            try:
                rows.setdefault(self._name(placed), _Rows(placed))
                self._join(rows[self._name(placed)], placed)
            except PolicyError as error:
                findings += error.diagnostics
        for name, part in rows.items():
            part.keeps = part.keeps or _enclosing(part.place, keeps)
            try:
                self._rows(name, part)
            except PolicyError as error:
                findings += error.diagnostics
        named = (*keeps, *picks)
        if all(item.prefixes for item in named) and not any(item.heads == "rest" for item in named):
            self._class("rest" if rows else "all", None, None, self.resolved.header.header)
        return findings

    def refuse_updates(self, over_heads: list[ast.Node]) -> None:
        """Updates over all heads of a layer need rows that hold the same entries."""
        classes = any(placed.heads is not None for placed in self.resolved.of(ast.Keep))
        if over_heads and (classes or self.apart):
            why = "head classes" if classes else "selections in which heads differ"
            refuse("K906", f"an update over all heads (`[h]`) in a policy that has {why}",
                   over_heads[0].span, "leave out `[h]`, or let all heads share one decision")  # fmt: skip

    # ------------------------------------------------------------ clauses to rows

    def _name(self, placed: Placed) -> str:
        keeps = self.resolved.of(ast.Keep)
        if placed.prefixes or isinstance(placed.clause, ast.Keep):
            return class_name(placed, keeps)
        plain = next((item for item in keeps if not item.prefixes), None)
        if plain is not None:
            return class_name(plain, keeps)
        return "rest" if keeps else "all"

    def _join(self, rows: _Rows, placed: Placed) -> None:
        if isinstance(placed.clause, ast.Pick):
            if any(p.clause.name == placed.clause.name for p in rows.picks if isinstance(p.clause, ast.Pick)):
                raise fail("K106", f"the pick `{placed.clause.name}` is defined twice for the same rows",
                           placed.clause.span, "name them differently")  # fmt: skip
            rows.picks.append(placed)
            return
        if any(set(other.triggers) == set(placed.triggers) for other in rows.keeps):
            refuse("K901", "a second `keep` for the same rows at the same triggers", placed.clause.span,
                   "join the sets by `|`, or give each an `at` of its own")  # fmt: skip
        rows.keeps.append(placed)

    # ------------------------------------------------------------ rows to operations

    def _rows(self, name: str, rows: _Rows) -> None:
        findings: list[Diagnostic] = []
        found: list[Callable[[], object]] = []
        terms: list[tuple[Operation, ast.Node]] = []
        uneven: list[ast.Node] = []  # conditions that differ between heads
        for placed in (*rows.picks, *rows.keeps):
            try:
                found.append(self._decision(name, placed, terms, uneven, rows.keeps[-1:] == [placed]))
            except PolicyError as error:
                findings += error.diagnostics
        if findings:
            raise PolicyError(*findings)
        # What these rows pick themselves is among the terms already, by its own selections.
        own = {placed.clause.name for placed in rows.picks if isinstance(placed.clause, ast.Pick)}
        others = [(term, node) for term, node in terms if not (isinstance(node, ast.Ref) and node.name in own)]
        self._refuse_apart(others, uneven)
        place = rows.place
        layers = _layer_ranges(place.layers) if place.layers is not None else None
        span = (place.prefixes[-1] if place.prefixes else place.clause).span
        self._class(name, place.heads, layers, span, keeps=bool(rows.keeps))
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
        union = self._union(node, scope)
        here = [(term.owner, written) for term, written in zip(union.terms, node.set.terms, strict=True)]
        tops = [term for term, _ in here if isinstance(term, TopOp)]
        triggers, conds = lower_triggers(self.builder, placed.triggers, scope, self.names.units, tops)
        terms += [(term, written) for term, written in here if isinstance(term, Operation)]
        uneven += placed.triggers if reads_queries(conds) else ()
        if isinstance(node, ast.Pick):
            _refuse_pick(node, here)
            pick = PickOp(node.name, name, union.res, triggers, conds)
            return partial(self.builder.add, pick, node.span)
        _refuse_spanning(node, here, last)
        losers = lower_losers(self.builder, node.losers, scope)
        return partial(self.builder.add, KeepOp(name, union.res, triggers, conds, losers), node.span)

    def _union(self, node: ast.Keep | ast.Pick, scope: Scope) -> UnionOp:
        try:
            return lower_set(self.builder, node.set, scope, self.names)
        except PolicyError as error:
            if isinstance(node, ast.Pick) and any(finding.code == "K204" for finding in error.diagnostics):
                refuse("K910", "a pick of each query", node.span, "reduce the queries, as in `sum[q] attn`")
            raise

    def _refuse_apart(self, terms: list[tuple[Operation, ast.Node]], uneven: list[ast.Node]) -> None:
        """What reads all heads goes through their rows column by column: nothing may tell these rows apart."""
        ops = list(self.builder.block.ops)
        apart = [written for term, written in terms if parts_heads(term, ops)]
        self.apart |= bool(apart or uneven)
        if not any(isinstance(term, TopOp) and decides_for_all(term, ops) for term, _ in terms):
            return
        if apart:
            what = "selection" if isinstance(apart[0], ast.Selection) else "term"
            refuse("K904", f"a {what} in which heads differ, in a set that also decides for all heads at once,",
                   apart[0].span,
                   "say `shared heads` at every selection of the set, or at none, without `[h]`")  # fmt: skip
        if uneven:
            refuse("K903", "a condition that reads queries, for a set that decides for all heads at once,",
                   uneven[0].span, "compare len, now, prompt or step, or decide per head")  # fmt: skip


def _enclosing(placed: Placed, keeps: tuple[Placed, ...]) -> list[Placed]:
    """The `keep` clauses that hold for a prefix which has none of its own: those of the nearest prefix around it."""
    around = [item for item in keeps if set(item.prefixes) <= set(placed.prefixes)]
    nearest = max((len(item.prefixes) for item in around), default=0)
    return [item for item in around if len(item.prefixes) == nearest]


def _refuse_pick(node: ast.Pick, terms: Sequence[tuple[object, ast.Term]]) -> None:
    """A pick hands on the winners of selections, of one layer at a time."""
    for term, written in terms:
        if isinstance(term, RegionOp) and term.kind.data != "picked":
            refuse("K902", f"the region `{written.span.text}` in a pick", written.span,
                   f"pick by selections, and name the region beside `{node.name}`")  # fmt: skip
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


def class_name(placed: Placed, others: tuple[Placed, ...]) -> str:
    """The class of a `keep`: its prefix in words; `all` without one, or `rest` beside prefixed ones."""
    words = [f"layers {layers_text(placed.layers)}"] if placed.layers is not None else []
    words += [placed.heads] if placed.heads is not None else []
    if words:
        return " ".join(words)
    taken = any(item.prefixes for item in others) and not any(item.heads == "rest" for item in others)
    return "rest" if taken else "all"


def layers_text(prefix: ast.LayersPrefix) -> str:
    items = []
    for item in prefix.items:
        if isinstance(item, ast.LayerRest):
            items.append("rest")
        elif item.first == item.last:
            items.append(_index_text(item.first))
        else:
            items.append(f"{_index_text(item.first)}..{_index_text(item.last)}")
    return ", ".join(items)


def _index_text(index: ast.LayerIndex) -> str:
    if not index.from_last:
        return str(index.number)
    return f"last-{index.number}" if index.number else "last"


def _layer_ranges(prefix: ast.LayersPrefix) -> list[tuple[int, int]]:
    """Pairs of ends, negative ones counted from the end; empty for `layers rest`."""
    out: list[tuple[int, int]] = []
    for item in prefix.items:
        if isinstance(item, ast.LayerRest):
            if len(prefix.items) > 1:
                refuse("K901", "`rest` beside other layers", item.span, "give `layers rest` a clause of its own")
            return []
        out.append((_end(item.first), _end(item.last)))
    return out


def _end(index: ast.LayerIndex) -> int:
    if index.number > _LAYER_LIMIT:
        raise fail("K701", f"no model has a layer {index.number}", index.span, "count layers from 0")
    return -1 - index.number if index.from_last else index.number
