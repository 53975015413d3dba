"""The `kv` dialect, expressions: scores and counts of a policy as SSA, in xDSL.

The type of a score is its open axes, `!kv.expr<"gqi">`, always in the order of `AXES`; "" is a number of the
sequence. KV heads (`h`) are open everywhere and never written: a reduction over them makes all heads equal.
Guarantees: every op verifies the axes that it opens and closes; text parses back to an equal module.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from xdsl.dialects.builtin import IntegerAttr, StringAttr, i64
from xdsl.ir import Attribute, ParametrizedAttribute, SSAValue, TypeAttribute
from xdsl.irdl import (
    IRDLOperation,
    base,
    irdl_attr_definition,
    irdl_op_definition,
    operand_def,
    opt_prop_def,
    param_def,
    prop_def,
    result_def,
    traits_def,
)
from xdsl.traits import Pure
from xdsl.utils.exceptions import VerifyException

AXES = "gquid"

REDUCTIONS = ("sum", "mean", "max", "min", "var", "std", "softmax")
UNARY = ("neg", "exp", "log", "sqrt", "abs", "sigmoid", "norm")
BINARY = ("+", "-", "*", "/", "max", "min", "<", "<=", ">", ">=", "==", "!=", "and", "or")
PAIRS = ("dot", "cos")
POOLS = ("max", "avg")
SCALARS = ("prompt", "now", "chunk", "step", "len")
SOURCES = ("forward", "last", "peek", "sample", "previous", "own")
_UNCOUNTED = ("forward", "sample", "own")
EVIDENCE = ("attn", "logit")
# A field inside a unit's landmark is read per unit, so its type gains the axis u.
FIELDS = {"k": "id", "v": "id", "raw.k": "id", "pos": "i", "age": "i", "count": "i", "next.k": "uid", "next.v": "uid"}


def join(*axes: str) -> str:
    """All axes of the operands, in the order of `AXES`."""
    together = "".join(axes)
    return "".join(a for a in AXES if a in together)


@irdl_attr_definition
class ExprType(ParametrizedAttribute, TypeAttribute):
    """A float32 per point of its open axes; a number where none is open."""

    name = "kv.expr"
    axes: StringAttr = param_def(base(StringAttr))

    def __init__(self, axes: str) -> None:
        super().__init__(StringAttr(axes))

    def verify(self) -> None:
        axes = self.axes.data
        if join(axes) != axes:
            raise VerifyException(f"axes '{axes}' must be distinct letters of '{AXES}' in this order")


@irdl_attr_definition
class CountType(ParametrizedAttribute, TypeAttribute):
    """A number of entries: truncated once, never negative."""

    name = "kv.count"


SCALAR = ExprType("")
INT = IntegerAttr.constr(i64)


def axes_of(value: SSAValue) -> str:
    """Open axes of a value of type `!kv.expr`."""
    assert isinstance(value.type, ExprType)
    return value.type.axes.data


def one_of(what: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise VerifyException(f"unknown {what} '{value}', expected one of: {', '.join(known)}")


def rational(text: StringAttr) -> Fraction:
    """The exact number that an attribute such as "3/10" spells."""
    try:
        return Fraction(text.data)
    except (ValueError, ZeroDivisionError):
        raise VerifyException(f'\'{text.data}\' is not an exact number such as "2048" or "3/10"') from None


class ExprOp(IRDLOperation):
    """An op with one result of type `!kv.expr`, whose axes follow from its operands."""

    def expected_axes(self) -> str:
        raise NotImplementedError

    def verify_(self) -> None:
        expected = self.expected_axes()
        found = axes_of(self.results[0])
        if expected != found:
            raise VerifyException(f"result has axes '{found}', its operands give '{expected}'")


@irdl_op_definition
class ConstOp(ExprOp):
    """An exact rational: `kv.const "1/10" : !kv.expr<"">`."""

    name = "kv.const"
    value = prop_def(StringAttr)
    res = result_def(ExprType)
    traits = traits_def(Pure())
    assembly_format = "$value attr-dict `:` type($res)"

    def __init__(self, value: Fraction) -> None:
        super().__init__(properties={"value": StringAttr(str(value))}, result_types=[SCALAR])

    def expected_axes(self) -> str:
        rational(self.value)
        return ""


@irdl_op_definition
class ScalarOp(ExprOp):
    """A number known when a set is decided: prompt, now, chunk, step of the sequence, len of the row."""

    name = "kv.scalar"
    what = prop_def(StringAttr)
    res = result_def(ExprType)
    traits = traits_def(Pure())
    assembly_format = "$what attr-dict `:` type($res)"

    def __init__(self, what: str) -> None:
        super().__init__(properties={"what": StringAttr(what)}, result_types=[SCALAR])

    def expected_axes(self) -> str:
        one_of("run-time number", self.what.data, SCALARS)
        return ""


@irdl_op_definition
class FieldOp(ExprOp):
    """What an entry has: `kv.field "k" : !kv.expr<"id">`; with u open, the entries of each unit."""

    name = "kv.field"
    what = prop_def(StringAttr)
    res = result_def(ExprType)
    traits = traits_def(Pure())
    assembly_format = "$what attr-dict `:` type($res)"

    def __init__(self, what: str, per_unit: bool = False) -> None:
        axes = join(FIELDS.get(what, ""), "u" if per_unit else "")
        super().__init__(properties={"what": StringAttr(what)}, result_types=[ExprType(axes)])

    def expected_axes(self) -> str:
        one_of("field", self.what.data, tuple(FIELDS))
        return join(FIELDS[self.what.data], "u" if "u" in axes_of(self.res) else "")


class SourcedOp(ExprOp):
    """An op about queries: `source` says whose, `width` how many (0 where it does not say), `part` which part.

    "own" is, in `attend`, the query that reads. With u open, entries are those of each unit.
    """

    source = prop_def(StringAttr)
    width = prop_def(INT)
    part = opt_prop_def(StringAttr)

    def check_source(self) -> None:
        kind, width = self.source.data, self.width.value.data
        one_of("query source", kind, SOURCES)
        if (width == 0) != (kind in _UNCOUNTED) or width < 0:
            uncounted = ", ".join(f"'{name}'" for name in _UNCOUNTED)
            raise VerifyException(f"{width} queries of source '{kind}': {uncounted} take 0, others 1 or more")
        if (self.part is None) != (kind != "sample") or (self.part is not None and not 0 < rational(self.part) <= 1):
            raise VerifyException("a sample is a part of the queries, above 0 and up to 1; other sources have none")


Source = tuple[str, int, Fraction]  # kind, width, part
FORWARD: Source = ("forward", 0, Fraction(0))
OWN: Source = ("own", 0, Fraction(0))


def source_props(source: Source) -> dict[str, Attribute]:
    """The properties of a `SourcedOp`."""
    kind, width, part = source
    found: dict[str, Attribute] = {"source": StringAttr(kind), "width": IntegerAttr(width, i64)}
    return found | ({"part": StringAttr(str(part))} if kind == "sample" else {})


@irdl_op_definition
class EvidenceOp(SourcedOp):
    """Attention of queries to entries: `kv.evidence "attn" over "last" 64 : !kv.expr<"gqi">`."""

    name = "kv.evidence"
    what = prop_def(StringAttr)
    res = result_def(ExprType)
    traits = traits_def(Pure())
    assembly_format = "$what `over` $source $width (`part` $part^)? attr-dict `:` type($res)"

    def __init__(self, what: str, source: Source = FORWARD, per_unit: bool = False) -> None:
        super().__init__(
            properties=source_props(source) | {"what": StringAttr(what)},
            result_types=[ExprType("gqui" if per_unit else "gqi")],
        )

    def expected_axes(self) -> str:
        one_of("evidence", self.what.data, EVIDENCE)
        self.check_source()
        return "gqui" if "u" in axes_of(self.res) else "gqi"


@irdl_op_definition
class ReadOp(ExprOp):
    """An entry's own state: `kv.read "acc" : !kv.expr<"i">`; with u open, of the entries of each unit."""

    name = "kv.read"
    state = prop_def(StringAttr)
    res = result_def(ExprType)
    traits = traits_def(Pure())
    assembly_format = "$state attr-dict `:` type($res)"

    def __init__(self, state: str, per_unit: bool = False) -> None:
        super().__init__(properties={"state": StringAttr(state)}, result_types=[ExprType("ui" if per_unit else "i")])

    def expected_axes(self) -> str:
        return "ui" if "u" in axes_of(self.res) else "i"


@irdl_op_definition
class LandmarkOp(ExprOp):
    """A landmark of every unit: `kv.landmark "lot" "klo" : !kv.expr<"ud">`; the policy checks the declared axes."""

    name = "kv.landmark"
    unit = prop_def(StringAttr)
    landmark = prop_def(StringAttr)
    res = result_def(ExprType)
    traits = traits_def(Pure())
    assembly_format = "$unit $landmark attr-dict `:` type($res)"

    def __init__(self, unit: str, landmark: str, axes: str) -> None:
        super().__init__(
            properties={"unit": StringAttr(unit), "landmark": StringAttr(landmark)}, result_types=[ExprType(axes)]
        )

    def expected_axes(self) -> str:
        axes = axes_of(self.res)
        if axes not in ("u", "ud"):
            raise VerifyException(f"a landmark has axes 'u' or 'ud', not '{axes}'")
        return axes


@irdl_op_definition
class ReduceOp(ExprOp):
    """One axis closed (softmax keeps it): `kv.reduce "sum" over "q" %0 : !kv.expr<"gqi"> -> !kv.expr<"gi">`."""

    name = "kv.reduce"
    fn = prop_def(StringAttr)
    axis = prop_def(StringAttr)
    arg = operand_def(ExprType)
    res = result_def(ExprType)
    traits = traits_def(Pure())
    assembly_format = "$fn `over` $axis $arg attr-dict `:` type($arg) `->` type($res)"

    def __init__(self, fn: str, axis: str, arg: SSAValue) -> None:
        super().__init__(
            operands=[arg],
            properties={"fn": StringAttr(fn), "axis": StringAttr(axis)},
            result_types=[ExprType(reduced(fn, axis, axes_of(arg)))],
        )

    def expected_axes(self) -> str:
        fn, axis, axes = self.fn.data, self.axis.data, axes_of(self.arg)
        one_of("reduction", fn, REDUCTIONS)
        if axis != "h" and axis not in axes:
            raise VerifyException(f"no axis '{axis}' in '{axes}'")
        if axis == "h" and "g" in axes:
            raise VerifyException("'g' must be reduced before 'h'")
        return reduced(fn, axis, axes)


def reduced(fn: str, axis: str, axes: str) -> str:
    """Axes that a reduction leaves open."""
    return axes if fn == "softmax" else axes.replace(axis, "")


@irdl_op_definition
class PoolOp(ExprOp):
    """Centred pooling over the candidates in position order: `kv.pool "max" 7 %2 : !kv.expr<"i"> -> !kv.expr<"i">`."""

    name = "kv.pool"
    fn = prop_def(StringAttr)
    width = prop_def(INT)
    arg = operand_def(ExprType)
    res = result_def(ExprType)
    traits = traits_def(Pure())
    assembly_format = "$fn $width $arg attr-dict `:` type($arg) `->` type($res)"

    def __init__(self, fn: str, width: int, arg: SSAValue) -> None:
        super().__init__(
            operands=[arg],
            properties={"fn": StringAttr(fn), "width": IntegerAttr(width, i64)},
            result_types=[ExprType(axes_of(arg))],
        )

    def expected_axes(self) -> str:
        one_of("pooling", self.fn.data, POOLS)
        if self.width.value.data < 1 or self.width.value.data % 2 == 0:
            raise VerifyException(f"pooling width {self.width.value.data} is not odd")
        if axes_of(self.arg) not in ("i", "gi"):
            raise VerifyException(f"pooling runs over the entries of a row, not over axes '{axes_of(self.arg)}'")
        return axes_of(self.arg)


@irdl_op_definition
class UnaryOp(ExprOp):
    """Elementwise; `norm` closes d: `kv.unary "norm" %0 : !kv.expr<"id"> -> !kv.expr<"i">`."""

    name = "kv.unary"
    fn = prop_def(StringAttr)
    arg = operand_def(ExprType)
    res = result_def(ExprType)
    traits = traits_def(Pure())
    assembly_format = "$fn $arg attr-dict `:` type($arg) `->` type($res)"

    def __init__(self, fn: str, arg: SSAValue) -> None:
        axes = axes_of(arg).replace("d", "") if fn == "norm" else axes_of(arg)
        super().__init__(operands=[arg], properties={"fn": StringAttr(fn)}, result_types=[ExprType(axes)])

    def expected_axes(self) -> str:
        one_of("function", self.fn.data, UNARY)
        axes = axes_of(self.arg)
        if self.fn.data != "norm":
            return axes
        if "d" not in axes:
            raise VerifyException(f"norm needs the axis 'd', found '{axes}'")
        return axes.replace("d", "")


@irdl_op_definition
class BinaryOp(ExprOp):
    """Elementwise over the joined axes, x / 0 is 0: `kv.binary "-" %0, %1 : !kv.expr<"uid">, !kv.expr<"ud"> -> ...`."""

    name = "kv.binary"
    fn = prop_def(StringAttr)
    lhs = operand_def(ExprType)
    rhs = operand_def(ExprType)
    res = result_def(ExprType)
    traits = traits_def(Pure())
    assembly_format = "$fn $lhs `,` $rhs attr-dict `:` type($lhs) `,` type($rhs) `->` type($res)"

    def __init__(self, fn: str, lhs: SSAValue, rhs: SSAValue) -> None:
        super().__init__(
            operands=[lhs, rhs],
            properties={"fn": StringAttr(fn)},
            result_types=[ExprType(join(axes_of(lhs), axes_of(rhs)))],
        )

    def expected_axes(self) -> str:
        one_of("operator", self.fn.data, BINARY)
        return join(axes_of(self.lhs), axes_of(self.rhs))


@irdl_op_definition
class PairOp(ExprOp):
    """A product of two vectors that closes d: `kv.pair "cos" %0, %1 : !kv.expr<"id">, !kv.expr<"d"> -> ...`."""

    name = "kv.pair"
    fn = prop_def(StringAttr)
    lhs = operand_def(ExprType)
    rhs = operand_def(ExprType)
    res = result_def(ExprType)
    traits = traits_def(Pure())
    assembly_format = "$fn $lhs `,` $rhs attr-dict `:` type($lhs) `,` type($rhs) `->` type($res)"

    def __init__(self, fn: str, lhs: SSAValue, rhs: SSAValue) -> None:
        axes = join(axes_of(lhs), axes_of(rhs)).replace("d", "")
        super().__init__(operands=[lhs, rhs], properties={"fn": StringAttr(fn)}, result_types=[ExprType(axes)])

    def expected_axes(self) -> str:
        one_of("product", self.fn.data, PAIRS)
        if "d" not in axes_of(self.lhs) or "d" not in axes_of(self.rhs):
            raise VerifyException(f"{self.fn.data} needs the axis 'd' on both sides")
        return join(axes_of(self.lhs), axes_of(self.rhs)).replace("d", "")


@irdl_op_definition
class CountOp(IRDLOperation):
    """A number of entries, truncated once: `kv.count "budget - observe" %0`."""

    name = "kv.count"
    label = prop_def(StringAttr)
    amount = operand_def(SCALAR)
    res = result_def(CountType)
    traits = traits_def(Pure())
    assembly_format = "$label $amount attr-dict"

    def __init__(self, label: str, amount: SSAValue) -> None:
        super().__init__(operands=[amount], properties={"label": StringAttr(label)}, result_types=[CountType()])
