"""Bytes that a policy holds, forward by forward, without running it.

Takes a plan, a prompt length and decode forwards; gives `Held` for one sequence: entries by layer and bytes at the
end, and the largest sum of held entries and fresh keys and values. Guarantees: an entry counts with its position,
frozen mark and states; rows are rounded up to pages, or to extents on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvcompile.kernels.plan import PolicyPlan
from kvcompile.passes.residents import Group, forwards, groups

_MARKS = 4 + 1  # int32 position, frozen mark
_EXTENT = 64  # slots; an extent also has room for one entry more


@dataclass(frozen=True, slots=True)
class Held:
    """One sequence. `entries`: of all KV heads of each layer at the end; bytes with rounding, positions and states."""

    entries: tuple[int, ...]
    bytes: int
    bytes_peak: int


def held(plan: PolicyPlan, prompt: int, generate: int, paged: bool) -> Held:
    """What one sequence of `prompt` tokens and `generate` decode forwards holds at the end and at its peak."""
    parts = groups(plan, prompt)
    facts = plan.facts
    slot = facts.entry_bytes + _MARKS + 4 * len(plan.states)
    totals: Sequence[int] = tuple(0 for _ in parts)
    peak = 0
    for forward in forwards(plan, prompt, generate):
        fresh = (forward.tokens + forward.peeked) * facts.kv_heads * facts.entry_bytes
        if forward.phase == "step":  # the evictions of all layers wait for the last one
            before = [total + group.heads for total, group in zip(forward.before, parts, strict=True)]
        else:
            before = list(forward.before)
        most = max(_slots(plan, parts, before, paged), _slots(plan, parts, forward.after, paged))
        peak = max(peak, most * slot + fresh)
        totals = forward.after
    by_layer = [0] * facts.layers
    for group, total in zip(parts, totals, strict=True):
        for layer in group.layers:
            by_layer[layer] += total
    return Held(tuple(by_layer), _slots(plan, parts, totals, paged) * slot, peak)


def _slots(plan: PolicyPlan, parts: Sequence[Group], totals: Sequence[int], paged: bool) -> int:
    return sum(
        len(group.layers) * _rounded(total, group.heads, plan.page, paged)
        for group, total in zip(parts, totals, strict=True)
        if total
    )


def _rounded(total: int, heads: int, page: int, paged: bool) -> int:
    """Slots of `heads` rows that hold `total` entries, spread evenly."""
    longer = total % heads
    lengths = ((total // heads + 1, longer), (total // heads, heads - longer))
    if paged:
        return sum(-(-length // page) * page * rows for length, rows in lengths)
    return sum(-(-(length + 1) // _EXTENT) * _EXTENT * rows for length, rows in lengths)
