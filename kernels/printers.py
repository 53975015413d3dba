"""Prints a formula as statements over a tile whose axes have a fixed order, in Triton or in torch.

Takes a `plan.Expr`, the tile's axes ("ig": entries by query heads) and a text for each leaf; gives lines
`t0 = ...` and the name of the result. Guarantees: every value is float32, x / 0 is 0, lanes that a mask
excludes enter no reduction. tests/kernels/test_triton_printers.py holds both dialects to the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from kvcompile.kernels.plan import Expr
from kvcompile.kernels.stages import Unprintable, reduction


@dataclass(frozen=True, slots=True)
class Value:
    """A name or literal of the generated code, the axes it varies over, and whether it is a truth value."""

    text: str
    axes: str = ""
    truth: bool = False
    bare: bool = True  # a name or literal; else an expression that stands inside a statement over its axes

    @property
    def literal(self) -> bool:
        return self.text.lstrip("-(")[:1].isdigit()


@dataclass(frozen=True, slots=True)
class Axis:
    """How an axis of the tile is reduced: its length as text, and a mask over it where lanes are padding."""

    size: str
    mask: str | None = None


@dataclass(frozen=True, slots=True)
class Dialect:
    """The words of one target language; {0}, {1} are operands, {axis} a dimension."""

    unary: Mapping[str, str]
    extreme: Mapping[str, str]
    reduce: Mapping[str, str]
    where: str
    number: str
    scalar: str  # a literal as a value that functions take
    truth: str  # 0 or 1 as a truth value


TRITON = Dialect(
    unary={
        "neg": "-{0}",
        "exp": "tl.exp({0})",
        "log": "tl.log({0})",
        "sqrt": "tl.sqrt_rn({0})",
        "abs": "tl.abs({0})",
        "sigmoid": "tl.sigmoid({0})",
    },
    extreme={
        "max": "tl.maximum({0}, {1}, tl.PropagateNan.ALL)",
        "min": "tl.minimum({0}, {1}, tl.PropagateNan.ALL)",
    },
    reduce={fn: f"tl.{fn}({{0}}, {{axis}})" for fn in ("sum", "max", "min")}
    | {  # tl.max and tl.min pass over NaN, the language does not
        f"{fn} with NaN": "tl.where(tl.max(({0} != {0}).to(tl.int32), {axis}) > 0, float('nan'), "
        f"tl.{fn}({{0}}, {{axis}}))"
        for fn in ("max", "min")
    },
    where="tl.where",
    number="{0}.to(tl.float32)",
    scalar="tl.full([], {0}, tl.float32)",
    truth="tl.full([], {0}, tl.int1)",
)
TORCH = Dialect(
    unary={name: f"torch.{name}({{0}})" for name in ("neg", "exp", "log", "sqrt", "abs", "sigmoid")},
    extreme={"max": "torch.maximum({0}, {1})", "min": "torch.minimum({0}, {1})"},
    reduce={"sum": "torch.sum({0}, {axis})"}
    | {fn + more: f"torch.a{fn}({{0}}, {{axis}})" for fn in ("max", "min") for more in ("", " with NaN")},
    where="torch.where",
    number="{0}.float()",
    scalar="torch.tensor({0})",
    truth="torch.tensor({0} != 0)",
)


def extreme_of(fn: str, arg: Expr) -> str:
    """The word of `Dialect.reduce` for a reduction of a formula: whether it has to look out for NaN."""
    return fn if fn == "sum" or arg.op in ("evidence", "field") else f"{fn} with NaN"


_COMPARE = ("<", "<=", ">", ">=", "==", "!=")
_IDENTITY = {"sum": "0.0", "max": "float('-inf')", "min": "float('inf')"}


@dataclass
class Printer:
    """Prints formulas into `lines`; equal sub-formulas are printed once.

    layout   the tile's axes in the order of its dimensions, such as "ig" or "id"
    leaf     text of a leaf of the formula (everything but const)
    axes     how each axis that a formula may reduce is reduced; a reduction over an axis that the tile
             does not have (one query: `q`) is the value itself
    """

    layout: str
    leaf: Callable[[Expr], Value]
    axes: Mapping[str, Axis] = field(default_factory=dict)
    dialect: Dialect = TRITON
    prefix: str = "t"
    lines: list[str] = field(default_factory=list)
    _known: dict[Expr, Value] = field(default_factory=dict)

    def value(self, expr: Expr) -> Value:
        """Print `expr` and all that it needs; returns the name that holds it."""
        if expr not in self._known:
            self._known[expr] = self._print(expr)
        return self._known[expr]

    def number(self, expr: Expr) -> Value:
        """The same as a float32."""
        value = self.value(expr)
        return Value(self.dialect.number.format(value.text), value.axes) if value.truth else value

    def _print(self, expr: Expr) -> Value:
        if expr.op == "const":
            assert isinstance(expr.value, (Fraction, int, float))
            number = repr(float(expr.value))
            return Value(f"({number})" if number.startswith("-") else number)
        printer = getattr(self, "_" + expr.op, None)
        return self.leaf(expr) if printer is None else printer(expr)

    def _let(self, text: str, axes: str, truth: bool = False) -> Value:
        name = f"{self.prefix}{len(self.lines)}"
        self.lines.append(f"{name} = {text}")
        return Value(name, axes, truth)

    def _join(self, *values: Value) -> tuple[str, list[str]]:
        """The axes of all values together, and each one's text with a dimension for those that it lacks."""
        union = "".join(a for a in self.layout if any(a in v.axes for v in values))
        return union, [self._text(v, union) for v in values]

    def _text(self, value: Value, axes: str) -> str:
        """A value inside a statement over these axes: with a dimension for each that it lacks."""
        if not value.axes or len(axes) < 2 or value.axes == axes:
            return value.text
        return f"{value.text}[{', '.join(':' if a in value.axes else 'None' for a in axes)}]"

    def _own(self, value: Value) -> str:
        """A value inside a statement over its own axes."""
        return self._text(value, value.axes)

    def _square(self, value: Value) -> Value:
        text = self._own(value)
        return Value(f"{text} * {text}", value.axes, bare=False)

    def _boxed(self, value: Value) -> Value:
        return Value(self.dialect.scalar.format(value.text)) if value.literal else value

    def _unary(self, expr: Expr) -> Value:
        x = self.number(expr.args[0])
        if expr.value == "norm":
            return self._norm(x)
        return self._let(self.dialect.unary[str(expr.value)].format(self._own(self._boxed(x))), x.axes)

    def _norm(self, x: Value) -> Value:
        square = self._total(self._square(x), "d")
        return self._let(self.dialect.unary["sqrt"].format(square), x.axes.replace("d", ""))

    def _binary(self, expr: Expr) -> Value:
        op = str(expr.value)
        if op in ("and", "or"):
            axes, (a, b) = self._join(*(self._truth(arg) for arg in expr.args))
            return self._let(f"{a} {'&' if op == 'and' else '|'} {b}", axes, truth=True)
        left, right = (self.number(arg) for arg in expr.args)
        if op in self.dialect.extreme or op in _COMPARE:
            left, right = self._boxed(left), self._boxed(right)
        axes, (a, b) = self._join(left, right)
        if op == "!=":  # of NaN every comparison is false, this one too
            return self._let(f"({a} < {b}) | ({a} > {b})", axes, truth=True)
        if op in _COMPARE:
            return self._let(f"{a} {op} {b}", axes, truth=True)
        if op in self.dialect.extreme:
            return self._let(self.dialect.extreme[op].format(a, b), axes)
        if op != "/" or (expr.args[1].op == "const" and expr.args[1].value):
            return self._let(f"{a} {op} {b}", axes)
        b = self._boxed(right).text if right.literal else b
        return self._let(self._quotient(a, b), axes)

    def _quotient(self, a: str, b: str) -> str:
        return f"{self.dialect.where}({b} == 0, 0.0, {a} / {b})"

    def _truth(self, expr: Expr) -> Value:
        """Whether a number is neither 0 nor NaN."""
        value = self.value(expr)
        if value.truth:
            return value
        if value.literal:
            return Value(self.dialect.truth.format(int(float(value.text.strip("()f")) != 0)), "", True)
        text = self._own(value)
        return self._let(f"({text} < 0) | ({text} > 0)", value.axes, truth=True)

    def _pair(self, expr: Expr) -> Value:
        left, right = (self.number(arg) for arg in expr.args)
        axes, (a, b) = self._join(left, right)
        dot = self._let(self._total(Value(f"{a} * {b}", axes, bare=False), "d"), axes.replace("d", ""))
        if expr.value == "dot":
            return dot
        axes, (d, m, n) = self._join(dot, self._norm(left), self._norm(right))
        return self._let(self._quotient(d, self._let(f"{m} * {n}", axes).text), axes)

    def _reduce(self, expr: Expr) -> Value:
        fn, axis = reduction(expr)
        x = self.number(expr.args[0])
        if axis not in x.axes:
            if axis == "q" and "q" not in self.layout and fn in ("sum", "mean", "max", "min"):
                return x  # one query: it is its own sum, mean, maximum and minimum
            raise Unprintable(f"{fn}[{axis}] of what has no axis {axis} has no Triton form yet")
        rest = x.axes.replace(axis, "")
        if fn in ("sum", "max", "min"):
            return self._let(self._total(x, axis, extreme_of(fn, expr.args[0])), rest)
        if fn not in ("mean", "var", "std"):
            raise Unprintable(f"{fn}[{axis}] inside a tile has no Triton form yet")
        total, size = self._total(x, axis), self.axes[axis].size
        mean = self._let(f"{total} / {size}", rest)
        if fn == "mean":
            return mean
        axes, (a, m) = self._join(x, mean)
        far = self._let(f"{a} - {m}", axes)
        var = f"{self._total(self._square(far), axis)} / "
        var += f"({size} - 1 + ({size} == 1))"  # the sample variance; of one value 0
        return self._let(self.dialect.unary["sqrt"].format(var) if fn == "std" else var, rest)

    def _total(self, x: Value, axis: str, fn: str = "sum") -> str:
        if axis not in self.axes:
            raise Unprintable(f"a reduction over {axis} has no place in this kernel")
        mask, text, dim = self.axes[axis].mask, x.text, x.axes.index(axis)
        if mask is not None:
            _, (m, _) = self._join(Value(mask, axis), x)
            text = f"{self.dialect.where}({m}, {text}, {_IDENTITY[fn.split()[0]]})"
        return self.dialect.reduce[fn].format(text, axis=dim)
