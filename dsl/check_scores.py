"""Expressions: names, functions and axes of every formula, and of conditions and sizes."""

from __future__ import annotations

from kvcompile.dsl import ast, words
from kvcompile.dsl.axes import Env, axes_of
from kvcompile.dsl.context import Context
from kvcompile.dsl.printer import text

_OPEN_AXIS = {
    "d": "a score has no channels: reduce them, such as `sum[d] ...` or `norm(...)`",
    "q": "reduce the queries, such as `sum[q in last(64)] ...`",
    "u": "a score per unit ranks units: write the unit after the count, as in `top(n) pages by s`",
    "i": "reduce the entries, such as `mean[i] ...`",
}


def check_scores(context: Context) -> None:
    """Type every expression. What a set makes of its score is checked with the set."""
    env = context.env()
    for placed in context.resolved.clauses:
        match placed.clause:
            case ast.Score() as clause:
                axes_of(ast.Name(clause.name, span=clause.name_span), env)
                axes_of(clause.value, env)
            case ast.Unit() as clause:
                _unit(context, clause, env)
            case ast.State() as clause:
                for assign in clause.assigns:
                    _per_entry(context, assign.value, env, "the first value of a state", allowed="i")
            case ast.On() as clause:
                # `on attend` runs query by query, so the queries may stay open.
                if clause.where is not None:
                    _per_entry(context, clause.where, env, "the condition", allowed="giq")
                for update in clause.updates:
                    _per_entry(context, update.value, env, "the update", allowed="giq")
            case ast.Share() as clause:
                _share(context, clause, env)
    for placed in context.resolved.ats:
        if isinstance(placed.clause, ast.At):
            for trigger in placed.clause.triggers:
                if trigger.cond is not None:
                    axes_of(trigger.cond, env)


def check_selection_score(context: Context, by: ast.Expr, env: Env, allowed: str, keeps: bool, wants: str) -> None:
    """A score used by a set: at least one of the axes `wants` and nothing beyond `allowed` may be open. g stands
    for mean[g]; a query stays open in attend sets only, where each query selects for itself."""
    axes = axes_of(by, env)
    if axes is None:
        return
    place = _place_of(context, by)
    if keeps and "q" in axes:
        context.say(
            "K204",
            "the score leaves the queries open, but keep and store decide without a query",
            place,
            _bracket_hint(context, by, "q") or _OPEN_AXIS["q"],
        )
    left = [axis for axis in axes if axis not in allowed + "g" and axis != "q"]
    for axis in left:
        context.say(
            "K202",
            f"the score leaves axis `{axis}` open",
            place,
            _bracket_hint(context, by, axis) or _OPEN_AXIS.get(axis, "reduce it"),
        )
    if not left and not set(wants) & set(axes):
        what = "unit" if wants == "u" else "entry"
        context.say(
            "K203",
            f"the score is the same number for every {what}, so it ranks nothing",
            place,
            "score entries by attn, keys, values, states or positions",
        )


def _place_of(context: Context, by: ast.Expr) -> ast.Node:
    """Where to point: into the definition of a score rather than at its name."""
    if isinstance(by, ast.Name) and by.id in context.scores:
        return context.scores[by.id].value
    return by


def _bracket_hint(context: Context, by: ast.Expr, axis: str) -> str:
    """For `sum[d] q * k`: a reduction binds closer than the operator to its right."""
    env = context.env(quiet=True)
    for node in context.reads(by):
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
    if clause.offset is not None:
        axes_of(clause.offset, env)
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


def _share(context: Context, clause: ast.Share, env: Env) -> None:
    total = axes_of(clause.total, env)
    if total:
        context.say("K211", "the total of a share is one number", clause.total, "such as `budget - observe`")
    if clause.by.fn == "table":
        return
    for arg in clause.by.args:
        axes = axes_of(arg, env)
        allowed = "gi" if clause.by.fn == "cover" else "g"
        for axis in axes or "":
            if axis not in allowed and axis in words.AXES:
                context.say(
                    "K202",
                    f"`{clause.by.fn}` leaves axis `{axis}` open",
                    arg,
                    "a share weighs layers: one number per layer, such as `softmax(-var[i] acc)`",
                )
