"""The `kv` dialect, further expressions: queries, noise, trained scores, units as others, what losers of a merge read.

Each gives a `!kv.expr` like the ops of `dialect`. Guarantees: every op verifies the axes that it opens and closes.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from xdsl.dialects.builtin import IntegerAttr, StringAttr, i64
from xdsl.ir import SSAValue
from xdsl.irdl import irdl_op_definition, operand_def, prop_def, result_def, traits_def, var_operand_def
from xdsl.traits import Pure
from xdsl.utils.exceptions import VerifyException

from kvcompile.dsl.dialect import (
    FORWARD,
    INT,
    SCALAR,
    ExprOp,
    ExprType,
    Source,
    SourcedOp,
    axes_of,
    rational,
    source_props,
)


@irdl_op_definition
class QueriesOp(SourcedOp):
    """The queries themselves, rotated: `kv.queries over "last" 1 : !kv.expr<"gqd">`."""

    name = "kv.queries"
    res = result_def(ExprType)
    traits = traits_def(Pure())
    assembly_format = "`over` $source $width (`part` $part^)? attr-dict `:` type($res)"

    def __init__(self, source: Source = FORWARD) -> None:
        super().__init__(properties=source_props(source), result_types=[ExprType("gqd")])

    def expected_axes(self) -> str:
        self.check_source()
        return "gqd"


@irdl_op_definition
class NoiseOp(SourcedOp):
    """Gumbel noise of a seed, fixed for each layer, query head, query and entry: `kv.noise 0 over "forward" 0`."""

    name = "kv.noise"
    seed = prop_def(INT)
    res = result_def(ExprType)
    traits = traits_def(Pure())
    assembly_format = "$seed `over` $source $width (`part` $part^)? attr-dict `:` type($res)"

    def __init__(self, seed: int, source: Source = FORWARD, per_unit: bool = False) -> None:
        super().__init__(
            properties=source_props(source) | {"seed": IntegerAttr(seed, i64)},
            result_types=[ExprType("gqui" if per_unit else "gqi")],
        )

    def expected_axes(self) -> str:
        self.check_source()
        return "gqui" if "u" in axes_of(self.res) else "gqi"


@irdl_op_definition
class LearnedOp(ExprOp):
    """A trained score of an entry from its own token's vectors: `kv.learned "cis" from "f.safetensors" %0, %1`.

    Where it reads landmarks: of each unit and query head, from the query that reads.
    """

    name = "kv.learned"
    label = prop_def(StringAttr)
    file = prop_def(StringAttr)
    args = var_operand_def(ExprType)
    res = result_def(ExprType)
    traits = traits_def(Pure())
    assembly_format = "$label `from` $file $args attr-dict `:` type($args) `->` type($res)"

    def __init__(self, label: str, file: str, args: Sequence[SSAValue]) -> None:
        super().__init__(
            operands=[list(args)],
            properties={"label": StringAttr(label), "file": StringAttr(file)},
            result_types=[ExprType(_trained_axes(args))],
        )

    def expected_axes(self) -> str:
        if not self.args or any("d" not in axes_of(arg) for arg in self.args):
            raise VerifyException("a trained score reads vectors, one at least")
        return _trained_axes(self.args)


def _trained_axes(args: Sequence[SSAValue]) -> str:
    return "gu" if any("u" in axes_of(arg) for arg in args) else "i"


@irdl_op_definition
class RegroupOp(ExprOp):
    """Scores of units as those of others, the largest of the full ones that overlap with each.

    `kv.regroup "kernel" "block" %0 : !kv.expr<"gu">`
    """

    name = "kv.regroup"
    unit = prop_def(StringAttr)
    into = prop_def(StringAttr)
    arg = operand_def(ExprType)
    res = result_def(ExprType)
    traits = traits_def(Pure())
    assembly_format = "$unit $into $arg attr-dict `:` type($arg) `->` type($res)"

    def __init__(self, unit: str, into: str, arg: SSAValue) -> None:
        super().__init__(
            operands=[arg],
            properties={"unit": StringAttr(unit), "into": StringAttr(into)},
            result_types=[ExprType(axes_of(arg))],
        )

    def expected_axes(self) -> str:
        if "u" not in axes_of(self.arg):
            raise VerifyException(f"no axis 'u' in '{axes_of(self.arg)}'")
        return axes_of(self.arg)


@irdl_op_definition
class SimOp(ExprOp):
    """A loser's likeness to the survivor that it would be merged into: `kv.sim : !kv.expr<"i">`."""

    name = "kv.sim"
    res = result_def(ExprType)
    traits = traits_def(Pure())
    assembly_format = "attr-dict `:` type($res)"

    def __init__(self) -> None:
        super().__init__(result_types=[ExprType("i")])

    def expected_axes(self) -> str:
        return "i"


@irdl_op_definition
class EmaOp(ExprOp):
    """A row's running mean, kept in its number `index`: `kv.ema 0 "1/2" %3` is beta * before + (1 - beta) * now."""

    name = "kv.ema"
    index = prop_def(INT)
    beta = prop_def(StringAttr)
    arg = operand_def(SCALAR)
    res = result_def(SCALAR)
    traits = traits_def(Pure())
    assembly_format = "$index $beta $arg attr-dict"

    def __init__(self, index: int, beta: Fraction, arg: SSAValue) -> None:
        super().__init__(
            operands=[arg],
            properties={"index": IntegerAttr(index, i64), "beta": StringAttr(str(beta))},
            result_types=[SCALAR],
        )

    def expected_axes(self) -> str:
        if self.index.value.data < 0 or not 0 <= rational(self.beta) <= 1:
            raise VerifyException("a running mean has an index from 0 and a beta between 0 and 1")
        return ""
