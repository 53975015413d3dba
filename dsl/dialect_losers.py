"""The `kv` dialect, losers: what becomes of entries that are not kept.

Guarantees: every action has the facts that its kind needs and no others.
"""

from __future__ import annotations

from fractions import Fraction

from xdsl.dialects.builtin import StringAttr
from xdsl.ir import Attribute, ParametrizedAttribute, SSAValue, TypeAttribute
from xdsl.irdl import (
    AttrSizedOperandSegments,
    IRDLOperation,
    irdl_attr_definition,
    irdl_op_definition,
    opt_operand_def,
    opt_prop_def,
    prop_def,
    result_def,
    traits_def,
)
from xdsl.traits import Pure
from xdsl.utils.exceptions import VerifyException

from kvcompile.dsl.dialect import ExprType, axes_of, one_of, rational

LIKENESSES = ("cos", "dot", "distance")
FOLDS = ("mean", "dct", "pool")


@irdl_attr_definition
class LoserType(ParametrizedAttribute, TypeAttribute):
    """What becomes of entries that are not kept."""

    name = "kv.loser"


@irdl_op_definition
class LoserOp(IRDLOperation):
    """One action on losers: `kv.loser "merge" by "cos" of "k" when %1 : ... weight %2 : ...`, `kv.loser "drop"`.

    `merge` goes by a likeness of keys or values, or by distance; `fold` by a mean, or by a transform that leaves
    `part` of its entries. Entries that `when` refuses go to the next action.
    """

    name = "kv.loser"
    kind = prop_def(StringAttr)
    fn = opt_prop_def(StringAttr)
    of = opt_prop_def(StringAttr)
    part = opt_prop_def(StringAttr)
    when = opt_operand_def(ExprType)
    weight = opt_operand_def(ExprType)
    res = result_def(LoserType)
    traits = traits_def(Pure())
    irdl_options = (AttrSizedOperandSegments(as_property=True),)
    assembly_format = (
        "$kind (`by` $fn^)? (`of` $of^)? (`part` $part^)? (`when` $when^ `:` type($when))? "
        "(`weight` $weight^ `:` type($weight))? attr-dict"
    )

    def __init__(
        self,
        kind: str,
        fn: str | None = None,
        of: str | None = None,
        part: Fraction | None = None,
        when: SSAValue | None = None,
        weight: SSAValue | None = None,
    ) -> None:
        properties: dict[str, Attribute] = {"kind": StringAttr(kind)}
        for name, text in (("fn", fn), ("of", of), ("part", None if part is None else str(part))):
            if text is not None:
                properties[name] = StringAttr(text)
        super().__init__(operands=[when, weight], properties=properties, result_types=[LoserType()])

    def verify_(self) -> None:
        kind, fn = self.kind.data, self.fn.data if self.fn is not None else ""
        one_of("loser action", kind, ("drop", "merge", "fold"))
        one_of(f"way to {kind}", fn, {"drop": ("",), "merge": LIKENESSES, "fold": FOLDS}[kind])
        of = self.of.data if self.of is not None else ""
        if of not in (("k", "v") if kind == "merge" and fn != "distance" else ("",)):
            raise VerifyException(f"{kind} {fn} of '{of}'")
        if (self.part is not None) != (fn in ("dct", "pool")):
            raise VerifyException("dct and pool, and nothing else, leave a part")
        if self.part is not None and not 0 < rational(self.part) <= 1:
            raise VerifyException(f"part {self.part.data} is not above 0 and up to 1")
        for given in (self.when, self.weight):
            if given is not None and (kind != "merge" or axes_of(given) not in ("", "i")):
                raise VerifyException("a merge, and nothing else, has a condition and a weight, per loser or per row")
