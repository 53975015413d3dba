"""Assisted decoding: which policies allow that tokens are tried and taken back, and which generate() is doing it.

A draft is several tokens in one forward that stand for as many decode steps; `KvCache.crop` takes back what was
rejected. Guarantees: with the plans that `why_not` lets pass, greedy tokens are those of plain decoding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from kvcompile.kernels.plan import STEP_TRIGGERS, Expr, PolicyPlan, ReadPlan, Region
from kvcompile.kernels.reads import chooses_once
from kvcompile.kernels.states import follow_reads


@dataclass(frozen=True, slots=True)
class Drafting:
    """The generate() of `model` that is running in this thread; prompt: columns of its prompt, None: all of the first
    forward."""

    model: Any
    prompt: int | None


_current: ContextVar[Drafting | None] = ContextVar("drafting", default=None)


@contextmanager
def drafting(model: Any, prompt: int | None) -> Iterator[None]:
    """A generate() whose tokens after the prompt may be taken back; what it calls may be one, too."""
    token = _current.set(Drafting(model, prompt))
    try:
        yield
    finally:
        _current.reset(token)


def drafted(model: Any) -> Drafting | None:
    """The assisted decoding that a forward of `model` belongs to, if any."""
    current = _current.get()
    return current if current is not None and current.model is model else None


def why_not(plan: PolicyPlan) -> str:
    """What of a policy forbids that tokens are taken back; empty where nothing does.

    A sliding window is no hindrance: what has left it waits until its successors are accepted.
    """
    for cls in plan.classes:
        kinds = [t.kind for t in cls.triggers if t.kind in STEP_TRIGGERS and t.kind != "slide"]
        if kinds and not cls.keeps_all:
            return f"{plan.name} evicts while it decodes (class {cls.name}, `at {kinds[0]}`)"
    for read in plan.reads:
        if odd := _by_step(plan, read):
            return f"{plan.name} reads by {odd} (rows {read.name}), which is of one step and not of several at once"
    if follow_reads(plan):
        return f"{plan.name} has states that every read changes"
    starts = [s.init for s in plan.states] + [e for u in plan.updates for _, e in u.assigns]
    if any(_counts_steps(e) for e in starts):
        return f"{plan.name} has states that start from `step` or `chunk`"
    return ""


def _by_step(plan: PolicyPlan, read: ReadPlan) -> str:
    """What of a read is known for one step at a time; empty where each token of a draft reads as a step would."""
    if read.holds:
        return "a set that some steps take over from the one before"
    for rule in read.rules:
        if rule.pick is not None or any(isinstance(t, Region) and t.kind == "picked" for t in rule.terms):
            return "what another layer has picked"
        if any(chooses_once(t) for t in rule.selections):
            return "a choice that all queries of a forward share"
        counts = [plan.counts[t.count].expr for t in rule.terms if t.count is not None]
        if any(n.op == "scalar" and n.value != "prompt" for e in counts for n in e.walk()):
            return "a count that changes from step to step"
    return ""


def _counts_steps(formula: Expr) -> bool:
    return any(n.op == "scalar" and n.value in ("step", "chunk") for n in formula.walk())
