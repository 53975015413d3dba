"""Triggers: their arguments, what they govern, and what sets mean at the time they fire."""

from __future__ import annotations

from kvcompile.dsl import ast, words
from kvcompile.dsl.axes import axes_of, unit_of
from kvcompile.dsl.context import Context, Prefixes, SetClause, constant
from kvcompile.dsl.diagnostics import did_you_mean, finding
from kvcompile.dsl.resolve import Placed

_Time = tuple[type, tuple[ast.Prefix, ...], frozenset[ast.Trigger]]  # what is set, for whom, when


def check_time(context: Context) -> None:
    """Every `at`, then every set with its triggers, then the policy as a whole."""
    governing = {id(t) for placed, _ in context.sets() for t in placed.triggers}
    for placed in context.resolved.ats:
        if isinstance(placed.clause, ast.At):
            for trigger in placed.clause.triggers:
                _trigger(context, trigger, placed.prefixes)
            if not any(id(t) in governing for t in placed.clause.triggers):
                context.say(
                    "K306", "no set stands above this `at`", placed.clause, "move it below the sets that it times"
                )
    seen: set[_Time] = set()
    for placed, clause in context.sets():
        _untimed(context, placed, clause)
        _queries(context, placed, clause)
        if isinstance(clause, ast.Keep):
            _rejudged(context, placed, clause)
        if isinstance(clause, ast.Keep | ast.Attend):
            _twice(context, seen, placed, clause)
    _grows(context)


def _trigger(context: Context, trigger: ast.Trigger, prefixes: Prefixes) -> None:
    arity = words.TRIGGERS.get(trigger.name)
    if arity is None:
        context.say(
            "K112", f"unknown trigger `{trigger.name}`", trigger, did_you_mean(trigger.name, words.TRIGGERS, "triggers")
        )
        return
    low, high = arity
    given = len(trigger.args) + len(trigger.named)
    if not low <= given <= high or trigger.named:
        wants = "no arguments" if not high else f"{low}" if low == high else f"{low} to {high}"
        context.say("K305", f"`{trigger.name}` takes {wants}, not {given}", trigger, _SHAPES.get(trigger.name, ""))
        return
    numbers = trigger.args
    if trigger.name == "filled" and given == 2:
        unit, numbers = trigger.args[0], trigger.args[1:]
        name = unit.id if isinstance(unit, ast.Name) else unit.span.text
        if unit_of(name, context.units) is None:
            context.say(
                "K110",
                f"unknown unit `{name}`",
                unit,
                did_you_mean(name, context.units, "units") or f"declare it: `unit {name}(128)`",
            )
    env = context.env(prefixes)
    for number in numbers:
        axes = axes_of(number, env)
        value = constant(number)
        percent = isinstance(number, ast.Number) and number.kind == "percent"
        if axes or percent or (value is not None and (value < 1 or value.denominator != 1)):
            context.say(
                "K305", f"`{trigger.name}` wants a whole number of at least 1", number, _SHAPES.get(trigger.name, "")
            )


_SHAPES = {
    "prefill.end": "write `prefill.end`",
    "step": "write `step`; for every n-th step `every(n)`",
    "chunk": "such as `chunk(8192)`; `chunk` alone cuts nothing: it fires after each piece of another `chunk(c)`",
    "every": "such as `every(128)`",
    "filled": "such as `filled(lot, 2)` or `filled(128)`",
    "full": "such as `full(4096)`",
}


def _untimed(context: Context, placed: Placed, clause: SetClause) -> None:
    if placed.triggers or isinstance(clause, ast.Pick):
        return
    chooses = any(isinstance(t, ast.Selection | ast.Where) for t in clause.set.terms)
    if isinstance(clause, ast.Attend):
        needed = chooses
    else:
        needed = not (len(clause.set.terms) == 1 and _is_all(clause.set.terms[0]) and isinstance(clause, ast.Keep))
    if needed:
        verb = type(clause).__name__.lower()
        context.say(
            "K304",
            f"no `at` says when this `{verb}` set is computed",
            clause,
            "such as `at prefill.end, step` below it",
        )


def _queries(context: Context, placed: Placed, clause: SetClause) -> None:
    """`q in last(w)` where pieces end, and `q in peek(w)` where none do."""
    names = {trigger.name for trigger in placed.triggers}
    for term in clause.set.terms:
        by = term.by if isinstance(term, ast.Selection) else term.cond if isinstance(term, ast.Where) else None
        for axis in context.query_axes(by, placed.prefixes) if by is not None else ():
            if not isinstance(axis.source, ast.Call):
                continue
            width = axis.source.span.text.partition("(")[2] or "64)"
            if axis.source.fn == "last" and "chunk" in names and context.keeps(clause):
                context.say(
                    "K301",
                    "under `at chunk` these are the last queries of each piece, not of the prompt",
                    axis,
                    f"write `q in peek({width}` to ask the end of the prompt",
                )
            if axis.source.fn == "peek" and placed.triggers and "chunk" not in names:
                context.say(
                    "K307",
                    "`peek` looks past the end of a piece, and no piece ends here",
                    axis,
                    f"write `q in last({width}`, or `at chunk(8192)`",
                )


def _rejudged(context: Context, placed: Placed, clause: ast.Keep) -> None:
    if not any(trigger.name == "chunk" for trigger in placed.triggers):
        return
    frozen = any(isinstance(term, ast.Region) and term.kind == "frozen" for term in clause.set.terms)
    chooses = next((term for term in clause.set.terms if isinstance(term, ast.Selection)), None)
    if chooses is not None and not frozen:
        context.say(
            "K302",
            "after each piece, the survivors of earlier ones compete again",
            chooses,
            "`frozen |` in front keeps them; without it this is legal",
        )


def _twice(context: Context, seen: set[_Time], placed: Placed, clause: SetClause) -> None:
    time = type(clause), placed.prefixes, frozenset(placed.triggers)
    if time in seen:
        verb = type(clause).__name__.lower()
        hint = "join the sets by `|`, or give each an `at` of its own below it"
        context.say("K106", f"a second `{verb}` for the same heads, layers and time", clause, hint)
    seen.add(time)


def _grows(context: Context) -> None:
    """Say it where no set drops what is generated: at the policy, or at the rows that grow beside others that do not.
    Layers and classes that keep all by intent do not count."""
    if any(isinstance(placed.clause, ast.Off) for placed in context.resolved.clauses):
        return
    stays: dict[Prefixes, ast.Keep] = {}
    drops: set[Prefixes] = set()
    for placed, clause in context.sets():
        if not isinstance(clause, ast.Keep) or any(_is_all(term) for term in clause.set.terms):
            continue
        if any(t.name in words.DECODE_TRIGGERS for t in placed.triggers):
            drops.add(placed.prefixes)
        else:
            stays.setdefault(placed.prefixes, clause)
    hint = "add `step` or `every(128)` to the `at` of a `keep`, if that is not meant"
    if not drops:
        message = "nothing is evicted in decode, so the cache grows by every generated token"
        context.report(finding("K303", message, context.resolved.header.header, hint))
    for prefixes, clause in stays.items() if drops else ():
        if prefixes not in drops:
            context.say("K303", "nothing is evicted here in decode, so these rows grow by every token", clause, hint)


def _is_all(term: ast.Term) -> bool:
    return isinstance(term, ast.Region) and term.kind == "all"
