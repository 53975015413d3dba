"""What the score of a set adds to the model's own work, as a class and as a note.

`cost_of` takes an expression and what its names mean; gives one of `COSTS`, dearest source first.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvcompile.dsl import ast
from kvcompile.dsl.axes import axes_of
from kvcompile.dsl.context import Context, SetClause
from kvcompile.dsl.diagnostics import finding
from kvcompile.dsl.resolve import Placed

# Cost class -> what it means, cheapest first.
COSTS: dict[str, str] = {
    "position": "position only: free",
    "entries": "keys or values of the entries: O(n d), once per trigger",
    "queries": "a few queries against the row: a small extra product per trigger",
    "landmarks": "each query against the landmarks of the units: O(n u d) for n queries and u units, O(u d) in a step",
    "sampled": "a sample of the queries against the row: that part of an attention pass",
    "logits": "attention of each step: its logits are kept while it runs",
    "everything": "attention of the whole prefill: a second pass, about +50 % of its attention FLOPs",
}
_ORDER = list(COSTS)
# Cost class -> the nearest cheaper one, with a clause that can be typed in. Position only has none.
CHEAPER: dict[str, str] = {
    "entries": "cheaper: positions alone, `keep sink(4) | recent(1020)`, as in streaming",
    "queries": "cheaper: keys alone, `score s = -norm(k)`, as in knorm",
    "landmarks": "cheaper: one choice for the last queries, `mean[q in last(16)]`, or larger units",
    "sampled": "cheaper: `sum[q in last(64)] attn` asks the last queries only, as in snapkv",
    "logits": "cheaper: `sum[q in last(8)] attn` at `every(64)` asks a few queries now and then",
    "everything": "cheaper: `sum[q in last(64)] attn` asks the last queries only, as in snapkv",
}


def check_cost(context: Context) -> None:
    """A note on the dearest source of each scored set, and of each share that the entries decide."""
    seen: dict[tuple[ast.Expr, object, object, bool, type], str] = {}
    for placed, clause in context.sets():
        for term in clause.set.terms:
            by = term.by if isinstance(term, ast.Selection) else term.cond if isinstance(term, ast.Where) else None
            if by is None or axes_of(by, context.env(placed.prefixes, quiet=True)) is None:
                continue
            key = by, placed.prefixes, placed.triggers, context.keeps(clause), type(clause)
            if key not in seen:
                seen[key] = cost_of(context, by, placed, clause)
            _note(context, by, seen[key], "this score")
    for placed in context.resolved.of(ast.Share):
        share = placed.clause
        if isinstance(share, ast.Share) and share.by.fn in ("softmax", "cover") and share.by.args:
            # A share is divided once, at the end of the prompt.
            once = Placed(share, placed.prefixes, (ast.Trigger("prefill.end"),))
            _note(context, share.by.args[0], cost_of(context, share.by.args[0], once), "this share")


def _note(context: Context, place: ast.Expr, kind: str, what: str) -> None:
    context.report(finding("K501", f"cost of {what}: {COSTS[kind]}", place.span, CHEAPER.get(kind, "")))


def cost_of(context: Context, by: ast.Expr, placed: Placed, clause: SetClause | None = None) -> str:
    """The cost class of a score at the triggers of its set. Without a `clause` no query is left open."""
    prefill = any(t.name in ("prefill.end", "chunk") for t in placed.triggers)
    nodes = list(context.reads(by, placed.prefixes))
    over_queries = [n for n in nodes if isinstance(n, ast.Reduce) and any(axis.name == "q" for axis in n.axes)]
    reduced = {id(part) for node in over_queries for part in node.body.walk()}
    free = clause is not None and not context.keeps(clause) and not isinstance(clause, ast.Store)
    kinds = {"position"}
    for node in nodes:
        match node:
            case ast.Reduce() if any(a.name == "q" for a in node.axes):
                kinds.add(_queries(node, prefill))
            case ast.Name() if node.id in context.states:
                kinds.add(_state(context, node.id))
            case ast.Name() if node.id in ("k", "v") or node.id in context.landmarks:
                kinds.add("entries")
            case ast.Name() if node.id in ("attn", "logit") and free and id(node) not in reduced:
                kinds.add("everything" if prefill else "logits")
            case ast.Name() if node.id == "q" and free and id(node) not in reduced:
                by_unit = any(isinstance(other, ast.Name) and other.id in context.landmarks for other in nodes)
                kinds.add("landmarks" if by_unit else "everything" if prefill else "logits")
            case ast.Field():
                kinds.add("entries")
    return max(kinds, key=_ORDER.index)


def _queries(node: ast.Reduce, prefill: bool) -> str:
    if not any(isinstance(n, ast.Name) and n.id in ("q", "attn", "logit") for n in node.body.walk()):
        return "position"
    source = next((a.source for a in node.axes if a.name == "q"), None)
    fn = source.fn if isinstance(source, ast.Call) else ""
    if fn in ("last", "peek"):
        return "queries"
    if fn == "sample":
        return "sampled"
    return "everything" if prefill else "logits"


def _state(context: Context, name: str) -> str:
    """A state that reads attention sees every query, those of the prefill too; one of an entry's own token is
    computed as the entry comes in."""
    kind = "position"
    for event, expr in _sources_of_state(context, name):
        for node in context.reads(expr):
            if isinstance(node, ast.Name) and node.id in ("attn", "logit") and event == "attend":
                return "everything"
            own = isinstance(node, ast.Name) and node.id in ("q", "k", "v")
            if own or isinstance(node, ast.Field):
                kind = "entries"
    return kind


def _sources_of_state(context: Context, name: str) -> Iterator[tuple[str, ast.Expr]]:
    """What gives a state its value: its first value and its updates, with the event of each."""
    if name in context.states:
        yield "insert", context.states[name].value
    for placed in context.resolved.of(ast.On):
        clause = placed.clause
        if not isinstance(clause, ast.On):
            continue
        own = [update.value for update in clause.updates if update.name == name]
        yield from ((clause.event, value) for value in own)
        if own and clause.where is not None:
            yield clause.event, clause.where
