"""The `kv` dialect, facts: what a policy declares, its classes of rows, their sites, and the policy itself.

One `kv.policy` holds expressions, sets and facts in one flat block; classes are named by symbol.
Guarantees: the policy verifies that every state, landmark, unit and class that is named is declared.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from xdsl.dialects.builtin import (
    ArrayAttr,
    FlatSymbolRefAttr,
    IntegerAttr,
    StringAttr,
    SymbolNameConstraint,
    SymbolRefAttr,
    UnitAttr,
    i64,
)
from xdsl.ir import Attribute, Block, Dialect, Operation, Region, SSAValue
from xdsl.irdl import (
    AttrSizedOperandSegments,
    IRDLOperation,
    irdl_op_definition,
    operand_def,
    opt_operand_def,
    opt_prop_def,
    prop_def,
    region_def,
    traits_def,
    var_operand_def,
)
from xdsl.traits import IsolatedFromAbove, NoTerminator, SymbolOpInterface
from xdsl.utils.exceptions import VerifyException

from kvcompile.dsl import dialect as kv
from kvcompile.dsl import dialect_sources as sources
from kvcompile.dsl.dialect import INT, ExprType, axes_of, one_of, rational
from kvcompile.dsl.dialect_counts import BytesOp, PartOp, ShareOp, ShareType
from kvcompile.dsl.dialect_losers import LoserOp, LoserType
from kvcompile.dsl.dialect_reads import NamesRows, OffOp, ReadersOp
from kvcompile.dsl.dialect_sets import AttendOp, KeepOp, PickOp, RegionOp, SetType, TopOp, TriggerAttr, UnionOp

PROBES = ("induction", "echo")


@irdl_op_definition
class StateOp(IRDLOperation):
    """A float32 per entry: starts at `init`, grows by `add`, a sum over queries that reads no state.

    `kv.state "acc" init %0 add %1 : !kv.expr<""> , !kv.expr<"i">`
    """

    name = "kv.state"
    label = prop_def(StringAttr)
    init = operand_def(ExprType)
    add = opt_operand_def(ExprType)
    assembly_format = "$label `init` $init (`add` $add^ `:` type($add))? `from` type($init) attr-dict"

    def __init__(self, label: str, init: SSAValue, add: SSAValue | None) -> None:
        super().__init__(operands=[init, add], properties={"label": StringAttr(label)})

    def verify_(self) -> None:
        if axes_of(self.init) not in ("", "i"):
            raise VerifyException(f"a state starts from one value per entry, not from axes '{axes_of(self.init)}'")
        if self.add is not None and axes_of(self.add) != "i":
            raise VerifyException(f"a state grows by one value per entry, found axes '{axes_of(self.add)}'")


@irdl_op_definition
class UpdateOp(IRDLOperation):
    """States that change on an event, left to right: `kv.update "attend" ["seen"] %0 : !kv.expr<"i"> where %1 : ...`.

    `attend` runs once per query in position order, `insert` for new entries, `step` after the reads of a step.
    """

    name = "kv.update"
    event = prop_def(StringAttr)
    states = prop_def(ArrayAttr[StringAttr])
    values = var_operand_def(ExprType)
    where = opt_operand_def(ExprType)
    irdl_options = (AttrSizedOperandSegments(as_property=True),)
    assembly_format = "$event $states $values `:` type($values) (`where` $where^ `:` type($where))? attr-dict"

    def __init__(self, event: str, assigns: Sequence[tuple[str, SSAValue]], where: SSAValue | None = None) -> None:
        properties: dict[str, Attribute] = {
            "event": StringAttr(event),
            "states": ArrayAttr([StringAttr(name) for name, _ in assigns]),
        }
        super().__init__(operands=[[value for _, value in assigns], where], properties=properties)

    def verify_(self) -> None:
        one_of("event", self.event.data, ("attend", "insert", "step"))
        if not self.states or len(self.states) != len(self.values):
            raise VerifyException(f"{len(self.states)} states for {len(self.values)} values")
        for value in (*self.values, *((self.where,) if self.where is not None else ())):
            if axes_of(value) not in ("", "i"):
                raise VerifyException(f"a state changes by one value per entry, found axes '{axes_of(value)}'")


@irdl_op_definition
class UnitOp(IRDLOperation):
    """Units of a fixed size: `kv.unit "lot" size 1024 from 16 with ["klo"] %0 : !kv.expr<"ud">`.

    They overlap where one begins every `stride` positions; without it, every `size`.
    """

    name = "kv.unit"
    label = prop_def(StringAttr)
    size = prop_def(INT)
    stride = opt_prop_def(INT)
    offset = prop_def(INT)
    names = prop_def(ArrayAttr[StringAttr])
    landmarks = var_operand_def(ExprType)
    assembly_format = (
        "$label `size` $size (`stride` $stride^)? `from` $offset `with` $names ($landmarks^ `:` type($landmarks))? "
        "attr-dict"
    )

    def __init__(
        self,
        label: str,
        size: int,
        offset: int,
        landmarks: Sequence[tuple[str, SSAValue]],
        stride: int | None = None,
    ) -> None:
        properties: dict[str, Attribute] = {
            "label": StringAttr(label),
            "size": IntegerAttr(size, i64),
            "offset": IntegerAttr(offset, i64),
            "names": ArrayAttr([StringAttr(name) for name, _ in landmarks]),
        }
        if stride is not None:
            properties["stride"] = IntegerAttr(stride, i64)
        super().__init__(operands=[[value for _, value in landmarks]], properties=properties)

    @property
    def every(self) -> int:
        """Positions from the begin of a unit to that of the next."""
        return int((self.size if self.stride is None else self.stride).value.data)

    @property
    def overlaps(self) -> bool:
        """Whether an entry may be in more than one."""
        return self.every != self.size.value.data

    def verify_(self) -> None:
        if self.size.value.data < 1 or self.offset.value.data < 0:
            raise VerifyException("a unit has a positive size and starts at 0 or later")
        if not 1 <= self.every <= self.size.value.data:
            raise VerifyException(f"units begin every 1 to {self.size.value.data} positions, or some are in none")
        if len(self.names) != len(self.landmarks):
            raise VerifyException(f"{len(self.names)} names for {len(self.landmarks)} landmarks")
        for name, value in zip(self.names, self.landmarks, strict=True):
            if axes_of(value) not in ("u", "ud"):
                raise VerifyException(f"landmark {name.data} has axes '{axes_of(value)}', expected 'u' or 'ud'")


@irdl_op_definition
class HeadsOp(IRDLOperation):
    """One source of a head class: `kv.heads "retrieval" "table" "masks.tsv" top "3/10"`, `kv.heads "local" "rest" ""`.

    A `probe` names what is measured, and of how many random tokens where that is said.
    """

    name = "kv.heads"
    label = prop_def(StringAttr)
    kind = prop_def(StringAttr)
    source = prop_def(StringAttr)
    top = opt_prop_def(StringAttr)
    tokens = opt_prop_def(INT)
    assembly_format = "$label $kind $source (`top` $top^)? (`tokens` $tokens^)? attr-dict"

    def __init__(
        self, label: str, kind: str, source: str = "", top: Fraction | None = None, tokens: int | None = None
    ) -> None:
        properties: dict[str, Attribute] = {
            "label": StringAttr(label),
            "kind": StringAttr(kind),
            "source": StringAttr(source),
        }
        if top is not None:
            properties["top"] = StringAttr(str(top))
        if tokens is not None:
            properties["tokens"] = IntegerAttr(tokens, i64)
        super().__init__(properties=properties)

    def verify_(self) -> None:
        kind = self.kind.data
        one_of("head source", kind, ("table", "probe", "same", "rest"))
        if self.top is not None and not 0 <= rational(self.top) <= 1:
            raise VerifyException(f"top {self.top.data} is not between 0 and 1")
        if kind == "probe":
            one_of("probe", self.source.data, PROBES)
        if (kind == "probe" and self.top is None) or (self.tokens is not None and kind != "probe"):
            raise VerifyException("a probe has a part of the heads, and nothing else has tokens")


@irdl_op_definition
class ClassOp(NamesRows):
    """A class of rows, as its prefix says: `kv.class @local heads "local" layers array<i64: 2, -1>`.

    Without heads and layers: every row that no other class takes.
    """

    name = "kv.class"


@irdl_op_definition
class SiteOp(IRDLOperation):
    """The class of each KV head of one layer, once bound to a model: `kv.site 3 [@local, @retrieval]`.

    `reads [@"reads all", unit]`: the readers of each head, `unit` where it reads all; left out where all do. A layer
    that is off has no classes.
    """

    name = "kv.site"
    layer = prop_def(INT)
    classes = prop_def(ArrayAttr[FlatSymbolRefAttr])
    readers = opt_prop_def(ArrayAttr[FlatSymbolRefAttr | UnitAttr])
    assembly_format = "$layer $classes (`reads` $readers^)? attr-dict"

    def __init__(self, layer: int, classes: Sequence[str], readers: Sequence[str | None] = ()) -> None:
        refs = ArrayAttr([SymbolRefAttr(name) for name in classes])
        properties: dict[str, Attribute] = {"layer": IntegerAttr(layer, i64), "classes": refs}
        if any(name is not None for name in readers):
            properties["readers"] = ArrayAttr([UnitAttr() if name is None else SymbolRefAttr(name) for name in readers])
        super().__init__(properties=properties)

    def reading(self) -> list[str | None]:
        """The readers of each KV head, None where it reads all."""
        refs = self.readers if self.readers is not None else ArrayAttr([UnitAttr() for _ in self.classes])
        return [None if isinstance(ref, UnitAttr) else ref.root_reference.data for ref in refs]

    def verify_(self) -> None:
        if self.readers is not None and len(self.readers) != len(self.classes):
            raise VerifyException(f"{len(self.readers)} readers for {len(self.classes)} heads")


@irdl_op_definition
class PositionsOp(IRDLOperation):
    """What a key is rotated by: `kv.positions "compact"` is its place in the row; without the op, its position."""

    name = "kv.positions"
    mode = prop_def(StringAttr)
    assembly_format = "$mode attr-dict"

    def __init__(self, mode: str) -> None:
        super().__init__(properties={"mode": StringAttr(mode)})

    def verify_(self) -> None:
        one_of("positions", self.mode.data, ("compact",))


@irdl_op_definition
class ScheduleOp(IRDLOperation):
    """How forwards run: piece size (0: the whole prompt), peeked tokens, newest queries kept, tokens a page."""

    name = "kv.schedule"
    chunk = prop_def(INT)
    peek = prop_def(INT)
    window = prop_def(INT)
    page = prop_def(INT)
    assembly_format = "`chunk` $chunk `peek` $peek `window` $window `page` $page attr-dict"

    def __init__(self, chunk: int, peek: int, window: int, page: int) -> None:
        values = {"chunk": chunk, "peek": peek, "window": window, "page": page}
        super().__init__(properties={name: IntegerAttr(value, i64) for name, value in values.items()})

    def verify_(self) -> None:
        page = self.page.value.data
        if page < 1 or page & (page - 1):
            raise VerifyException(f"page of {page} tokens is not a power of two")
        if min(self.chunk.value.data, self.peek.value.data, self.window.value.data) < 0:
            raise VerifyException("a schedule has no negative sizes")


@irdl_op_definition
class PolicyOp(IRDLOperation):
    """A policy: `kv.policy @snapkv digest "..." { ... }`."""

    name = "kv.policy"
    sym_name = prop_def(SymbolNameConstraint())
    digest = prop_def(StringAttr)
    body = region_def("single_block")
    traits = traits_def(NoTerminator(), SymbolOpInterface(), IsolatedFromAbove())
    assembly_format = "$sym_name `digest` $digest $body attr-dict"

    def __init__(self, name: str, digest: str, body: Region | None = None) -> None:
        super().__init__(
            properties={"sym_name": StringAttr(name), "digest": StringAttr(digest)},
            regions=[body or Region(Block())],
        )

    def verify_(self) -> None:
        ops = list(self.body.block.ops)
        classes = [op.sym_name.data for op in ops if isinstance(op, ClassOp)]
        readers = [op.sym_name.data for op in ops if isinstance(op, ReadersOp)]
        for symbols in (classes, readers):
            if len(set(symbols)) != len(symbols):
                raise VerifyException(f"a class is there twice: {', '.join(sorted(symbols))}")
        if sum(isinstance(op, PositionsOp) for op in ops) > 1:
            raise VerifyException("positions are said once")
        states = {op.label.data for op in ops if isinstance(op, StateOp)}
        units = {op.label.data: op for op in ops if isinstance(op, UnitOp)}
        picks = {op.label.data for op in ops if isinstance(op, PickOp)}
        for op in ops:
            _check_rows(op, classes, readers)
            _check_units(op, units)
            match op:
                case kv.ReadOp() if op.state.data not in states:
                    raise VerifyException(f"undeclared state '{op.state.data}'")
                case UpdateOp() if lost := {name.data for name in op.states} - states:
                    raise VerifyException(f"undeclared states {', '.join(sorted(lost))}")
                case RegionOp() if op.pick is not None and op.pick.data not in picks:
                    raise VerifyException(f"undeclared pick '{op.pick.data}'")
                case _:
                    pass


def _check_rows(op: Operation, classes: list[str], readers: list[str]) -> None:
    """The classes and readers that an operation is about are declared."""
    match op:
        case KeepOp() if op.of.root_reference.data not in classes:
            raise VerifyException(f"a set of an undeclared class '{op.of.root_reference.data}'")
        case AttendOp() if op.of.root_reference.data not in readers:
            raise VerifyException(f"a set of undeclared readers '{op.of.root_reference.data}'")
        case PickOp() if op.of.root_reference.data not in (*classes, *readers):
            raise VerifyException(f"a set of an undeclared class '{op.of.root_reference.data}'")
        case SiteOp() if missing := {ref.root_reference.data for ref in op.classes} - set(classes):
            raise VerifyException(f"site of undeclared classes {', '.join(sorted(missing))}")
        case SiteOp() if lost := {name for name in op.reading() if name is not None} - set(readers):
            raise VerifyException(f"site of undeclared readers {', '.join(sorted(lost))}")
        case _:
            pass


def _check_units(op: Operation, units: dict[str, UnitOp]) -> None:
    """The units and landmarks that an operation names are declared."""
    match op:
        case kv.LandmarkOp() | RegionOp():
            named = [op.unit]
        case TopOp():
            named = [op.unit, op.whole]
        case sources.RegroupOp():
            named = [op.unit, op.into]
        case _:
            return
    if unknown := [unit.data for unit in named if unit is not None and unit.data not in units]:
        raise VerifyException(f"undeclared unit '{unknown[0]}'")
    if isinstance(op, kv.LandmarkOp):
        _check_landmark(op, units[op.unit.data])


def _check_landmark(op: kv.LandmarkOp, unit: UnitOp) -> None:
    declared = {name.data: axes_of(value) for name, value in zip(unit.names, unit.landmarks, strict=True)}
    if declared.get(op.landmark.data) != axes_of(op.res):
        raise VerifyException(f"unit '{op.unit.data}' has no landmark '{op.landmark.data}' of these axes")


KV = Dialect(
    "kv",
    [
        *(kv.ConstOp, kv.ScalarOp, kv.FieldOp, kv.EvidenceOp, kv.ReadOp, kv.LandmarkOp, kv.ReduceOp, kv.PoolOp),
        *(kv.UnaryOp, kv.BinaryOp, kv.PairOp, kv.CountOp, BytesOp, ShareOp, PartOp),
        *(sources.QueriesOp, sources.NoiseOp, sources.LearnedOp, sources.RegroupOp, sources.SimOp, sources.EmaOp),
        *(RegionOp, TopOp, UnionOp, StateOp, UpdateOp, UnitOp, HeadsOp, ClassOp, SiteOp, LoserOp, KeepOp, PickOp),
        *(ReadersOp, AttendOp, OffOp, PositionsOp, ScheduleOp, PolicyOp),
    ],
    [kv.ExprType, kv.CountType, ShareType, SetType, LoserType, TriggerAttr],
)
