"""Names and words: reserved ones, double ones, and words that a clause does not know."""

from __future__ import annotations

from collections.abc import Iterable

from kvcompile.dsl import ast, words
from kvcompile.dsl.context import Context
from kvcompile.dsl.diagnostics import did_you_mean, finding
from kvcompile.dsl.printer import text
from kvcompile.dsl.source import Span


def check_names(context: Context) -> None:
    """Declarations of the policy, then the words of formats, events, losers and positions."""
    _declarations(context)
    for prefix in {id(p): p for placed in context.resolved.clauses for p in placed.prefixes}.values():
        if isinstance(prefix, ast.LayersPrefix):
            _layers(context, prefix)
    for placed in context.resolved.clauses:
        match placed.clause:
            case ast.Store() as clause:
                check_formats(context, clause.formats)
            case ast.On() as clause:
                _on(context, clause)
            case ast.Positions() as clause:
                known_word(context, clause.mode, words.POSITIONS, "mode of positions", clause)
            case ast.Unit() as clause:
                _unit(context, clause)
            case ast.Share() as clause:
                _share(context, clause)


def _declarations(context: Context) -> None:
    values: dict[str, str] = {name: "parameter" for name, _ in context.resolved.params}
    prefixed: dict[str, set[tuple[ast.Prefix, ...]]] = {}
    units: dict[str, str] = {}  # units are named where nothing else can be, so `unit page(page)` is clear

    def declare(name: str, what: str, span: Span, names: dict[str, str] = values) -> None:
        _reserved(context, name, what, span)
        if name in names:
            context.report(finding("K106", f"`{name}` is a {names[name]} already", span, "give it another name"))
        names.setdefault(name, what)

    for param in context.resolved.header.params:
        _reserved(context, param.name, "parameter", param.name_span)
        if param.name in words.OPTIONS:
            context.report(
                finding(
                    "K105",
                    f"`{param.name}` is an option of the Python interface",
                    param.name_span,
                    "the parameter could never be given: name it otherwise",
                )
            )
    for placed in context.resolved.clauses:
        match placed.clause:
            case ast.State() as clause:
                for assign in clause.assigns:
                    declare(assign.name, "state", assign.name_span)
            case ast.Unit() as clause:
                declare(clause.name, "unit", clause.name_span, units)
                for landmark in clause.landmarks:
                    declare(landmark.name, "landmark", landmark.name_span)
            case ast.Score() | ast.Share() | ast.Pick() as clause:
                what = type(clause).__name__.lower()
                # Below a prefix a name may mean something else than beside it: the nearest meaning counts.
                known = prefixed.setdefault(clause.name, set())
                if not known or placed.prefixes in known or values[clause.name] != what:
                    declare(clause.name, what, clause.name_span)
                known.add(placed.prefixes)


def _layers(context: Context, prefix: ast.LayersPrefix) -> None:
    """Ranges that hold no layer, whatever the model."""
    for item in prefix.items:
        if not isinstance(item, ast.LayerRange) or item.first.from_last != item.last.from_last:
            continue
        step = -1 if item.first.from_last else 1
        if step * item.first.number > step * item.last.number:
            turned = text(ast.LayersPrefix((ast.LayerRange(item.last, item.first),)))
            context.say("K402", "the range runs backwards, so it holds no layer", item, f"write `{turned}`")


def _reserved(context: Context, name: str, what: str, span: Span) -> None:
    if name in words.RESERVED:
        context.report(
            finding(
                "K105",
                f"`{name}` is a word of the language, so no {what} can have that name",
                span,
                f"name it otherwise, such as `{name}_`",
            )
        )


def known_word(context: Context, word: str, known: Iterable[str], what: str, node: ast.Node) -> bool:
    """Whether a word is one of those known here; reported if not."""
    if word in known:
        return True
    context.say("K116", f"unknown {what} `{word}`", node, did_you_mean(word, known, "known here"))
    return False


def argument_count(context: Context, what: str, given: int, arity: tuple[int, int], node: ast.Node, shape: str) -> None:
    """Report another number of arguments than the construct takes."""
    low, high = arity
    if not low <= given <= high:
        wants = f"{low}" if low == high else f"{low} to {high}"
        context.say("K113", f"`{what}` takes {wants} arguments, not {given}", node, shape)


def check_formats(context: Context, formats: tuple[ast.Format, ...]) -> None:
    """The words of `store ... as ...`."""
    for form in formats:
        for word in form.words:
            match word:
                case ast.FormatWord():
                    if word.name not in words.FORMATS:
                        context.say(
                            "K115",
                            f"unknown format `{word.name}`",
                            word,
                            did_you_mean(word.name, words.FORMATS, "formats"),
                        )
                case ast.Grain():
                    known_word(context, word.what, words.GRAINS, "grain of a format", word)
                case ast.Move():
                    known_word(context, word.tier, words.TIERS, "tier", word)


def _on(context: Context, clause: ast.On) -> None:
    known_word(context, clause.event, words.EVENTS, "event", clause)
    for update in clause.updates:
        if update.name not in context.states:
            context.report(
                finding(
                    "K101",
                    f"`{update.name}` is no state of this policy",
                    update.name_span,
                    did_you_mean(update.name, context.states, "states") or f"declare `state {update.name} = 0`",
                )
            )


def _unit(context: Context, clause: ast.Unit) -> None:
    if len(clause.args) != 1:
        context.say(
            "K113", f"a unit takes one size or condition, not {len(clause.args)}", clause, "such as `unit page(16)`"
        )
    for named in clause.named:
        known_word(context, named.name, ("stride", "order"), "argument of a unit", named)


def _share(context: Context, clause: ast.Share) -> None:
    by = clause.by
    if by.fn not in words.SHARES:
        context.say("K102", f"no way to share by `{by.fn}`", by, did_you_mean(by.fn, words.SHARES, "shares"))
        return
    shape = f"write `by {words.SHARE_SHAPES[by.fn]}`"
    argument_count(context, by.fn, len(by.args) + len(by.named), words.SHARES[by.fn], by, shape)
