"""Cuts the score of units into what a kernel holds: sums over channels, the rest of a formula, passes over the units.

Takes the score of a selection of whole units, of one query and of landmarks; gives a `UnitScore`, the same for every
target. What does not fit raises `Unprintable` with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

from kvcompile.kernels.plan import Expr, source_of, words_of
from kvcompile.kernels.stages import Unprintable, reduction

ROW = Expr("tile", (), "row")  # in a later pass: what the passes before it have made of a unit
_CHAINS = ("softmax", "regroup")


@dataclass(frozen=True, slots=True)
class Pass:
    """A step over all units at once (softmax, regroup), or a formula of each one's `ROW` (map)."""

    kind: str
    formula: Expr | None = None


@dataclass(frozen=True, slots=True)
class UnitScore:
    """parts: elementwise over channels (and query heads) of `queries` and `landmark` leaves, each summed over the
    channels; first: the formula of a unit over leaves `tile` (value: index into parts); passes: what follows, in order;
    unit: whose landmarks they are; landmarks: their names, sorted."""

    parts: tuple[Expr, ...]
    first: Expr
    passes: tuple[Pass, ...]
    unit: str
    landmarks: tuple[str, ...]


def cut_units(score: Expr) -> UnitScore:
    """The stages of a score of units.

    Raises:
        Unprintable: it reads more than the query at hand and landmarks of one unit, or reduces them in other ways.
    """
    score = _of_one_query(score)
    base, passes = _passes(score)
    found = _Parts()
    first = found.split(base)
    units = {words_of(n)[0] for n in base.walk() if n.op == "landmark"}
    if len(units) != 1:
        raise Unprintable("a score of units that reads landmarks of none or of several units has no kernel yet")
    names = sorted({words_of(n)[1] for n in base.walk() if n.op == "landmark"})
    return UnitScore(tuple(found.parts), first, tuple(passes), min(units), tuple(names))


def leaves_heads(score: Expr) -> bool:
    """Whether the axis g of a score is open: each query head has its own."""
    if score.op == "queries":
        return True
    if score.op == "reduce" and words_of(score)[1] == "g" and words_of(score)[0] != "softmax":
        return False
    return any(leaves_heads(arg) for arg in score.args)


def bounded(score: Expr, landmarks: dict[str, Expr]) -> Expr:
    """The same score with max(a * lo, a * hi) as max(a, 0) * hi + min(a, 0) * lo, where a is of the query alone and
    `lo` and `hi` are a unit's least and largest value of one thing: half of it can be said once for all units."""
    args = tuple(bounded(arg, landmarks) for arg in score.args)
    made = Expr(score.op, args, score.value, score.axes)
    if score.op != "binary" or score.value not in ("max", "min") or any(arg.value != "*" for arg in args):
        return made
    for factor, other in zip(args[0].args, args[0].args[::-1], strict=True):
        rest = [arg for arg in args[1].args if arg != factor]
        if factor not in args[1].args or len(rest) != 1 or any(n.op == "landmark" for n in factor.walk()):
            continue
        ends = _ends(other, rest[0], landmarks)
        if ends is not None:
            low, high = ends if score.value == "max" else ends[::-1]
            zero = Expr("const", (), Fraction(0))
            above, below = (Expr("binary", (factor, zero), fn) for fn in ("max", "min"))
            return Expr("binary", (_times(above, high), _times(below, low)), "+", score.axes)
    return made


def _ends(a: Expr, b: Expr, landmarks: dict[str, Expr]) -> tuple[Expr, Expr] | None:
    """Two landmarks as (least, largest) of one thing."""
    if a.op != "landmark" or b.op != "landmark" or words_of(a)[0] != words_of(b)[0]:
        return None
    made = [landmarks[words_of(x)[1]] for x in (a, b)]
    if any(x.op != "reduce" or words_of(x)[1] != "i" for x in made) or made[0].args != made[1].args:
        return None
    found = {words_of(x)[0]: y for x, y in zip(made, (a, b), strict=True)}
    return (found["min"], found["max"]) if found.keys() == {"min", "max"} else None


def _of_one_query(expr: Expr) -> Expr:
    """Reductions over the query that reads, which is one, left out."""
    source = source_of(expr)
    if source is not None and (expr.op != "queries" or source.kind != "own"):
        raise Unprintable("a score of units that reads attention or several queries has no kernel yet")
    args = tuple(_of_one_query(arg) for arg in expr.args)
    if expr.op == "reduce" and reduction(expr)[1] == "q":
        if reduction(expr)[0] not in ("sum", "mean", "max", "min"):
            raise Unprintable(f"{reduction(expr)[0]}[q] of one query has no kernel yet")
        return args[0]
    return Expr(expr.op, args, expr.value, expr.axes)


def _passes(score: Expr) -> tuple[Expr, list[Pass]]:
    """The formula of a unit by itself, and the passes over all units that follow it."""
    chain = [n for n in score.walk() if n.op == "regroup" or (n.op == "reduce" and reduction(n) == ("softmax", "u"))]
    if not chain:
        return score, []
    last = chain[-1]
    base, before = _passes(last.args[0])
    kind = "regroup" if last.op == "regroup" else "softmax"
    rest = _swap(score, last, ROW)
    if any(n.op in ("queries", "landmark") for n in rest.walk()):
        raise Unprintable(f"{kind} over units beside landmarks has no kernel yet")
    _check(rest)
    return base, [*before, Pass(kind), *([] if rest == ROW else [Pass("map", rest)])]


def _swap(expr: Expr, old: Expr, new: Expr) -> Expr:
    if expr == old:
        return new
    return Expr(expr.op, tuple(_swap(arg, old, new) for arg in expr.args), expr.value, expr.axes)


@dataclass
class _Parts:
    parts: list[Expr] = field(default_factory=list)

    def split(self, expr: Expr) -> Expr:
        """The formula with a leaf in place of each sum over channels."""
        if expr.op == "pair" and expr.value == "dot":
            return self._sum(_times(*expr.args))
        if expr.op == "pair":
            dot, a, b = (self._sum(_times(x, y)) for x, y in _pairs(*expr.args))
            return Expr("binary", (dot, _times(_root(a), _root(b))), "/")
        if expr.op == "unary" and expr.value == "norm":
            return _root(self._sum(_times(expr.args[0], expr.args[0])))
        if expr.op == "reduce" and reduction(expr)[1] == "d":
            if reduction(expr)[0] != "sum":
                raise Unprintable(f"{reduction(expr)[0]}[d] in a score of units has no kernel yet")
            return self._sum(expr.args[0])
        if expr.op in ("queries", "landmark"):
            raise Unprintable("a score of units that leaves channels open has no kernel yet")
        made = Expr(expr.op, tuple(self.split(arg) for arg in expr.args), expr.value, expr.axes)
        _check(made, deep=False)
        return made

    def _sum(self, part: Expr) -> Expr:
        for node in part.walk():
            if node.op not in ("const", "queries", "landmark", "binary", "unary") or node.value == "norm":
                raise Unprintable(f"{node.op} within a sum over channels has no kernel yet")
        if not any(node.op in ("queries", "landmark") for node in part.walk()):
            raise Unprintable("a sum over channels of constants alone has no kernel yet")
        if part not in self.parts:
            self.parts.append(part)
        return Expr("tile", (), self.parts.index(part))


def _check(expr: Expr, deep: bool = True) -> None:
    for node in expr.walk() if deep else [expr]:
        plain = node.op in ("const", "tile", "binary", "unary") or (node.op == "reduce" and reduction(node)[1] == "g")
        if not plain or (node.op == "reduce" and reduction(node)[0] == "softmax"):
            raise Unprintable(f"{node.op} {node.value} in a score of units has no kernel yet")


def _times(a: Expr, b: Expr) -> Expr:
    return Expr("binary", (a, b), "*")


def _root(x: Expr) -> Expr:
    return Expr("unary", (x,), "sqrt")


def _pairs(a: Expr, b: Expr) -> tuple[tuple[Expr, Expr], ...]:
    return (a, b), (a, a), (b, b)
