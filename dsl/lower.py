"""From a resolved policy to its kv module.

Takes `Resolved`; gives a module with one `kv.policy` and the places behind its locations. Guarantees: a clause
that this version cannot run is refused with its own K9 code and span, never ignored; equal expressions are one
value; the module verifies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Operation, SSAValue
from xdsl.transforms.common_subexpression_elimination import cse

from kvcompile.dsl import ast
from kvcompile.dsl import dialect as kv
from kvcompile.dsl.diagnostics import Diagnostic, PolicyError, fail
from kvcompile.dsl.dialect_policy import PROBES, HeadsOp, PolicyOp, PositionsOp, UnitOp
from kvcompile.dsl.lower_classes import Classes
from kvcompile.dsl.lower_expr import Builder, Scope
from kvcompile.dsl.lower_heads import reads_all_heads
from kvcompile.dsl.lower_numbers import constant, refuse, whole
from kvcompile.dsl.lower_reads import Reads, lower_off
from kvcompile.dsl.lower_rows import class_name, read_picks
from kvcompile.dsl.lower_sets import Names
from kvcompile.dsl.lower_state import lower_states
from kvcompile.dsl.module import Places, verify
from kvcompile.dsl.resolve import Placed, Resolved

__all__ = ["Lowered", "class_name", "lower"]


@dataclass(frozen=True, slots=True)
class Lowered:
    """A kv module and where its operations come from."""

    module: ModuleOp
    places: Places


def lower(resolved: Resolved) -> Lowered:
    """Lower a policy. PolicyError with every clause that cannot be lowered."""
    policy = PolicyOp(resolved.name, resolved.digest)
    module = ModuleOp([policy])
    places = Places()
    policy.location = places.location(resolved.header.header)
    _Lowering(resolved, Builder(policy.body.block, places)).run()
    cse(module)
    verify(module, places)
    return Lowered(module, places)


class _Lowering:
    """One run over the clauses; findings of all clauses are collected and raised together."""

    def __init__(self, resolved: Resolved, builder: Builder) -> None:
        self.resolved = resolved
        self.builder = builder
        self.findings: list[Diagnostic] = []
        self.units: dict[str, dict[str, str]] = {}  # unit -> landmark -> axes
        self.overlapping: list[str] = []
        self.read: frozenset[str] = frozenset()  # the picks that `attend` names
        self.states: list[str] = []
        self.over_heads: list[ast.Node] = []  # updates with a reduction over all heads of a layer

    def run(self) -> None:
        self.attempt(self.refuse_others)
        for unit in self.resolved.of(ast.Unit):
            self.attempt(partial(self.unit, unit))
        clauses = [placed.clause for placed in self.resolved.of(ast.State)]
        self.states = [clause.assigns[0].name for clause in clauses if isinstance(clause, ast.State)]
        self.attempt(self.positions)
        self.attempt(self.changes)
        for head in self.resolved.heads:
            self.attempt(partial(self.heads, head.decl))
        for off in self.resolved.of(ast.Off):
            self.attempt(partial(lower_off, self.builder, off))
        picks = frozenset(p.clause.name for p in self.resolved.of(ast.Pick) if isinstance(p.clause, ast.Pick))
        names = Names(frozenset(self.units), picks, frozenset(self.overlapping))
        self.attempt(self.divide)
        classes = Classes(self.resolved, self.builder, self.scope, names, self.read)
        self.findings += classes.lower()
        self.attempt(partial(classes.refuse_updates, self.over_heads))
        self.findings += Reads(self.resolved, self.builder, self.scope, names, self.read, classes).lower()
        if self.findings:
            raise PolicyError(*self.findings)

    def attempt(self, step: Callable[[], None]) -> None:
        try:
            step()
        except PolicyError as error:
            self.findings += error.diagnostics

    # ------------------------------------------------------------ what is not lowered

    def refuse_others(self) -> None:
        found: list[Diagnostic] = []
        for placed in self.resolved.clauses:
            try:
                _refuse_clause(placed)
            except PolicyError as error:
                found += error.diagnostics
        if found:
            raise PolicyError(*found)

    # ------------------------------------------------------------ declarations

    def divide(self) -> None:
        self.read = read_picks(self.resolved)

    def positions(self) -> None:
        compact = [p.clause for p in self.resolved.of(ast.Positions) if getattr(p.clause, "mode", "") == "compact"]
        if compact:
            self.builder.add(PositionsOp("compact"), compact[0].span)

    def unit(self, placed: Placed) -> None:
        node = placed.clause
        assert isinstance(node, ast.Unit)
        try:
            self._unit(placed, node)
        except PolicyError:
            known = self.units.setdefault(node.name, {})  # so that what names them is not wrong for that
            for assign in node.landmarks:
                known.setdefault(assign.name, "ud")
            raise

    def _unit(self, placed: Placed, node: ast.Unit) -> None:
        others = [named for named in node.named if named.name != "stride"]
        if len(node.args) != 1 or others or len(node.named) > 1 or constant(node.args[0]) is None:
            refuse("K913", f"the unit `{node.name}`, which is not of one fixed size,", node.span,
                   "such as `unit page(16)`")  # fmt: skip
        if node.name in self.units:
            raise fail("K106", f"the unit `{node.name}` is declared twice", node.name_span, "name them differently")
        size = whole(node.args[0], 1)
        offset = whole(node.offset, 0) if node.offset is not None else 0
        stride = whole(node.named[0].value, 1) if node.named else size
        if stride > size:
            raise fail("K205", f"units of {size} that begin every {stride} positions leave some out",
                       node.named[0].span, f"a stride is at most the size, {size}")  # fmt: skip
        if stride < size:
            self.overlapping.append(node.name)
        known = self.units[node.name] = {}
        values: list[tuple[str, SSAValue]] = []
        for assign in node.landmarks:
            scope = replace(self.scope(placed), per_unit=True, place="landmark")
            value = self.builder.over("g", self.builder.expr(assign.value, scope), assign.span)
            if kv.axes_of(value) not in ("u", "ud"):
                refuse("K913", f"the landmark `{assign.name}` over axes `{kv.axes_of(value)}`", assign.span,
                       "reduce the tokens of the unit, such as `min[i] k`")  # fmt: skip
            known[assign.name] = kv.axes_of(value)
            values.append((assign.name, value))
        self.builder.add(UnitOp(node.name, size, offset, values, stride if stride < size else None), node.span)

    def changes(self) -> None:
        for node, value in lower_states(self.builder, self.resolved, self.scope):
            if reads_all_heads(value, self.ops):
                self.over_heads.append(node)

    def heads(self, decl: ast.HeadsDecl) -> None:
        for source in decl.sources:
            match source:
                case ast.HeadsRest():
                    op = HeadsOp(decl.name, "rest")
                case ast.HeadsSame():
                    op = HeadsOp(decl.name, "same", source.name)
                case ast.Call(fn="table" | "probe", args=(ast.Text() as name,)):
                    op = _measured_heads(decl.name, source, name.value)
                case _:
                    raise fail("K604", f"heads cannot come from `{source.span.text}`", source.span,
                               "use a table or a probe")  # fmt: skip
            self.builder.add(op, source.span)

    @property
    def ops(self) -> list[Operation]:
        return list(self.builder.block.ops)

    def scope(self, placed: Placed) -> Scope:
        """The names around a clause: those without prefix, and those of its own prefixes, which come first."""
        scores: dict[str, ast.Score] = {}
        shares: dict[str, ast.Share] = {}
        for other in sorted(self.resolved.of(ast.Score, ast.Share), key=lambda p: len(p.prefixes)):
            if placed.prefixes[: len(other.prefixes)] != other.prefixes:
                continue
            if isinstance(other.clause, ast.Score):
                scores[other.clause.name] = other.clause
            elif isinstance(other.clause, ast.Share):
                shares[other.clause.name] = other.clause
        landmarks = {name: (unit, axes) for unit, marks in self.units.items() for name, axes in marks.items()}
        return Scope(scores, frozenset(self.states), landmarks, shares, units=bool(self.units))


def _measured_heads(label: str, source: ast.Call, name: str) -> HeadsOp:
    """Heads above a threshold of a table or of what a probe measures."""
    top, tokens = source.get("top"), source.get("tokens")
    if {named.name for named in source.named} - {"top", "tokens"} or (tokens is not None and source.fn == "table"):
        raise fail("K604", f"`{source.span.text}` has arguments that a {source.fn} does not take", source.span,
                   'write table("f.tsv", top=30%) or probe("echo", top=1%)')  # fmt: skip
    part = constant(top) if top is not None else None
    if top is not None and (part is None or not 0 <= part <= 1):
        raise fail("K210", "top is a fraction between 0% and 100%", source.span, "such as top=30%")
    if source.fn == "table":
        return HeadsOp(label, "table", name, part)
    if name not in PROBES:
        known = " or ".join(f'probe("{probe}", top=10%)' for probe in PROBES)
        raise fail("K604", f"there is no probe `{name}`", source.span, known)
    if part is None:
        raise fail("K613", "a probe measures every head: say how many the class takes", source.span,
                   f'such as probe("{name}", top=10%)')  # fmt: skip
    return HeadsOp(label, "probe", name, part, whole(tokens, 2) if tokens is not None else None)


def _refuse_clause(placed: Placed) -> None:
    clause = placed.clause
    match clause:
        case ast.Store():
            refuse("K909", "`store`", clause.span, "entries keep the model's dtype and device")
        case ast.Positions(mode=mode) if mode not in ("original", "compact") or (mode == "compact" and placed.prefixes):
            refuse("K911", f"`positions {mode}` of some rows", clause.span,
                   "say it for the whole policy, without prefix")  # fmt: skip
        case _:
            return
