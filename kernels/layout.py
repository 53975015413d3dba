"""How entries lie in memory: the tensors that an op is handed, and where entry i of a row is found.

A row is one (layer, sequence, KV head). Both layouts keep flat pools of slots and differ only in the
address of a row's entry, so that everything above addresses is written once.
`extent` (CPU): one pool per layer, a row is one stretch of slots, its page is as long as the row.
`paged` (GPU): one pool for all layers, pages of a power of two of tokens, a stack of free pages.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvcompile.kernels.extent import extent

LONG = 256  # entries a row from which copying row by row costs less than finding the slot of every entry


class Clock:
    """Columns of `Site.clock`, one line per sequence, all known on the host before the forward."""

    NEW, PEEK, START, PROMPT, STEP, ENDS = range(6)
    WIDTH = 6


class _Tensors(NamedTuple):
    layer: Tensor
    k: Tensor
    v: Tensor
    pos: Tensor
    frozen: Tensor
    state: Tensor
    length: Tensor
    table: Tensor
    free: Tensor
    top: Tensor
    ring: Tensor
    clock: Tensor
    counts: Tensor
    fires: Tensor
    scalar: Tensor
    picked: Tensor
    rope: Tensor
    reach: Tensor
    sink: Tensor
    marks: Tensor
    edges: Tensor
    marked: Tensor
    segment: Tensor
    links: Tensor


class Site(_Tensors):
    """All tensors of one layer's call, in the order in which ops take them. None is ever resized in place, so what a
    backend makes of their addresses may be kept in the instance.

    layer   int64 [1]            which layer this is: data, never a literal of the graph
    k, v    [slots, head_dim]    pos int32 [slots]   frozen uint8 [slots]   state float32 [states, slots]
    length  int32 [rows]         entries of each row
    table   paged: int32 [rows, pages of a row]; extent: int64 [rows, 2] = start and capacity
    free    paged: int32 [pages], a stack of free pages; extent: empty
    top     paged: int32 [1], how many pages are free; extent: int64 [1], first slot never handed out
    ring    [batch, q_heads, window, head_dim], the newest queries, at slot position mod window
    clock   int64 [batch, Clock.WIDTH]
    counts  int64 [layers, counts + shares, batch], the policy's counts, then the layer's parts of its shares
    fires   uint8 [classes + rules, batch], 0: does not decide; bit 0: by a trigger without condition; bit 1 + j: by the
            class's j-th trigger that has one, where that holds; then the same for each rule of `plan.reads`, in order
    scalar  float32 [scalars, rows], numbers that a row keeps between decisions, NaN before the first
    picked  int32 [picks, batch, kv_heads, positions], not 0 where a layer has chosen a position for later layers; what
            query heads choose apart has bit g for head g of the group
    rope    float32 [2, positions, head_dim], cosine and sine of every place; no positions where nothing is rotated
    reach   int32 [layers], the sliding window of every layer: a query at p reads positions > p - reach; 0: all
    sink    float32 [layers, q_heads], one more logit in the softmax's denominator of each query head; [0, q_heads]
            where the model has none
    marks   [readers, batch, blocks, numbers], landmarks of the units of rows that are read by them, edges int32
            [readers, batch, blocks, units of a block or 0, 2], where their entries begin and end, and marked int32
            [readers, batch, kinds], how many units of each kind are current: see `marks.MarksLayout`
    segment int32 [batch, positions], the stretch of the text that each position is in, 0: none; no positions where
            no set asks for it; links uint8 [batch, names, stretches, stretches], whether for a query of one stretch
            (line) another (column) is in the region of each name of `spans.span_names`; line and column 0: of none
    """

    @property
    def paged(self) -> bool:
        return self.table.dtype == torch.int32

    @property
    def batch(self) -> int:
        return self.clock.shape[0]

    def page(self) -> int:
        """Tokens per page (paged layout)."""
        return self.k.shape[0] // self.free.shape[0]

    def base(self, kv_heads: int) -> int:
        """Index of this layer's first row."""
        return int(self.layer) * self.batch * kv_heads if self.paged else 0

    def slots(self, row: int, start: int, stop: int) -> Tensor:
        """Slots of entries start..stop-1 of a row, int64 [stop - start]."""
        entries = torch.arange(start, stop, device=self.k.device)
        if not self.paged:
            return entries + int(self.table[row, 0])
        page = self.page()
        return self.table[row, entries // page].long() * page + entries % page

    def slot_matrix(self, rows: Tensor, width: int) -> Tensor:
        """Slots of entries 0..width-1 of several rows, int64 [rows, width]; entries past a row's end give slot 0."""
        entries = torch.arange(width, device=self.k.device)
        alive = entries < self.length[rows][:, None]
        if self.paged:
            page = self.page()
            pages = self.table[rows][:, (entries // page).clamp(max=self.table.shape[1] - 1)].long()
            return torch.where(alive, pages * page + entries % page, 0)
        return torch.where(alive, self.table[rows, 0][:, None] + entries, 0)


def make_room(site: Site, totals: dict[int, int]) -> None:
    """Give rows space for so many entries in all, moving them if need be; their entries stay what they are.

    The pools never grow here: their size comes from the plan, and the host reserves it between forwards.
    """
    if site.paged:
        for row, total in totals.items():
            _take_pages(site, row, total)
        return
    table, tail = site.table.tolist(), int(site.top)
    short = {row: extent(total) for row, total in totals.items() if total > table[row][1]}
    if not short:
        return
    if tail + sum(short.values()) > site.k.shape[0]:
        repack(site, {row: extent(total) for row, total in totals.items()})
        return
    lengths = site.length.tolist()
    for row, need in short.items():
        start, length = table[row][0], lengths[row]
        for pool in _by_slot(site) if length else ():  # beyond all extents, so that nothing overlaps
            pool[tail : tail + length] = pool[start : start + length]
        site.table[row, 0], site.table[row, 1] = tail, need
        tail += need
    site.top.fill_(tail)


def repack(site: Site, capacities: dict[int, int]) -> None:
    """Close the holes between extents; rows named in `capacities` get that many slots, others keep what they use."""
    lengths = site.length.tolist()
    old = site.table.tolist()
    source: list[Tensor] = []
    target: list[Tensor] = []
    tail = 0
    for row, (start, _) in enumerate(old):
        keep = capacities.get(row, extent(lengths[row]) if lengths[row] else 0)
        source.append(torch.arange(start, start + lengths[row]))
        target.append(torch.arange(tail, tail + lengths[row]))
        site.table[row, 0], site.table[row, 1] = tail, keep
        tail += keep
    if tail > site.k.shape[0]:
        raise RuntimeError(f"pool of {site.k.shape[0]} slots cannot hold the {tail} slots that its rows need")
    _move(site, torch.cat(source), torch.cat(target))
    site.top.fill_(tail)


def _by_slot(site: Site) -> tuple[Tensor, ...]:
    """The pools, all with slots as their first dimension."""
    return site.k, site.v, site.pos, site.frozen, site.state.t()


def _move(site: Site, source: Tensor, target: Tensor) -> None:
    # Advanced indexing copies the sources first, so overlapping stretches are safe.
    for pool in (site.k, site.v, site.pos, site.frozen):
        pool[target] = pool[source]
    site.state[:, target] = site.state[:, source]


def _take_pages(site: Site, row: int, total: int) -> None:
    page = site.page()
    held = -(-int(site.length[row]) // page)
    need = -(-total // page) - held
    if need <= 0:
        return
    free = int(site.top)
    if need > free or held + need > site.table.shape[1]:
        raise RuntimeError(f"pool has {free} free pages of {page} tokens, row {row} needs {need} more")
    site.table[row, held : held + need] = site.free[free - need : free].flip(0)
    site.top.fill_(free - need)


def write(
    site: Site, rows: list[int], counts: list[int], k: Tensor, v: Tensor, pos: Tensor, frozen: Tensor, state: Tensor
) -> None:
    """Append so many entries to each row: k, v [n, head_dim], pos [n], frozen [n], state [states, n], row by row."""
    if not sum(counts):
        return
    lengths = site.length.tolist()
    added = {row: count for row, count in zip(rows, counts, strict=True) if count}
    make_room(site, {row: lengths[row] + count for row, count in added.items()})
    fresh = k, v, pos, frozen, state.t()
    if not site.paged and sum(counts) >= LONG * len(counts):
        table, taken = site.table.tolist(), 0
        for row, count in added.items():
            at = table[row][0] + lengths[row]
            for pool, new in zip(_by_slot(site), fresh, strict=True):
                pool[at : at + count] = new[taken : taken + count]
            taken += count
    else:
        slots = torch.cat([site.slots(row, lengths[row], lengths[row] + count) for row, count in added.items()])
        for pool, new in zip(_by_slot(site), fresh, strict=True):
            pool[slots] = new.to(pool.dtype)
    more = torch.tensor(counts, dtype=site.length.dtype, device=site.length.device)
    site.length[torch.tensor(rows, device=site.length.device)] += more


def compact(site: Site, rows: Tensor, keep: Tensor, by_position: bool) -> Tensor:
    """Drop entries of several rows in place; pages that fall empty are freed. Returns entries dropped per row.

    rows int64 [rows]; keep bool [rows, width], in entry order, false past a row's end. Hole filling:
    survivors above the new length drop into the dead slots below it, as many as there are. With
    `by_position` every survivor moves left instead, so that the order of the entries stays.
    """
    length, kept = site.length[rows].long(), keep.sum(1)
    dropped = length - kept
    if not bool(dropped.any()):
        return dropped
    entries = torch.arange(keep.shape[1], device=keep.device)
    slots = site.slot_matrix(rows, keep.shape[1])
    if by_position:
        target_entry = keep.cumsum(1) - 1
        moved = keep & (target_entry != entries)
        source, target = slots[moved], slots.gather(1, target_entry.clamp(min=0))[moved]
    else:
        below = entries < kept[:, None]
        source, target = slots[keep & ~below], slots[~keep & below]
    _move(site, source, target)
    if site.paged:
        _free_pages(site, rows.tolist(), length.tolist(), kept.tolist())
    site.length[rows] = kept.int()
    return dropped


def _free_pages(site: Site, rows: list[int], before: list[int], after: list[int]) -> None:
    page, free = site.page(), int(site.top)
    for row, old, new in zip(rows, before, after, strict=True):
        held, need = -(-old // page), -(-new // page)
        site.free[free : free + held - need] = site.table[row, need:held]
        free += held - need
    site.top.fill_(free)
