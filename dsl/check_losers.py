"""What becomes of losers: what a merge calls near, its condition and weight, folds, and the rotation of keys."""

from __future__ import annotations

from kvcompile.dsl import ast, words
from kvcompile.dsl.axes import Env, axes_of
from kvcompile.dsl.check_names import argument_count, check_formats, known_word
from kvcompile.dsl.context import Context
from kvcompile.dsl.diagnostics import did_you_mean

_NEAR = "write `merge into nearest by cos(k)`"
_UNROTATED = "with `positions compact` keys are merged unrotated; without it this is as published"


def check_losers(context: Context) -> None:
    """The `else` actions of every `keep`."""
    for placed in context.resolved.of(ast.Keep):
        keep = placed.clause
        if not isinstance(keep, ast.Keep):
            continue
        for position, loser in enumerate(keep.losers):
            _loser(context, loser)
            if position + 1 < len(keep.losers) and _takes_all(loser):
                context.say(
                    "K402", "this action takes every loser, so none reaches the next", loser, "leave out those after it"
                )


def _takes_all(loser: ast.Loser) -> bool:
    return not (isinstance(loser, ast.Merge) and loser.when is not None)


def _loser(context: Context, loser: ast.Loser) -> None:
    # A loser is known by its likeness to its nearest survivor, and by the tokens that it stands for.
    env = Env({"sim": "i", "count": "i"}, report=context.report, losing=True)
    match loser:
        case ast.Merge():
            known_word(context, loser.into, ("nearest",), "target of a merge", loser)
            _similarity(context, loser.by)
            _per_loser(context, loser.when, env)
            _per_loser(context, loser.weight, env)
            _rotation(context, loser, "merged")
        case ast.Fold():
            if known_word(context, loser.fn, words.FOLDS, "fold", loser):
                _fold(context, loser)
            _per_loser(context, loser.weight, Env({"count": "i"}, report=context.report, losing=True))
            _rotation(context, loser, "averaged" if loser.fn == "mean" else "mixed")
        case ast.Requant():
            check_formats(context, loser.formats)
        case ast.Move():
            known_word(context, loser.tier, words.TIERS, "tier", loser)


def _rotation(context: Context, loser: ast.Node, how: str) -> None:
    if not context.unrotated:
        message = f"keys are {how} after their rotation, which belongs to another position each"
        context.say("K401", message, loser, _UNROTATED)


def _similarity(context: Context, by: ast.Call) -> None:
    of = words.SIMILARITIES.get(by.fn)
    if of is None:
        hint = did_you_mean(by.fn, words.SIMILARITIES) or _NEAR
        context.say("K102", f"`{by.fn}` does not say what is near", by, hint)
        return
    read = f"`{by.fn}` of {' or '.join(f'`{name}`' for name in of)}"
    shape = f"write `merge into nearest by {by.fn}({of[0]})`"
    if len(by.args) != 1 or by.named:
        given = len(by.args) + len(by.named)
        context.say("K113", f"nearness is {read}, one value per entry, not {given}", by, shape)
    elif not (isinstance(by.args[0], ast.Name) and by.args[0].id in of):
        context.say("K109", f"nearness is {read}", by.args[0], shape)


def _per_loser(context: Context, expr: ast.Expr | None, env: Env) -> None:
    """`when` and `weight` read likeness and count, and what follows from them; nothing else is open there."""
    if expr is not None:
        axes_of(expr, env)


def _fold(context: Context, loser: ast.Fold) -> None:
    shape = f"write `fold {words.FOLD_SHAPES[loser.fn]}`"
    argument_count(context, loser.fn, len(loser.args) + len(loser.named), words.FOLDS[loser.fn], loser, shape)
    for arg in loser.args:
        value = arg.value if isinstance(arg, ast.Number) else None
        if loser.fn == "pool" and (value is None or value < 1 or value.denominator != 1):
            context.say("K210", "`pool` wants the number of losers that become one", arg, shape)
        elif loser.fn != "pool" and (value is None or not 0 < value <= 1):
            context.say("K210", f"`{loser.fn}` wants the part of the losers that it leaves", arg, shape)
    if loser.weight is not None and loser.fn != "mean":
        context.say("K402", f"`fold {loser.fn}` weighs nothing", loser.weight, "leave out the `weight`")
