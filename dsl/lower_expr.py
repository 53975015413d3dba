"""Expressions of a policy as kv operations.

Takes expressions of a resolved policy and the names around them; gives SSA values in the block of a builder.
Guarantees: what this version cannot run is refused with a K9 code at its span; a left-over `g` is averaged;
numbers stay exact; every operation carries the place that it comes from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Literal, TypeVar

from xdsl.ir import Block, Operation, SSAValue

from kvcompile.dsl import ast
from kvcompile.dsl import dialect as kv
from kvcompile.dsl.diagnostics import fail
from kvcompile.dsl.dialect_counts import BytesOp, PartOp
from kvcompile.dsl.dialect_sources import EmaOp, LearnedOp, NoiseOp, QueriesOp, SimOp
from kvcompile.dsl.lower_heads import below
from kvcompile.dsl.lower_numbers import constant, part, refuse, whole
from kvcompile.dsl.module import Places
from kvcompile.dsl.source import Span

Op = TypeVar("Op", bound=Operation)
Place = Literal["score", "count", "cond", "landmark", "attend", "insert", "step", "loser"]

FUNCTIONS = ("exp", "log", "sqrt", "abs", "sigmoid", "norm")
# Counts are evaluated on the host, scores on the device. `chunk` is of a forward, so no row knows it; an update
# belongs to one query or token, at which the row had another length than it has now.
_NUMBERS: dict[Place, frozenset[str]] = {
    "score": frozenset({"prompt", "now", "len", "step"}),
    "count": frozenset({"prompt", "now", "chunk", "step", "len"}),
    "cond": frozenset({"prompt", "now", "len", "step"}),
    "landmark": frozenset({"prompt", "now"}),
    "attend": frozenset({"prompt", "now", "step"}),
    "insert": frozenset({"prompt", "now", "step"}),
    "step": frozenset({"prompt", "now", "step", "len"}),
    "loser": frozenset(),
}
_TOGETHER = ("sum", "mean", "max", "min")  # over g and h at once they are what they are one after the other
_COMPARISONS = ("<", "<=", ">", ">=", "==", "!=")
_LATEST: kv.Source = ("last", 1, Fraction(0))
_BEFORE: kv.Source = ("previous", 1, Fraction(0))


@dataclass(frozen=True, slots=True)
class Scope:
    """What names mean at one place: scores, states, landmarks as (unit, axes), and the shares."""

    scores: Mapping[str, ast.Score] = field(default_factory=dict)
    states: frozenset[str] = frozenset()
    landmarks: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    shares: Mapping[str, ast.Share] = field(default_factory=dict)
    parts: Mapping[str, SSAValue] = field(default_factory=dict)  # the shares that a count reads, lowered
    source: kv.Source = kv.FORWARD  # whose queries `attn`, `logit` and `q` are of
    per_unit: bool = False  # entries are those of each unit: inside a landmark, and where units compete
    units: bool = False  # the policy has units, so `[i]` runs over the tokens of a unit
    place: Place = "score"
    state: str = ""  # whose new value this is, in an update
    decides: bool = False  # inside a condition: what is compared is averaged over a left-over g before, not after
    reads: bool = False  # inside `attend`: a query that is left open is the one that reads
    steps: bool = True  # this is computed in steps alone, so that all queries have one position and one length
    named: str = ""  # the score in whose definition this stands

    @property
    def numbers(self) -> frozenset[str]:
        """The run-time numbers that may be read here."""
        moving = {"len"} | ({"now"} if self.place == "count" else set())
        return _NUMBERS[self.place] - (moving if self.reads and not self.steps else set())


@dataclass(slots=True)
class Builder:
    """Appends operations to a block, each with its location."""

    block: Block
    places: Places
    emas: int = 0  # running means so far, each with a number of its own in every row
    trained: dict[str, ast.Call] = field(default_factory=dict)  # by state: its weights go by the state's name

    def add(self, op: Op, span: Span) -> Op:
        op.location = self.places.location(span)
        self.block.add_op(op)
        return op

    # ------------------------------------------------------------ values of a kind

    def score(self, node: ast.Expr, scope: Scope, group: bool = False) -> SSAValue:
        """One value per entry, axes "i" or "ui"; where units compete, per unit, axis "u". A left-over g is averaged,
        with `group` it stays."""
        value = self.expr(node, scope)
        value = value if group else self.over("g", value, node.span)
        if scope.reads:
            value = self._own(value, node)
        axes = kv.axes_of(value)
        if "q" in axes:
            raise fail("K204", "the score leaves the queries open", node.span, "reduce them, such as `sum[q] attn`")
        if scope.per_unit and "i" in axes:
            value = self.over("i", value, node.span)  # a unit's score is the mean of its entries' (rule 18)
            axes = kv.axes_of(value)
        wanted = ("u",) if scope.per_unit else ("i", "ui", *("u" * (scope.reads and scope.decides)))
        if axes.replace("g", "") not in wanted:
            left = axes.replace("i", "") if "i" in axes else ""
            code, what = ("K202", f"leaves `{left}` open") if left else ("K203", "is of no entry")
            of_units = "a score of units chooses units, as in `top(n) pages by s`"
            hint = of_units if "u" in axes and "i" not in axes else "a score is one value per entry"
            raise fail(code, f"the score {what}", node.span, hint)
        return value

    def _own(self, value: SSAValue, node: ast.Expr) -> SSAValue:
        """A score of the query at hand: it is one, so its sum over queries is itself."""
        sources = {op.source.data for op in below(value) if isinstance(op, kv.SourcedOp)}
        if "own" in sources and len(sources) > 1:
            refuse("K905", "a score that reads the query at hand and others beside it", node.span,
                   "score by the one, or by the others, such as `sum[q in last(64)] attn`")  # fmt: skip
        return self.over("q", value, node.span, "sum")

    def over(self, axis: str, value: SSAValue, span: Span, fn: str = "mean") -> SSAValue:
        """The mean over an axis where it is left over."""
        if axis not in kv.axes_of(value):
            return value
        return self.add(kv.ReduceOp(fn, axis, value), span).res

    def condition(self, node: ast.Expr, scope: Scope) -> SSAValue:
        """A number per row that decides whether a trigger fires; left-over g and q are averaged."""
        scope = replace(scope, place="cond", source=_LATEST, decides=True)
        value = self.expr(node, scope)
        value = self.over("q", self.over("g", value, node.span), node.span)
        if kv.axes_of(value):
            refuse("K903", f"a condition that leaves `{kv.axes_of(value)}` open", node.span,
                   "compare numbers of the row, such as `len > 4096`, or queries: `cos(q, prev.q) < 0.8`")  # fmt: skip
        return value

    def change(self, node: ast.Expr, scope: Scope) -> SSAValue:
        """What an update gives: one value per entry, at one query. PolicyError K906 for other axes."""
        value = self.over("g", self.expr(node, scope), node.span)
        value = self.over("q", value, node.span, "sum")  # one query at a time
        if kv.axes_of(value) not in ("", "i"):
            refuse("K906", f"an update over axes `{kv.axes_of(value)}`", node.span, "give one value per entry")
        return value

    # ------------------------------------------------------------ any expression

    def expr(self, node: ast.Expr, scope: Scope) -> SSAValue:
        """Any expression. PolicyError K9xx for what is not lowered, K1xx and K2xx for what is wrong."""
        match node:
            case ast.Number():
                return self._number(node, scope)
            case ast.Name():
                return self._name(node, scope)
            case ast.Field(owner="prev", name="q") if scope.place == "cond":
                return self.add(QueriesOp(_BEFORE), node.span).res
            case ast.Field():
                return self._field(f"{node.owner}.{node.name}", node.span, scope)
            case ast.Portion():
                self._allowed(node.of, f"`of {node.of}`", node.span, scope)
                share = self.expr(node.fraction, scope)
                everything = self.add(kv.ScalarOp(node.of), node.span).res
                return self.add(kv.BinaryOp("*", share, everything), node.span).res
            case ast.Unary(op="-"):
                return self.add(kv.UnaryOp("neg", self.expr(node.operand, scope)), node.span).res
            case ast.Unary():
                zero = self.add(kv.ConstOp(Fraction(0)), node.span).res
                return self.add(kv.BinaryOp("==", self.expr(node.operand, scope), zero), node.span).res
            case ast.Binary():
                left, right = self.expr(node.left, scope), self.expr(node.right, scope)
                if scope.decides and node.op in _COMPARISONS:
                    left, right = self.over("g", left, node.left.span), self.over("g", right, node.right.span)
                return self.add(kv.BinaryOp(node.op, left, right), node.span).res
            case ast.Call():
                return self._call(node, scope)
            case ast.Reduce():
                return self._reduce(node, scope)
        return refuse("K905", f"`{node.span.text}`", node.span, "write numbers, names and functions of them")

    def _number(self, node: ast.Number, scope: Scope) -> SSAValue:
        if node.kind != "bytes":
            return self.add(kv.ConstOp(node.value), node.span).res
        if scope.place != "count":
            refuse("K905", "a number of bytes that is no budget", node.span, "give tokens or a percentage")
        return self.add(BytesOp(int(node.value)), node.span).res

    def _allowed(self, name: str, what: str, span: Span, scope: Scope) -> None:
        if name not in scope.numbers:
            here = ", ".join(sorted(scope.numbers))
            refuse("K905", f"{what} here", span, f"use {here}" if here else "use constants, `sim` and `count`")

    def _name(self, node: ast.Name, scope: Scope) -> SSAValue:
        name = node.id
        if name in scope.scores:
            return self.expr(scope.scores[name].value, replace(without(scope, name), named=name))
        if name in scope.shares:
            if name not in scope.parts:
                refuse("K914", f"the share `{name}` outside a count", node.span, f"use it as in `top({name} / 2)`")
            return self.add(PartOp(scope.parts[name]), node.span).res
        if name in kv.SCALARS:
            self._allowed(name, f"`{name}`", node.span, scope)
            return self.add(kv.ScalarOp(name), node.span).res
        if name == "q" and scope.place in ("score", "cond", "attend", "insert"):
            return self.add(QueriesOp(scope.source), node.span).res
        if scope.place == "cond":
            refuse("K903", f"a condition that reads `{name}`", node.span,
                   "conditions may read len, now, prompt, step, q and prev.q")  # fmt: skip
        if scope.place == "loser":
            return self._of_loser(node, scope)
        if name in scope.states:
            return self.add(kv.ReadOp(name, scope.per_unit), node.span).res
        if name in scope.landmarks:
            unit, axes = scope.landmarks[name]
            if scope.place in ("attend", "insert", "step"):
                refuse("K906", f"an update that reads the landmark `{name}`", node.span, "read it in the score")
            return self.add(kv.LandmarkOp(unit, name, axes), node.span).res
        if name in kv.EVIDENCE:
            self._sees(f"`{name}`", node.span, scope)
            return self.add(kv.EvidenceOp(name, scope.source, scope.per_unit), node.span).res
        return self._field(name, node.span, scope)

    def _sees(self, what: str, span: Span, scope: Scope) -> None:
        """Attention, and what goes with it, is known where queries read."""
        if scope.place == "landmark":
            refuse("K913", f"a landmark over {what}", span, "landmarks are made of keys, values and positions")
        if scope.place in ("insert", "step"):
            refuse("K906", f"{what} in `on {scope.place}`", span, "`on attend` sees attention")

    def _of_loser(self, node: ast.Name, scope: Scope) -> SSAValue:
        if node.id == "sim":
            return self.add(SimOp(), node.span).res
        if node.id == "count":
            return self.add(kv.FieldOp("count"), node.span).res
        return refuse("K908", f"`{node.id}` of losers", node.span,
                      "conditions and weights may read sim, mean(sim), ema(x, beta) and count")  # fmt: skip

    def _field(self, name: str, span: Span, scope: Scope) -> SSAValue:
        if name not in kv.FIELDS or scope.place in ("cond", "loser"):
            refuse("K905", f"`{name}`", span,
                   "scores may use attn, logit, q, k, v, raw.k, next.k, next.v, pos, age, count")  # fmt: skip
        if name.startswith("next.") and not scope.units:
            raise fail("K110", f"`{name}` is the next unit's, and the policy has no unit", span, "declare a unit")
        if name.startswith("next.") and scope.reads:
            refuse("K905", f"`{name}` in what a query reads", span, "score units by their own keys and values")
        if name.startswith("next.") and scope.place in ("attend", "insert", "step"):
            refuse("K906", f"an update that reads `{name}`", span, "read it in the score, or in a landmark")
        return self.add(kv.FieldOp(name, scope.per_unit), span).res

    def _call(self, node: ast.Call, scope: Scope) -> SSAValue:
        if node.named:
            refuse("K905", f"`{node.fn}` with named arguments", node.span, "leave the names out")
        match node.fn, node.args:
            case (("maxpool" | "avgpool"), (body, width)):
                value = self.expr(body, scope)
                if kv.axes_of(value) not in ("i", "gi") or scope.place != "score":
                    refuse("K905", f"`{node.fn}` over `{kv.axes_of(value)}`", node.span,
                           "pool one value per entry, in a score")  # fmt: skip
                return self.add(kv.PoolOp(node.fn[:3], whole(width, 1), value), node.span).res
            case (("dot" | "cos"), (left, right)):
                operands = [self._vector(arg, scope, node.fn) for arg in (left, right)]
                return self.add(kv.PairOp(node.fn, *operands), node.span).res
            case "norm", (arg,):
                return self.add(kv.UnaryOp("norm", self._vector(arg, scope, "norm")), node.span).res
            case fn, (arg,) if fn in FUNCTIONS:
                return self.add(kv.UnaryOp(fn, self.expr(arg, scope)), node.span).res
            case (("min" | "max"), (first, *others)) if others:
                value = self.expr(first, scope)
                for other in others:
                    value = self.add(kv.BinaryOp(node.fn, value, self.expr(other, scope)), node.span).res
                return value
            case "gumbel", (seed,):
                self._sees("noise", node.span, scope)
                return self.add(NoiseOp(whole(seed, 0), scope.source, scope.per_unit), node.span).res
            case "learned", (ast.Text() as file, *vectors) if vectors:
                return self._learned(node, file, vectors, scope)
            case "mean", (arg,) if scope.place == "loser":
                return self.over("i", self.expr(arg, scope), node.span)
            case "ema", (arg, beta) if scope.place == "loser":
                return self._ema(node, arg, beta, scope)
        return refuse("K905", f"`{node.fn}` with {len(node.args)} arguments here", node.span,
                      "such as `maxpool(x, 7)`, `cos(k, v)`, `norm(k)` or `gumbel(0)`")  # fmt: skip

    def _vector(self, node: ast.Expr, scope: Scope, fn: str) -> SSAValue:
        value = self.expr(node, scope)
        if "d" not in kv.axes_of(value):
            raise fail("K203", f"`{fn}` needs vectors, this has no axis d", node.span, "use keys or values")
        return value

    def _learned(self, node: ast.Call, file: ast.Text, vectors: list[ast.Expr], scope: Scope) -> SSAValue:
        if scope.reads and scope.place == "score":
            return self._gate(node, file, vectors, scope)
        if scope.place != "insert":
            refuse("K906", "a trained score outside `on insert`", node.span,
                   'let a state hold it: state s = learned("f.safetensors", q, k, v)')  # fmt: skip
        args: list[SSAValue] = []
        for vector in vectors:
            if not isinstance(vector, ast.Name) or vector.id not in ("q", "k", "v"):
                refuse("K906", f"a trained score of `{vector.span.text}`", vector.span, "it reads q, k and v")
            op = QueriesOp(_LATEST) if vector.id == "q" else kv.FieldOp(vector.id)
            args.append(self.add(op, vector.span).results[0])
        if self.trained.setdefault(scope.state, node) != node:
            refuse("K906", f"a second trained score of the state `{scope.state}`", node.span,
                   "give each trained score a state of its own, and add them up in a score")  # fmt: skip
        return self.add(LearnedOp(scope.state, file.value, args), node.span).res

    def _gate(self, node: ast.Call, file: ast.Text, vectors: list[ast.Expr], scope: Scope) -> SSAValue:
        """A trained score of units, by the query that reads and landmarks of one unit."""
        args = [self.expr(vector, scope) for vector in vectors]
        query, *marks = [arg.owner for arg in args]
        units = {op.unit.data for op in marks if isinstance(op, kv.LandmarkOp)}
        own = isinstance(query, QueriesOp) and query.source.data == "own"
        if not own or len(units) != 1 or not all(isinstance(op, kv.LandmarkOp) for op in marks):
            refuse("K905", f"`{node.span.text}` in `attend`", node.span,
                   'it reads q, then landmarks of one unit: learned("gate.safetensors", q, c)')  # fmt: skip
        if not scope.named:
            refuse("K905", "a trained score without a name in `attend`", node.span,
                   f"name it, so that its file can be given: score s = {node.span.text}")  # fmt: skip
        if self.trained.setdefault(scope.named, node) != node:
            refuse("K905", f"a second trained score in `{scope.named}`", node.span, "give each a score of its own")
        return self.add(LearnedOp(scope.named, file.value, args), node.span).res

    def _ema(self, node: ast.Call, arg: ast.Expr, beta: ast.Expr, scope: Scope) -> SSAValue:
        value = self.expr(arg, scope)
        if kv.axes_of(value):
            refuse("K908", "a running mean of more than one number", arg.span, "such as `ema(mean(sim), 0.5)`")
        keeps = constant(beta)
        if keeps is None or not 0 <= keeps <= 1:
            raise fail("K109", "a running mean keeps a part between 0 and 1 of what was before", beta.span,
                       "such as `ema(mean(sim), 0.5)`")  # fmt: skip
        self.emas += 1
        return self.add(EmaOp(self.emas - 1, keeps, value), node.span).res

    def _reduce(self, node: ast.Reduce, scope: Scope) -> SSAValue:
        for axis in node.axes:
            if axis.name == "q":
                scope = replace(scope, source=_source(axis, scope))
            elif axis.source is not None:
                refuse("K905", f"`{axis.name} in {axis.source.span.text}`", axis.span, "only queries have a source")
        value = self.expr(node.body, scope)
        if len(node.axes) > 1 and node.fn not in _TOGETHER:
            refuse("K905", f"`{node.fn}` over several axes at once", node.span, "reduce one axis after the other")
        for axis in node.axes:
            if axis.name == "h" and "g" in kv.axes_of(value):  # `[h]` means all heads, so the group first
                if node.fn not in _TOGETHER:
                    refuse("K905", f"`{node.fn}[h]` over grouped heads", node.span, "reduce g first")
                value = self.add(kv.ReduceOp(node.fn, "g", value), node.span).res
            if axis.name != "h" and axis.name not in kv.axes_of(value):
                raise fail("K203", f"`{node.fn}[{axis.name}]` needs an axis `{axis.name}`, this has "
                           f"`{kv.axes_of(value) or 'none'}`", node.span, "reduce an axis that is open")  # fmt: skip
            if axis.name == "i" and scope.place == "insert":
                refuse("K906", f"`{node.fn}[i]` of an entry that comes in, which is not among others yet,", node.span,
                       "reduce over the entries in the score")  # fmt: skip
            if axis.name == "i" and scope.units and "u" not in kv.axes_of(value):
                refuse("K913", "a reduction over the tokens of a unit without a landmark of it", node.span,
                       "choose whole units, such as `top(n) pages`, or leave the unit out")  # fmt: skip
            value = self.add(kv.ReduceOp(node.fn, axis.name, value), node.span).res
        return value


def _source(axis: ast.Axis, scope: Scope) -> kv.Source:
    """Whose queries an axis `q` ranges over."""
    source = axis.source
    if source is None:
        return _LATEST if scope.place == "cond" else kv.FORWARD
    if scope.place in ("attend", "insert"):
        refuse("K906", f"`{axis.span.text}` in an update", axis.span, "an update sees the query at hand")
    match source:
        case ast.Call(fn="peek") if scope.reads:
            refuse("K905", f"`{axis.span.text}` in what a query reads", axis.span,
                   "ask queries of this forward: `q in last(n)` or `q in sample(5%)`")  # fmt: skip
        case ast.Call(fn="last" | "peek", args=(width,), named=()):
            return source.fn, whole(width, 1), Fraction(0)
        case ast.Call(fn="sample", args=(share,), named=()):
            return "sample", 0, part(share, "a sample of the queries", "such as sample(5%)")
    return refuse("K905", f"`{axis.name} in {source.span.text}`", axis.span, "use last(n), peek(n) or sample(5%)")


def reads(node: ast.Expr, scope: Scope) -> Iterator[ast.Node]:
    """The nodes of an expression and of the scores that it names."""
    for each in node.walk():
        yield each
        if isinstance(each, ast.Name) and each.id in scope.scores:
            yield from reads(scope.scores[each.id].value, without(scope, each.id))


def without(scope: Scope, name: str) -> Scope:
    """The scope inside a score's own definition: a cycle then ends as an unknown name."""
    return replace(scope, scores={key: value for key, value in scope.scores.items() if key != name})
