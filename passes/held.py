"""Bytes that a policy holds, forward by forward, without running it.

Takes a plan, a prompt length and decode forwards; gives `Held` for one sequence: entries by layer and bytes at the
end, and the largest sum of held entries and fresh keys and values. Guarantees: an entry counts with its position,
frozen mark and states, hidden ones too; rows are rounded up to pages, or to extents on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvcompile.kernels.extent import SLACK, extent
from kvcompile.kernels.marks import layout_of
from kvcompile.kernels.plan import PolicyPlan, Region
from kvcompile.passes.groups import Group, groups
from kvcompile.passes.residents import forwards

_MARKS = 4 + 1  # int32 position, frozen mark
_LEAST_PLACES = 256  # of tables that grow with the sequence, by doubling


@dataclass(frozen=True, slots=True)
class Held:
    """One sequence. groups: what each holds at the end, by its layers; bytes with rounding, positions and states;
    `tables` are bytes that stand once for all sequences; `exact` is False where entries are upper bounds."""

    groups: tuple[tuple[Group, tuple[int, ...]], ...]
    bytes: int
    bytes_peak: int
    tables: int
    exact: bool

    @property
    def entries(self) -> int:
        """Of all layers and KV heads."""
        return sum(sum(by_layer) for _, by_layer in self.groups)


def held(plan: PolicyPlan, prompt: int, generate: int, paged: bool) -> Held:
    """What one sequence of `prompt` tokens and `generate` decode forwards holds at the end and at its peak.

    Room for a whole prefill is taken before its first piece, so each row's most stands beside every piece.
    """
    pools = _Pools(plan, groups(plan, prompt), paged)
    facts = plan.facts
    slot = facts.entry_bytes + _MARKS + 4 * len(plan.states)
    totals = tops = stood = tuple(0 for _ in pools.groups)
    steps = piece = most = seen = 0
    turned = _turned(plan, prompt + plan.peek, prompt + generate)
    exact = True
    for forward in forwards(plan, prompt, generate):
        fresh = (forward.tokens + forward.peeked) * facts.kv_heads * facts.entry_bytes
        seen += forward.tokens
        totals, exact = forward.after, forward.exact
        stood = tuple(max(some) for some in zip(stood, forward.peak, totals, strict=True))
        halved = any(2 * now < then for now, then in zip(totals, stood, strict=True))
        if halved and not paged and forward.phase != "chunk":  # pools that give memory back stand beside the new ones
            old, new = pools.reserved(stood, seen + 1), pools.reserved(totals, seen + 1)
            steps = max(steps, (sum(old) + max(new)) * slot)
            stood = totals
        if forward.phase != "step":
            piece = max(piece, fresh)
            tops = tuple(max(some) for some in zip(tops, forward.peak, totals, strict=True))
            most = sum(pools.reserved(tops, seen + 1))
            continue
        # The evictions of all layers wait for the last one.
        now = max(pools.resident(forward.peak), pools.resident(totals))
        moving = pools.moving(forward.peak, seen + 1) if now > most else 0
        steps = max(steps, now * slot + max(fresh, moving * slot, turned))
    places = max(_LEAST_PLACES, 1 << (seen + plan.peek).bit_length())
    beside = _beside(plan, places, seen + plan.peek + 1)
    by_layer = tuple((g, tuple(g.share_of(total))) for g, total in zip(pools.groups, totals, strict=True))
    peak = max(steps, most * slot + piece) + beside
    tables = plan.rotates * 2 * 4 * facts.head_dim * places  # cosine and sine, float32
    return Held(by_layer, pools.resident(totals) * slot + beside, peak, tables, exact)


def _turned(plan: PolicyPlan, before: int, after: int) -> int:
    """The most bytes of choices or landmarks that stand beside larger ones while steps let them grow."""
    layout = layout_of(plan)
    marks = layout.nbytes(after) // 2 * (layout.blocks(after) > layout.blocks(before))
    size = 1 << max(63, after - 1).bit_length()
    return max(marks, 4 * plan.picks * plan.facts.kv_heads * (size // 2) * (size > max(64, before)))


def _beside(plan: PolicyPlan, places: int, tokens: int) -> int:
    """The newest queries that scores may ask for, numbers of rows, choices for later layers, landmarks, and which
    stretch of the text each token is in."""
    facts = plan.facts
    ring = len(plan.live) * facts.q_heads * plan.ring * facts.entry_bytes // 2
    numbers = 4 * plan.scalars * facts.layers * facts.kv_heads
    terms = (term for read in plan.reads for rule in read.rules for term in rule.terms)
    names = {term.name for term in terms if isinstance(term, Region) and term.kind == "span"}
    segments = (4 * places + 16 * len(names)) * bool(names)  # and which of up to three stretches read which
    return ring + numbers + 4 * plan.picks * facts.kv_heads * places + layout_of(plan).nbytes(tokens) + segments


@dataclass(frozen=True, slots=True)
class _Pools:
    """Slots that rows take in one layout, from the totals of their groups."""

    plan: PolicyPlan
    groups: tuple[Group, ...]
    paged: bool

    def resident(self, totals: Sequence[int]) -> int:
        """Slots of rows that hold so much, spread evenly."""
        return sum(self._spread(group, total) for group, total in zip(self.groups, totals, strict=True))

    def reserved(self, totals: Sequence[int], longest: int) -> list[int]:
        """Slots of each layer that rows of such totals, none longer than `longest`, may need.

        With pages, which all layers share, each layer has its part of what it needs together with others.
        """
        by_layer = [0] * self.plan.facts.layers
        for group, total in zip(self.groups, totals, strict=True):
            if group.pooled and not self.paged:
                for layer, member in zip(group.layers, group.members, strict=True):
                    by_layer[layer] += self._rows(min(total, member.rows * longest), member.rows, True)
                continue
            for layer, slots in zip(group.layers, group.share_of(self._spread(group, total)), strict=True):
                by_layer[layer] += slots
        return by_layer

    def moving(self, totals: Sequence[int], longest: int) -> int:
        """Slots that stand twice while a pool grows: the one pool of all pages, or a layer's pool of extents."""
        by_layer = self.reserved(totals, longest)
        return sum(by_layer) if self.paged else max(by_layer)

    def _spread(self, group: Group, total: int) -> int:
        return group.times * self._rows(total // group.times, group.rows, group.competes)

    def _rows(self, total: int, rows: int, uneven: bool) -> int:
        """Slots of rows that hold `total` together, spread evenly; competing rows come out uneven, round up more."""
        if not total:
            return 0
        longer = total % rows
        lengths = ((total // rows + 1, longer), (total // rows, rows - longer))
        if self.paged:
            page = self.plan.page
            return sum((-(-length // page) + uneven) * page * n for length, n in lengths)
        return sum(extent(length + uneven * SLACK) * n for length, n in lengths)
