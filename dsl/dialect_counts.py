"""The `kv` dialect, budgets: bytes, and totals that are divided over the layers.

A share has the type `!kv.share`; `kv.part` is what the layer at hand gets of it, a number like any other.
Guarantees: each way of dividing has the facts that it needs and no others.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from xdsl.dialects.builtin import ArrayAttr, IntegerAttr, StringAttr, i64
from xdsl.ir import Attribute, ParametrizedAttribute, SSAValue, TypeAttribute
from xdsl.irdl import (
    AttrSizedOperandSegments,
    IRDLOperation,
    base,
    irdl_attr_definition,
    irdl_op_definition,
    operand_def,
    opt_operand_def,
    opt_prop_def,
    prop_def,
    result_def,
    traits_def,
    var_operand_def,
)
from xdsl.traits import Pure
from xdsl.utils.exceptions import VerifyException

from kvcompile.dsl.dialect import INT, SCALAR, CountType, ExprOp, ExprType, axes_of, one_of, rational

DIVISIONS = ("pyramid", "softmax", "cover", "table")


@irdl_attr_definition
class ShareType(ParametrizedAttribute, TypeAttribute):
    """A total that layers divide among themselves."""

    name = "kv.share"


@irdl_op_definition
class BytesOp(ExprOp):
    """As many entries as fit into some bytes of one row, known once bound to a model: `kv.bytes 2097152`."""

    name = "kv.bytes"
    size = prop_def(INT)
    res = result_def(SCALAR)
    traits = traits_def(Pure())
    assembly_format = "$size attr-dict"

    def __init__(self, size: int) -> None:
        super().__init__(properties={"size": IntegerAttr(size, i64)}, result_types=[SCALAR])

    def expected_axes(self) -> str:
        if self.size.value.data < 0:
            raise VerifyException("a number of bytes is not negative")
        return ""


@irdl_op_definition
class ShareOp(IRDLOperation):
    """A total per layer and how layers divide the sum: `kv.share "b" %0 by "pyramid" beta "20" reserve %1`.

    `score` is what `softmax` (one number per row) and `cover` (one per entry) measure, `table` the file of the
    weights, `weights` what stood in it. `budgets` adds what the same union sets aside first, and how many layers
    share one decision.
    """

    name = "kv.share"
    label = prop_def(StringAttr)
    total = operand_def(SCALAR)
    by = prop_def(StringAttr)
    beta = opt_prop_def(StringAttr)
    table = opt_prop_def(StringAttr)
    weights = opt_prop_def(ArrayAttr[StringAttr])
    sharing = opt_prop_def(INT)
    score = opt_operand_def(ExprType)
    reserve = var_operand_def(base(CountType))
    res = result_def(ShareType)
    traits = traits_def(Pure())
    irdl_options = (AttrSizedOperandSegments(as_property=True),)
    assembly_format = (
        "$label $total `by` $by (`beta` $beta^)? (`of` $score^ `:` type($score))? (`table` $table^)? "
        "(`weights` $weights^)? (`reserve` $reserve^)? (`sharing` $sharing^)? attr-dict"
    )

    def __init__(
        self,
        label: str,
        total: SSAValue,
        by: str,
        *,
        beta: Fraction | None = None,
        score: SSAValue | None = None,
        table: str | None = None,
        weights: Sequence[Fraction] = (),
        reserve: Sequence[SSAValue] = (),
        sharing: int = 1,
    ) -> None:
        properties: dict[str, Attribute] = {"label": StringAttr(label), "by": StringAttr(by)}
        if beta is not None:
            properties["beta"] = StringAttr(str(beta))
        if table is not None:
            properties["table"] = StringAttr(table)
        if weights:
            properties["weights"] = ArrayAttr([StringAttr(str(weight)) for weight in weights])
        if sharing > 1:
            properties["sharing"] = IntegerAttr(sharing, i64)
        super().__init__(operands=[total, score, list(reserve)], properties=properties, result_types=[ShareType()])

    @property
    def measured(self) -> bool:
        """Whether the parts follow from the entries and not from lengths alone."""
        return self.score is not None

    def verify_(self) -> None:
        by = self.by.data
        one_of("share", by, DIVISIONS)
        if (self.beta is not None) != (by == "pyramid") or (self.beta is not None and rational(self.beta) < 1):
            raise VerifyException("a pyramid, and nothing else, has a number of at least 1")
        if (self.table is not None) != (by == "table") or (self.weights is not None and by != "table"):
            raise VerifyException("weights come from a table")
        if any(rational(weight) < 0 for weight in self.weights or ()):
            raise VerifyException("a weight is not negative")
        wanted = {"softmax": "", "cover": "i"}.get(by)
        found = axes_of(self.score) if self.score is not None else None
        if wanted != found:
            raise VerifyException(f"a share by {by} measures axes '{wanted}', found '{found}'")
        if self.sharing is not None and self.sharing.value.data < 2:
            raise VerifyException("layers that share one decision are 2 or more")


@irdl_op_definition
class PartOp(ExprOp):
    """What the layer at hand gets of a share: `kv.part %0`."""

    name = "kv.part"
    share = operand_def(base(ShareType))
    res = result_def(SCALAR)
    traits = traits_def(Pure())
    assembly_format = "$share attr-dict"

    def __init__(self, share: SSAValue) -> None:
        super().__init__(operands=[share], result_types=[SCALAR])

    def expected_axes(self) -> str:
        return ""
