"""Memory: whether rows stop growing, and how long they get.

Takes a scheduled kv module; says of every `kv.keep` whether a row is bounded after the prompt and in decode.
`bounds` gives the numbers for a plan and a prompt. Guarantees: no row is ever longer than its bound.
"""

from __future__ import annotations

from dataclasses import dataclass

from xdsl.dialects.builtin import ModuleOp, StringAttr
from xdsl.ir import SSAValue

from kvcompile.dsl import dialect as kv
from kvcompile.dsl.dialect_sets import KeepOp, RegionOp, TopOp, UnionOp
from kvcompile.dsl.module import ops_of
from kvcompile.kernels.counts import layer_counts, layer_shares, scalars_of
from kvcompile.kernels.plan import ClassPlan, PolicyPlan, Region, Selection, Trigger
from kvcompile.passes.context import Context
from kvcompile.passes.residents import forwards, groups

# ---------------------------------------------------------------- the pass


@dataclass(frozen=True, slots=True)
class Memory:
    """Marks what grows; no options."""

    name: str = "memory"

    def __call__(self, module: ModuleOp, context: Context) -> None:
        for keep in ops_of(module):
            if not isinstance(keep, KeepOp):
                continue
            union = keep.set.owner
            assert isinstance(union, UnionOp)
            terms: list[object] = [term.owner for term in union.terms]
            phases = {phase.data for phase in keep.phases or ()}
            everything = any(isinstance(term, RegionOp) and term.kind.data == "all" for term in terms)
            evicts = "prefill.end" in phases and not everything
            stays = "step" in phases and all(_steady(term, terms) for term in terms)
            keep.prefill = StringAttr("bounded" if evicts else "grows")
            keep.decode = StringAttr("bounded" if stays else "grows")


def _steady(term: object, terms: list[object]) -> bool:
    """Whether a term of a union takes no more entries the longer decode runs."""
    frozen = any(isinstance(other, RegionOp) and other.kind.data == "frozen" for other in terms)
    if isinstance(term, RegionOp):
        return term.kind.data in ("sink", "recent", "prompt", "frozen", "newest") and _fixed(term.count)
    assert isinstance(term, TopOp)
    return not frozen and term.unit is None and term.fraction is None and _fixed(term.count)


def _fixed(count: SSAValue | None) -> bool:
    """Whether a count stays what it is while decode runs."""
    todo = [count] if count is not None else []
    while todo:
        owner = todo.pop().owner
        if isinstance(owner, kv.ScalarOp) and owner.what.data != "prompt":
            return False
        todo += owner.operands if isinstance(owner, kv.ExprOp | kv.CountOp) else ()
    return True


# ---------------------------------------------------------------- numbers


@dataclass(frozen=True, slots=True)
class ClassBound:
    """Entries of the rows of one class, for one prompt.

    after_prefill: the longest row may hold; step_cap: the same after any step's trigger, None where it grows;
    overshoot: entries that may pile up in a row between two triggers of steps; layer_totals: what all rows of
    the class in a layer hold together after the prompt, by layer (0 where it has no heads).
    """

    name: str
    after_prefill: int
    step_cap: int | None
    overshoot: int
    layer_totals: tuple[int, ...]


def bounds(plan: PolicyPlan, prompt: int) -> tuple[ClassBound, ...]:
    """Bounds for every class, in the plan's order, after a prompt of `prompt` tokens."""
    parts = groups(plan, prompt)
    totals = [[0] * plan.facts.layers for _ in plan.classes]
    final: tuple[int, ...] = tuple(0 for _ in parts)
    for forward in forwards(plan, prompt, 0):
        final = forward.after
    longest = [0] * len(plan.classes)
    for group, total in zip(parts, final, strict=True):
        for layer in group.layers:
            totals[group.cls][layer] = total
        longest[group.cls] = max(longest[group.cls], _row(plan.classes[group.cls], total, group.heads, prompt))
    return tuple(
        ClassBound(cls.name, row, cap, _overshoot(plan, cls, cap), tuple(by_layer))
        for cls, row, by_layer in zip(plan.classes, longest, totals, strict=True)
        for cap in (_step_cap(plan, cls, prompt, max(by_layer)),)
    )


def _row(cls: ClassPlan, total: int, heads: int, prompt: int) -> int:
    """The longest of `heads` rows that hold `total` together: equal, but where heads compete."""
    if not cls.keeps_all and any(term.scope == "across" for term in cls.selections):
        return min(prompt, total)
    return -(-total // heads)


def _step_cap(plan: PolicyPlan, cls: ClassPlan, prompt: int, layer_total: int) -> int | None:
    if cls.keeps_all or not any(t.kind in ("step", "every", "full", "filled") for t in cls.triggers):
        return None
    frozen = any(isinstance(t, Region) and t.kind == "frozen" for t in cls.keep)
    cap = 0
    for term in cls.keep:
        if isinstance(term, Region):
            part = _region_cap(plan, term, prompt)
        else:
            part = _selection_cap(plan, term, frozen, prompt)
        if part is None:
            return None
        cap += part * (_widest(plan, cls) if isinstance(term, Selection) and term.scope == "across" else 1)
    return cap


def _widest(plan: PolicyPlan, cls: ClassPlan) -> int:
    """The most heads that a layer has of a class: competing, one of them may win all."""
    index = plan.classes.index(cls)
    return max(len(plan.heads(layer, index)) for layer in range(plan.facts.layers))


def _region_cap(plan: PolicyPlan, region: Region, prompt: int) -> int | None:
    match region.kind:
        case "sink" | "recent":
            return _count_cap(plan, region.count, prompt)
        case "prompt":
            return prompt
        case "newest":
            assert region.unit is not None
            return plan.unit(region.unit).size
        case "frozen":
            return 0
    return None


def _selection_cap(plan: PolicyPlan, term: Selection, frozen: bool, prompt: int) -> int | None:
    if frozen or term.unit is not None or term.count is None:
        return None
    return _count_cap(plan, term.count, prompt)


def _count_cap(plan: PolicyPlan, index: int | None, prompt: int) -> int | None:
    assert index is not None
    count = plan.counts[index]
    if scalars_of(count) - {"prompt"}:
        return None
    parts = layer_shares(plan, {"prompt": prompt}, {})
    return max(layer_counts(plan, index, {"prompt": prompt}, parts))


def _overshoot(plan: PolicyPlan, cls: ClassPlan, cap: int | None) -> int:
    if cls.keeps_all:
        return 0
    found = [_wait(plan, trigger, cap or 0) for trigger in cls.triggers]
    return min([n for n in found if n], default=0)


def _wait(plan: PolicyPlan, trigger: Trigger, cap: int) -> int:
    n = trigger.n or 0
    match trigger.kind:
        case "step":
            return 1
        case "every":
            return n
        case "full":
            return max(1, n - cap)
        case "filled":
            return n * plan.unit(trigger.unit).size if trigger.unit is not None else n
    return 0
