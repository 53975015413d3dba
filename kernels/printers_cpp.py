"""Prints a formula as C++ statements: axis `i` is the lanes of a vector, every other axis a loop over a small array.

Takes what `printers.Printer` takes, for a template that includes `_head.cpp.jinja`, whose types and functions the text
uses. Guarantees the same: every value is float32, x / 0 is 0, lanes that a mask excludes enter no reduction.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kvcompile.kernels.plan import Expr
from kvcompile.kernels.printers import Dialect, Printer, Value
from kvcompile.kernels.stages import Unprintable

CPP = Dialect(
    unary={
        "neg": "-{0}",
        "exp": "exp_of({0})",
        "log": "log_of({0})",
        "sqrt": "sqrt_of({0})",
        "abs": "abs_of({0})",
        "sigmoid": "sigmoid_of({0})",
    },
    extreme={"max": "max_of({0}, {1})", "min": "min_of({0}, {1})"},  # both pass NaN on, as the language does
    reduce={"sum": "{0} + {1}"}
    | {fn + more: f"{fn}_of({{0}}, {{1}})" for fn in ("max", "min") for more in ("", " with NaN")},
    where="where",
    number="where({0}, 1.0f, 0.0f)",
    scalar="{0}",
    truth="-{0}",  # of lanes and of a bool alike
)
_IDENTITY = {"sum": "0.0f", "max": "-INFINITY", "min": "INFINITY"}


@dataclass
class CppPrinter(Printer):
    """A value over `i` is an `F` (truth: `M`), over no axis a `float` (`bool`); other axes make it an array."""

    dialect: Dialect = field(default=CPP)

    def number(self, expr: Expr) -> Value:
        value = self.value(expr)
        return self._let(self.dialect.number.format(self._own(value)), value.axes) if value.truth else value

    def _print(self, expr: Expr) -> Value:
        value = super()._print(expr)
        if expr.op != "const":
            return value
        return Value(f"{value.text[:-1]}f)" if value.text.endswith(")") else f"{value.text}f")

    def _let(self, text: str, axes: str, truth: bool = False) -> Value:
        return self._declared(axes, truth, text)

    def _declared(self, axes: str, truth: bool, text: str) -> Value:
        """A new name that starts as `text`, a statement over its axes."""
        kind = ("M" if truth else "F") if "i" in axes else ("bool" if truth else "float")
        value = Value(f"{self.prefix}{len(self.lines)}", axes, truth)
        if not _index(axes):
            self.lines.append(f"{kind} {value.text} = {text};")
            return value
        sizes = "".join(f"[{self._size(axis)}]" for axis in axes if axis != "i")
        self.lines.append(f"{kind} {value.text}{sizes};")
        self.lines.append(f"{self._loops(axes)}{value.text}{_index(axes)} = {text};")
        return value

    def _loops(self, axes: str) -> str:
        return "".join(f"for (int {axis} = 0; {axis} < {self._size(axis)}; ++{axis}) " for axis in axes if axis != "i")

    def _size(self, axis: str) -> str:
        if axis not in self.axes:
            raise Unprintable(f"the axis {axis} has no place in this kernel")
        return self.axes[axis].size

    def _text(self, value: Value, axes: str) -> str:
        return value.text + _index(value.axes) if value.bare else value.text

    def _total(self, x: Value, axis: str, fn: str = "sum") -> str:
        if axis == "i" or axis not in self.axes:
            raise Unprintable(f"a reduction over {axis} has no place in this kernel")
        rest, start = x.axes.replace(axis, ""), _IDENTITY[fn.split()[0]]
        at = self._own(self._declared(rest, False, f"splat({start})" if "i" in rest else start))
        text, mask = self._text(x, x.axes), self.axes[axis].mask
        if mask is not None:
            text = f"where({mask}[{axis}], {text}, {start})"
        self.lines.append(f"{self._loops(rest + axis)}{at} = {self.dialect.reduce[fn].format(at, text)};")
        return at


def _index(axes: str) -> str:
    return "".join(f"[{axis}]" for axis in axes if axis != "i")
