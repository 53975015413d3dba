"""What the score of a set adds to the model's own work, as a class and as a note.

`cost_of` takes an expression and what its names mean; gives one of `COSTS`, dearest source first.
"""

from __future__ import annotations

from kvcompile.dsl import ast
from kvcompile.dsl.context import Context, SetClause
from kvcompile.dsl.diagnostics import finding
from kvcompile.dsl.resolve import Placed

# Cost class -> what it means, cheapest first.
COSTS: dict[str, str] = {
    "position": "position only: free",
    "entries": "keys or values of the entries: O(n d), once per trigger",
    "queries": "a few queries against the row: a small extra product per trigger",
    "landmarks": "each query against the landmarks of the units: far less than against their entries",
    "sampled": "a sample of the queries against the row: that part of an attention pass",
    "logits": "attention of each step: its logits are kept while it runs",
    "everything": "attention of the whole prefill: a second pass, about +50 % of its attention FLOPs",
}
_ORDER = list(COSTS)


def check_cost(context: Context) -> None:
    """A note on the dearest source of each scored set."""
    for placed, clause in context.sets():
        for term in clause.set.terms:
            by = term.by if isinstance(term, ast.Selection) else term.cond if isinstance(term, ast.Where) else None
            if by is None:
                continue
            kind = cost_of(context, by, placed, clause)
            hint = ""
            if kind == "everything":
                hint = "cheaper: `sum[q in last(64)] attn` asks the last queries only, as in snapkv"
            context.report(finding("K501", f"cost of this score: {COSTS[kind]}", by.span, hint))


def cost_of(context: Context, by: ast.Expr, placed: Placed, clause: SetClause) -> str:
    """The cost class of a score at the triggers of its set."""
    prefill = any(t.name in ("prefill.end", "chunk") for t in placed.triggers)
    kinds = {"position"}
    for node in context.reads(by):
        match node:
            case ast.Reduce() if any(a.name == "q" for a in node.axes):
                kinds.add(_queries(node, prefill))
            case ast.Name() if node.id in context.states:
                kinds.add(_state(context, node.id))
            case ast.Name() if node.id in ("k", "v") or node.id in context.landmarks:
                kinds.add("entries")
            case ast.Name() if node.id in ("attn", "logit") and not isinstance(clause, ast.Keep | ast.Store):
                if not any(isinstance(n, ast.Reduce) and node in n.body.walk() for n in context.reads(by)):
                    kinds.add("everything" if prefill else "logits")
            case ast.Name() if node.id == "q" and not isinstance(clause, ast.Keep | ast.Store):
                kinds.add("landmarks" if context.landmarks else "queries")
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
    """A state that reads attention sees every query, those of the prefill too."""
    for placed in context.resolved.of(ast.On):
        clause = placed.clause
        if not isinstance(clause, ast.On) or clause.event != "attend":
            continue
        parts = [u.value for u in clause.updates if u.name == name]
        if parts and clause.where is not None:
            parts.append(clause.where)
        if any(isinstance(n, ast.Name) and n.id in ("attn", "logit") for part in parts for n in context.reads(part)):
            return "everything"
    return "position"
