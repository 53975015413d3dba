"""A common budget becomes parameters: what a policy must be told so that it keeps, say, 30 % of a prompt.

Takes a policy, the part to keep, the prompt's length and a piece size; gives `Fitted`: parameters and tables for
`use`. Guarantees: parameters that the caller gives win; a learned table is ranked and rounded as `learn` does it and
written as the published 0/1 table; a policy that no rule fits is an `Unfit` with the way out, never a guess.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from kvcompile.dsl import ast, load, resolve
from kvcompile.dsl.resolve import Resolved
from kvcompile.kernels.errors import KvCompileError


class Unfit(KvCompileError):
    """A budget or a piece size is asked of a policy that has no parameter, or was given no table, for it."""


@dataclass(frozen=True, slots=True)
class Case:
    """One policy at one budget and piece size; the cases of one `label` and chunk are one curve.

    policy, name, params, tables: as in `optimize`. budget: the part of the prompt to keep, in (0, 1], turned into
    parameters by `parameters_for`; None: the parameters as they are. chunk: tokens per piece of the prompt, for the
    policy's parameter `c`; None: as it is. cut: the prompt is fed in pieces of `chunk` tokens instead, each a prefill
    of its own: a policy that judges at `prefill.end` then judges after each piece, by its last queries.
    """

    label: str
    policy: Any
    params: Mapping[str, Any] = field(default_factory=dict)
    tables: Mapping[str, str | Path] = field(default_factory=dict)
    budget: float | None = None
    chunk: int | None = None
    name: str | None = None
    cut: bool = False

    @property
    def fed(self) -> int | None:
        """Tokens of a prompt that are fed at a time; None: all."""
        if self.cut and (self.chunk is None or self.chunk < 1):
            raise KvCompileError(f"case {self.label} is to be fed in pieces: say of how many tokens (chunk)")
        return self.chunk if self.cut else None


@dataclass(frozen=True, slots=True)
class Fitted:
    """Parameters and tables as `use` takes them, those of the caller included."""

    params: dict[str, Any]
    tables: dict[str, Path]


def part(budget: object) -> Fraction:
    """A budget as an exact part: `10%`, `0.1` and 0.1 are 1/10. KvCompileError outside of (0, 1]."""
    try:
        text = str(budget).strip()
        keep = Fraction(text.removesuffix("%").strip()) / (100 if text.endswith("%") else 1)
    except (ValueError, ZeroDivisionError):
        raise KvCompileError(f"the budget {budget!r} is no number: give a part such as 30% or 0.3") from None
    if not 0 < keep <= 1:
        hint = f"; did you mean {keep}%?" if 1 < keep <= 100 and keep.denominator == 1 else ""
        raise KvCompileError(f"the budget {budget} is outside of (0, 1]: give the part to keep, such as 30%{hint}")
    return keep


def fitted(case: Case, length: int, folder: Path, shape: tuple[int, int] | None = None) -> Fitted:
    """What `use` is to be given for a case on prompts of `length` tokens; tables that are made go into `folder`.

    shape: layers and KV heads of the model, so that a table of another one is found where it lies.
    """
    loaded = load(case.policy, case.name)
    params, tables = dict(case.params), {name: Path(path) for name, path in case.tables.items()}
    if case.chunk is not None and not case.cut:
        params = chunk_for(loaded, case.chunk, params) | params
    if case.budget is not None:
        found = parameters_for(
            loaded, part(case.budget), length, params=params, tables=tables, folder=folder, shape=shape
        )
        params, tables = {**found.params, **params}, {**tables, **found.tables}
    return Fitted(params, tables)


def is_fixed(policy: Any, name: str | None = None) -> bool:
    """Whether a policy has nothing that could be set, as `keep_all`: it is one point, not a curve."""
    resolved = resolve(load(policy, name))
    return not resolved.params and not resolved.heads


def parameters_for(
    policy: Any,
    keep: Fraction,
    length: int,
    *,
    params: Mapping[str, Any] | None = None,
    tables: Mapping[str, Path] | None = None,
    folder: Path | None = None,
    shape: tuple[int, int] | None = None,
) -> Fitted:
    """The parameters, and the table, with which a policy keeps the part `keep` of a prompt of `length` tokens.

    By name, the first that fits: a head class by table keeps the part of the heads; `ratio`; `budget`; `heavy` and
    `local`, half each; `window`, with `n_sink` within it. Counts are truncated. What a policy
    keeps besides is its own: windows of other heads, exempt layers, units not yet judged (lagkv), entries until the
    next decision (lazy); whole units may fall short. `Cell.kept` says what it came to. `folder` takes the 0/1 table of
    a ranked one. Raises Unfit where no rule fits, PolicyError where the policy itself is wrong.
    """
    loaded = load(policy)
    given = dict(params or {})
    resolved = resolve(loaded, given)
    by_table = [head for head in resolved.heads if any(_is_table(source) for source in head.decl.sources)]
    if by_table:
        if len(by_table) > 1:
            names = ", ".join(head.decl.name for head in by_table)
            raise Unfit(f"policy {resolved.name} has several classes by table ({names}): a budget cannot say how they "
                        "share it; give each its table and leave the budget out")  # fmt: skip
        return Fitted(
            {}, {by_table[0].decl.name: _rounded(resolved, by_table[0], keep, dict(tables or {}), folder, shape)}
        )
    return Fitted(_by_name(resolved, keep, length), {})


def chunk_for(policy: Any, chunk: int, params: Mapping[str, Any] | None = None) -> dict[str, int]:
    """The parameter with which a policy cuts prompts into pieces of `chunk` tokens. Unfit where it has none."""
    if chunk < 1:
        raise KvCompileError(f"pieces of {chunk} tokens: give at least 1")
    loaded = load(policy)
    plain = resolve(loaded, params)
    if "c" in dict(plain.params):
        tried = resolve(loaded, {**(params or {}), "c": chunk})
        sizes = [t.args[0] for p in tried.clauses for t in p.triggers if t.name == "chunk" and t.args]
        if any(isinstance(size, ast.Number) and size.value == chunk for size in sizes):
            return {"c": chunk}
    raise Unfit(
        f"policy {plain.name} has no parameter `c` that says how prompts are cut: leave the piece size out, or "
        f"evaluate a policy of your own that extends it, `policy mine(c={chunk}) extends {plain.name}:` with "
        "`at chunk(c), step` below"
    )


def _by_name(resolved: Resolved, keep: Fraction, length: int) -> dict[str, Any]:
    names = dict(resolved.params)
    total = int(keep * length)
    if "ratio" in names:
        return {"ratio": keep}
    if _counts(names.get("budget")):
        return {"budget": _amount(names["budget"], keep, total)}
    if _counts(names.get("heavy")) and _counts(names.get("local")):
        heavy = _amount(names["heavy"], keep / 2, total // 2)
        return {"heavy": heavy, "local": _amount(names["local"], keep / 2, total - total // 2)}
    if not resolved.heads and _counts(names.get("window")):
        sink = names.get("n_sink")
        room = total - int(sink.value) if isinstance(sink, ast.Number) else total
        if room < 1:
            raise KvCompileError(f"{_percent(keep)} of {length} tokens leaves no window beside n_sink of "
                                 f"policy {resolved.name}: take a larger budget, or set n_sink")  # fmt: skip
        return {"window": room}
    listed = ", ".join(names) or "none"
    raise Unfit(
        f"no rule says how policy {resolved.name} keeps a part of the prompt (its parameters: {listed}): give its "
        "parameters with --set NAME=VALUE, or `params`, and leave the budget out"
    )


def _counts(default: ast.Expr | None) -> bool:
    """Whether a parameter stands for a number of tokens, or for a part of the prompt."""
    return isinstance(default, ast.Portion) or (isinstance(default, ast.Number) and default.kind in ("int", "size"))


def _amount(default: ast.Expr, keep: Fraction, tokens: int) -> int | str:
    """Tokens, or `30% of prompt` where that is what the parameter stands for."""
    return f"{_percent(keep)} of {default.of}" if isinstance(default, ast.Portion) else tokens


def _percent(keep: Fraction) -> str:
    return f"{float(keep * 100):.8g}%"


# -- head classes -----------------------------------------------------------------------------------------------------


def _is_table(source: object) -> bool:
    return isinstance(source, ast.Call) and source.fn == "table"


def _rounded(
    resolved: Resolved,
    head: Any,
    keep: Fraction,
    tables: Mapping[str, Path],
    folder: Path | None,
    shape: tuple[int, int] | None,
) -> Path:
    """The table of a class with the `keep` part of all heads as ones: written, unless it is just that already."""
    from kvcompile.learning.masks import load_scores

    name = head.decl.name
    path = tables.get(name) or _written(head)
    if path is None:
        raise Unfit(f"policy {resolved.name} takes a table for `{name}`: give --table {name}=FILE, or "
                             f'tables={{"{name}": "FILE"}}')  # fmt: skip
    scores = load_scores(path, shape)
    values = [value for row in scores.values for value in row]
    wanted = int(keep * len(values))
    if all(value in (0.0, 1.0) for value in values):
        if sum(values) == wanted:
            return path
        raise KvCompileError(
            f"{path} holds only 0 and 1, {int(sum(values))} of {len(values)} heads, so it cannot say which {wanted} "
            f"heads a budget of {_percent(keep)} keeps: give the scores that it was made from"
        )
    if folder is None:
        raise KvCompileError(f"the scores of {path} are to be rounded: say where the table goes (folder)")
    told = repr((scores.values, keep)).encode()
    made = folder / f"{name}-{hashlib.sha256(told).hexdigest()[:12]}.tsv"
    made.parent.mkdir(parents=True, exist_ok=True)
    scores.save(made, keep)
    return made


def _written(head: Any) -> Path | None:
    """The path that the policy itself names; None in the library, whose tables are the caller's."""
    for source in head.decl.sources:
        if _is_table(source) and source.args and isinstance(source.args[0], ast.Text):
            path = Path(source.args[0].value)
            return path if path.is_absolute() else head.base / path if head.base is not None else None
    return None
