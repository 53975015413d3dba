"""Which clauses are about the same rows, and what those rows are called.

Takes set clauses with their prefixes; gives names, pairs of layers, and the clauses around a prefix that has none of
its own. Guarantees: clauses below equal prefixes are about the same rows, whatever their verb.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from xdsl.ir import Operation

from kvcompile.dsl import ast
from kvcompile.dsl.diagnostics import fail
from kvcompile.dsl.dialect_sets import RegionOp, TopOp
from kvcompile.dsl.lower_heads import decides_for_all, parts_heads
from kvcompile.dsl.lower_numbers import refuse
from kvcompile.dsl.resolve import Placed, Resolved

Terms = Sequence[tuple[Operation, ast.Node]]
_LAYER_LIMIT = 100_000  # no model has more layers; keeps integers of the IR small


@dataclass(slots=True)
class RowsOf:
    """What the clauses say about some rows. place: the first of them, for prefix and place; sets: of one verb."""

    place: Placed
    sets: list[Placed] = field(default_factory=list)
    picks: list[Placed] = field(default_factory=list)

    def add_pick(self, placed: Placed, node: ast.Pick) -> None:
        """PolicyError K106 for a name that these rows have given already."""
        if any(p.clause.name == node.name for p in self.picks if isinstance(p.clause, ast.Pick)):
            raise fail("K106", f"the pick `{node.name}` is defined twice for the same rows", node.span,
                       "name them differently")  # fmt: skip
        self.picks.append(placed)


def row_name(placed: Placed, sets: Sequence[Placed]) -> str:
    """The rows of a set, or of a pick beside such sets: without a prefix of its own, those of the set without one."""
    if placed.prefixes or not isinstance(placed.clause, ast.Pick):
        return class_name(placed, tuple(sets))
    plain = next((item for item in sets if not item.prefixes), None)
    if plain is not None:
        return class_name(plain, tuple(sets))
    return "rest" if sets else "all"


def class_name(placed: Placed, others: tuple[Placed, ...]) -> str:
    """The rows of a clause: its prefix in words; `all` without one, or `rest` beside prefixed ones of its verb."""
    words = [f"layers {layers_text(placed.layers)}"] if placed.layers is not None else []
    words += [placed.heads] if placed.heads is not None else []
    if words:
        return " ".join(words)
    taken = any(item.prefixes for item in others) and not any(item.heads == "rest" for item in others)
    return "rest" if taken else "all"


def enclosing(placed: Placed, sets: Sequence[Placed]) -> list[Placed]:
    """The sets that hold for a prefix which has none of its own: those of the nearest prefix around it."""
    around = [item for item in sets if set(item.prefixes) <= set(placed.prefixes)]
    nearest = max((len(item.prefixes) for item in around), default=0)
    return [item for item in around if len(item.prefixes) == nearest]


def read_picks(resolved: Resolved) -> frozenset[str]:
    """The picks that an `attend` names, directly or through other picks. PolicyError K705 where a `keep` names one."""
    picks = {p.clause.name: p.clause for p in resolved.of(ast.Pick) if isinstance(p.clause, ast.Pick)}
    found: dict[type, dict[str, ast.Term]] = {}
    for placed in resolved.of(ast.Keep, ast.Attend):
        assert isinstance(placed.clause, ast.Keep | ast.Attend)
        named = found.setdefault(type(placed.clause), {})
        todo = list(placed.clause.set.terms)
        while todo:
            term = todo.pop()
            if isinstance(term, ast.Ref) and term.name in picks and term.name not in named:
                named[term.name] = term
                todo += picks[term.name].set.terms
    read, kept = found.get(ast.Attend, {}), found.get(ast.Keep, {})
    both = next((name for name in read if name in kept), None)
    if both is not None:
        raise fail("K705", f"the pick `{both}` is read by `attend` and kept by `keep`, and is chosen before the read "
                   "for the one, after it for the other", read[both].span,
                   "pick twice, by two names")  # fmt: skip
    return frozenset(read)


def refuse_pick(node: ast.Pick, terms: Sequence[tuple[object, ast.Term]]) -> None:
    """A pick hands on the winners of selections."""
    for term, written in terms:
        if isinstance(term, RegionOp) and term.kind.data != "picked":
            refuse("K902", f"the region `{written.span.text}` in a pick", written.span,
                   f"pick by selections, and name the region beside `{node.name}`")  # fmt: skip


def refuse_apart(terms: Terms, uneven: Sequence[ast.Node], ops: list[Operation]) -> None:
    """What reads all heads goes through their rows column by column: no term or condition (`uneven`) beside it may
    let these rows differ."""
    if not over_heads(terms, ops):
        return
    apart = [written for term, written in terms if parts_heads(term, ops)]
    if apart:
        what = "selection" if isinstance(apart[0], ast.Selection) else "term"
        refuse("K904", f"a {what} in which heads differ, in a set that also decides for all heads at once,",
               apart[0].span,
               "say `shared heads` at every selection of the set, or at none, without `[h]`")  # fmt: skip
    if uneven:
        refuse("K903", "a condition that reads queries, for a set that decides for all heads at once,",
               uneven[0].span, "compare len, now, prompt or step, or decide per head")  # fmt: skip


def over_heads(terms: Terms, ops: list[Operation]) -> list[ast.Node]:
    """The terms that read all heads of a layer at once."""
    return [written for term, written in terms if isinstance(term, TopOp) and decides_for_all(term, ops)]


# ---------------------------------------------------------------- layers


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


def layer_ranges(prefix: ast.LayersPrefix) -> list[tuple[int, int]]:
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
