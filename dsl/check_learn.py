"""Learn blocks: each of them right, one for a class, between two sets that can be learned.

A set can be learned if what a query reads under it follows from positions: training reads a whole sequence at once.
Only blocks written for the policy itself are checked with it. One that it inherits is checked when it is used, since a
child may change its parent's sets and never be learned. Blocks of trained scores: `learn_gate`.
"""

from __future__ import annotations

from kvcompile.dsl import ast, words
from kvcompile.dsl.check_heads import declare
from kvcompile.dsl.context import Context
from kvcompile.dsl.diagnostics import did_you_mean
from kvcompile.dsl.learn_block import Block, read_block
from kvcompile.dsl.learn_gate import check_gate_block, trained_scores
from kvcompile.dsl.resolve import Placed, Resolved

LEARNABLE = {"all": "all", "sink": "sink(n)", "recent": "recent(n)", "stride": "stride(n)", "random": "random(n, seed)"}
_REASON = "what a query reads must follow from positions where heads are learned"
_WAY_OUT = f"regions that can be learned: {', '.join(LEARNABLE.values())}"


def check_learn(context: Context) -> None:
    """The learn blocks that stand beside the policy."""
    seen: set[str] = set()
    for learn in context.resolved.learns:
        if learn.policy.id != context.resolved.name or learn.span.source != context.resolved.header.span.source:
            continue
        if learn.heads.id in seen:
            message = f"`{learn.heads.id}` has a learn block for `{learn.policy.id}` already"
            context.say("K813", message, learn.heads, "leave one, or write it for a policy that `extends` this one")
        seen.add(learn.heads.id)
        if learn.heads.id in trained_scores(context.resolved):
            check_gate_block(context, learn)
        else:
            check_block(context, learn)


def check_block(context: Context, learn: ast.Learn) -> Block | None:
    """One learn block: its values, or None where something is wrong with it."""
    resolved, name = context.resolved, learn.heads.id
    classes = learned_classes(resolved)
    declared = {head.decl.name: head.decl for head in resolved.heads}
    if name not in declared:
        known = {*declared, *trained_scores(resolved)}
        hint = did_you_mean(name, known, "it can learn") or declare(name)
        context.say("K601", f"no head class and no trained score `{name}` of this policy to learn", learn.heads, hint)
        return None
    if name not in classes:
        context.say("K814", f"`{name}` has no `keep` of its own", learn.heads, f"write `{name}: keep all`")
        return None
    if not any(isinstance(source, ast.Call) and source.fn == "table" for source in declared[name].sources):
        message = f"`{name}` comes from no table, so nothing reads the mask that is learned"
        context.say("K816", message, learn.heads, declare(name))
    block = read_block(learn, tuple(classes), [param for param, _ in resolved.params], context.say)
    others = block.others if block is not None else None
    before = len(context.findings)
    for placed in resolved.of(ast.Keep, ast.Pick, ast.Positions):
        _clause(context, placed, name, others)
    for same in classes.values():
        for placed in [other for other in same if other.layers is None][1:]:
            context.say("K814", f"a second `keep` of `{placed.heads}`: learning mixes one set of each class",
                        placed.clause, "leave one of them")  # fmt: skip
    if others is not None and _set_of(classes[name][0]) == _set_of(classes[others][0]):
        message = f"`{name}` and `{others}` keep the same, so a gate between them changes nothing"
        context.say("K814", message, classes[others][0].clause, "such as `keep all`, and `keep sink(4) | recent(1k)`")
    return block if len(context.findings) == before else None


def learned_classes(resolved: Resolved) -> dict[str, list[Placed]]:
    """The head classes that a `keep` of the policy has as its prefix, with these clauses."""
    found: dict[str, list[Placed]] = {}
    for placed in resolved.of(ast.Keep):
        if placed.heads is not None:
            found.setdefault(placed.heads, []).append(placed)
    return found


def _clause(context: Context, placed: Placed, name: str, others: str | None) -> None:
    """A clause that says which entries stay, or where they lie."""
    match placed.clause:
        case ast.Positions(mode="compact") as clause:
            context.say("K814", f"places in the row are no positions: {_REASON}", clause, "leave the clause out")
        case ast.Pick() as clause:
            context.say("K814", f"a pick is chosen by its score: {_REASON}", clause, _WAY_OUT)
        case ast.Keep() as clause:
            heads = next((p for p in placed.prefixes if isinstance(p, ast.HeadsPrefix)), None)
            if placed.layers is not None:
                message = "a learn block decides for all layers, and this `keep` is of some"
                context.say("K814", message, placed.layers, "leave the prefix out")
            elif heads is None:
                message = "a learn block decides between two head classes, and this `keep` is of none"
                context.say("K814", message, clause, "give it a head class, such as `rest:`")
            elif others is not None and heads.name not in (name, others):
                message = f"a learn block decides between two head classes, and `{heads.name}` is a third"
                context.say("K814", message, heads, "leave it out")
            else:
                _keep(context, placed, clause)


def _keep(context: Context, placed: Placed, keep: ast.Keep) -> None:
    for term in keep.set.terms:
        _term(context, placed, term)
    for loser in keep.losers:
        if not isinstance(loser, ast.Drop):
            message = f"`{loser.span.text}` leaves something of what is dropped: {_REASON}"
            context.say("K814", message, loser, "leave it out, for losers are dropped")
    everything = any(isinstance(term, ast.Region) and term.kind == "all" for term in keep.set.terms)
    if not placed.triggers and not everything:
        message = f"no `at` governs this set, so `{placed.heads}` never drops anything"
        context.say("K814", message, keep.set, "write `at chunk, step` below it")


def _term(context: Context, placed: Placed, term: ast.Term) -> None:
    text = term.span.text or type(term).__name__.lower()
    match term:
        case ast.Selection() | ast.Where():
            context.say("K814", f"`{text}` chooses by what entries hold: {_REASON}", term, _WAY_OUT)
        case ast.Region() if term.kind in LEARNABLE:
            for arg in term.args:
                if (name := _run_time(context, placed, arg)) is not None:
                    message = f"the count of `{text}` follows from `{name}`: {_REASON}"
                    context.say("K814", message, arg, "count by numbers and by `now`")
        case ast.Region() if term.kind in words.REGIONS or term.unit is not None:
            context.say("K814", f"`{text}` depends on more than positions: {_REASON}", term, _WAY_OUT)
        case ast.Ref() if term.name in context.picks:
            context.say("K814", f"`{text}` is chosen by its score: {_REASON}", term, _WAY_OUT)


def _run_time(context: Context, placed: Placed, count: ast.Expr) -> str | None:
    """What a count reads that is neither a number nor `now`."""
    shares = {name for name, clause in context.names_at(placed.prefixes).items() if isinstance(clause, ast.Share)}
    for node in count.walk():
        if isinstance(node, ast.Portion):
            return node.of
        if isinstance(node, ast.Name) and node.id in {"prompt", "len", "chunk", "step"} | shares:
            return node.id
    return None


def _set_of(placed: Placed) -> ast.SetUnion | None:
    return placed.clause.set if isinstance(placed.clause, ast.Keep) else None
