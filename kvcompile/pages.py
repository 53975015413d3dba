"""Where entries lie on a GPU: one pool of pages for all layers, a stack of free pages, a table of pages per row.

Takes how many entries rows are to hold; guarantees pages for them without reading lengths back from the device while
its own bound lasts, and pages of their own to rows that share some and are written to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompile.kernels.layout import Site
from kvcompile.kernels.plan import PolicyPlan
from kvcompile.kernels.triton_backend.pools import refuse_overrun
from kvcompile.limits import CacheFull
from kvcompile.sharing import Shared
from kvcompile.store import POOLS, Pools, Store, to_device


class PagedStore(Store):
    """One pool of pages for all layers, a stack of free pages, a table of pages per row."""

    def __init__(
        self, plan: PolicyPlan, batch: int, dtype: torch.dtype, device: torch.device, sinks: Tensor | None = None
    ) -> None:
        super().__init__(plan, batch, dtype, device, sinks)
        rows = plan.facts.layers * self.rows
        self.length = torch.zeros(rows, dtype=torch.int32, device=device)
        self.upper = torch.zeros(rows, dtype=torch.int64)  # what the host knows: no row is longer
        self.holds = torch.tensor([layer not in plan.off for layer in range(plan.facts.layers)])
        # Two pages at least: a graph would take a size of one for a constant.
        self.table = torch.zeros(rows, 2, dtype=torch.int32, device=device)
        self.free = torch.zeros(1, dtype=torch.int32, device=device)
        self.top = torch.ones(1, dtype=torch.int32, device=device)
        self.pools = Pools(plan, plan.page, dtype, device)
        self.shared = Shared.none(rows)

    def site(self, layer: int) -> Site:
        pool = self.pools
        return Site(
            self.layers[layer], pool.k, pool.v, pool.pos, pool.frozen, pool.state, self.length,
            self.table, self.free, self.top, self.queries(layer), self.clock, self.counts, self.fires,
            self.scalar.flatten(1), self.picked, self.rope, self.reach, self.sink, self.marks, self.edges, self.marked,
            self.segment, self.links,
        )  # fmt: skip

    def reserve(self, layer: int, bounds: list[int]) -> None:
        """Let the layer's rows grow to these bounds; call `commit` once all layers are said."""
        base = layer * self.rows
        if layer in self.plan.off:
            return
        self.upper[base : base + self.rows] = torch.tensor(bounds)

    def commit(self) -> None:
        """Grow pool and table to hold every row at its bound; where heads compete, with a spare page per row."""
        pages, widest = self.pages_for(self.upper)
        if widest > self.table.shape[1]:
            extra = self.table.new_zeros(self.table.shape[0], widest - self.table.shape[1])
            self.table = torch.cat([self.table, extra], 1)
        if pages > self.free.shape[0]:
            self._grow(pages)

    def admit(self, upper: Tensor, shared: Shared) -> None:
        """Room for rows of at most so many entries that share these pages; CacheFull, and nothing has changed."""
        former = self.upper, self.shared
        self.upper, self.shared = upper, shared
        try:
            self.commit()
        except CacheFull:
            self.upper, self.shared = former
            raise

    def pages_for(self, upper: Tensor) -> tuple[int, int]:
        """Pages for rows of at most so many entries, int64 [rows], and the most of one row."""
        page = self.plan.page
        selections = [t for c in self.plan.classes for t in c.selections]
        heads = self.plan.facts.kv_heads if any(t.scope == "across" for t in selections) else 1
        layers = self.plan.facts.layers if any(t.layers == "across" for t in selections) else 1
        uneven = heads * layers > 1
        room = (upper + 1 + self.ahead).view(len(self.holds), -1)[self.holds].flatten()
        pages = int((-(-room // page)).sum()) + uneven * len(room) - self.shared.saved
        return pages, -(-int(room.max()) // page) * heads * layers

    def reserve_step(self, active: Tensor) -> None:
        """Room for one more entry in every row; reads lengths from the device only when the bound runs out."""
        step = self._in_all_layers(active.long().cpu())
        bound = self.upper + step
        page = self.plan.page
        pages = int((-(-bound // page)).sum()) - self.shared.saved
        if pages > self.free.shape[0] or int(bound.max()) > self.table.shape[1] * page:
            refuse_overrun(self.site(0))
            bound = self.length.long().cpu() + step
            # Room for a while, so that growth is as rare as in the other layout.
            self.upper = bound + (bound // 32).clamp(min=page)
            self.commit()
        self.upper = bound

    def reserve_more(self, new: list[int]) -> None:
        """Room for so many more entries in every row of each sequence."""
        self.admit(self.upper + self._in_all_layers(torch.tensor(new)), self.shared)

    def _in_all_layers(self, new: Tensor) -> Tensor:
        """Entries that sequences bring, int64 [batch], as entries that rows take in, int64 [rows]."""
        return (self.holds[:, None] * new.repeat_interleave(self.plan.facts.kv_heads)).flatten()

    def separate(self, fires: Tensor, new: list[int], step: bool) -> None:
        """Rows that a forward writes to, other than behind their entries, get pages of their own first.

        fires: as in `Site.fires`, on the host; new: tokens that each sequence brings.
        """
        if not self.shared.saved:
            return
        owner = torch.tensor(self.plan.class_of)
        rows = torch.zeros(owner.shape[0], self.batch, owner.shape[1], dtype=torch.bool)
        for c, cls in enumerate(self.plan.classes):
            # Scores that wait for the last layer are noted in the states of a whole row, whoever decides.
            writes = fires[c] != 0 if step or not self.plan.spans(c) else torch.tensor(new) > 0
            rows |= (owner == (c if cls.rows_of is None else cls.rows_of))[:, None] & writes[:, None]
        self.own(rows.flatten())

    def own(self, rows: Tensor) -> None:
        """Copy what these rows, bool [rows] on the host, share with others; nothing is read back from the device."""
        shared = self.shared.copy()
        row, place, page = shared.leave(rows)
        self.admit(self.upper, shared)
        if not len(page):
            return
        row, place, page = (to_device(t, self.device) for t in (row, place, page))
        fresh = self.free[self.top.long() - 1 - torch.arange(len(page), device=self.device)]
        self.top.sub_(len(page))
        self.copy_pages(page, fresh.long())
        self.table[row, place] = fresh

    def copy_pages(self, source: Tensor, target: Tensor) -> None:
        """Pages onto others of the pool, int64 [n] each."""
        page = self.plan.page
        for name in POOLS[:-1]:
            pages = getattr(self.pools, name).unflatten(0, (-1, page))
            pages[target] = pages[source]
        state = self.pools.state.unflatten(1, (-1, page))
        state[:, target] = state[:, source]

    def settle(self) -> None:
        """Pages went back to the free stack when they fell empty; the pool itself stays for the rows to come."""

    def _grow(self, pages: int) -> None:
        page, old_pages = self.plan.page, self.free.shape[0]
        old, self.pools = self.pools, self.new_pools(pages * page)
        self.transient = max(self.transient, old.nbytes)
        for name in POOLS[:-1]:
            getattr(self.pools, name)[: old.slots] = getattr(old, name)
        self.pools.state[:, : old.slots] = old.state
        added = torch.arange(old_pages, pages, dtype=torch.int32, device=self.device)
        top = int(self.top)
        self.free = torch.cat([self.free[:top], added, self.free.new_zeros(old_pages - top)])
        self.top = self.top + (pages - old_pages)

    def bytes_resident(self) -> int:
        """Bytes of the pages that rows hold, unused room at their ends included, and of what stands beside them."""
        return (self.free.shape[0] - int(self.top)) * self.plan.page * self.slot_bytes + self.beside_bytes

    def bytes_allocated(self) -> int:
        return self.pools.nbytes + self.beside_bytes
