"""What the checks of one policy share: declared names, their open axes, constant arithmetic, findings so far.

Takes a `Resolved`; gives `Context`. Guarantees: a finding is held once, however many checks come upon it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property

from kvcompile.dsl import ast
from kvcompile.dsl.axes import Env, axes_of
from kvcompile.dsl.diagnostics import Diagnostic, finding
from kvcompile.dsl.graphs import cycles, extent, written_out
from kvcompile.dsl.resolve import Placed, Resolved

SetClause = ast.Keep | ast.Attend | ast.Store | ast.Pick
Prefixes = tuple[ast.Prefix, ...]
_BEYOND = 10**30  # a multiple of a run-time number that nobody means
MOST = 50  # errors of one policy
MAX_SIZE = 1000  # nodes of a score with the scores that it names written out
MAX_DEPTH = 120  # and levels of it: later passes walk it recursively
# A count as constant and multiples of run-time numbers: `10% of prompt - 4` is {"prompt": 1/10, "": -4}.
Linear = dict[str, Fraction]


class Enough(Exception):
    """There are errors enough to be going on with."""


@dataclass
class Context:
    """The policy under check. `findings` is filled by `report`. Units, states and picks are known everywhere; scores
    and shares at clauses below the same prefixes, or more (`names_at`)."""

    resolved: Resolved
    units: dict[str, ast.Unit] = field(default_factory=dict)
    states: dict[str, ast.Assign] = field(default_factory=dict)
    picks: dict[str, ast.Pick] = field(default_factory=dict)
    landmarks: dict[str, ast.Assign] = field(default_factory=dict)
    findings: dict[tuple[str, int, int, str], Diagnostic] = field(default_factory=dict)
    _errors: int = 0
    _defined: dict[Prefixes, list[ast.Score | ast.Share]] = field(default_factory=dict)
    _names: dict[Prefixes, dict[str, ast.Score | ast.Share]] = field(default_factory=dict)
    _envs: dict[Prefixes, Env] = field(default_factory=dict)
    _query_axes: dict[tuple[ast.Expr, Prefixes], tuple[ast.Axis, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, resolved: Resolved) -> Context:
        context = cls(resolved)
        for placed in resolved.clauses:
            match placed.clause:
                case ast.Score() | ast.Share() as clause:
                    context._defined.setdefault(placed.prefixes, []).append(clause)
                case ast.Unit() as clause:
                    context.units.setdefault(clause.name, clause)
                    for landmark in clause.landmarks:
                        context.landmarks.setdefault(landmark.name, landmark)
                case ast.Pick() as clause:
                    context.picks.setdefault(clause.name, clause)
                case ast.State() as clause:
                    for assign in clause.assigns:
                        context.states.setdefault(assign.name, assign)
        return context

    def report(self, diagnostic: Diagnostic) -> None:
        """Hold a finding. Enough after the first MOST errors: a text with more is no policy yet."""
        span = diagnostic.span
        key = diagnostic.code, span.start, span.end, span.source.name
        if key not in self.findings:
            self.findings[key] = diagnostic
            self._errors += diagnostic.severity == "error"
            if self._errors >= MOST:
                raise Enough

    def say(self, code: str, message: str, node: ast.Node, hint: str = "") -> None:
        """Report a finding at a node."""
        self.report(finding(code, message, node.span, hint))

    def sets(self) -> Iterator[tuple[Placed, SetClause]]:
        """The set clauses with their place."""
        for placed in self.resolved.clauses:
            if isinstance(placed.clause, SetClause):
                yield placed, placed.clause

    # ---------------------------------------------------------------- names

    def names_at(self, prefixes: Prefixes) -> dict[str, ast.Score | ast.Share]:
        """The scores and shares that a clause below these prefixes may name: the nearest definition counts."""
        prefixes = self._scope(prefixes)
        if prefixes not in self._names:
            known: dict[str, ast.Score | ast.Share] = {}
            for depth in range(len(prefixes) + 1):
                own: dict[str, ast.Score | ast.Share] = {}
                for clause in self._defined.get(prefixes[:depth], ()):
                    own.setdefault(clause.name, clause)
                known |= own
            self._names[prefixes] = known
        return self._names[prefixes]

    def _scope(self, prefixes: Prefixes) -> Prefixes:
        """The prefixes as far as some of them define anything: most prefixes share the names of the policy."""
        return next((prefixes[:n] for n in range(len(prefixes), 0, -1) if prefixes[:n] in self._defined), ())

    def score_at(self, name: str, prefixes: Prefixes) -> ast.Score | None:
        """The score that a name means below these prefixes, or None."""
        found = self.names_at(prefixes).get(name)
        return found if isinstance(found, ast.Score) else None

    def env(self, prefixes: Prefixes = (), quiet: bool = False) -> Env:
        """What expressions below these prefixes may name."""
        prefixes = self._scope(prefixes)
        if prefixes not in self._envs:
            self._envs[prefixes] = self._env(prefixes)
        env = self._envs[prefixes]
        return env if quiet else replace(env, report=self.report)

    def _env(self, prefixes: Prefixes) -> Env:
        names = self.names_at(prefixes)
        known = {name: "" for name, clause in names.items() if isinstance(clause, ast.Share)}
        known |= dict.fromkeys(self.states, "i")
        # Parameters stand substituted already; their names are still what a misspelt one is held against.
        known |= {name: "" for name, _ in self.resolved.params if name not in known}
        scores = {name: clause.value for name, clause in names.items() if isinstance(clause, ast.Score)}
        elsewhere = {clause.name for defined in self._defined.values() for clause in defined}
        broken = self._broken(scores)
        env = Env(known, scores, bool(self.units), elsewhere=frozenset(elsewhere - set(names)), broken=broken)
        for unit in self.units.values():
            for landmark in unit.landmarks:
                axes = axes_of(landmark.value, env)
                known[landmark.name] = "ud" if axes is None else axes
        # What was found on the way did not know all landmarks.
        return replace(env, _axes={})

    def _broken(self, scores: Mapping[str, ast.Expr]) -> frozenset[str]:
        """Scores that cannot be written out: those on cycles, and those that grow beyond bounds. Reported here."""
        edges = {
            name: [(node.id, node) for node in value.walk() if isinstance(node, ast.Name) and node.id in scores]
            for name, value in scores.items()
        }
        own = {name: extent(value) for name, value in scores.items()}
        for path, use in cycles(edges):
            message = f"scores are defined by each other: {' -> '.join(path)}"
            self.say("K108", message, use, "let one of them stand on its own")
        sizes = written_out(edges, own)
        large = {name for name, (size, depth) in sizes.items() if size > MAX_SIZE or depth > MAX_DEPTH}
        for name in large:
            if not any(other in large for other, _ in edges[name]):
                message = f"the score `{name}`, with the scores that it names written out, is too large"
                self.say("K008", message, scores[name], "say it in fewer steps; scores of others are copied in")
        return frozenset(scores.keys() - sizes.keys() | large)

    def reads(self, expr: ast.Expr, prefixes: Prefixes = ()) -> Iterator[ast.Node]:
        """The nodes of an expression and of the scores that it names, directly or through others."""
        seen: set[str] = set()
        pending: list[ast.Expr] = [expr]
        while pending:
            for node in pending.pop().walk():
                yield node
                if isinstance(node, ast.Name) and node.id not in seen:
                    seen.add(node.id)
                    score = self.score_at(node.id, prefixes)
                    if score is not None:
                        pending.append(score.value)

    def query_axes(self, expr: ast.Expr, prefixes: Prefixes = ()) -> tuple[ast.Axis, ...]:
        """The axes with a query source that an expression reduces, through scores too."""
        key = expr, self._scope(prefixes)
        if key in self._query_axes:
            return self._query_axes[key]
        nodes = (node for node in self.reads(expr, prefixes) if isinstance(node, ast.Axis))
        found = tuple(axis for axis in nodes if axis.source is not None)
        if isinstance(expr, ast.Name):  # other expressions may be equal, but stand at places of their own
            self._query_axes[key] = found
        return found

    # ---------------------------------------------------------------- sets

    def picks_of(self, union: ast.SetUnion) -> Iterator[str]:
        """The picks that a set names."""
        for term in union.terms:
            if isinstance(term, ast.Ref) and term.name in self.picks:
                yield term.name

    @cached_property
    def kept_picks(self) -> frozenset[str]:
        """The picks that some `keep` names, directly or through other picks."""
        pending = [
            name for _, clause in self.sets() if isinstance(clause, ast.Keep) for name in self.picks_of(clause.set)
        ]
        found: set[str] = set()
        while pending:
            name = pending.pop()
            if name not in found:
                found.add(name)
                pending += self.picks_of(self.picks[name].set)
        return frozenset(found)

    def keeps(self, clause: SetClause) -> bool:
        """Whether a set says what stays in memory: `keep`, and the picks that a `keep` names."""
        return isinstance(clause, ast.Keep) or (isinstance(clause, ast.Pick) and clause.name in self.kept_picks)

    @cached_property
    def unrotated(self) -> bool:
        """Whether keys lie in memory before their rotation: under `positions compact`."""
        modes = [placed.clause.mode for placed in self.resolved.clauses if isinstance(placed.clause, ast.Positions)]
        return "compact" in modes


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
            count = _combined(expr.op, linear(expr.left), linear(expr.right))
            bounded = count is not None and all(abs(value) < _BEYOND for value in count.values())
            return count if bounded else None
    return None


def negative(count: Linear) -> bool:
    """Whether a count is below zero whatever the run-time numbers, none of which is negative."""
    return all(value <= 0 for value in count.values()) and any(
        value < 0 for name, value in count.items() if name in ("", "prompt", "len", "chunk")
    )


def shown(count: Linear) -> str:
    """A count in words: `10% of prompt and -4`."""
    parts = [
        f"{float(v):g}" if not name else f"{float(v * 100):g}% of {name}" for name, v in sorted(count.items()) if v
    ]
    return " and ".join(parts)


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
