"""The memory behind a cache: pools, tables and lengths of all layers, reserved by the host between forwards.

`extents.ExtentStore` (CPU) has one pool per layer and a growable stretch of slots per row; `pages.PagedStore` (GPU)
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

from kvcompile.kernels.layout import Clock, Site
from kvcompile.kernels.marks import layout_of
from kvcompile.kernels.plan import PolicyPlan
from kvcompile.limits import UNLIMITED, allocated
from kvcompile.spans import Spans, tables_of

POOLS = ("k", "v", "pos", "frozen", "state")
_PARTS = frozenset({*Site._fields, "layers", "pools"})  # what sites are made of


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

    _sites: list[Site] | None  # as they are now, if they were asked for
    _beside: int | None  # bytes beside the pools, likewise

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
        if self._beside is None:
            beside = (self.ring, self.scalar, self.picked, self.rope, self.marks, self.edges, self.marked)
            self._beside = sum(t.untyped_storage().nbytes() for t in (*beside, self.segment, self.links))
        return self._beside + self._claimed

    @contextlib.contextmanager
    def claimed(self, sequences: int) -> Iterator[None]:
        """What stands beside so many more sequences counts in the block already. CacheFull without room for it."""
        own = (self.ring, self.scalar, self.picked, self.marks, self.edges, self.marked, self.segment, self.links)
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
        if not self.plan.picks and not self.landmarks.count:
            return
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
        """The sites of all layers; the same ones from forward to forward, as long as nothing moves."""
        if self._sites is None:
            self._sites = [self.site(layer) for layer in range(self.plan.facts.layers)]
        return self._sites

    def __setattr__(self, name: str, value: object) -> None:
        # No part is resized in place, and sites must not keep alive what has been replaced.
        if name in _PARTS and value is not vars(self).get(name):
            vars(self).update(_sites=None, _beside=None)
        super().__setattr__(name, value)

    def positions(self, layer: int, b: int) -> list[Tensor]:
        """Resident original positions of each KV head, sorted, int64."""
        site, kv_heads = self.site(layer), self.plan.facts.kv_heads
        rows = range(site.base(kv_heads) + b * kv_heads, site.base(kv_heads) + (b + 1) * kv_heads)
        return [site.pos[site.slots(r, 0, int(site.length[r]))].long().sort().values for r in rows]
