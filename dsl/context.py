"""What the checks of one policy share: declared names, their open axes, constant arithmetic, findings so far.

Takes a `Resolved`; gives `Context`. Guarantees: a finding is held once, however many checks come upon it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction

from kvcompile.dsl import ast
from kvcompile.dsl.axes import Env, axes_of
from kvcompile.dsl.diagnostics import Diagnostic, finding
from kvcompile.dsl.resolve import Placed, Resolved

SetClause = ast.Keep | ast.Attend | ast.Store | ast.Pick
# A count as constant and multiples of run-time numbers: `10% of prompt - 4` is {"prompt": 1/10, "": -4}.
Linear = dict[str, Fraction]


@dataclass(slots=True)
class Context:
    """The policy under check. `findings` is filled by `report`."""

    resolved: Resolved
    scores: dict[str, ast.Score] = field(default_factory=dict)
    units: dict[str, ast.Unit] = field(default_factory=dict)
    shares: dict[str, ast.Share] = field(default_factory=dict)
    states: dict[str, ast.Assign] = field(default_factory=dict)
    picks: dict[str, ast.Pick] = field(default_factory=dict)
    landmarks: dict[str, ast.Assign] = field(default_factory=dict)
    findings: dict[tuple[str, int, int, str], Diagnostic] = field(default_factory=dict)

    @classmethod
    def of(cls, resolved: Resolved) -> Context:
        context = cls(resolved)
        for placed in resolved.clauses:
            match placed.clause:
                case ast.Score() as clause:
                    context.scores.setdefault(clause.name, clause)
                case ast.Unit() as clause:
                    context.units.setdefault(clause.name, clause)
                    for landmark in clause.landmarks:
                        context.landmarks.setdefault(landmark.name, landmark)
                case ast.Share() as clause:
                    context.shares.setdefault(clause.name, clause)
                case ast.Pick() as clause:
                    context.picks.setdefault(clause.name, clause)
                case ast.State() as clause:
                    for assign in clause.assigns:
                        context.states.setdefault(assign.name, assign)
        return context

    def report(self, diagnostic: Diagnostic) -> None:
        span = diagnostic.span
        self.findings.setdefault((diagnostic.code, span.start, span.end, span.source.name), diagnostic)

    def say(self, code: str, message: str, node: ast.Node, hint: str = "") -> None:
        """Report a finding at a node."""
        self.report(finding(code, message, node.span, hint))

    def sets(self) -> Iterator[tuple[Placed, SetClause]]:
        """The set clauses with their place."""
        for placed in self.resolved.clauses:
            if isinstance(placed.clause, SetClause):
                yield placed, placed.clause

    def env(self, quiet: bool = False) -> Env:
        """What expressions of this policy may name."""
        known: dict[str, str] = dict.fromkeys(self.shares, "")
        known |= dict.fromkeys(self.states, "i")
        # Parameters stand substituted already; their names are still what a misspelt one is held against.
        known |= {name: "" for name, _ in self.resolved.params if name not in known}
        env = Env(known, {name: score.value for name, score in self.scores.items()}, bool(self.units))
        for unit in self.units.values():
            for landmark in unit.landmarks:
                axes = axes_of(landmark.value, env)
                known[landmark.name] = "ud" if axes is None else axes
        if not quiet:
            env.report = self.report
        return env

    def reads(self, expr: ast.Expr) -> Iterator[ast.Node]:
        """The nodes of an expression and of the scores that it names, directly or through others."""
        seen: set[str] = set()
        pending: list[ast.Expr] = [expr]
        while pending:
            for node in pending.pop().walk():
                yield node
                if isinstance(node, ast.Name) and node.id in self.scores and node.id not in seen:
                    seen.add(node.id)
                    pending.append(self.scores[node.id].value)


def linear(expr: ast.Expr) -> Linear | None:
    """A count by constants and run-time numbers, or None where it is no sum of multiples of them."""
    match expr:
        case ast.Number():
            return None if expr.kind == "percent" else {"": expr.value}
        case ast.Name() if expr.id in ("prompt", "len", "chunk", "now", "step"):
            return {expr.id: Fraction(1)}
        case ast.Portion() if isinstance(expr.fraction, ast.Number):
            return {expr.of: expr.fraction.value}
        case ast.Unary() if expr.op == "-":
            inner = linear(expr.operand)
            return None if inner is None else {name: -value for name, value in inner.items()}
        case ast.Binary():
            return _combined(expr.op, linear(expr.left), linear(expr.right))
    return None


def negative(count: Linear) -> bool:
    """Whether a count is below zero whatever the run-time numbers, none of which is negative."""
    return all(value <= 0 for value in count.values()) and any(
        value < 0 for name, value in count.items() if name in ("", "prompt", "len", "chunk")
    )


def constant(expr: ast.Expr) -> Fraction | None:
    """The value of an expression of constants alone."""
    count = linear(expr)
    if count is None or any(value for name, value in count.items() if name):
        return None
    return count.get("", Fraction(0))


WHOLE_COUNT = "write a whole number; a part is written `10% of prompt`, or as a quotient"


def broken_count(expr: ast.Expr) -> Fraction | None:
    """A constant count with a fraction that no product, quotient or percentage made, so that nobody asked to cut it."""
    value = constant(expr)
    parts = list(expr.walk())
    made = any(isinstance(part, ast.Binary) and part.op in ("*", "/") for part in parts)
    made |= any(isinstance(part, ast.Number) and part.kind == "percent" for part in parts)
    return None if made or value is None or value.denominator == 1 else value


def _combined(op: str, left: Linear | None, right: Linear | None) -> Linear | None:
    if left is None or right is None:
        return None
    names = {*left, *right}
    zero = Fraction(0)
    if op in ("+", "-"):
        sign = 1 if op == "+" else -1
        return {name: left.get(name, zero) + sign * right.get(name, zero) for name in names}
    if op == "*" and not set(left) - {""}:
        left, right = right, left
    if op in ("*", "/") and not set(right) - {""}:
        factor = right.get("", zero)
        if op == "/":
            return {name: value / factor if factor else zero for name, value in left.items()}
        return {name: value * factor for name, value in left.items()}
    return None
