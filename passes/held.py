"""Bytes that a policy holds, forward by forward, without running it.

Takes a plan, a prompt length and decode forwards; gives `Held` for one sequence: entries by layer and bytes at the
end, and the largest sum of held entries and fresh keys and values. Guarantees: an entry counts with its position,
frozen mark and states; rows are rounded up to pages, or to extents on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvcompile.kernels.extent import SLACK, extent
from kvcompile.kernels.plan import PolicyPlan
from kvcompile.passes.residents import Group, forwards, groups

_MARKS = 4 + 1  # int32 position, frozen mark


@dataclass(frozen=True, slots=True)
class Held:
    """One sequence. `entries`: of all KV heads of each layer at the end; bytes with rounding, positions and states."""

    entries: tuple[int, ...]
    bytes: int
    bytes_peak: int


def held(plan: PolicyPlan, prompt: int, generate: int, paged: bool) -> Held:
    """What one sequence of `prompt` tokens and `generate` decode forwards holds at the end and at its peak.

    Room for a whole prefill is taken before its first piece, so what its last piece leaves stands beside every piece.
    """
    parts = groups(plan, prompt)
    facts = plan.facts
    slot = facts.entry_bytes + _MARKS + 4 * len(plan.states)
    totals: Sequence[int] = tuple(0 for _ in parts)
    steps = piece = most = 0
    for forward in forwards(plan, prompt, generate):
        fresh = (forward.tokens + forward.peeked) * facts.kv_heads * facts.entry_bytes
        totals = forward.after
        if forward.phase == "step":  # the evictions of all layers wait for the last one
            before = [total + group.heads for total, group in zip(forward.before, parts, strict=True)]
            held_now = max(_slots(plan, parts, before, paged), _slots(plan, parts, totals, paged))
            moving = _largest_pool(plan, parts, totals, paged) if held_now > most else 0
            steps = max(steps, held_now * slot + max(fresh, moving * slot))
            continue
        piece = max(piece, fresh)
        most = max(most, _slots(plan, parts, forward.before, paged), _slots(plan, parts, totals, paged))
    peak = max(steps, most * slot + piece)
    by_layer = [0] * facts.layers
    for group, total in zip(parts, totals, strict=True):
        for layer in group.layers:
            by_layer[layer] += total
    ring = _ring_bytes(plan)
    return Held(tuple(by_layer), _slots(plan, parts, totals, paged) * slot + ring, peak + ring)


def _ring_bytes(plan: PolicyPlan) -> int:
    """The newest queries that scores may ask for, kept over pieces and turns."""
    facts = plan.facts
    return facts.layers * facts.q_heads * plan.ring * facts.entry_bytes // 2


def _slots(plan: PolicyPlan, parts: Sequence[Group], totals: Sequence[int], paged: bool) -> int:
    return sum(
        len(group.layers) * _rounded(plan, group, total, paged)
        for group, total in zip(parts, totals, strict=True)
        if total
    )


def _largest_pool(plan: PolicyPlan, parts: Sequence[Group], totals: Sequence[int], paged: bool) -> int:
    """Slots that stand twice while a pool grows: the one pool of all pages, or a layer's pool of extents."""
    if paged:
        return _slots(plan, parts, totals, paged)
    by_layer = [0] * plan.facts.layers
    for group, total in zip(parts, totals, strict=True):
        for layer in group.layers:
            by_layer[layer] += _rounded(plan, group, total, paged) if total else 0
    return max(by_layer)


def _rounded(plan: PolicyPlan, group: Group, total: int, paged: bool) -> int:
    """Slots of a layer's rows of one group, spread evenly; competing heads come out uneven and round up more."""
    longer = total % group.heads
    lengths = ((total // group.heads + 1, longer), (total // group.heads, group.heads - longer))
    spare = any(term.scope == "across" for term in plan.classes[group.cls].selections)
    if paged:
        return sum((-(-length // plan.page) + spare) * plan.page * rows for length, rows in lengths)
    return sum(extent(length + spare * SLACK) * rows for length, rows in lengths)
