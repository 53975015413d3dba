"""Memory: whether rows stop growing.

Takes a scheduled kv module; says of every `kv.keep` whether it bounds the length of its rows after the prompt and in
decode. Guarantees: what is called bounded never grows with the number of steps; `residents` has the numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

from xdsl.dialects.builtin import ModuleOp, StringAttr
from xdsl.ir import SSAValue

from kvcompile.dsl import dialect as kv
from kvcompile.dsl.dialect_counts import ShareOp
from kvcompile.dsl.dialect_sets import KeepOp, RegionOp, TopOp, TriggerAttr, UnionOp
from kvcompile.dsl.module import ops_of
from kvcompile.passes.context import Context

_AT_THE_END = ("prefill.end", "chunk", "filled", "full")
_IN_STEPS = ("step", "every", "filled", "full", "when")
_STEADY = ("sink", "recent", "prompt", "frozen", "newest", "random")


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
            everything = any(isinstance(term, RegionOp) and term.kind.data == "all" for term in terms)
            sure = [trigger.kind.data for trigger in keep.triggers if _surely(keep, trigger)]
            evicts = any(kind in _AT_THE_END for kind in sure) and not everything
            stays = any(kind in _IN_STEPS for kind in sure) and all(_steady(term, terms) for term in terms)
            keep.prefill = StringAttr("bounded" if evicts else "grows")
            keep.decode = StringAttr("bounded" if stays else "grows")


def _surely(keep: KeepOp, trigger: TriggerAttr) -> bool:
    """Whether a trigger decides every row that has grown for long enough: no condition, or `len` above a number."""
    if trigger.cond.value.data < 0:
        return True
    cond = keep.conds[trigger.cond.value.data].owner
    if not isinstance(cond, kv.BinaryOp) or cond.fn.data not in (">", ">="):
        return False
    length, limit = cond.operands
    return isinstance(length.owner, kv.ScalarOp) and length.owner.what.data == "len" and _fixed(limit)


def _steady(term: object, terms: list[object]) -> bool:
    """Whether a term of a union takes no more entries the longer decode runs."""
    frozen = any(isinstance(other, RegionOp) and other.kind.data == "frozen" for other in terms)
    if isinstance(term, RegionOp):
        return term.kind.data in _STEADY and _fixed(term.count)
    assert isinstance(term, TopOp)
    return not frozen and term.unit is None and term.count is not None and _fixed(term.count)


def _fixed(count: SSAValue | None) -> bool:
    """Whether a count stays what it is while decode runs; a share is divided once for each prompt."""
    todo = [count] if count is not None else []
    while todo:
        owner = todo.pop().owner
        if isinstance(owner, kv.ScalarOp) and owner.what.data != "prompt":
            return False
        todo += owner.operands if isinstance(owner, kv.ExprOp | kv.CountOp) and not isinstance(owner, ShareOp) else ()
    return True
