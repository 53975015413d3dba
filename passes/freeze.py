"""Freeze: a scheduled kv module as the frozen plan that everything at run time reads.

Takes a module after all passes, and the model's facts; gives `PolicyPlan`. Guarantees: equal modules and facts
give equal plans; the digest covers everything in the plan; nothing unused is in it.
"""

from __future__ import annotations

import hashlib
from fractions import Fraction

from xdsl.dialects.builtin import IntegerAttr, ModuleOp
from xdsl.ir import Operation, SSAValue

from kvcompile.dsl import dialect as kv
from kvcompile.dsl.dialect_counts import PartOp, ShareOp
from kvcompile.dsl.dialect_losers import LoserOp
from kvcompile.dsl.dialect_policy import ClassOp, PositionsOp, ScheduleOp, SiteOp, StateOp, UnitOp, UpdateOp
from kvcompile.dsl.dialect_reads import PREFIX, ReadersOp
from kvcompile.dsl.dialect_sets import AttendOp, Decision, KeepOp, PickOp, RegionOp, TopOp, TriggerAttr
from kvcompile.dsl.dialect_sources import EmaOp, LearnedOp, NoiseOp, RegroupOp, SimOp
from kvcompile.dsl.lower_heads import below
from kvcompile.dsl.module import ops_of, policy_of
from kvcompile.kernels.plan import (
    ClassPlan,
    Count,
    Expr,
    Loser,
    ModelFacts,
    PolicyPlan,
    QuerySource,
    ReadPlan,
    ReadRule,
    Region,
    Selection,
    Share,
    StatePlan,
    Term,
    Trigger,
    UnitPlan,
    Update,
    words_of,
)
from kvcompile.passes.carried import decisions, hidden_states, read_states, shares_of, terms_of


def freeze(module: ModuleOp, facts: ModelFacts, params: tuple[tuple[str, str], ...] = ()) -> PolicyPlan:
    """The plan of a module that is bound and scheduled. ValueError for one that is not."""
    policy = policy_of(module)
    ops = list(ops_of(module))
    schedules = [op for op in ops if isinstance(op, ScheduleOp)]
    sites = sorted((op for op in ops if isinstance(op, SiteOp)), key=lambda op: op.layer.value.data)
    if len(schedules) != 1 or [op.layer.value.data for op in sites] != list(range(facts.layers)):
        raise ValueError("the module is not bound to this model, or not scheduled")
    frozen = _Freezing(module, facts.group)
    classes = frozen.classes()
    reads = frozen.reads()
    first = {op.sym_name.data: frozen.first_of(op.sym_name.data) for op in ops if isinstance(op, ClassOp)}
    schedule = schedules[0]
    fields = {
        "name": policy.sym_name.data,
        "facts": facts,
        "classes": classes,
        "class_of": _class_of(sites, first, facts),
        "counts": tuple(frozen.counts),
        "shares": tuple(frozen.shares),
        "states": frozen.states(),
        "updates": frozen.updates(),
        "units": frozen.units_of(classes, reads),
        "chunk": _int(schedule.chunk) or None,
        "peek": _int(schedule.peek),
        "query_window": _int(schedule.window),
        "page": _int(schedule.page),
        "params": params,
        "picks": frozen.slots,
        "scalars": frozen.scalars,
        "compact": any(isinstance(op, PositionsOp) for op in ops),
        "rotates": any(isinstance(op, PositionsOp) for op in ops) or frozen.reads_raw_keys,
        "reads": reads,
        "read_of": _read_of(sites, reads, facts),
        "off": tuple(op.layer.value.data for op in sites if not op.classes),
    }
    text = policy.digest.data + repr(sorted(fields.items()))
    return PolicyPlan(digest=hashlib.sha256(text.encode()).hexdigest()[:16], **fields)  # type: ignore[arg-type]


def _class_of(sites: list[SiteOp], first: dict[str, int], facts: ModelFacts) -> tuple[tuple[int, ...], ...]:
    """By layer and KV head. A layer that is off has no heads; what stands there is the class of some other."""
    rows = [tuple(first[ref.root_reference.data] for ref in op.classes) for op in sites]
    some = next(row[0] for row in rows if row)
    return tuple(row or (some,) * facts.kv_heads for row in rows)


def _read_of(sites: list[SiteOp], reads: tuple[ReadPlan, ...], facts: ModelFacts) -> tuple[tuple[int, ...], ...]:
    """By layer and KV head; empty where every head reads all."""
    names = [read.name for read in reads]

    def index(name: str | None) -> int:
        short = name.removeprefix(PREFIX) if name is not None else None
        return names.index(short) if short in names else -1

    rows = [tuple(index(name) for name in op.reading()) or (-1,) * facts.kv_heads for op in sites]
    return tuple(rows) if reads else ()


class _Freezing:
    """Expressions once per value; counts once per meaning."""

    def __init__(self, module: ModuleOp, group: int) -> None:
        self.module = module
        self.group = group
        self.ops = list(ops_of(module))
        self.decisions = decisions(module)
        self.counts: list[Count] = []
        self.exprs: dict[SSAValue, Expr] = {}
        self.emas: list[EmaOp] = []
        picks = dict.fromkeys(op.label.data for op in self.ops if isinstance(op, PickOp))
        self.picks = {label: slot for slot, label in enumerate(picks)}
        self.slots = len(self.picks)
        self.share_ops = shares_of(module)
        self.shares = [self.share(op) for op in self.share_ops]

    @property
    def scalars(self) -> int:
        return len(self.emas)

    @property
    def reads_raw_keys(self) -> bool:
        return any(expr.op == "field" and expr.value == "raw.k" for expr in self.exprs.values())

    # ------------------------------------------------------------ classes

    def first_of(self, name: str) -> int:
        """Index of the plan's class that inserts the entries of these rows."""
        rows = [op.of.root_reference.data if op is not None else None for op in self.decisions]
        index = rows.index(name)
        return index - 1 if isinstance(self.decisions[index], PickOp) else index

    def classes(self) -> tuple[ClassPlan, ...]:
        found: list[ClassPlan] = []
        for index, decision in enumerate(self.decisions):
            if decision is None:
                after = self.decisions[index + 1]
                assert after is not None
                rows = after.of.root_reference.data
                found.append(ClassPlan(rows, (Region("all"),), (), by_position=_ordered(after)))
                continue
            found.append(self.klass(index, decision, [cls.name for cls in found]))
        return tuple(found)

    def klass(self, index: int, decision: Decision, taken: list[str]) -> ClassPlan:
        name = decision.of.root_reference.data
        first = self.first_of(name)
        slot: int | None = None
        if isinstance(decision, PickOp):
            slot = self.picks[decision.label.data]
            title = f"{name} pick {decision.label.data}"
        else:
            again = sum(1 for other in taken if other == name or other.startswith(f"{name} #"))
            title = f"{name} #{again + 1}" if again else name
        below_ = [op for operand in decision.operands for op in below(operand)]
        states = tuple(dict.fromkeys(op.state.data for op in below_ if isinstance(op, kv.ReadOp)))
        order = [op.label.data for op in self.ops if isinstance(op, StateOp)]
        conds = [self.expr(cond) for cond in decision.conds]
        losers = [value.owner for value in decision.losers] if isinstance(decision, KeepOp) else []
        return ClassPlan(
            title,
            tuple(self.term(term, slot) for term in terms_of(decision)),
            tuple(_trigger(trigger, conds) for trigger in decision.triggers),
            tuple(sorted(states, key=order.index)),
            by_position=_ordered(decision),
            losers=tuple(self.loser(op) for op in losers if isinstance(op, LoserOp)),
            rows_of=first if first != index else None,
            only_picks=slot is not None,
        )

    def reads(self) -> tuple[ReadPlan, ...]:
        """What each readers' rules are, picks first; readers without any read all."""
        found: list[ReadPlan] = []
        for readers in self.ops:
            if not isinstance(readers, ReadersOp):
                continue
            name = readers.sym_name.data
            mine = [op for op in self.ops if isinstance(op, PickOp | AttendOp) and op.of.root_reference.data == name]
            mine.sort(key=lambda op: isinstance(op, AttendOp))
            if mine:
                found.append(ReadPlan(name.removeprefix(PREFIX), tuple(self.rule(op) for op in mine)))
        return tuple(found)

    def rule(self, op: PickOp | AttendOp) -> ReadRule:
        conds = [self.expr(cond) for cond in op.conds]
        return ReadRule(
            tuple(self.term(term, None) for term in terms_of(op)),
            tuple(_trigger(trigger, conds) for trigger in op.triggers),
            self.picks[op.label.data] if isinstance(op, PickOp) else None,
        )

    def term(self, op: Operation, slot: int | None) -> Term:
        if isinstance(op, RegionOp):
            return Region(
                op.kind.data,
                self.count(op.count) if op.count is not None else None,
                op.unit.data if op.unit is not None else None,
                _int(op.seed) if op.seed is not None else 0,
                self.picks[op.pick.data] if op.pick is not None else None,
                op.span.data if op.span is not None else "",
            )
        assert isinstance(op, TopOp)
        layers = op.layers.data if op.layers is not None else "each"
        if layers == "shared":
            slot, self.slots = self.slots, self.slots + 1
        return Selection(
            rank=op.rank.data,  # type: ignore[arg-type]
            score=self.expr(op.score),
            count=self.count(op.count) if op.count is not None else None,
            fraction=kv.rational(op.fraction) if op.fraction is not None else None,
            scope=op.scope.data,  # type: ignore[arg-type]
            floor=kv.rational(op.floor) if op.floor is not None else Fraction(0),
            unit=op.unit.data if op.unit is not None else None,
            observed=_int(op.observed) if op.observed is not None else 0,
            layers=layers,  # type: ignore[arg-type]
            sharing=_int(op.sharing) if op.sharing is not None else 1,
            pick=slot,
            whole=op.whole.data if op.whole is not None else None,
        )

    def loser(self, op: LoserOp) -> Loser:
        fn = op.fn.data if op.fn is not None else ""
        return Loser(
            op.kind.data,  # type: ignore[arg-type]
            "pos" if fn == "distance" else fn,
            op.of.data if op.of is not None else "",  # type: ignore[arg-type]
            self.expr(op.when) if op.when is not None else None,
            self.expr(op.weight) if op.weight is not None else None,
            kv.rational(op.part) if op.part is not None else Fraction(0),
        )

    # ------------------------------------------------------------ numbers and formulas

    def count(self, value: SSAValue) -> int:
        op = value.owner
        assert isinstance(op, kv.CountOp)
        count = Count(op.label.data, self.expr(op.amount))
        if count not in self.counts:
            self.counts.append(count)
        return self.counts.index(count)

    def share(self, op: ShareOp) -> Share:
        return Share(
            op.label.data,
            self.expr(op.total),
            op.by.data,  # type: ignore[arg-type]
            kv.rational(op.beta) if op.beta is not None else Fraction(1),
            self.expr(op.score) if op.score is not None else None,
            tuple(kv.rational(weight) for weight in op.weights or ()),
            tuple(self.count(other) for other in op.reserve),
            _int(op.sharing) if op.sharing is not None else 1,
        )

    def expr(self, value: SSAValue) -> Expr:
        if value not in self.exprs:
            op = value.owner
            assert isinstance(op, kv.ExprOp)
            if isinstance(op, PartOp):
                assert isinstance(op.share.owner, ShareOp)
                self.exprs[value] = Expr("share", value=self.share_ops.index(op.share.owner))
                return self.exprs[value]
            if isinstance(op, EmaOp):
                self.emas.append(op)
                fact: object = (len(self.emas) - 1, kv.rational(op.beta))
                kind = "ema"
            else:
                kind, fact = _node(op)
            self.exprs[value] = Expr(kind, tuple(self.expr(arg) for arg in op.operands), fact, kv.axes_of(value))
        return self.exprs[value]

    # ------------------------------------------------------------ states and units

    def states(self) -> tuple[StatePlan, ...]:
        """The states that something reads, in the order declared, then the compiler's own."""
        read = read_states(self.module)
        first = {"@count": 1, "@read": (1 << self.group) - 1}
        own = [Expr("const", value=Fraction(first.get(name, 0))) for name in hidden_states(self.module)]
        return tuple(
            StatePlan(op.label.data, self.expr(op.init), self.expr(op.add) if op.add is not None else None)
            for op in self.ops
            if isinstance(op, StateOp) and op.label.data in read
        ) + tuple(StatePlan(name, init, None) for name, init in zip(hidden_states(self.module), own, strict=True))

    def updates(self) -> tuple[Update, ...]:
        """What changes these states, in the order written."""
        read = read_states(self.module)
        found: list[Update] = []
        for op in self.ops:
            if not isinstance(op, UpdateOp):
                continue
            assigns = [
                (name.data, self.expr(value))
                for name, value in zip(op.states, op.values, strict=True)
                if name.data in read
            ]
            if assigns:
                where = self.expr(op.where) if op.where is not None else None
                found.append(Update(op.event.data, tuple(assigns), where))  # type: ignore[arg-type]
        return tuple(found)

    def units_of(self, classes: tuple[ClassPlan, ...], reads: tuple[ReadPlan, ...]) -> tuple[UnitPlan, ...]:
        """The units that some region, selection, score or trigger names, with the landmarks that are read."""
        terms = [item for cls in classes for item in (*cls.keep, *cls.triggers)]
        terms += [term for read in reads for rule in read.rules for term in rule.terms]
        named = {item.unit for item in terms if item.unit is not None}
        named |= {item.whole for item in terms if isinstance(item, Selection) and item.whole is not None}
        marks = self.landmarks([item.score for item in terms if isinstance(item, Selection)])
        return tuple(
            UnitPlan(
                op.label.data,
                _int(op.size),
                _int(op.offset),
                tuple((name.data, marks[op.label.data, name.data]) for name in op.names
                      if (op.label.data, name.data) in marks),
                op.every,
            )
            for op in self.ops
            if isinstance(op, UnitOp) and (op.label.data in named or any(unit == op.label.data for unit, _ in marks))
        )  # fmt: skip

    def landmarks(self, todo: list[Expr]) -> dict[tuple[str, str], Expr]:
        """The landmarks that formulas read, and those that these are made of."""
        made = {
            (op.label.data, name.data): value
            for op in self.ops
            if isinstance(op, UnitOp)
            for name, value in zip(op.names, op.landmarks, strict=True)
        }
        found: dict[tuple[str, str], Expr] = {}
        while todo:
            for node in todo.pop().walk():
                if node.op == "landmark" and words_of(node) not in found:
                    found[words_of(node)] = self.expr(made[words_of(node)])
                    todo.append(found[words_of(node)])
        return found


def _node(op: kv.ExprOp) -> tuple[str, object]:
    """Kind and value of a plan's expression node, see `plan.Expr`."""
    if isinstance(op, kv.SourcedOp):
        return _sourced(op)
    match op:
        case kv.ConstOp():
            return "const", kv.rational(op.value)
        case kv.ScalarOp() | kv.FieldOp():
            return op.name.removeprefix("kv."), op.what.data
        case LearnedOp():
            return "learned", op.label.data
        case RegroupOp():
            return "regroup", (op.unit.data, op.into.data)
        case SimOp():
            return "sim", None
        case kv.ReadOp():
            return "state", op.state.data
        case kv.LandmarkOp():
            return "landmark", (op.unit.data, op.landmark.data)
        case kv.ReduceOp():
            return "reduce", (op.fn.data, op.axis.data)
        case kv.PoolOp():
            return "pool", (op.fn.data, _int(op.width))
        case kv.UnaryOp() | kv.BinaryOp() | kv.PairOp():
            return op.name.removeprefix("kv."), op.fn.data
    raise ValueError(f"{op.name} is no expression")


def _sourced(op: kv.SourcedOp) -> tuple[str, object]:
    part = kv.rational(op.part) if op.part is not None else Fraction(0)
    source = QuerySource(op.source.data, _int(op.width), part)  # type: ignore[arg-type]
    match op:
        case kv.EvidenceOp():
            return "evidence", (op.what.data, source)
        case NoiseOp():
            return "noise", (_int(op.seed), source)
    return "queries", source


def _ordered(decision: Decision) -> bool:
    return decision.order is not None and decision.order.data == "position"


def _trigger(attr: TriggerAttr, conds: list[Expr]) -> Trigger:
    n, cond = _int(attr.n), _int(attr.cond)
    return Trigger(attr.kind.data, n or None, attr.unit.data or None, conds[cond] if cond >= 0 else None)  # type: ignore[arg-type]


def _int(attr: IntegerAttr) -> int:
    return int(attr.value.data)
