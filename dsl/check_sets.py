"""Sets: regions and their arguments, selections with counts, units and scopes, and what sets say together."""

from __future__ import annotations

from fractions import Fraction

from kvcompile.dsl import ast, words
from kvcompile.dsl.axes import Env, axes_of, unit_of
from kvcompile.dsl.check_scores import check_selection_score
from kvcompile.dsl.context import WHOLE_COUNT, Context, Linear, SetClause, broken_count, linear, negative
from kvcompile.dsl.diagnostics import did_you_mean
from kvcompile.dsl.resolve import Placed


def check_sets(context: Context) -> None:
    """Every set clause by itself, then `attend` against `keep`."""
    env = context.env()
    for placed, clause in context.sets():
        keeps = isinstance(clause, ast.Keep | ast.Store)
        for term in clause.set.terms:
            match term:
                case ast.Region():
                    _region(context, term, env)
                case ast.Ref():
                    _ref(context, term)
                case ast.Where():
                    check_selection_score(context, term.cond, env, "iu", keeps, "iu")
                case ast.Selection():
                    _selection(context, term, clause, env, keeps)
        _all_beside_others(context, clause)
        if isinstance(clause, ast.Attend):
            _wider_than_keep(context, placed, clause)


def _region(context: Context, term: ast.Region, env: Env) -> None:
    if term.kind in words.UNIT_REGIONS:
        _unit(context, term.unit or "", term)
        return
    arity = words.REGIONS.get(term.kind)
    if arity is None:
        known = [*words.REGIONS, *words.UNIT_REGIONS, "top", "bottom", "cover"]
        context.say("K103", f"unknown region `{term.kind}`", term, did_you_mean(term.kind, known, "regions"))
        return
    if len(term.args) + len(term.named) != arity:
        given = len(term.args) + len(term.named)
        shape = "write `newest UNIT`" if term.kind == "newest" else f"such as `{term.kind}({', '.join('4' * arity)})`"
        wants = "no arguments" if not arity else f"{arity} argument{'s' if arity > 1 else ''}"
        context.say(
            "K113", f"`{term.kind}` takes {wants}, not {given}", term, shape if arity else f"write `{term.kind}`"
        )
        return
    for arg in (*term.args, *(named.value for named in term.named)):
        if term.kind == "span":
            if not isinstance(arg, ast.Text):
                context.say("K109", "`span` wants the name of a text span", arg, 'such as span("question")')
        else:
            _amount(context, arg, env, fraction=False)


def _ref(context: Context, term: ast.Ref) -> None:
    if term.name in context.picks:
        return
    known = [*words.REGIONS, *context.picks]
    hint = did_you_mean(term.name, known, "regions")
    if term.name in context.scores:
        hint = f"a score selects by `top(n) by {term.name}`"
    elif words.REGIONS.get(term.name):
        hint = f"it takes a count: `{term.name}(n)`"
    context.say("K103", f"unknown region `{term.name}`", term, hint)


def _unit(context: Context, word: str, node: ast.Node) -> str | None:
    unit = unit_of(word, context.units)
    if unit is None:
        hint = did_you_mean(word, context.units, "units") if context.units else f"declare it: `unit {word}(16)`"
        context.say("K110", f"unknown unit `{word}`", node, hint)
    return unit


def _selection(context: Context, term: ast.Selection, clause: SetClause, env: Env, keeps: bool) -> None:
    by_unit = term.unit is not None
    if by_unit:
        _unit(context, term.unit or "", term)
    if term.rank == "cover":
        value = term.amount.value if isinstance(term.amount, ast.Number) else None
        if value is None or not 0 <= value <= 1:
            context.say("K210", "`cover` wants the part of the mass to reach", term.amount, "such as cover(95%)")
    else:
        _amount(context, term.amount, env, fraction=True, regions=clause.set)
    check_selection_score(context, term.by, env, "iu", keeps, "u" if by_unit else "iu")
    _scopes(context, term, clause, env)


def _scopes(context: Context, term: ast.Selection, clause: SetClause, env: Env) -> None:
    seen: set[tuple[str, str]] = set()
    for scope in term.scopes:
        known = words.SCOPES[scope.kind]
        if scope.kind == "per" and scope.what not in known:
            if unit_of(scope.what, context.units) is None:
                context.say(
                    "K111",
                    f"unknown scope `per {scope.what}`",
                    scope,
                    did_you_mean(scope.what, [*known, *context.units], "per"),
                )
        elif scope.what not in known:
            context.say(
                "K111", f"unknown scope `{scope.kind} {scope.what}`", scope, did_you_mean(scope.what, known, scope.kind)
            )
        if scope.size is not None:
            if scope.what == "layers":
                _amount(context, scope.size, env, fraction=False)
            else:
                context.say(
                    "K111", f"`{scope.kind} {scope.what}` takes no number", scope, "only `shared layers(n)` does"
                )
        if scope.floor is not None:
            value = scope.floor.value if isinstance(scope.floor, ast.Number) else None
            if value is None or not 0 <= value <= 1:
                context.say("K210", "`floor` wants a percentage of the equal share", scope.floor, "such as floor 20%")
        seen.add((scope.kind, scope.what))
    if len(seen) < len(term.scopes):
        context.say("K208", "a scope is written twice", term, "leave one of them out")
    deciding = [
        s for s in (("per", "head"), ("per", "query_head"), ("shared", "heads"), ("across", "heads")) if s in seen
    ]
    if len(deciding) > 1:
        listed = " and ".join(f"`{kind} {what}`" for kind, what in deciding)
        context.say("K208", f"{listed} contradict each other", term, "keep one of them")
    if ("shared", "layers") in seen and ("across", "layers") in seen:
        context.say("K208", "`shared layers` and `across layers` contradict each other", term, "keep one of them")
    if isinstance(clause, ast.Keep) and ("per", "query_head") in seen:
        context.say(
            "K207",
            "the query heads of a group share one memory, so the union of their choices stays: up to as "
            "many times the count as a group has query heads",
            term,
            "`per head` with `mean[g]` keeps exactly the count",
        )


def _amount(context: Context, expr: ast.Expr, env: Env, fraction: bool, regions: ast.SetUnion | None = None) -> None:
    """A count of entries, units, layers; with `fraction` also a bare percentage of the candidates."""
    if isinstance(expr, ast.Number) and expr.kind == "percent":
        if not fraction:
            context.say("K210", "a bare percentage does not say of what", expr, "such as `10% of prompt`")
        elif not 0 <= expr.value <= 1:
            context.say("K210", "a percentage lies between 0% and 100%", expr, "say which part is kept")
        return
    axes = axes_of(expr, env)
    if axes:
        context.say(
            "K211",
            f"a count is one number, and axis `{axes[0]}` is open here",
            expr,
            "counts are made of constants, len, prompt, chunk, now, step and shares",
        )
        return
    broken = broken_count(expr)
    if broken is not None and not (fraction and 0 < broken < 1):
        context.say("K205", f"a count of {float(broken):g} is no whole number of entries", expr, WHOLE_COUNT)
        return
    count = linear(expr)
    if count is not None and negative(count):
        taken = _taken(regions) if regions is not None else None
        hint = (
            f"the regions of this set take {taken}; the budget must be at least that" if taken else "counts begin at 0"
        )
        context.say("K205", f"this count is {_shown(count)}, whatever the prompt", expr, hint)


def _taken(union: ast.SetUnion) -> str:
    total: Linear = {}
    for term in union.terms:
        if isinstance(term, ast.Region) and term.kind in ("sink", "recent") and term.args:
            for name, value in (linear(term.args[0]) or {}).items():
                total[name] = total.get(name, Fraction(0)) + value
    return _shown(total) if any(total.values()) else ""


def _shown(count: Linear) -> str:
    parts = [
        f"{float(v):g}" if not name else f"{float(v * 100):g}% of {name}" for name, v in sorted(count.items()) if v
    ]
    return " and ".join(parts)


def _all_beside_others(context: Context, clause: SetClause) -> None:
    terms = clause.set.terms
    whole = next((t for t in terms if isinstance(t, ast.Region) and t.kind == "all"), None)
    if whole is not None and len(terms) > 1:
        context.say(
            "K212",
            "`all` takes every entry, so the other terms choose nothing",
            whole,
            "leave out `all`, or the others",
        )


def _wider_than_keep(context: Context, placed: Placed, clause: ast.Attend) -> None:
    """`attend` may name only what some `keep` of the same heads leaves in memory; selections leave that open."""
    sizes: dict[str, Linear] = {}
    for other, keep in context.sets():
        if not isinstance(keep, ast.Keep) or other.heads != placed.heads or other.layers != placed.layers:
            continue
        for term in keep.set.terms:
            count = linear(term.args[0]) if isinstance(term, ast.Region) and term.args else None
            if not isinstance(term, ast.Region) or term.kind not in ("sink", "recent") or count is None:
                return
            sizes[term.kind] = count
    if not sizes:
        return
    for term in clause.set.terms:
        if not isinstance(term, ast.Region) or term.kind not in ("sink", "recent", "prompt", "generated", "stride"):
            continue
        count = linear(term.args[0]) if term.args else None
        kept = sizes.get(term.kind)
        if term.kind in ("sink", "recent") and count is None:
            continue
        if kept is not None and count is not None:
            extra = {n: kept.get(n, Fraction(0)) - count.get(n, Fraction(0)) for n in {*kept, *count}}
            if not negative(extra):
                continue
        context.say(
            "K206",
            f"`{term.span.text}` reaches entries that `keep` drops",
            term,
            "read no more than is kept, or keep more",
        )
