"""Expressions: names, functions and axes of every formula, and of conditions and sizes."""

from __future__ import annotations

from dataclasses import replace

from kvcompile.dsl import ast, words
from kvcompile.dsl.axes import Env, axes_of
from kvcompile.dsl.context import WHOLE_COUNT, Context, Prefixes, broken_count, constant, linear, negative, shown
from kvcompile.dsl.printer import text

_OPEN_AXIS = {
    "d": "a score has no channels: reduce them, such as `sum[d] ...` or `norm(...)`",
    "q": "reduce the queries, such as `sum[q in last(64)] ...`",
    "u": "a score per unit ranks units: write the unit after the count, as in `top(n) pages by s`",
    "i": "reduce the entries, such as `mean[i] ...`",
}


def check_scores(context: Context) -> None:
    """Type every expression. What a set makes of its score is checked with the set."""
    for placed in context.resolved.clauses:
        env = context.env(placed.prefixes)
        match placed.clause:
            case ast.Score() as clause:
                axes_of(clause.value, env)
            case ast.Unit() as clause:
                _unit(context, clause, env)
            case ast.State() as clause:
                for assign in clause.assigns:
                    first = replace(env, arriving=True)
                    _per_entry(context, assign.value, first, "the first value of a state", allowed="i")
            case ast.On() as clause:
                _on(context, clause, replace(env, arriving=clause.event == "insert"))
            case ast.Share() as clause:
                _share(context, clause, env)
    for placed in context.resolved.ats:
        if isinstance(placed.clause, ast.At):
            for trigger in placed.clause.triggers:
                if trigger.cond is not None:
                    _condition(context, trigger.cond, context.env(placed.prefixes))


def _on(context: Context, clause: ast.On, env: Env) -> None:
    # `on attend` runs query by query, `on insert` entry by entry with its own query: so the queries may stay open.
    allowed = "gi" if clause.event == "step" else "giq"
    if clause.where is not None:
        _per_entry(context, clause.where, env, "the condition", allowed)
    for update in clause.updates:
        _per_entry(context, update.value, env, "the update", allowed)


def _condition(context: Context, cond: ast.Expr, env: Env) -> None:
    """The condition of a trigger: one number per row. `q` is the newest query, `prev.q` the one before it."""
    for axis in axes_of(cond, env) or "":
        if axis not in "gq":
            hint = "reduce the entries, such as `max[i] ...`" if axis == "i" else _OPEN_AXIS.get(axis, "reduce it")
            context.say("K202", f"a condition is one number per row, and axis `{axis}` is open here", cond, hint)


def check_selection_score(
    context: Context, by: ast.Expr, prefixes: Prefixes, wants: str, decides: str, free: str = "iug"
) -> None:
    """A score used by a set: at least one of the axes `wants` and nothing beyond `free` may be open. A left-over g
    stands for mean[g], or for each query head under `per query_head`. A query stays open in attend sets only, where
    each query selects for itself; `decides` names what decides without one, or is empty."""
    axes = axes_of(by, context.env(prefixes))
    if axes is None:
        return
    place = _place_of(context, by, prefixes)
    if decides and "q" in axes:
        context.say(
            "K204",
            f"the score leaves the queries open, but {decides} decides without a query",
            place,
            _bracket_hint(context, by, "q", prefixes) or _OPEN_AXIS["q"],
        )
    left = [axis for axis in axes if axis not in free and axis != "q"]
    for axis in left:
        context.say(
            "K202",
            f"the score leaves axis `{axis}` open",
            place,
            _bracket_hint(context, by, axis, prefixes) or _OPEN_AXIS.get(axis, "reduce it"),
        )
    if not left and not set(wants) & set(axes):
        what = "unit" if wants[0] == "u" else "entry"
        context.say(
            "K203",
            f"the score is the same number for every {what}, so it ranks nothing",
            place,
            "score entries by attn, keys, values, states or positions",
        )


def _place_of(context: Context, by: ast.Expr, prefixes: Prefixes) -> ast.Node:
    """Where to point: into the definition of a score rather than at its name."""
    score = context.score_at(by.id, prefixes) if isinstance(by, ast.Name) else None
    return by if score is None else score.value


def _bracket_hint(context: Context, by: ast.Expr, axis: str, prefixes: Prefixes = ()) -> str:
    """For `sum[d] q * k`: a reduction binds closer than the operator to its right."""
    env = context.env(prefixes, quiet=True)
    for node in context.reads(by, prefixes):
        if not isinstance(node, ast.Binary) or not isinstance(node.left, ast.Reduce):
            continue
        reduce = node.left
        right = axes_of(node.right, env)
        if any(a.name == axis for a in reduce.axes) and right and axis in right:
            inside = ast.Binary(node.op, reduce.body, node.right)
            fixed = text(ast.Reduce(reduce.fn, reduce.axes, inside))
            return f"`{reduce.fn}[{axis}]` takes only what stands right after it: write `{fixed}`"
    return ""


def _per_entry(context: Context, expr: ast.Expr, env: Env, what: str, allowed: str) -> None:
    axes = axes_of(expr, env)
    for axis in axes or "":
        if axis not in allowed:
            context.say(
                "K202",
                f"{what} leaves axis `{axis}` open",
                expr,
                _bracket_hint(context, expr, axis) or _OPEN_AXIS.get(axis, "reduce it"),
            )


def _unit(context: Context, clause: ast.Unit, env: Env) -> None:
    for arg in (*clause.args, *(named.value for named in clause.named)):
        axes_of(arg, env)
    sizes = [*clause.args[:1], *(named.value for named in clause.named if named.name == "stride")]
    for size in sizes:
        _whole(context, size, 1, "a unit holds a whole number of entries, at least 1", "such as `unit page(16)`")
    if clause.offset is not None:
        axes_of(clause.offset, env)
        _whole(context, clause.offset, 0, "units begin at a whole position, at least 0", "such as `from 4`")
    for landmark in clause.landmarks:
        axes = axes_of(landmark.value, env)
        for axis in axes or "":
            if axis not in "ud":
                context.say(
                    "K202",
                    f"the landmark leaves axis `{axis}` open",
                    landmark.value,
                    "a landmark is one value or vector per unit, such as `mean[i] k`",
                )


def _whole(context: Context, expr: ast.Expr, least: int, message: str, hint: str) -> None:
    value = constant(expr)
    if value is not None and (value < least or value.denominator != 1):
        context.say("K205", message, expr, hint)


def _share(context: Context, clause: ast.Share, env: Env) -> None:
    total = axes_of(clause.total, env)
    if total:
        context.say("K211", "the total of a share is one number", clause.total, "such as `budget - observe`")
    if isinstance(clause.total, ast.Number) and clause.total.kind == "percent":
        hint = f"such as `{clause.total.span.text} of prompt`"
        context.say("K210", "a bare percentage does not say of what", clause.total, hint)
        return
    broken = broken_count(clause.total)
    if broken is not None:
        context.say("K205", f"a total of {float(broken):g} is no whole number of entries", clause.total, WHOLE_COUNT)
        return
    count = linear(clause.total)
    if count is not None and negative(count):
        context.say(
            "K205",
            f"this total is {shown(count)}, whatever the prompt",
            clause.total,
            "what the regions take comes off the budget: it must be larger than they are",
        )
    by, arg = clause.by, clause.by.args[0] if clause.by.args else None
    if arg is None or by.fn not in words.SHARES:
        return
    shape = f"write {words.SHARE_SHAPES[by.fn]}"
    if by.fn == "table":
        if not isinstance(arg, ast.Text):
            context.say("K109", "`table` wants the name of a file of weights, one per layer", arg, shape)
        return
    axes = axes_of(arg, env)
    if by.fn == "pyramid" and (axes or not (constant(arg) or 0) > 0):
        context.say("K109", "`pyramid` wants a constant above 0: the first layer's part over the last's", arg, shape)
        return
    allowed = "gi" if by.fn == "cover" else "g"
    for axis in axes or "":
        if axis not in allowed:
            hint = "a share weighs layers: one number per layer, such as `softmax(-var[i] acc)`"
            if by.fn == "cover":
                hint = _OPEN_AXIS.get(axis, "reduce it")
            context.say("K202", f"`{by.fn}` leaves axis `{axis}` open", arg, hint)
    if by.fn == "cover" and axes is not None and "i" not in axes:
        context.say("K203", "`cover` wants one number per entry", arg, "such as `cover(mean[h] sum[q] attn)`")
