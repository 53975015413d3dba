"""Sets: regions and their arguments, selections with counts, units and scopes, and what sets say together."""

from __future__ import annotations

from fractions import Fraction
from typing import TypeVar

from kvcompile.dsl import ast, words
from kvcompile.dsl.axes import Env, axes_of, unit_of
from kvcompile.dsl.check_scores import check_selection_score
from kvcompile.dsl.context import (
    WHOLE_COUNT,
    Context,
    Linear,
    SetClause,
    broken_count,
    constant,
    linear,
    negative,
    shown,
)
from kvcompile.dsl.diagnostics import did_you_mean, nearest
from kvcompile.dsl.graphs import cycles
from kvcompile.dsl.resolve import Placed

C = TypeVar("C")


def check_sets(context: Context) -> None:
    """Every set clause by itself, then picks that use each other, then `attend` against `keep`."""
    for placed, clause in context.sets():
        env = context.env(placed.prefixes)
        for term in clause.set.terms:
            match term:
                case ast.Region():
                    _region(context, term, env)
                case ast.Ref():
                    _ref(context, term, placed)
                case ast.Where():
                    check_selection_score(context, term.cond, placed.prefixes, "iu", _decides(context, clause))
                case ast.Selection():
                    _selection(context, term, placed, clause)
        _all_beside_others(context, clause)
    _pick_cycles(context)
    _wider_than_keep(context)


def _decides(context: Context, clause: SetClause) -> str:
    """What decides without a query here, in words; empty for `attend` and for picks that only `attend` names."""
    if isinstance(clause, ast.Pick):
        return "a pick that `keep` names" if context.keeps(clause) else ""
    return "" if isinstance(clause, ast.Attend) else f"`{type(clause).__name__.lower()}`"


def _pick_cycles(context: Context) -> None:
    """Picks that hold themselves, through whatever others."""
    edges = {
        name: [(term.name, term) for term in pick.set.terms if isinstance(term, ast.Ref)]
        for name, pick in context.picks.items()
    }
    for path, use in cycles(edges):
        message = f"picks are defined by each other: {' -> '.join(path)}"
        context.say("K108", message, use, "let one of them stand on its own")


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


def _ref(context: Context, term: ast.Ref, placed: Placed) -> None:
    if term.name in context.picks:
        return
    known = [*words.REGIONS, *context.picks]
    hint = did_you_mean(term.name, known, "regions")
    if context.score_at(term.name, placed.prefixes) is not None:
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


def _selection(context: Context, term: ast.Selection, placed: Placed, clause: SetClause) -> None:
    env = context.env(placed.prefixes)
    by_unit = term.unit is not None
    if by_unit:
        _unit(context, term.unit or "", term)
    if term.rank == "cover":
        value = term.amount.value if isinstance(term.amount, ast.Number) else None
        if value is None or not 0 <= value <= 1:
            context.say("K210", "`cover` wants the part of the mass to reach", term.amount, "such as cover(95%)")
    else:
        _amount(context, term.amount, env, fraction=True, regions=clause.set)
        _chooses_nothing(context, term)
    check_selection_score(context, term.by, placed.prefixes, "ui" if by_unit else "iu", _decides(context, clause))
    _scopes(context, term, clause, env)


def _scope_hint(context: Context, scope: ast.Scope) -> str:
    """The scope that was meant, whole, so that it can be typed in; else all of them."""
    near = nearest(scope.what, [*words.SCOPES[scope.kind], *(context.units if scope.kind == "per" else ())])
    if near:
        return f"did you mean `{scope.kind} {near}`?"
    known = [f"{kind} {what}" for kind, whats in words.SCOPES.items() for what in sorted(whats)]
    return f"scopes: {', '.join([*known, *(f'per {unit}' for unit in context.units)])}"


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
                    _scope_hint(context, scope),
                )
        elif scope.what not in known:
            context.say("K111", f"unknown scope `{scope.kind} {scope.what}`", scope, _scope_hint(context, scope))
        if scope.size is not None:
            if scope.what == "layers":
                _amount(context, scope.size, env, fraction=False)
                if constant(scope.size) == 0:
                    context.say("K205", "no layers share a decision", scope.size, "such as `shared layers(8)`")
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
    if context.keeps(clause) and ("per", "query_head") in seen:
        context.say("K207", _union_grows(term), term, "`per head` with `mean[g]` keeps exactly the count")


def _union_grows(term: ast.Selection) -> str:
    """By how much the union of a group's choices may outgrow the count of each."""
    count = constant(term.amount)
    grown = f", {count * 4} where 4 of them share a KV head" if count is not None and count >= 1 else ""
    return (
        "query heads share the memory of their KV head, so the union of their choices stays: up to "
        f"{term.amount.span.text or 'the count'} for each of them{grown}"
    )


def _amount(context: Context, expr: ast.Expr, env: Env, fraction: bool, regions: ast.SetUnion | None = None) -> None:
    """A count of entries, units, layers; with `fraction` also a bare percentage of the candidates."""
    if isinstance(expr, ast.Number) and expr.kind == "percent":
        if not fraction:
            hint = f"such as `{expr.span.text} of prompt`"
            context.say("K210", "a bare percentage does not say of what", expr, hint)
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
        context.say("K205", f"this count is {shown(count)}, whatever the prompt", expr, hint)


def _chooses_nothing(context: Context, term: ast.Selection) -> None:
    """A count that comes to none whatever the prompt: legal, and hardly what was meant."""
    value = constant(term.amount)
    kinds = {part.kind for part in term.amount.walk() if isinstance(part, ast.Number)}
    if value is None or not 0 <= value < 1 or kinds & {"float", "bytes"}:  # a bare fraction is of the candidates
        return
    cut = f"{float(value):.4g}, cut to 0" if value else "0"
    what = f"no whole {term.unit} are" if term.unit is not None else "no entry is"
    hint = "give it at least 1"
    if value and term.unit is not None:
        hint = "give a budget of at least one unit"
    context.say("K212", f"this count is {cut}: {what} chosen, whatever the prompt", term.amount, hint)


def _taken(union: ast.SetUnion) -> str:
    total: Linear = {}
    for term in union.terms:
        if isinstance(term, ast.Region) and term.kind in ("sink", "recent") and term.args:
            for name, value in (linear(term.args[0]) or {}).items():
                total[name] = total.get(name, Fraction(0)) + value
    return shown(total) if any(total.values()) else ""


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


_Rows = tuple[str | None, ast.LayersPrefix | None]  # the head class and the layers of some rows, None for all


def _wider_than_keep(context: Context) -> None:
    """`attend` may name only what the `keep` of the same heads leaves in memory; selections leave that open."""
    attends: dict[_Rows, list[ast.Attend]] = {}
    keeps: dict[_Rows, list[tuple[ast.Keep, tuple[ast.Trigger, ...]]]] = {}
    for placed, clause in context.sets():
        rows = placed.heads, placed.layers
        if isinstance(clause, ast.Attend):
            attends.setdefault(rows, []).append(clause)
        elif isinstance(clause, ast.Keep):
            keeps.setdefault(rows, []).append((clause, placed.triggers))
    for rows in dict.fromkeys([*attends, *keeps]) if attends else ():
        # More than a few at one place differ in triggers at best, which `_twice` has a word about.
        for attend in _governing(attends, rows)[:4]:
            for keep, triggers in _governing(keeps, rows)[:4]:
                _reaches_beyond(context, attend, _region_sizes(keep), triggers)


def _governing(clauses: dict[_Rows, list[C]], rows: _Rows) -> list[C]:
    """The clauses of most detail that speak for some rows."""
    heads, layers = rows
    found = ((heads, layers), (heads, None), (None, layers), (None, None))
    return next((clauses[key] for key in found if key in clauses), [])


def _region_sizes(keep: ast.Keep) -> dict[str, Linear]:
    """The sizes of `sink` and `recent` of a set that is made of nothing else; empty for other sets."""
    sizes: dict[str, Linear] = {}
    for term in keep.set.terms:
        count = linear(term.args[0]) if isinstance(term, ast.Region) and term.args else None
        if not isinstance(term, ast.Region) or term.kind not in ("sink", "recent") or count is None:
            return {}
        sizes[term.kind] = count
    return sizes


def _reaches_beyond(
    context: Context, attend: ast.Attend, sizes: dict[str, Linear], triggers: tuple[ast.Trigger, ...]
) -> None:
    if not sizes:
        return
    every_step = any(trigger.name == "step" for trigger in triggers)
    for term in attend.set.terms:
        if not isinstance(term, ast.Region) or term.kind not in ("sink", "recent", "prompt", "generated", "stride"):
            continue
        if term.kind in ("recent", "generated") and not every_step:
            continue  # new entries stay until the set is decided anew
        count = linear(term.args[0]) if term.args else None
        kept = sizes.get(term.kind)
        if term.kind in ("sink", "recent") and count is None:
            continue
        if kept is not None and count is not None:
            extra = {n: kept.get(n, Fraction(0)) - count.get(n, Fraction(0)) for n in {*kept, *count}}
            if not negative(extra):
                continue
        hint = f"read no more than is kept: `{term.kind}({shown(kept)})`" if kept else "keep it too"
        context.say("K206", f"`{term.span.text}` reaches entries that `keep` drops", term, f"{hint}, or keep more")
