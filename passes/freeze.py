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
from kvcompile.dsl.dialect_policy import ClassOp, ScheduleOp, SiteOp, StateOp, UnitOp
from kvcompile.dsl.dialect_sets import KeepOp, RegionOp, TopOp, TriggerAttr, UnionOp
from kvcompile.dsl.module import ops_of, policy_of
from kvcompile.kernels.plan import (
    ClassPlan,
    Count,
    Expr,
    ModelFacts,
    PolicyPlan,
    QuerySource,
    Region,
    Selection,
    Share,
    StatePlan,
    Term,
    Trigger,
    UnitPlan,
)


def freeze(module: ModuleOp, facts: ModelFacts, params: tuple[tuple[str, str], ...] = ()) -> PolicyPlan:
    """The plan of a module that is bound and scheduled. ValueError for one that is not."""
    policy = policy_of(module)
    ops = list(ops_of(module))
    schedules = [op for op in ops if isinstance(op, ScheduleOp)]
    sites = sorted((op for op in ops if isinstance(op, SiteOp)), key=lambda op: op.layer.value.data)
    if len(schedules) != 1 or [op.layer.value.data for op in sites] != list(range(facts.layers)):
        raise ValueError("the module is not bound to this model, or not scheduled")
    frozen = _Freezing(ops)
    keeps = {op.of.root_reference.data: op for op in ops if isinstance(op, KeepOp)}
    names = [op.sym_name.data for op in ops if isinstance(op, ClassOp)]
    classes = tuple(frozen.klass(name, keeps[name]) for name in names)
    schedule = schedules[0]
    fields = {
        "name": policy.sym_name.data,
        "facts": facts,
        "classes": classes,
        "class_of": tuple(tuple(names.index(ref.root_reference.data) for ref in op.classes) for op in sites),
        "counts": tuple(frozen.counts),
        "shares": tuple(frozen.shares),
        "states": frozen.states_of(classes),
        "units": frozen.units_of(classes),
        "chunk": _int(schedule.chunk) or None,
        "peek": _int(schedule.peek),
        "query_window": _int(schedule.window),
        "page": _int(schedule.page),
        "params": params,
    }
    text = policy.digest.data + repr(sorted(fields.items()))
    return PolicyPlan(digest=hashlib.sha256(text.encode()).hexdigest()[:16], **fields)  # type: ignore[arg-type]


class _Freezing:
    """Expressions once per value; counts once per meaning."""

    def __init__(self, ops: list[Operation]) -> None:
        self.ops = ops
        self.counts: list[Count] = []
        self.shares: list[Share] = []
        self.exprs: dict[SSAValue, Expr] = {}

    def klass(self, name: str, keep: KeepOp) -> ClassPlan:
        union = keep.set.owner
        assert isinstance(union, UnionOp)
        terms = tuple(self.term(term) for term in union.terms)
        scores = [node for term in terms if isinstance(term, Selection) for node in term.score.walk()]
        states = tuple(dict.fromkeys(str(node.value) for node in scores if node.op == "state"))
        triggers = tuple(_trigger(trigger) for trigger in keep.triggers)
        ordered = keep.order is not None and keep.order.data == "position"
        return ClassPlan(name, terms, triggers, states, ordered)

    def term(self, value: SSAValue) -> Term:
        op = value.owner
        if isinstance(op, RegionOp):
            count = self.count(op.count) if op.count is not None else None
            unit = op.unit.data if op.unit is not None else None
            return Region(op.kind.data, count, unit, _int(op.seed) if op.seed is not None else 0)
        assert isinstance(op, TopOp)
        return Selection(
            rank=op.rank.data,  # type: ignore[arg-type]
            score=self.expr(op.score),
            count=self.count(op.count) if op.count is not None else None,
            fraction=kv.rational(op.fraction) if op.fraction is not None else None,
            scope=op.scope.data,  # type: ignore[arg-type]
            floor=kv.rational(op.floor) if op.floor is not None else Fraction(0),
            unit=op.unit.data if op.unit is not None else None,
            observed=_int(op.observed) if op.observed is not None else 0,
        )

    def count(self, value: SSAValue) -> int:
        op = value.owner
        assert isinstance(op, kv.CountOp)
        expr = self.expr(op.amount)
        if op.share is not None and op.parameter is not None:
            reserve = tuple(self.count(other) for other in op.reserve)
            share = Share(op.label.data, expr, op.share.data, kv.rational(op.parameter), reserve=reserve)  # type: ignore[arg-type]
            if share not in self.shares:
                self.shares.append(share)
            expr = Expr("share", value=self.shares.index(share))
        count = Count(op.label.data, expr)
        if count not in self.counts:
            self.counts.append(count)
        return self.counts.index(count)

    def expr(self, value: SSAValue) -> Expr:
        if value not in self.exprs:
            op = value.owner
            assert isinstance(op, kv.ExprOp)
            kind, fact = _node(op)
            self.exprs[value] = Expr(kind, tuple(self.expr(arg) for arg in op.operands), fact, kv.axes_of(value))
        return self.exprs[value]

    def states_of(self, classes: tuple[ClassPlan, ...]) -> tuple[StatePlan, ...]:
        """The states that some score reads, in the order declared."""
        read = {state for cls in classes for state in cls.states}
        return tuple(
            StatePlan(op.label.data, self.expr(op.init), self.expr(op.add) if op.add is not None else None)
            for op in self.ops
            if isinstance(op, StateOp) and op.label.data in read
        )

    def units_of(self, classes: tuple[ClassPlan, ...]) -> tuple[UnitPlan, ...]:
        """The units that some region, selection or trigger names."""
        terms = [item for cls in classes for item in (*cls.keep, *cls.triggers)]
        named = {item.unit for item in terms if item.unit is not None}
        return tuple(
            UnitPlan(op.label.data, _int(op.size), _int(op.offset), self.landmarks(op))
            for op in self.ops
            if isinstance(op, UnitOp) and op.label.data in named
        )

    def landmarks(self, op: UnitOp) -> tuple[tuple[str, Expr], ...]:
        return tuple((name.data, self.expr(value)) for name, value in zip(op.names, op.landmarks, strict=True))


def _node(op: kv.ExprOp) -> tuple[str, object]:
    """Kind and value of a plan's expression node, see `plan.Expr`."""
    match op:
        case kv.ConstOp():
            return "const", kv.rational(op.value)
        case kv.ScalarOp():
            return "scalar", op.what.data
        case kv.FieldOp():
            return "field", op.what.data
        case kv.EvidenceOp():
            return "evidence", (op.what.data, QuerySource(op.source.data, _int(op.width)))  # type: ignore[arg-type]
        case kv.ReadOp():
            return "state", op.state.data
        case kv.LandmarkOp():
            return "landmark", (op.unit.data, op.landmark.data)
        case kv.ReduceOp():
            return "reduce", (op.fn.data, op.axis.data)
        case kv.PoolOp():
            return "pool", (op.fn.data, _int(op.width))
        case kv.UnaryOp():
            return "unary", op.fn.data
        case kv.BinaryOp():
            return "binary", op.fn.data
        case kv.PairOp():
            return "pair", op.fn.data
    raise ValueError(f"{op.name} is no expression")


def _trigger(attr: TriggerAttr) -> Trigger:
    n = _int(attr.n)
    return Trigger(attr.kind.data, n or None, attr.unit.data or None)  # type: ignore[arg-type]


def _int(attr: IntegerAttr) -> int:
    return int(attr.value.data)
