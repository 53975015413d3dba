"""Open axes of expressions.

Takes an expression and an `Env` that knows names; gives the open axes as a string in the order of `words.AXES`
("" is one number), or None after a finding that makes them unknown. Findings go to `Env.report`: unknown names
and functions, reductions of axes that are not there, wrong numbers of arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction

from kvcompile.dsl import ast, words
from kvcompile.dsl.diagnostics import Diagnostic, did_you_mean, finding

Report = Callable[[Diagnostic], None]


def _ignore(_: Diagnostic) -> None:
    """Findings of an expression that is typed twice are reported once."""


@dataclass(slots=True)
class Env:
    """What names mean. `known` maps states, landmarks, shares and local names to their open axes, `scores` the
    names of scores to their definitions; `units` says whether `[i]` means the tokens of a unit. `arriving`: the
    expression is computed once for each new entry; `losing`: it is about a loser of `merge` or `fold`, of which
    only the names in `known` are there. `elsewhere` are scores and shares that other prefixes define, `broken`
    scores that are reported already and have no axes."""

    known: Mapping[str, str]
    scores: Mapping[str, ast.Expr] = field(default_factory=dict)
    units: bool = False
    report: Report = _ignore
    arriving: bool = False
    losing: bool = False
    elsewhere: frozenset[str] = frozenset()
    broken: frozenset[str] = frozenset()
    _axes: dict[str, str | None] = field(default_factory=dict)  # of scores, once each

    def names(self) -> set[str]:
        """Every name that an expression may use."""
        return {*self.known, *self.scores} | (set() if self.losing else set(words.FIELDS))


def ordered(axes: Iterable[str]) -> str:
    """Axes in the order in which they are written, each once."""
    present = set(axes)
    return "".join(axis for axis in words.AXES if axis in present)


def axes_of(expr: ast.Expr | ast.Named, env: Env) -> str | None:
    """The open axes of `expr`."""
    match expr:
        case ast.Number():
            return ""
        case ast.Portion():
            _portion(expr, env)
            return ""
        case ast.Text():
            return _bad(
                env, "K213", "a string is no value here", expr, "write a number, or a formula such as `norm(k)`"
            )
        case ast.Name():
            return _name(expr, env)
        case ast.Field():
            return _field(expr, env)
        case ast.Unary():
            return axes_of(expr.operand, env)
        case ast.Binary():
            return _joined([axes_of(expr.left, env), axes_of(expr.right, env)])
        case ast.Reduce():
            return _reduce(expr, env)
        case ast.Call():
            return _call(expr, env)
        case ast.Named():
            return _bad(env, "K113", f"no function takes an argument `{expr.name}=`", expr, "leave the name out")


def unit_of(word: str, units: Iterable[str]) -> str | None:
    """The unit that a word names, in the singular or plural, or None."""
    known = set(units)
    if word in known:
        return word
    return next((name for name in sorted(known) if word in _plurals(name)), None)


def _plurals(name: str) -> tuple[str, ...]:
    """`page` pages, `box` boxes, `entry` entries, `index` indices."""
    if name.endswith("y"):
        return name + "s", name[:-1] + "ies"
    if name.endswith(("ex", "ix")):
        return name + "es", name[:-2] + "ices"
    return name + "s", name + "es"


def _bad(env: Env, code: str, message: str, node: ast.Node, hint: str = "") -> str | None:
    env.report(finding(code, message, node.span, hint))
    return None


def _joined(parts: Iterable[str | None]) -> str | None:
    out: set[str] = set()
    for part in parts:
        if part is None:
            return None
        out |= set(part)
    return ordered(out)


def _name(expr: ast.Name, env: Env) -> str | None:
    if expr.id in env.known:
        return env.known[expr.id]
    if expr.id in env.broken:
        return None
    if expr.id in env.scores:
        if expr.id not in env._axes:
            # The score's own clause reports what is wrong inside it.
            env._axes[expr.id] = axes_of(env.scores[expr.id], replace(env, report=_ignore))
        return env._axes[expr.id]
    if expr.id in words.FIELDS and not env.losing:
        return words.FIELDS[expr.id]
    if expr.id in env.elsewhere:
        return _bad(
            env,
            "K101",
            f"`{expr.id}` is defined below another prefix only",
            expr,
            f"move its definition out of the prefix, or write one for these heads: `score {expr.id} = ...`",
        )
    return _bad(env, "K101", f"unknown name `{expr.id}`", expr, did_you_mean(expr.id, env.names(), "known here"))


def _field(expr: ast.Field, env: Env) -> str | None:
    known = words.OWNERS.get(expr.owner)
    if known is None or expr.name not in known:
        names = [f"{owner}.{name}" for owner, names in words.OWNERS.items() for name in names]
        return _bad(
            env,
            "K101",
            f"unknown field `{expr.owner}.{expr.name}`",
            expr,
            did_you_mean(f"{expr.owner}.{expr.name}", names, "fields"),
        )
    return words.FIELDS[expr.name]


def _portion(expr: ast.Portion, env: Env) -> None:
    if expr.of not in words.PORTIONS:
        _bad(env, "K116", f"a part `of {expr.of}`", expr, "parts are taken of prompt, len or chunk")
    value = expr.fraction.value if isinstance(expr.fraction, ast.Number) else None
    fits = isinstance(expr.fraction, ast.Number) and expr.fraction.kind in ("percent", "float")
    if value is None or not fits or not 0 <= value <= 1:
        _bad(
            env, "K210", "`of` wants a percentage between 0% and 100% on its left", expr, f"such as `10% of {expr.of}`"
        )


def _reduce(expr: ast.Reduce, env: Env) -> str | None:
    if expr.fn not in words.REDUCTIONS:
        _bad(env, "K114", f"unknown reduction `{expr.fn}`", expr, did_you_mean(expr.fn, words.REDUCTIONS, "reductions"))
    body = axes_of(expr.body, env)
    for axis in expr.axes:
        body = _reduce_one(expr, axis, body, env)
    return body


def _reduce_one(expr: ast.Reduce, axis: ast.Axis, body: str | None, env: Env) -> str | None:
    if axis.name not in words.AXES:
        return _bad(
            env,
            "K114",
            f"unknown axis `{axis.name}`",
            axis,
            "axes are q queries, g grouped query heads, h heads, d channels, i tokens, u units",
        )
    if axis.source is not None:
        _query_source(axis, env)
    if body is None:
        return None
    if axis.name != "h" and axis.name not in body:
        shown = f"`{body}`" if body else "none"
        return _bad(
            env,
            "K203",
            f"`{expr.fn}[{axis.name}]` over something without an axis `{axis.name}`; open here: {shown}",
            expr,
            _missing_hint(axis.name),
        )
    if expr.fn == "softmax":
        return body
    if axis.name == "h":  # all query heads of the layer, so the groups with them
        return body.replace("h", "").replace("g", "")
    if axis.name == "i" and env.units:
        return ordered(body.replace("i", "") + "u")
    return body.replace(axis.name, "")


def _missing_hint(axis: str) -> str:
    return {
        "q": "queries come with q, attn and logit",
        "g": "grouped query heads come with q, attn and logit",
        "d": "channels come with k, v and q",
        "u": "units come with the landmarks of a `unit`",
        "i": "tokens come with k, v, attn, states and positions",
    }.get(axis, "")


def _query_source(axis: ast.Axis, env: Env) -> None:
    source = axis.source
    shape = "write `q in last(64)`, `q in peek(64)` or `q in sample(5%)`"
    if axis.name != "q":
        _bad(env, "K114", f"only queries have a source, not `{axis.name}`", axis, shape)
        return
    if (
        not isinstance(source, ast.Call)
        or source.fn not in words.QUERY_SOURCES
        or source.named
        or len(source.args) != 1
    ):
        _bad(env, "K114", "unknown source of queries", source or axis, shape)
        return
    arg = source.args[0]
    if not isinstance(arg, ast.Number):
        _bad(env, "K211", f"`{source.fn}` wants a constant", source, shape)
    elif source.fn == "sample":
        if not 0 < arg.value <= 1:
            _bad(env, "K210", "`sample` wants a percentage of the queries", source, "such as sample(5%)")
    elif arg.kind == "percent" or arg.value.denominator != 1 or arg.value < 1:
        _bad(env, "K211", f"`{source.fn}` wants a number of queries, at least 1", source, shape)


def _call(expr: ast.Call, env: Env) -> str | None:
    if env.losing and expr.fn in words.OVER_LOSERS:
        return _over_losers(expr, env)
    if not _known_call(expr, env):
        return None
    if expr.fn == "learned":
        return _learned(expr, env)
    parts = [axes_of(arg, env) for arg in expr.args]
    if expr.fn in words.POOLS:
        return _pool(expr, parts[0], env)
    joined = _joined(parts)
    if joined is None:
        return None
    if expr.fn == "gumbel":
        return words.FIELDS["logit"]
    if expr.fn in words.PAIRS or expr.fn == "norm":
        for part, arg in zip(parts, expr.args, strict=True):
            if part is not None and "d" not in part:
                return _bad(
                    env, "K203", f"`{expr.fn}` wants vectors, and this has no axis `d`", arg, _missing_hint("d")
                )
        return joined.replace("d", "")
    return joined


def _known_call(expr: ast.Call, env: Env) -> bool:
    """Whether the language has this function with so many arguments."""
    arity = words.FUNCTIONS.get(expr.fn)
    if arity is None:
        hint = did_you_mean(expr.fn, words.FUNCTIONS, "functions")
        if expr.fn in words.OVER_LOSERS:
            hint = f"`{expr.fn}` belongs to the `when` and `weight` of a `merge`"
        if expr.fn in words.REDUCTIONS:
            hint = f"a reduction names its axes: {expr.fn}[q] x"
        _bad(env, "K102", f"unknown function `{expr.fn}`", expr, hint)
        return False
    for named in expr.named:
        _bad(env, "K113", f"`{expr.fn}` takes no argument `{named.name}=`", named, "leave the name out")
    low, high = arity
    if low <= len(expr.args) <= high:
        return True
    if expr.fn in ("min", "max") and len(expr.args) == 1:
        _bad(env, "K113", f"`{expr.fn}` of one value", expr, f"a reduction names its axes: {expr.fn}[i] x")
        return False
    wants = f"{low}" if low == high else f"{low} to {high}"
    shape = "such as " + words.SHAPES[expr.fn]
    _bad(env, "K113", f"`{expr.fn}` takes {wants} arguments, not {len(expr.args)}", expr, shape)
    return False


def _learned(expr: ast.Call, env: Env) -> str | None:
    """A score that trained weights give each new entry, from its own token's q, k and v; or each unit, from the query
    that reads and landmarks."""
    shape = f"write {words.SHAPES['learned']}"
    path, *fields = expr.args
    if not isinstance(path, ast.Text):
        return _bad(env, "K109", "`learned` wants the name of a file of weights first", path, shape)
    if not path.value.endswith(".safetensors"):
        return _bad(env, "K109", "trained weights come in a .safetensors file", path, shape)
    marks = [arg for arg in fields[1:] if isinstance(arg, ast.Name) and env.known.get(arg.id) == "ud"]
    if marks and len(marks) == len(fields) - 1 and fields[0] == ast.Name("q") and not env.arriving:
        return ordered("gqu")
    given = [arg.id if isinstance(arg, ast.Name) else "" for arg in fields]
    for name, arg in zip(given, fields, strict=True):
        if name not in ("q", "k", "v") or given.count(name) > 1:
            return _bad(env, "K109", "`learned` reads q, k and v, each at most once", arg, shape)
    if not env.arriving:
        return _bad(
            env,
            "K214",
            "a trained score is given when an entry comes in",
            expr,
            f"write `state trained = {expr.span.text}`, and use `trained` here",
        )
    return "i"


def _over_losers(expr: ast.Call, env: Env) -> str | None:
    """`mean(x)` over the losers of a row, `ema(x, beta)` of one number per row."""
    shape = "such as ema(mean(sim), 0.5)"
    if len(expr.args) != (2 if expr.fn == "ema" else 1) or expr.named:
        return _bad(env, "K113", f"`{expr.fn}` takes {'two values' if expr.fn == 'ema' else 'one value'}", expr, shape)
    axes = axes_of(expr.args[0], env)
    if expr.fn == "mean":
        return None if axes is None else ""
    if axes:
        return _bad(env, "K203", "`ema` goes on from one number per row", expr.args[0], shape)
    beta = expr.args[1].value if isinstance(expr.args[1], ast.Number) else None
    if beta is None or not 0 <= beta <= 1:
        return _bad(env, "K109", "`ema` wants a constant between 0 and 1: the part that stays", expr.args[1], shape)
    return axes


def _pool(expr: ast.Call, body: str | None, env: Env) -> str | None:
    width = expr.args[1]
    if not isinstance(width, ast.Number) or width.kind == "percent" or width.value.denominator != 1 or width.value < 1:
        _bad(env, "K209", f"`{expr.fn}` wants a constant width", width, "such as 7")
    elif width.value % 2 == 0:
        value = Fraction(width.value)
        _bad(
            env,
            "K209",
            f"the pooling width {value} is even, so no entry is its centre",
            width,
            f"take {value - 1} or {value + 1}",
        )
    if body is not None and "i" not in body:
        return _bad(
            env, "K203", f"`{expr.fn}` runs along the entries, and this has no axis `i`", expr, _missing_hint("i")
        )
    return body
