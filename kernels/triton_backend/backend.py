"""The `triton` backend: the reference's meaning, its hot parts on the generated kernels.

Takes a plan and a paged `Site`. A step (append, attend, states, scores, evictions of all layers) reads no
device value back. What a policy's formulas do not let Triton do runs as in the reference, and
`choose.unprintable` lists it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcompile.kernels import evict, reference
from kvcompile.kernels.choose import decode_spec, evict_spec, pack_spec
from kvcompile.kernels.gather import entries_of_state, sequence
from kvcompile.kernels.layout import Clock, Site
from kvcompile.kernels.plan import PolicyPlan
from kvcompile.kernels.stages import Unprintable
from kvcompile.kernels.triton_backend import prefill
from kvcompile.kernels.triton_backend.decode import DecodeStep
from kvcompile.kernels.triton_backend.evict import EvictStep
from kvcompile.kernels.triton_backend.library import library
from kvcompile.kernels.triton_backend.oneshot import decide

_STEP = ("step", "every", "filled", "full")


def steps_on_triton(plan: PolicyPlan) -> bool:
    """Whether a whole step, evictions included, has Triton forms."""
    try:
        decode_spec(plan)
        for index, cls in enumerate(plan.classes):
            if any(cls.fires_on(kind) for kind in _STEP):
                evict_spec(plan, index)
    except Unprintable:
        return False
    return True


def prefills_on_triton(plan: PolicyPlan, cls: int) -> bool:
    """Whether a class's one-shot prefill has Triton forms for its scores, its choice and its survivors."""
    found = library(plan)
    try:
        pack_spec(plan)
        for term in plan.classes[cls].selections:
            found.scores(term)
            found.select(cls, term)
    except Unprintable:
        return False
    return True


@dataclass
class _Ready:
    """A plan's step kernels with their scratch, for one batch and for rows of at most `capacity` entries."""

    capacity: int
    decode: DecodeStep
    evict: dict[int, EvictStep]
    by_layer: dict[int, Tensor]  # class -> sites int32 [layers, most groups of a layer, 1 + heads]


@dataclass
class Triton:
    """What `ops.Backend` asks for; scratch is made at the first step of a shape and then stays."""

    name: str = "triton"
    _ready: dict[tuple[object, ...], _Ready] = field(default_factory=dict)

    def attend_prefill(self, plan: PolicyPlan, site: Site, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """As `reference.attend_prefill`; a piece with nothing before it goes to the library's own kernel."""
        kv_heads = plan.facts.kv_heads
        rows = site.batch * kv_heads
        base = site.base(kv_heads)
        if bool(site.length[base : base + rows].any()):
            return reference.attend_prefill(plan, site, q, k, v, scale)
        out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], q.shape[3])
        for b in range(site.batch):
            fresh = sequence(site, b, q, k, v, None, kv_heads)
            n = fresh.k.shape[1]
            if n:
                keys, values = (t.repeat_interleave(plan.facts.group, 0)[None] for t in (fresh.k, fresh.v))
                own = q[b : b + 1, :, q.shape[2] - n :]
                read = F.scaled_dot_product_attention(own, keys, values, is_causal=True, scale=scale)
                out[b, out.shape[1] - n :] = read[0].transpose(0, 1)
                reference.file_queries(site, b, own[0], fresh.real, fresh.start)
        return out

    observe = staticmethod(reference.observe)

    def insert(self, plan: PolicyPlan, cls: int, site: Site, k: Tensor, v: Tensor, state: Tensor | None) -> None:
        """As `evict.insert`: real entries of this class's heads to their rows' pages, in order."""
        pos, real = places(site, k.shape[2])
        keep = torch.zeros(*k.shape[:3], dtype=torch.bool, device=k.device)
        heads = list(plan.heads(int(site.layer), cls))
        if heads:
            keep[:, heads] = real[:, None]
            self._pack(plan, site, k, v, pos, keep, torch.zeros_like(keep, dtype=torch.uint8), state)

    def evict_prefill(
        self,
        plan: PolicyPlan,
        cls: int,
        site: Site,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: Tensor | None,
        scale: float,
    ) -> None:
        """As `evict.evict_prefill`; on kernels where the prompt comes in one piece into empty rows."""
        heads = list(plan.heads(int(site.layer), cls))
        if not heads:
            return
        base = site.base(plan.facts.kv_heads)
        past = site.length[base : base + site.batch * plan.facts.kv_heads].view(site.batch, -1)[:, heads]
        alone = not bool(past.any() | site.clock[:, Clock.PEEK].any() | ~site.fires[cls].all())
        if not (alone and prefills_on_triton(plan, cls)):
            evict.evict_prefill(plan, cls, site, q, k, v, state, scale)
            return
        pos, _ = places(site, k.shape[2])
        keep, won = decide(plan, cls, site, heads, k, pos, state, scale)
        self._pack(plan, site, k, v, pos, keep, won, state)

    def _pack(
        self,
        plan: PolicyPlan,
        site: Site,
        k: Tensor,
        v: Tensor,
        pos: Tensor,
        keep: Tensor,
        won: Tensor,
        state: Tensor | None,
    ) -> None:
        where = pos[:, None].expand(keep.shape)
        if state is None:
            start = [entries_of_state(s, pos) for s in plan.states]
            state = torch.stack(start)[:, :, None].expand(-1, *keep.shape) if start else site.state.new_zeros(0)
        prefill.append(library(plan).pack(), site, k, v, where, won, state, keep, site.layer)

    def attend_step(self, plan: PolicyPlan, site: Site, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """As `reference.attend_step`, in two launches."""
        if not steps_on_triton(plan):
            return reference.attend_step(plan, site, q, k, v, scale)
        now, active = site.clock[:, Clock.START], site.clock[:, Clock.NEW]
        decode = self._prepared(plan, site).decode
        out, _ = decode(q[:, :, 0], k[:, :, 0], v[:, :, 0], site, now, active, site.layer, scale)
        window = site.ring.shape[2]
        if window:
            slot = (now % window)[:, None, None, None].expand(-1, q.shape[1], 1, q.shape[3])
            kept = torch.where(active[:, None, None, None] != 0, q.to(site.ring.dtype), site.ring.gather(2, slot))
            site.ring.scatter_(2, slot, kept)
        return out

    def evict_step(self, plan: PolicyPlan, sites: list[Site], scale: float) -> None:
        """As `evict.evict_step`: one launch a head class for all the layers given."""
        if not steps_on_triton(plan):
            evict.evict_step(plan, sites, scale)
            return
        site = sites[0]
        ready = self._prepared(plan, site)
        which = torch.cat([s.layer for s in sites])
        for cls, step in ready.evict.items():
            own = ready.by_layer[cls]
            some = step if len(sites) == own.shape[0] else step.of(own[which].flatten(0, 1))
            now, prompt = site.clock[:, Clock.START], site.clock[:, Clock.PROMPT]
            some(site, site.counts, site.fires[cls], now, prompt, ready.decode.score)

    def _prepared(self, plan: PolicyPlan, site: Site) -> _Ready:
        capacity = site.table.shape[1] * plan.page
        key = (plan, site.batch, site.k.device)
        if key not in self._ready or self._ready[key].capacity != capacity:
            self._ready[key] = _prepare(plan, site.batch, capacity, site.k.device)
        return self._ready[key]


def _prepare(plan: PolicyPlan, batch: int, capacity: int, device: torch.device) -> _Ready:
    found, facts = library(plan), plan.facts
    decode = DecodeStep.prepare(found.decode(), facts.layers, batch * facts.kv_heads, capacity, device)
    drops, by_layer = {}, {}
    for index, cls in enumerate(plan.classes):
        if any(cls.fires_on(kind) for kind in _STEP) and plan.class_size(index):
            drops[index] = EvictStep.prepare(found.evict(index), plan, index, batch, capacity, device)
            by_layer[index] = _by_layer(drops[index].sites, facts.layers)
    return _Ready(capacity, decode, drops, by_layer)


def _by_layer(sites: Tensor, layers: int) -> Tensor:
    """Sites as int32 [layers, groups, 1 + heads]; a layer with fewer groups has some without heads (-1)."""
    lines: list[list[list[int]]] = [[] for _ in range(layers)]
    for line in sites.tolist():
        lines[line[0]].append(line)
    most = max(len(group) for group in lines)
    empty = [-1] * (sites.shape[1] - 1)
    padded = [group + [[layer, *empty]] * (most - len(group)) for layer, group in enumerate(lines)]
    return torch.tensor(padded, dtype=torch.int32, device=sites.device)


def places(site: Site, columns: int) -> tuple[Tensor, Tensor]:
    """Positions int32 [B, columns] of a right-aligned forward's columns (-1: no real token), and where they are real."""
    new, peek, start = (site.clock[:, c, None] for c in (Clock.NEW, Clock.PEEK, Clock.START))
    place = torch.arange(columns, device=site.k.device) - (columns - new - peek)
    real = (place >= 0) & (place < new)
    return torch.where(real, start + place, -1).int(), real
