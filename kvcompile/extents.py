"""Where entries lie on the CPU: one pool per layer, a growable stretch of slots per row, no page in between.

Takes how many entries rows are to hold; guarantees room for them, moves rows that outgrow theirs, gives memory back.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from kvcompile.kernels.extent import SLACK, extent
from kvcompile.kernels.layout import Site, repack
from kvcompile.kernels.plan import PolicyPlan
from kvcompile.limits import CacheFull
from kvcompile.store import POOLS, Pools, Store


class ExtentStore(Store):
    """One pool per layer; a row's entries lie side by side, so that attention reads them in place."""

    def __init__(
        self, plan: PolicyPlan, batch: int, dtype: torch.dtype, device: torch.device, sinks: Tensor | None = None
    ) -> None:
        super().__init__(plan, batch, dtype, device, sinks)
        layers = plan.facts.layers
        self.table = torch.zeros(layers, self.rows, 2, dtype=torch.int64, device=device)
        self.top = torch.zeros(layers, 1, dtype=torch.int64, device=device)
        self.free = torch.zeros(0, dtype=torch.int32, device=device)
        self.pools = tuple(Pools(plan, 0, dtype, device) for _ in range(layers))
        self.room = 0  # steps for which every row surely has room; 0: not known

    def site(self, layer: int) -> Site:
        pool = self.pools[layer]
        return Site(
            self.layers[layer], pool.k, pool.v, pool.pos, pool.frozen, pool.state, self.length[layer],
            self.table[layer], self.free, self.top[layer], self.queries(layer), self.clock, self.counts, self.fires,
            self.scalar[:, layer], self.picked, self.rope, self.reach, self.sink, self.marks, self.edges, self.marked,
            self.segment, self.links,
        )  # fmt: skip

    def reserve(self, layer: int, bounds: list[int]) -> None:
        """Make the layer's pool large enough for rows of so many entries (their sum is what counts)."""
        self.room = 0
        if layer in self.plan.off:
            return
        slots = sum(extent(b) for b in bounds)
        lengths = self.length[layer].tolist()
        slots = max(slots, sum(extent(n) for n in lengths if n))
        if slots > self.pools[layer].slots:
            self.resize(layer, slots)

    def reserve_step(self, active: Tensor) -> None:
        """Room for one more entry in every row of the active sequences, bool [batch]."""
        if self.room > 0:  # a step adds one entry a row
            self.room -= 1
            return
        live = list(self.lines)
        room = (self.table[:, :, 1] - self.length)[live]
        self.room = int(room.min()) - 1
        if self.room >= 0:
            return
        full = (room <= 0) & active.repeat_interleave(self.plan.facts.kv_heads)
        if not bool(full.any()):
            return
        for layer in (live[i] for i in full.any(1).nonzero().flatten().tolist()):
            need = [extent(n) for n in self.length[layer].tolist()]
            if sum(need) > self.pools[layer].slots:
                self.resize(layer, sum(need))
            repack(self.site(layer), dict(enumerate(need)))

    def reserve_more(self, new: list[int]) -> None:
        """Room for so many more entries in every row of each sequence."""
        kv_heads = self.plan.facts.kv_heads
        for layer, lengths in enumerate(self.length.tolist()):
            self.reserve(layer, [n + new[row // kv_heads] for row, n in enumerate(lengths)])

    def settle(self) -> None:
        """After entries went: rows that shrank leave room to others, layers that evicted most give memory back."""
        self.room = 0
        loose = self.table[:, :, 1] - self.length > self.length // 32 + 2 * SLACK
        for layer, row in loose.nonzero().tolist():
            self.table[layer, row, 1] = extent(int(self.length[layer, row]))
        most = 0
        for layer, entries in enumerate(self.length.sum(1).tolist()):
            if self.pools[layer].slots > 2 * (entries + entries // 32 + self.rows * SLACK):
                slots = sum(extent(n) for n in self.length[layer].tolist() if n)
                most = max(most, self.bytes_allocated() + slots * self.slot_bytes)
                with contextlib.suppress(CacheFull):  # to give memory back is no duty
                    self.resize(layer, slots)
        self.transient = max(self.transient, most - self.bytes_allocated())

    def resize(self, layer: int, slots: int) -> None:
        old, lengths = self.site(layer), self.length[layer].tolist()
        new = self.new_pools(slots)
        self.room = 0
        self.transient = max(self.transient, self.pools[layer].nbytes)
        self.put(layer, new)
        tail = 0
        for row, n in enumerate(lengths):
            start = int(self.table[layer, row, 0])
            for name in POOLS[:-1]:
                getattr(new, name)[tail : tail + n] = getattr(old, name)[start : start + n]
            new.state[:, tail : tail + n] = old.state[:, start : start + n]
            capacity = min(extent(n), slots - tail) if n else 0
            self.table[layer, row, 0], self.table[layer, row, 1] = tail, capacity
            tail += capacity
        self.top[layer] = tail

    def put(self, layer: int, pools: Pools) -> None:
        """Other pools for a layer; what was in its own is gone."""
        self.pools = (*self.pools[:layer], pools, *self.pools[layer + 1 :])

    def bytes_resident(self) -> int:
        """Bytes of the extents that rows hold, unused room at their ends included, and of what stands beside them."""
        return int(self.table[:, :, 1].sum()) * self.slot_bytes + self.beside_bytes

    def bytes_allocated(self) -> int:
        return sum(pool.nbytes for pool in self.pools) + self.beside_bytes
