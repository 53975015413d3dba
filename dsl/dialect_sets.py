"""The `kv` dialect, sets: regions, selections, unions, and the keep clause of a class with its triggers.

A set has the type `!kv.set`. Guarantees: every region has the number, unit or seed that its kind needs, every
selection one score per entry and either a number of entries or a fraction.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from xdsl.dialects.builtin import (
    ArrayAttr,
    FlatSymbolRefAttrConstr,
    IntegerAttr,
    StringAttr,
    SymbolRefAttr,
    i64,
)
from xdsl.ir import Attribute, ParametrizedAttribute, SSAValue, TypeAttribute
from xdsl.irdl import (
    IRDLOperation,
    base,
    irdl_attr_definition,
    irdl_op_definition,
    operand_def,
    opt_operand_def,
    opt_prop_def,
    param_def,
    prop_def,
    result_def,
    traits_def,
    var_operand_def,
)
from xdsl.parser import AttrParser
from xdsl.printer import Printer
from xdsl.traits import Pure
from xdsl.utils.exceptions import VerifyException

from kvcompile.dsl.dialect import INT, CountType, ExprType, axes_of, one_of, rational

REGIONS = ("all", "sink", "recent", "prompt", "generated", "frozen", "newest", "stride", "random")
COUNTED = ("sink", "recent", "stride", "random")
TRIGGERS = ("prefill.end", "chunk", "step", "every", "filled", "full")
SCOPES = ("head", "shared", "across")
PHASES = ("chunk", "prefill.end", "step")


@irdl_attr_definition
class SetType(ParametrizedAttribute, TypeAttribute):
    """A set of a row's resident entries."""

    name = "kv.set"


@irdl_attr_definition
class TriggerAttr(ParametrizedAttribute):
    """When a set is decided: `#kv.trigger<"filled", 2, "lot">`; 0 and "" where there is no number or unit."""

    name = "kv.trigger"
    kind: StringAttr = param_def(base(StringAttr))
    n: IntegerAttr = param_def()
    unit: StringAttr = param_def(base(StringAttr))

    def __init__(self, kind: str, n: int = 0, unit: str = "") -> None:
        super().__init__(StringAttr(kind), IntegerAttr(n, i64), StringAttr(unit))

    @classmethod
    def parse_parameters(cls, parser: AttrParser) -> Sequence[Attribute]:
        with parser.in_angle_brackets():
            kind = parser.parse_str_literal()
            parser.parse_punctuation(",")
            n = parser.parse_integer()
            parser.parse_punctuation(",")
            unit = parser.parse_str_literal()
        return StringAttr(kind), IntegerAttr(n, i64), StringAttr(unit)

    def print_parameters(self, printer: Printer) -> None:
        with printer.in_angle_brackets():
            printer.print_string(f'"{self.kind.data}", {self.n.value.data}, "{self.unit.data}"')

    def verify(self) -> None:
        one_of("trigger", self.kind.data, TRIGGERS)
        n = self.n.value.data
        if n < 0 or (n == 0 and self.kind.data in ("every", "filled", "full")):
            raise VerifyException(f"{self.kind.data} needs a positive number, found {n}")
        if self.unit.data and self.kind.data != "filled":
            raise VerifyException(f"{self.kind.data} has no unit")


@irdl_op_definition
class RegionOp(IRDLOperation):
    """Entries named by position or history: `kv.region "sink" count %0`, `kv.region "newest" of "lot"`."""

    name = "kv.region"
    kind = prop_def(StringAttr)
    count = opt_operand_def(base(CountType))
    unit = opt_prop_def(StringAttr)
    seed = opt_prop_def(INT)
    res = result_def(SetType)
    traits = traits_def(Pure())
    assembly_format = "$kind (`count` $count^)? (`of` $unit^)? (`seed` $seed^)? attr-dict"

    def __init__(
        self, kind: str, count: SSAValue | None = None, unit: str | None = None, seed: int | None = None
    ) -> None:
        properties: dict[str, Attribute] = {"kind": StringAttr(kind)}
        if unit is not None:
            properties["unit"] = StringAttr(unit)
        if seed is not None:
            properties["seed"] = IntegerAttr(seed, i64)
        super().__init__(operands=[count], properties=properties, result_types=[SetType()])

    def verify_(self) -> None:
        kind = self.kind.data
        one_of("region", kind, REGIONS)
        if (self.count is not None) != (kind in COUNTED):
            raise VerifyException(f"{kind} {'needs' if kind in COUNTED else 'takes no'} number of entries")
        if (self.unit is not None) != (kind == "newest"):
            raise VerifyException(f"{kind} {'needs' if kind == 'newest' else 'takes no'} unit")
        if (self.seed is not None) != (kind == "random"):
            raise VerifyException(f"{kind} {'needs' if kind == 'random' else 'takes no'} seed")


@irdl_op_definition
class TopOp(IRDLOperation):
    """The best candidates by a score; `count` of them, or a `fraction` of each competing group's.

    `kv.top "bottom" by %3 count %2 scope "across" floor "1/5" : !kv.expr<"i">`
    """

    name = "kv.top"
    rank = prop_def(StringAttr)
    score = operand_def(ExprType)
    count = opt_operand_def(base(CountType))
    fraction = opt_prop_def(StringAttr)
    scope = prop_def(StringAttr)
    floor = opt_prop_def(StringAttr)
    unit = opt_prop_def(StringAttr)
    observed = opt_prop_def(INT)
    res = result_def(SetType)
    traits = traits_def(Pure())
    assembly_format = (
        "$rank `by` $score (`count` $count^)? (`fraction` $fraction^)? `scope` $scope (`floor` $floor^)? "
        "(`per` $unit^)? (`observed` $observed^)? attr-dict `:` type($score)"
    )

    def __init__(
        self,
        rank: str,
        score: SSAValue,
        amount: SSAValue | Fraction,
        scope: str = "head",
        floor: Fraction | None = None,
        unit: str | None = None,
        observed: int = 0,
    ) -> None:
        properties: dict[str, Attribute] = {"rank": StringAttr(rank), "scope": StringAttr(scope)}
        if isinstance(amount, Fraction):
            properties["fraction"] = StringAttr(str(amount))
        if floor is not None:
            properties["floor"] = StringAttr(str(floor))
        if unit is not None:
            properties["unit"] = StringAttr(unit)
        if observed:
            properties["observed"] = IntegerAttr(observed, i64)
        count = None if isinstance(amount, Fraction) else amount
        super().__init__(operands=[score, count], properties=properties, result_types=[SetType()])

    def verify_(self) -> None:
        one_of("rank", self.rank.data, ("top", "bottom"))
        one_of("scope", self.scope.data, SCOPES)
        axes = axes_of(self.score)
        if axes not in ("i", "ui"):
            raise VerifyException(f"a selection needs one score per entry (axes 'i' or 'ui'), found '{axes}'")
        if (self.count is None) == (self.fraction is None):
            raise VerifyException("a selection has either a number of entries or a fraction")
        if self.fraction is not None and not 0 <= rational(self.fraction) <= 1:
            raise VerifyException(f"fraction {self.fraction.data} is not between 0 and 1")
        if self.floor is not None and (self.scope.data != "across" or not 0 <= rational(self.floor) <= 1):
            raise VerifyException("floor is a fraction between 0 and 1 of a selection across heads")
        if self.scope.data == "across" and self.unit is not None:
            raise VerifyException("heads compete either across the layer or per unit")


@irdl_op_definition
class UnionOp(IRDLOperation):
    """Entries of any of the sets, in the order written: earlier terms take theirs first."""

    name = "kv.union"
    terms = var_operand_def(base(SetType))
    res = result_def(SetType)
    traits = traits_def(Pure())
    assembly_format = "$terms attr-dict"

    def __init__(self, terms: Sequence[SSAValue]) -> None:
        super().__init__(operands=[list(terms)], result_types=[SetType()])


@irdl_op_definition
class KeepOp(IRDLOperation):
    """What the rows of a class keep, and when that is decided; no trigger: nothing is ever dropped.

    `schedule` adds the order that the scores need and the phases in which the set may be decided;
    `memory` adds whether a row's length is bounded after the prompt and in decode.
    """

    name = "kv.keep"
    set = operand_def(base(SetType))
    of = prop_def(FlatSymbolRefAttrConstr)
    triggers = prop_def(ArrayAttr[TriggerAttr])
    order = opt_prop_def(StringAttr)
    phases = opt_prop_def(ArrayAttr[StringAttr])
    prefill = opt_prop_def(StringAttr)
    decode = opt_prop_def(StringAttr)
    assembly_format = (
        "$set `for` $of `at` $triggers (`order` $order^)? (`phases` $phases^)? "
        "(`prefill` $prefill^)? (`decode` $decode^)? attr-dict"
    )

    def __init__(self, of: str, value: SSAValue, triggers: Sequence[TriggerAttr]) -> None:
        super().__init__(operands=[value], properties={"of": SymbolRefAttr(of), "triggers": ArrayAttr(list(triggers))})

    def verify_(self) -> None:
        if self.order is not None:
            one_of("order", self.order.data, ("any", "position"))
        for phase in self.phases or ():
            one_of("phase", phase.data, PHASES)
        if self.prefill is not None:
            one_of("bound", self.prefill.data, ("bounded", "grows"))
        if self.decode is not None:
            one_of("bound", self.decode.data, ("bounded", "grows"))
