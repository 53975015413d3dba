"""A loaded policy without parents, parameters or blocks left to look up.

Takes a `Loaded` and parameter overrides; gives `Resolved`: clauses flat, each with its prefixes and triggers,
parameters substituted, head classes and learn blocks in scope. Guarantees: every parameter has a value that
holds no other parameter; `digest` depends on meaning only, not on white space, comments or spelling of numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from kvcompile.dsl import ast
from kvcompile.dsl.diagnostics import Diagnostic, fail, finding
from kvcompile.dsl.graphs import extent
from kvcompile.dsl.inherit import Flat, lineage, merge
from kvcompile.dsl.load import Loaded
from kvcompile.dsl.params import FINEST, LARGEST, Values, bind_params, substitute
from kvcompile.dsl.printer import canonical
from kvcompile.dsl.source import Source

MAX_SIZE = 50_000  # nodes of all clauses of a policy
MAX_DEPTH = 180  # levels of one


@dataclass(frozen=True, slots=True)
class Placed:
    """A clause (never an `at` or a prefix block) with the prefixes around it, outermost first.

    `triggers` are those of the `at` that governs a set clause (keep, attend, store, pick); empty for
    the others, and where no `at` governs.
    """

    clause: ast.Clause
    prefixes: tuple[ast.Prefix, ...] = ()
    triggers: tuple[ast.Trigger, ...] = ()

    @property
    def heads(self) -> str | None:
        """The head class of the innermost heads prefix, or None for all heads."""
        return next((p.name for p in reversed(self.prefixes) if isinstance(p, ast.HeadsPrefix)), None)

    @property
    def layers(self) -> ast.LayersPrefix | None:
        """The innermost layers prefix, or None for all layers."""
        return next((p for p in reversed(self.prefixes) if isinstance(p, ast.LayersPrefix)), None)


@dataclass(frozen=True, slots=True)
class HeadClass:
    """A head class declaration and the folder its table paths count from (None: only the caller can give them)."""

    decl: ast.HeadsDecl
    base: Path | None


@dataclass(frozen=True, slots=True)
class Resolved:
    """A policy ready to be checked and lowered.

    `heads` holds the classes that prefixes use, directly or through another class, in the order declared.
    `learns` holds its learn blocks, inherited ones too, in the order of the lineage.
    `states` are split: one assignment per `State` clause. `findings` came up while resolving.
    """

    name: str
    header: ast.Policy
    params: tuple[tuple[str, ast.Expr], ...]
    clauses: tuple[Placed, ...]
    ats: tuple[Placed, ...]
    heads: tuple[HeadClass, ...]
    learns: tuple[ast.Learn, ...]
    sources: tuple[Source, ...]
    digest: str
    findings: tuple[Diagnostic, ...] = ()

    def of(self, *kinds: type[ast.Node]) -> tuple[Placed, ...]:
        """The clauses of these kinds, in order."""
        return tuple(placed for placed in self.clauses if isinstance(placed.clause, kinds))


def resolve(loaded: Loaded, params: Mapping[str, object] | None = None) -> Resolved:
    """Merge parents, apply overrides, substitute parameters. PolicyError for what cannot be resolved."""
    line = lineage(loaded)
    values, unused_in = bind_params(line, dict(params or {}))
    merged = [Flat(flat.prefixes, flat.clause) for flat in merge(line)]
    used: set[str] = set()
    flat = [Flat(f.prefixes, substitute(f.clause, values, used)) for f in merged]
    _bounded(flat)
    placed = _place(flat)
    clauses = tuple(p for p in placed if not isinstance(p.clause, ast.At))
    heads = _heads_in_scope(line, placed)
    learns = tuple(_with_values(learn, values, used) for learn in _learns_in_scope(line))
    findings = [
        finding(
            "K117",
            f"no clause of `{loaded.policy.name}` reads the parameter `{p.name}`",
            p.name_span,
            "remove it, or use it in a clause",
        )
        for p in loaded.policy.params
        if p.name not in used | unused_in
    ]
    sources = tuple(dict.fromkeys(link.file.source for link in line))
    return Resolved(
        name=loaded.policy.name,
        header=loaded.policy,
        params=tuple(values.items()),
        clauses=clauses,
        ats=tuple(p for p in placed if isinstance(p.clause, ast.At)),
        heads=heads,
        learns=learns,
        sources=sources,
        digest=_digest(clauses, heads),
        findings=tuple(findings),
    )


def _bounded(flat: list[Flat]) -> None:
    """Refuse what later passes, some of them recursive, could not walk in good time."""
    total = 0
    for one in flat:
        size, depth = extent(one.clause)
        total += size
        if depth > MAX_DEPTH or total > MAX_SIZE:
            message = "with all parameters written out, the clauses are too large"
            raise fail("K008", message, one.clause.span, "say it in fewer clauses, with smaller parameters")
        _constant(one.clause)


def _constant(node: ast.Node) -> Fraction | None:
    """The value of a part that is made of constants, all of them bounded as numbers are; None for other parts."""
    parts = [_constant(child) for child in node.children()]
    value: Fraction | None = None
    match node, parts:
        case ast.Number(), _:
            value = node.value
        case ast.Unary(op="-"), [Fraction() as inner]:
            value = -inner
        case ast.Binary(op="+" | "-" | "*" | "/" as op), [Fraction() as left, Fraction() as right]:
            value = {"+": left + right, "-": left - right, "*": left * right}.get(op, left / (right or 1))
    if value is not None and (abs(value) > LARGEST or value.denominator > FINEST):
        raise fail("K007", "a number too large or too fine to be meant", node.span, "numbers go up to 1e18")
    return value


def _place(flat: list[Flat]) -> list[Placed]:
    """Give each set clause the triggers of its `at`: the next one below whose prefixes enclose the clause,
    or the policy's only one wherever it stands (rule 7)."""
    ats = [f.clause for f in flat if isinstance(f.clause, ast.At)]
    below: dict[tuple[ast.Prefix, ...], tuple[int, ast.At]] = {}
    out: list[Placed] = []
    for index in range(len(flat) - 1, -1, -1):
        clause, prefixes = flat[index].clause, flat[index].prefixes
        triggers: tuple[ast.Trigger, ...] = ()
        if isinstance(clause, ast.At):
            below[prefixes] = index, clause
        elif isinstance(clause, ast.Keep | ast.Attend | ast.Store | ast.Pick):
            enclosing = [below[prefixes[:n]] for n in range(len(prefixes) + 1) if prefixes[:n] in below]
            if len(ats) == 1:
                triggers = ats[0].triggers
            elif enclosing:
                triggers = min(enclosing, key=lambda found: found[0])[1].triggers
        out.append(Placed(clause, prefixes, triggers))
    return out[::-1]


def _heads_in_scope(line: tuple[Loaded, ...], placed: list[Placed]) -> tuple[HeadClass, ...]:
    known: dict[str, HeadClass] = {}
    for link in line:
        for decl in link.file.heads:
            known.setdefault(decl.name, HeadClass(decl, link.base))
    wanted = [p.name for item in placed for p in item.prefixes if isinstance(p, ast.HeadsPrefix)]
    needed: set[str] = set()
    while wanted:
        name = wanted.pop()
        if name in needed or name not in known:
            continue
        needed.add(name)
        wanted += [s.name for s in known[name].decl.sources if isinstance(s, ast.HeadsSame)]
    return tuple(head for name, head in known.items() if name in needed)


def _learns_in_scope(line: tuple[Loaded, ...]) -> list[ast.Learn]:
    """The learn blocks of a policy; of the classes that it has none for, those of its nearest ancestor."""
    found: list[ast.Learn] = []
    for link in line:
        taken = {learn.heads.id for learn in found}
        own = [learn for learn in link.file.learns if learn.policy.id == link.policy.name]
        found += [learn for learn in own if learn.heads.id not in taken]
    return found


def _with_values(learn: ast.Learn, values: Values, used: set[str]) -> ast.Learn:
    """The block with parameters put in. In a mix words are head classes, which may be called like a parameter."""
    clauses = [clause if isinstance(clause, ast.Mix) else substitute(clause, values, used) for clause in learn.clauses]
    return replace(learn, clauses=tuple(clauses))


def _digest(clauses: tuple[Placed, ...], heads: tuple[HeadClass, ...]) -> str:
    """SHA-256, first 16 hex digits, of the meaning: clauses with prefixes and triggers, and head classes."""
    text = [canonical(head.decl) for head in heads]
    text += [canonical(node) for placed in clauses for node in (*placed.prefixes, placed.clause, *placed.triggers)]
    return hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]
