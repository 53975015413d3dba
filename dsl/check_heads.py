"""Head classes: declared, disjoint, and leaving no head without a rule."""

from __future__ import annotations

from collections.abc import Iterable

from kvcompile.dsl import ast, words
from kvcompile.dsl.context import Context
from kvcompile.dsl.diagnostics import did_you_mean
from kvcompile.dsl.graphs import cycles


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
                    hint = did_you_mean(prefix.name, [*declared, "rest"]) or declare(prefix.name)
                    context.say("K601", f"no head class `{prefix.name}` is declared", prefix, hint)
    _cycles(context, declared)
    _overlaps(context, used, declared)
    _left_out(context, declared)


def declare(name: str) -> str:
    """A hint that shows how a class is declared."""
    return f'declare it: `heads {name} = table("masks.tsv", top=30%)`'


def _cycles(context: Context, declared: dict[str, ast.HeadsDecl]) -> None:
    edges = {
        name: [(source.name, source) for source in decl.sources if isinstance(source, ast.HeadsSame)]
        for name, decl in declared.items()
    }
    for path, use in cycles(edges):
        context.say(
            "K108", f"head classes are defined by each other: {' -> '.join(path)}", use, "name a table or `rest`"
        )


def _source(context: Context, decl: ast.HeadsDecl, source: ast.HeadSource, declared: dict[str, ast.HeadsDecl]) -> None:
    match source:
        case ast.HeadsSame():
            if source.name not in declared:
                hint = did_you_mean(source.name, declared) or declare(source.name)
                context.say("K601", f"no head class `{source.name}` is declared", source, hint)
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
        if named.name == "tokens" and source.fn == "probe":
            value = named.value.value if isinstance(named.value, ast.Number) else None
            if value is None or value < 2 or value.denominator != 1:
                context.say(
                    "K109", "`tokens=` is a whole number, at least 2", named, 'such as probe("echo", top=1%, tokens=1k)'
                )
        elif named.name != "top":
            context.say("K604", f"`{source.fn}` takes no argument `{named.name}=`", named, example)
        elif not (
            isinstance(named.value, ast.Number)
            and named.value.kind in ("percent", "float", "int")
            and 0 <= named.value.value <= 1
        ):
            context.say("K210", "`top=` is the part of all heads that the class takes", named, example)
    if source.fn == "probe":
        _probe(context, source, example)


def _probe(context: Context, source: ast.Call, example: str) -> None:
    """A probe scores heads, so it needs a threshold."""
    kind = source.args[0].value if source.args and isinstance(source.args[0], ast.Text) else None
    if kind is not None and kind not in words.PROBES:
        hint = did_you_mean(kind, words.PROBES, "probes") or example
        context.say("K604", f"there is no probe `{kind}`", source.args[0], hint)
    if source.get("top") is None:
        context.say("K604", "`probe` does not say which part of the heads the class takes", source, example)


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


def _left_out(context: Context, declared: dict[str, ast.HeadsDecl]) -> None:
    """Where some heads of some layers have a `keep` of their own, the others need one too."""
    keeps = context.resolved.of(ast.Keep)
    plain = {placed.layers for placed in keeps if placed.heads is None}
    named: dict[ast.LayersPrefix | None, dict[str, ast.HeadsPrefix]] = {}
    for placed in keeps:
        for prefix in placed.prefixes:
            if isinstance(prefix, ast.HeadsPrefix):
                named.setdefault(placed.layers, {}).setdefault(prefix.name, prefix)
    everywhere = _whole(named.get(None, {}), declared)
    for layers, classes in named.items():
        if not (everywhere or {None, layers} & plain or _whole(classes, declared)):
            place = next(iter(classes.values()))
            context.say("K603", "the prefixes leave heads without a `keep`", place, "add `rest: keep all`")


def _whole(classes: Iterable[str], declared: dict[str, ast.HeadsDecl]) -> bool:
    """Whether one of the classes is what the others leave."""
    return any(
        name == "rest"
        or any(isinstance(s, ast.HeadsRest) for base in _behind(name, declared) for s in declared[base].sources)
        for name in classes
    )
