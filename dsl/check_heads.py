"""Head classes: declared, disjoint, and leaving no head without a rule."""

from __future__ import annotations

from kvcompile.dsl import ast, words
from kvcompile.dsl.context import Context
from kvcompile.dsl.diagnostics import did_you_mean


def check_heads(context: Context) -> None:
    """Declarations in scope, then the prefixes that use them."""
    declared = {head.decl.name: head.decl for head in context.resolved.heads}
    for decl in declared.values():
        for source in decl.sources:
            _source(context, decl, source, declared)
    used: dict[str, ast.HeadsPrefix] = {}
    for placed in context.resolved.clauses + context.resolved.ats:
        for prefix in placed.prefixes:
            if isinstance(prefix, ast.HeadsPrefix):
                used.setdefault(prefix.name, prefix)
                if prefix.name != "rest" and prefix.name not in declared:
                    hint = did_you_mean(prefix.name, [*declared, "rest"]) or f"declare `heads {prefix.name} = ...`"
                    context.say("K601", f"no head class `{prefix.name}` is declared", prefix, hint)
    for learn in context.resolved.learns:
        if learn.heads.id not in declared:
            context.say(
                "K601",
                f"no head class `{learn.heads.id}` of this policy to learn",
                learn.heads,
                did_you_mean(learn.heads.id, declared, "its classes"),
            )
    _overlaps(context, used, declared)
    _left_out(context, used, declared)


def _source(context: Context, decl: ast.HeadsDecl, source: ast.HeadSource, declared: dict[str, ast.HeadsDecl]) -> None:
    match source:
        case ast.HeadsSame():
            if source.name not in declared:
                context.say(
                    "K601", f"no head class `{source.name}` is declared", source, did_you_mean(source.name, declared)
                )
            elif decl.name in _behind(source.name, declared):
                context.say(
                    "K108", f"the head class `{decl.name}` is defined by itself", source, "name a table or `rest`"
                )
        case ast.HeadsRest():
            if len(decl.sources) > 1:
                context.say(
                    "K602", "`rest` is what other classes leave, so it joins nothing", source, "let it stand alone"
                )
        case ast.Call():
            _call(context, source)


def _call(context: Context, source: ast.Call) -> None:
    if source.fn not in words.HEAD_SOURCES:
        context.say(
            "K604",
            f"heads cannot come from `{source.fn}`",
            source,
            did_you_mean(source.fn, words.HEAD_SOURCES, "sources"),
        )
        return
    example = f'such as {source.fn}("{"masks.tsv" if source.fn == "table" else "induction"}", top=30%)'
    if len(source.args) != 1 or not isinstance(source.args[0], ast.Text):
        context.say("K604", f"`{source.fn}` wants one string", source, example)
    for named in source.named:
        if named.name != "top":
            context.say("K604", f"`{source.fn}` takes no argument `{named.name}=`", named, example)
        elif not (
            isinstance(named.value, ast.Number)
            and named.value.kind in ("percent", "float", "int")
            and 0 <= named.value.value <= 1
        ):
            context.say("K210", "`top=` is the part of all heads that the class takes", named, example)


def _behind(name: str, declared: dict[str, ast.HeadsDecl]) -> set[str]:
    """The classes that a class is made of, itself included."""
    out: set[str] = set()
    pending = [name]
    while pending:
        current = pending.pop()
        if current in out or current not in declared:
            continue
        out.add(current)
        pending += [s.name for s in declared[current].sources if isinstance(s, ast.HeadsSame)]
    return out


def _overlaps(context: Context, used: dict[str, ast.HeadsPrefix], declared: dict[str, ast.HeadsDecl]) -> None:
    taken: dict[str, str] = {}
    for name, prefix in used.items():
        bases = {"rest"} if name == "rest" else _behind(name, declared)
        bases |= {
            "rest"
            for base in bases
            if base in declared and any(isinstance(s, ast.HeadsRest) for s in declared[base].sources)
        }
        for base in sorted(bases):
            first = taken.setdefault(base, name)
            if first != name:
                context.say(
                    "K602",
                    f"the classes `{first}` and `{name}` share heads",
                    prefix,
                    "give every head to one class; `rest` is what the others leave",
                )
                break


def _left_out(context: Context, used: dict[str, ast.HeadsPrefix], declared: dict[str, ast.HeadsDecl]) -> None:
    keeps = context.resolved.of(ast.Keep)
    if not keeps or any(placed.heads is None and placed.layers is None for placed in keeps):
        return
    named = {placed.heads for placed in keeps if placed.heads is not None and placed.layers is None}
    whole = "rest" in named or any(
        isinstance(source, ast.HeadsRest)
        for name in named
        for base in _behind(name, declared)
        for source in declared[base].sources
    )
    if named and not whole:
        place = used[sorted(named)[0]]
        context.say("K603", "the prefixes leave heads without a `keep`", place, "add `rest: keep all`")
