"""The `kv` dialect, sets: regions, selections, unions, and what is kept, picked or read at triggers.

A set has the type `!kv.set`. Guarantees: every region has the number, unit, seed or pick that its kind needs, every
selection one score per entry, query head or unit, and the number or fraction that its rank needs, every trigger its
number and condition. A class may have several `kv.keep`, in the order in which they judge.
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
    AttrSizedOperandSegments,
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

from kvcompile.dsl.dialect import INT, SCALAR, CountType, ExprType, axes_of, one_of, rational
from kvcompile.dsl.dialect_losers import LoserType
from kvcompile.dsl.words import UNIT_REGIONS

OF_QUERY = ("own", "pow2", "span")  # what they hold depends on the query that reads
REGIONS = (
    *("all", "sink", "recent", "prompt", "generated", "frozen", "newest", "stride", "random", "picked"),
    *OF_QUERY,
)
COUNTED = ("sink", "recent", "stride", "random")
TRIGGERS = ("prefill.end", "chunk", "step", "every", "filled", "full", "when")
PHASES = ("chunk", "prefill.end", "step")
RANKS = ("top", "bottom", "cover", "where")
SCOPES = ("head", "query_head", "shared", "across")


@irdl_attr_definition
class SetType(ParametrizedAttribute, TypeAttribute):
    """A set of a row's resident entries."""

    name = "kv.set"


@irdl_op_definition
class RegionOp(IRDLOperation):
    """Entries named by position, history or the query: `kv.region "sink" count %0`, `kv.region "newest" of "lot"`."""

    name = "kv.region"
    kind = prop_def(StringAttr)
    count = opt_operand_def(base(CountType))
    unit = opt_prop_def(StringAttr)
    seed = opt_prop_def(INT)
    pick = opt_prop_def(StringAttr)
    span = opt_prop_def(StringAttr)
    res = result_def(SetType)
    traits = traits_def(Pure())
    assembly_format = (
        "$kind (`count` $count^)? (`of` $unit^)? (`seed` $seed^)? (`pick` $pick^)? (`span` $span^)? attr-dict"
    )

    def __init__(
        self,
        kind: str,
        count: SSAValue | None = None,
        unit: str | None = None,
        seed: int | None = None,
        pick: str | None = None,
        span: str | None = None,
    ) -> None:
        properties: dict[str, Attribute] = {"kind": StringAttr(kind)}
        for name, text in (("unit", unit), ("pick", pick), ("span", span)):
            if text is not None:
                properties[name] = StringAttr(text)
        if seed is not None:
            properties["seed"] = IntegerAttr(seed, i64)
        super().__init__(operands=[count], properties=properties, result_types=[SetType()])

    def verify_(self) -> None:
        kind = self.kind.data
        one_of("region", kind, REGIONS)
        facts = (
            ("number of entries", self.count, kind in COUNTED),
            ("unit", self.unit, kind in UNIT_REGIONS),
            ("seed", self.seed, kind == "random"),
            ("pick", self.pick, kind == "picked"),
            ("name of a span", self.span, kind == "span"),
        )
        for what, given, needed in facts:
            if (given is not None) != needed:
                raise VerifyException(f"{kind} {'needs' if needed else 'takes no'} {what}")


@irdl_op_definition
class TopOp(IRDLOperation):
    """The best candidates by a score; `count` of them, or a `fraction` of each competing group's.

    `kv.top "bottom" by %3 count %2 scope "across" floor "1/5" : !kv.expr<"i">`. `per`: the entries of each unit
    compete among themselves; `whole`: units compete. `layers "shared" sharing 8`: the first of 8 layers decides.
    """

    name = "kv.top"
    rank = prop_def(StringAttr)
    score = operand_def(ExprType)
    count = opt_operand_def(base(CountType))
    fraction = opt_prop_def(StringAttr)
    scope = prop_def(StringAttr)
    floor = opt_prop_def(StringAttr)
    unit = opt_prop_def(StringAttr)
    whole = opt_prop_def(StringAttr)
    layers = opt_prop_def(StringAttr)
    sharing = opt_prop_def(INT)
    observed = opt_prop_def(INT)
    res = result_def(SetType)
    traits = traits_def(Pure())
    assembly_format = (
        "$rank `by` $score (`count` $count^)? (`fraction` $fraction^)? `scope` $scope (`floor` $floor^)? "
        "(`per` $unit^)? (`whole` $whole^)? (`layers` $layers^)? (`sharing` $sharing^)? (`observed` $observed^)? "
        "attr-dict `:` type($score)"
    )

    def __init__(
        self,
        rank: str,
        score: SSAValue,
        amount: SSAValue | Fraction | None,
        scope: str = "head",
        floor: Fraction | None = None,
        unit: str | None = None,
        observed: int = 0,
        *,
        whole: str | None = None,
        layers: str | None = None,
        sharing: int = 1,
    ) -> None:
        properties: dict[str, Attribute] = {"rank": StringAttr(rank), "scope": StringAttr(scope)}
        if isinstance(amount, Fraction):
            properties["fraction"] = StringAttr(str(amount))
        if floor is not None:
            properties["floor"] = StringAttr(str(floor))
        for name, text in (("unit", unit), ("whole", whole), ("layers", layers)):
            if text is not None:
                properties[name] = StringAttr(text)
        if layers == "shared":
            properties["sharing"] = IntegerAttr(sharing, i64)
        if observed:
            properties["observed"] = IntegerAttr(observed, i64)
        count = None if isinstance(amount, Fraction) else amount
        super().__init__(operands=[score, count], properties=properties, result_types=[SetType()])

    def verify_(self) -> None:
        one_of("rank", self.rank.data, RANKS)
        one_of("scope", self.scope.data, SCOPES)
        self._verify_score()
        self._verify_amount()
        if self.floor is not None and (self.scope.data != "across" or not 0 <= rational(self.floor) <= 1):
            raise VerifyException("floor is a fraction between 0 and 1 of a selection across heads")
        if self.unit is not None and (self.whole is not None or self.scope.data in ("across", "query_head")):
            raise VerifyException("entries compete per unit in each KV head alone")
        if self.layers is not None:
            one_of("layers", self.layers.data, ("shared", "across"))
        if (self.sharing is not None) != (self.layers is not None and self.layers.data == "shared"):
            raise VerifyException("layers that share one decision, and no others, have a number")
        if self.sharing is not None and self.sharing.value.data < 1:
            raise VerifyException("at least one layer shares a decision")

    def _verify_score(self) -> None:
        axes, open_ = axes_of(self.score), "gi" if self.scope.data == "query_head" else "i"
        wanted = (open_.replace("i", "u"),) if self.whole is not None else (open_, open_.replace("i", "ui"))
        if axes not in wanted:
            shown = " or ".join(f"'{one}'" for one in wanted)
            raise VerifyException(f"a selection needs one score per competitor (axes {shown}), found '{axes}'")

    def _verify_amount(self) -> None:
        rank = self.rank.data
        if rank == "where":
            plain = self.scope.data == "head" and self.layers is None and self.unit is None
            if self.count is not None or self.fraction is not None or not plain:
                raise VerifyException("a condition takes all that it holds for, each head alone")
        elif (self.count is None) == (self.fraction is None) or (rank == "cover" and self.fraction is None):
            raise VerifyException("a selection has either a number of entries or a fraction, `cover` a fraction")
        if self.fraction is not None and not 0 <= rational(self.fraction) <= 1:
            raise VerifyException(f"fraction {self.fraction.data} is not between 0 and 1")


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


@irdl_attr_definition
class TriggerAttr(ParametrizedAttribute):
    """When a set is decided: `#kv.trigger<"filled", 2, "lot">`; 0 and "" where there is no number or unit.

    `#kv.trigger<"every", 175, "", 0>` has the first of its clause's conditions (-1, not written: none).
    """

    name = "kv.trigger"
    kind: StringAttr = param_def(base(StringAttr))
    n: IntegerAttr = param_def()
    unit: StringAttr = param_def(base(StringAttr))
    cond: IntegerAttr = param_def()

    def __init__(self, kind: str, n: int = 0, unit: str = "", cond: int = -1) -> None:
        super().__init__(StringAttr(kind), IntegerAttr(n, i64), StringAttr(unit), IntegerAttr(cond, i64))

    @classmethod
    def parse_parameters(cls, parser: AttrParser) -> Sequence[Attribute]:
        with parser.in_angle_brackets():
            kind = parser.parse_str_literal()
            parser.parse_punctuation(",")
            n = parser.parse_integer()
            parser.parse_punctuation(",")
            unit = parser.parse_str_literal()
            cond = parser.parse_integer() if parser.parse_optional_punctuation(",") else -1
        return StringAttr(kind), IntegerAttr(n, i64), StringAttr(unit), IntegerAttr(cond, i64)

    def print_parameters(self, printer: Printer) -> None:
        with printer.in_angle_brackets():
            printer.print_string(f'"{self.kind.data}", {self.n.value.data}, "{self.unit.data}"')
            if self.cond.value.data >= 0:
                printer.print_string(f", {self.cond.value.data}")

    def verify(self) -> None:
        one_of("trigger", self.kind.data, TRIGGERS)
        n = self.n.value.data
        if n < 0 or (n == 0 and self.kind.data in ("every", "filled", "full")):
            raise VerifyException(f"{self.kind.data} needs a positive number, found {n}")
        if self.unit.data and self.kind.data != "filled":
            raise VerifyException(f"{self.kind.data} has no unit")
        if self.kind.data == "when" and self.cond.value.data < 0:
            raise VerifyException("when needs a condition")


@irdl_op_definition
class KeepOp(IRDLOperation):
    """What the rows of a class keep, and when that is decided; no trigger: nothing is ever dropped.

    `conds` are the conditions of triggers. `schedule` adds the order that the scores need and the phases in which the
    set may be decided; `memory` adds whether a row's length is bounded after the prompt and in decode.
    """

    name = "kv.keep"
    set = operand_def(base(SetType))
    conds = var_operand_def(SCALAR)
    losers = var_operand_def(base(LoserType))
    of = prop_def(FlatSymbolRefAttrConstr)
    triggers = prop_def(ArrayAttr[TriggerAttr])
    order = opt_prop_def(StringAttr)
    phases = opt_prop_def(ArrayAttr[StringAttr])
    prefill = opt_prop_def(StringAttr)
    decode = opt_prop_def(StringAttr)
    irdl_options = (AttrSizedOperandSegments(as_property=True),)
    assembly_format = (
        "$set `for` $of `at` $triggers (`if` $conds^)? (`else` $losers^)? (`order` $order^)? (`phases` $phases^)? "
        "(`prefill` $prefill^)? (`decode` $decode^)? attr-dict"
    )

    def __init__(
        self,
        of: str,
        value: SSAValue,
        triggers: Sequence[TriggerAttr],
        conds: Sequence[SSAValue] = (),
        losers: Sequence[SSAValue] = (),
    ) -> None:
        super().__init__(
            operands=[value, list(conds), list(losers)],
            properties={"of": SymbolRefAttr(of), "triggers": ArrayAttr(list(triggers))},
        )

    def verify_(self) -> None:
        _verify_decision(self)
        union = self.set.owner
        for term in union.terms if isinstance(union, UnionOp) else ():
            if isinstance(term.owner, RegionOp) and term.owner.kind.data in OF_QUERY:
                raise VerifyException(f"{term.owner.kind.data} is about the query that reads, and nobody reads here")
        for bound in (self.prefill, self.decode):
            if bound is not None:
                one_of("bound", bound.data, ("bounded", "grows"))


@irdl_op_definition
class PickOp(IRDLOperation):
    """A choice that later layers read, dropping nothing: `kv.pick "t" %3 for @"layers 2" at [...]`."""

    name = "kv.pick"
    label = prop_def(StringAttr)
    set = operand_def(base(SetType))
    conds = var_operand_def(SCALAR)
    of = prop_def(FlatSymbolRefAttrConstr)
    triggers = prop_def(ArrayAttr[TriggerAttr])
    order = opt_prop_def(StringAttr)
    phases = opt_prop_def(ArrayAttr[StringAttr])
    assembly_format = (
        "$label $set `for` $of `at` $triggers (`if` $conds^)? (`order` $order^)? (`phases` $phases^)? attr-dict"
    )

    def __init__(
        self, label: str, of: str, value: SSAValue, triggers: Sequence[TriggerAttr], conds: Sequence[SSAValue] = ()
    ) -> None:
        super().__init__(
            operands=[value, list(conds)],
            properties={"label": StringAttr(label), "of": SymbolRefAttr(of), "triggers": ArrayAttr(list(triggers))},
        )

    def verify_(self) -> None:
        _verify_decision(self)


@irdl_op_definition
class AttendOp(IRDLOperation):
    """What queries of some rows read, from a forward at which a trigger fires.

    `kv.attend %3 for @"reads all" at [...]`; no trigger: every forward. `schedule` adds the phases in which the set
    may be computed.
    """

    name = "kv.attend"
    set = operand_def(base(SetType))
    conds = var_operand_def(SCALAR)
    of = prop_def(FlatSymbolRefAttrConstr)
    triggers = prop_def(ArrayAttr[TriggerAttr])
    phases = opt_prop_def(ArrayAttr[StringAttr])
    assembly_format = "$set `for` $of `at` $triggers (`if` $conds^)? (`phases` $phases^)? attr-dict"

    def __init__(
        self, of: str, value: SSAValue, triggers: Sequence[TriggerAttr], conds: Sequence[SSAValue] = ()
    ) -> None:
        super().__init__(
            operands=[value, list(conds)],
            properties={"of": SymbolRefAttr(of), "triggers": ArrayAttr(list(triggers))},
        )

    def verify_(self) -> None:
        _verify_decision(self)
        if unfit := {t.kind.data for t in self.triggers} & {"filled", "full"}:
            raise VerifyException(f"{min(unfit)} is about what is kept")


Decision = KeepOp | PickOp
AnySet = KeepOp | PickOp | AttendOp


def _verify_decision(op: AnySet) -> None:
    used = {t.cond.value.data for t in op.triggers if t.cond.value.data >= 0}
    if used != set(range(len(op.conds))):
        raise VerifyException(f"triggers name {len(used)} conditions of {len(op.conds)}")
    if not isinstance(op, AttendOp) and op.order is not None:
        one_of("order", op.order.data, ("any", "position"))
    for phase in op.phases or ():
        one_of("phase", phase.data, PHASES)
