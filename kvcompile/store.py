"""The memory behind a cache: pools, tables and lengths of all layers, reserved by the host between forwards.

`ExtentStore` (CPU) has one pool per layer and a growable stretch of slots per row; `PagedStore` (GPU)
one pool of pages for all layers. Both hand out `layout.Site` lists and count the bytes they really hold.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from kvcompile.kernels.extent import SLACK, extent
from kvcompile.kernels.layout import Clock, Site, repack
from kvcompile.kernels.marks import layout_of
from kvcompile.kernels.plan import PolicyPlan
from kvcompile.kernels.triton_backend.pools import refuse_overrun
from kvcompile.limits import UNLIMITED, CacheFull, allocated
from kvcompile.sharing import Shared
from kvcompile.spans import Spans, tables_of

POOLS = ("k", "v", "pos", "frozen", "state")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on `device`, without waiting for what the device is doing."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """A block whose launches go to `device`: Triton takes the current one, wherever its arguments are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class Pools:
    """Flat pools of slots; `slots` may be 0. All of one size, one device."""

    def __init__(self, plan: PolicyPlan, slots: int, dtype: torch.dtype, device: torch.device) -> None:
        width = plan.facts.head_dim
        self.k = torch.empty(slots, width, dtype=dtype, device=device)
        self.v = torch.empty(slots, width, dtype=dtype, device=device)
        self.pos = torch.empty(slots, dtype=torch.int32, device=device)
        self.frozen = torch.empty(slots, dtype=torch.uint8, device=device)
        self.state = torch.empty(len(plan.states), slots, dtype=torch.float32, device=device)
        self.nbytes = sum(getattr(self, name).untyped_storage().nbytes() for name in POOLS)

    @property
    def slots(self) -> int:
        return self.k.shape[0]


class Store:
    """What both layouts share: per-row lengths, the ring of newest queries, the numbers of a forward."""

    def __init__(
        self, plan: PolicyPlan, batch: int, dtype: torch.dtype, device: torch.device, sinks: Tensor | None = None
    ) -> None:
        facts = plan.facts
        self.plan, self.batch, self.dtype, self.device = plan, batch, dtype, device
        self.rows = batch * facts.kv_heads
        self.length = torch.zeros(facts.layers, self.rows, dtype=torch.int32, device=device)
        self.ring = torch.zeros(  # of the layers that are not off
            len(plan.live), batch, facts.q_heads, plan.ring, facts.head_dim, dtype=dtype, device=device
        )
        self.lines = {layer: line for line, layer in enumerate(plan.live)}  # where a layer's ring is
        self.layers = torch.arange(facts.layers, device=device)[:, None]
        self.clock = torch.zeros(batch, Clock.WIDTH, dtype=torch.int64, device=device)
        numbers = len(plan.counts) + len(plan.shares)
        self.counts = torch.zeros(facts.layers, numbers, batch, dtype=torch.int64, device=device)
        self.fires = torch.zeros(len(plan.classes) + plan.rules, batch, dtype=torch.uint8, device=device)
        self.scalar = torch.full((plan.scalars, facts.layers, self.rows), float("nan"), device=device)
        self.picked = torch.zeros(plan.picks, batch, facts.kv_heads, 0, dtype=torch.int32, device=device)
        self.rope = torch.zeros(2, 0, facts.head_dim, device=device)
        self.landmarks = layout_of(plan)
        kept = self.landmarks.count, batch
        self.marks = torch.zeros(
            *kept, 0, self.landmarks.width, dtype=getattr(torch, self.landmarks.dtype), device=device
        )
        self.edges = torch.zeros(*kept, 0, self.landmarks.edges, 2, dtype=torch.int32, device=device)
        self.marked = torch.zeros(*kept, len(self.landmarks.kinds), dtype=torch.int32, device=device)
        self.reach = torch.tensor([facts.reach(i) for i in range(facts.layers)], dtype=torch.int32, device=device)
        self.sink = torch.zeros(0, facts.q_heads, device=device) if sinks is None else sinks.to(device)
        self.segment, self.links = (t.to(device) for t in tables_of(plan, [None] * batch))
        self.limit = UNLIMITED  # what the caches of the model may take together
        self._claimed = 0  # bytes beside the pools that are about to be allocated
        self.transient = 0  # largest pool or table that stood beside its successor while entries moved
        self.ahead = 0  # paged: entries that every row has room for beyond its bound, where moving the pool is dear

    @property
    def slot_bytes(self) -> int:
        """Key, value, position, frozen mark and states of one entry."""
        width = self.plan.facts.head_dim * torch.empty(0, dtype=self.dtype).element_size()
        return 2 * width + 4 + 1 + 4 * len(self.plan.states)

    @property
    def beside_bytes(self) -> int:
        """What stands beside the pools: newest queries, numbers of rows, choices, RoPE tables, landmarks."""
        beside = (self.ring, self.scalar, self.picked, self.rope, self.marks, self.edges, self.marked)
        return sum(t.untyped_storage().nbytes() for t in (*beside, self.segment, self.links)) + self._claimed

    @contextlib.contextmanager
    def claimed(self, sequences: int) -> Iterator[None]:
        """What stands beside so many more sequences counts in the block already. CacheFull without room for it."""
        own = (self.ring, self.scalar, self.picked, self.marks, self.edges, self.marked)
        self._claimed = sequences * sum(t.nbytes for t in own) // self.batch
        try:
            self.limit.admit(self, self.bytes_allocated())
            yield
        finally:
            self._claimed = 0

    def cover(self, positions: int) -> None:
        """Let choices for later layers and landmarks reach positions below this; call before a forward brings them.

        CacheFull, and nothing has changed, without room for them.
        """
        shapes = self._covering(positions)
        if not shapes:
            return
        size, old = self.covering(positions)
        self.limit.admit(self, self.bytes_allocated() + size + old)
        for name, shape in shapes.items():
            held = getattr(self, name)
            fresh = allocated(partial(held.new_zeros, shape), math.prod(shape) * held.itemsize)
            fresh[tuple(slice(n) for n in held.shape)] = held
            setattr(self, name, fresh)
        self.transient = max(self.transient, old)

    def covering(self, positions: int) -> tuple[int, int]:
        """Bytes by which `cover` would let this grow, and those of a table that would stand beside its successor."""
        shapes = self._covering(positions)
        new = sum(math.prod(shape) * getattr(self, name).itemsize for name, shape in shapes.items())
        old = [getattr(self, name).nbytes for name in shapes]
        return new - sum(old), max(old, default=0)

    def _covering(self, positions: int) -> dict[str, tuple[int, ...]]:
        """The shapes that tables of positions and of units are to have, where they are too small."""
        # Doubled, so that a graph sees a new size rarely, and never one or none.
        places = max(64, 1 << (positions - 1).bit_length()) if self.plan.picks else 0
        blocks = self.landmarks.blocks(positions)
        wanted = {"picked": (3, places), "marks": (2, blocks), "edges": (2, blocks)}
        found = {name: (getattr(self, name).shape, dim, n) for name, (dim, n) in wanted.items()}
        return {name: (*was[:dim], n, *was[dim + 1 :]) for name, (was, dim, n) in found.items() if n > was[dim]}

    def lengths(self) -> Tensor:
        """Entries per row, int32 [layers, batch, kv_heads]."""
        return self.length.view(-1, self.batch, self.plan.facts.kv_heads)

    def tell(self, spans: Sequence[Spans | None]) -> None:
        """Which stretches of the text the tokens of each sequence are in."""
        new = (to_device(t, self.device) for t in tables_of(self.plan, spans))
        old = self.segment, self.links  # at the old address where that fits: what has captured it goes on
        self.segment, self.links = (a.copy_(b) if a.shape == b.shape else b for a, b in zip(old, new, strict=True))

    def queries(self, layer: int) -> Tensor:
        """A layer's ring of newest queries, [batch, q_heads, window, head_dim]; no window where the layer is off."""
        line = self.lines.get(layer)
        facts = self.plan.facts
        return self.ring.new_zeros(self.batch, facts.q_heads, 0, facts.head_dim) if line is None else self.ring[line]

    def site(self, layer: int) -> Site:
        raise NotImplementedError

    def settle(self) -> None:
        raise NotImplementedError

    def bytes_resident(self) -> int:
        raise NotImplementedError

    def become(self, other: Store) -> None:
        """Take over all that another store of this kind has; it must not be used any more."""
        vars(self).update({**vars(other), "limit": self.limit})

    def bytes_allocated(self) -> int:
        raise NotImplementedError

    def admit_piece(self, width: int) -> None:
        """CacheFull where the fresh keys and values of so many columns have no room beside the pools."""
        if self.limit.most is not None:
            fresh = self.batch * width * self.plan.facts.kv_heads * self.plan.facts.entry_bytes
            self.limit.admit(self, self.bytes_allocated() + fresh)

    def new_pools(self, slots: int) -> Pools:
        """Pools to stand beside those that are there; CacheFull, and nothing has changed, without room for them."""
        size = slots * self.slot_bytes
        self.limit.admit(self, self.bytes_allocated() + size)
        return allocated(lambda: Pools(self.plan, slots, self.dtype, self.device), size)

    def sites(self) -> list[Site]:
        return [self.site(layer) for layer in range(self.plan.facts.layers)]

    def positions(self, layer: int, b: int) -> list[Tensor]:
        """Resident original positions of each KV head, sorted, int64."""
        site, kv_heads = self.site(layer), self.plan.facts.kv_heads
        rows = range(site.base(kv_heads) + b * kv_heads, site.base(kv_heads) + (b + 1) * kv_heads)
        return [site.pos[site.slots(r, 0, int(site.length[r]))].long().sort().values for r in rows]


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
        self.pools = [Pools(plan, 0, dtype, device) for _ in range(layers)]
        self._room = 0  # steps for which every row surely has room; 0: not known

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
        self._room = 0
        if layer in self.plan.off:
            return
        slots = sum(extent(b) for b in bounds)
        lengths = self.length[layer].tolist()
        slots = max(slots, sum(extent(n) for n in lengths if n))
        if slots > self.pools[layer].slots:
            self.resize(layer, slots)

    def reserve_step(self, active: Tensor) -> None:
        """Room for one more entry in every row of the active sequences, bool [batch]."""
        if self._room > 0:  # a step adds one entry a row
            self._room -= 1
            return
        live = list(self.lines)
        room = (self.table[:, :, 1] - self.length)[live]
        self._room = int(room.min()) - 1
        if self._room >= 0:
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
        self._room = 0
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
        self.transient = max(self.transient, self.pools[layer].nbytes)
        self.pools[layer] = new
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

    def bytes_resident(self) -> int:
        """Bytes of the extents that rows hold, unused room at their ends included, and of what stands beside them."""
        return int(self.table[:, :, 1].sum()) * self.slot_bytes + self.beside_bytes

    def bytes_allocated(self) -> int:
        return sum(pool.nbytes for pool in self.pools) + self.beside_bytes


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
