"""The `triton` backend: generated kernels behind the operators, on the paged layout.

A step is decode attention (append, states and scores fused), then one eviction launch per head class for all
layers. A prefill is attention of the piece for all heads in one launch, then scores, winners and the move into pages.
What has no Triton form runs as the reference; `choose.unprintable` and `choose_listed.unlisted` say what that is.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from kvcompile.kernels import evict, reference
from kvcompile.kernels.choose_listed import asks_narrowed, narrows_pieces, narrows_steps
from kvcompile.kernels.compete import Contest
from kvcompile.kernels.formulas import sources_of
from kvcompile.kernels.gather import Fresh, gather_rows, needs_keys, query_sources, sequence, with_queries
from kvcompile.kernels.layout import Clock, Site, compact
from kvcompile.kernels.plan import STEP_TRIGGERS, PolicyPlan, Selection, StatePlan, UnitPlan, formulas_of
from kvcompile.kernels.ranks import has_joint
from kvcompile.kernels.reads import narrows, with_reads
from kvcompile.kernels.rows import Rows, as_read_by
from kvcompile.kernels.select import Plainly
from kvcompile.kernels.span import competes
from kvcompile.kernels.stages import Unprintable
from kvcompile.kernels.states import UNTRAINED, Weights, growth, observe
from kvcompile.kernels.triton_backend import prefill
from kvcompile.kernels.triton_backend.attend import (
    alone,
    attend,
    dense,
    file_queries,
    library_reads,
    variant,
    variant_of,
)
from kvcompile.kernels.triton_backend.decode import DecodeStep
from kvcompile.kernels.triton_backend.evict import EvictStep
from kvcompile.kernels.triton_backend.library import At, library
from kvcompile.kernels.triton_backend.reads import PieceReading, Reading


class Triton:
    """Kernels of a policy, and the scratch that its steps share; one instance per optimised model."""

    name = "triton"

    def __init__(self) -> None:
        self._readers: dict[tuple[object, ...], ModuleType | None] = {}
        self._decoders: dict[tuple[object, ...], DecodeStep | None] = {}
        self._readings: dict[tuple[object, ...], Reading | None] = {}
        self._piece_readings: dict[tuple[object, ...], PieceReading | None] = {}
        self._evictions: dict[tuple[object, ...], EvictStep | None] = {}

    def prepare(self, plan: PolicyPlan) -> None:
        """Write the kernels' files; they are compiled at their first launch."""
        library(plan)

    def observe(
        self, plan: PolicyPlan, site: Site, q: Tensor, k: Tensor, v: Tensor, scale: float, weights: Weights
    ) -> Tensor:
        """As `states.observe`: what queries add to a state by kernel, where its formula has one."""

        def grown(states: tuple[StatePlan, ...], rows: Rows, fresh: Fresh) -> dict[str, Tensor]:
            whole = rows.narrow is None or not narrows_pieces(plan)
            return _growth(plan, states, rows, fresh) if whole else growth(states, rows, fresh)

        return observe(plan, site, q, k, v, scale, weights, grown)

    def attend_prefill(
        self, plan: PolicyPlan, site: Site, q: Tensor, k: Tensor, v: Tensor, scale: float, weights: Weights = UNTRAINED
    ) -> Tensor:
        """As `reference.attend_prefill`; a long dense piece without past or padding goes to torch's own attention.

        Whether it is one is on the device alone: only there, and only for long pieces, is a value read back.
        """
        narrowed = narrows_pieces(plan) and narrows(plan, site)
        pieces = self._pieces(plan, site, q.shape[2]) if narrowed else None
        if pieces is not None:
            out = pieces(site, q, k, v, scale, **variant(plan, site))
            file_queries(site, q)
            return out
        module = None if narrowed else self._reader(plan, site, q.shape[2])
        if module is None:
            return reference.attend_prefill(plan, site, q, k, v, scale, weights)
        plain = not plan.facts.softcap and not plan.facts.sinks
        if plain and library_reads(q, k, v) and alone(site, k):
            out = dense(q, k, v, scale)
        else:
            out = attend(module, site, q, k, v, scale, **variant(plan, site))
        file_queries(site, q)
        return out

    def _reader(self, plan: PolicyPlan, site: Site, tokens: int) -> ModuleType | None:
        key = (*_key(plan, site), tokens)
        if key not in self._readers:
            try:
                self._readers[key] = library(plan).prefill(At(site.k.device, site.batch * plan.facts.kv_heads, tokens))
            except Unprintable:
                self._readers[key] = None
        return self._readers[key]

    def _pieces(self, plan: PolicyPlan, site: Site, tokens: int) -> PieceReading | None:
        """What a piece reads by, where all reads that narrow it have a form."""
        key = (*_key(plan, site), tokens)
        if key not in self._piece_readings:
            try:
                self._piece_readings[key] = PieceReading.prepare(plan, site, tokens)
            except Unprintable:
                self._piece_readings[key] = None
        return self._piece_readings[key]

    def attend_step(
        self, plan: PolicyPlan, site: Site, q: Tensor, k: Tensor, v: Tensor, scale: float, weights: Weights
    ) -> Tensor:
        """As `reference.attend_step`, without a look at any device value."""
        active, start = site.clock[:, Clock.NEW], site.clock[:, Clock.START]
        given, reading = variant(plan, site), self._reading(plan, site)
        if reading is not None:
            out = reading(site, q[:, :, 0], k[:, :, 0], v[:, :, 0], scale, **given)
            _file_queries(site, q, start, active)
            return out
        step = None if narrows_steps(plan) and narrows(plan, site) else self._decoder(plan, site)
        if step is None:
            return reference.attend_step(plan, site, q, k, v, scale, weights)
        out, _ = step(q[:, :, 0], k[:, :, 0], v[:, :, 0], site, start, active, site.layer, scale, **given)
        _file_queries(site, q, start, active)
        return out

    def _reading(self, plan: PolicyPlan, site: Site) -> Reading | None:
        """What a step reads by, where the plan narrows steps and all of their reads have a form."""
        if not narrows_steps(plan):
            return None
        key = (*_key(plan, site), site.marks.shape[2])
        if key not in self._readings:
            try:
                self._readings[key] = Reading.prepare(plan, site, _capacity(site))
            except Unprintable:
                self._readings[key] = None
        return self._readings[key]

    def _decoder(self, plan: PolicyPlan, site: Site) -> DecodeStep | None:
        key = _key(plan, site)
        if key not in self._decoders:
            rows = site.batch * plan.facts.kv_heads
            at = At(site.k.device, rows, _capacity(site))
            try:
                module = library(plan).decode(at)
            except Unprintable:
                self._decoders[key] = None
            else:
                self._decoders[key] = DecodeStep.prepare(
                    module, plan.facts.layers, rows, at.tokens, at.device, library(plan).target(at)
                )
        return self._decoders[key]

    def evict_step(self, plan: PolicyPlan, stores: list[Site], scale: float) -> None:
        """One launch per head class over all the layers given; classes without a Triton form go by the reference.

        Where layers choose for later ones, the layers have to be taken in order, so all of it goes by the reference.
        """
        if plan.picks:
            evict.evict_step(plan, stores, scale)
            return
        first = stores[0]
        now = first.clock[:, Clock.START] + first.clock[:, Clock.NEW] - 1
        prompt = first.clock[:, Clock.PROMPT]
        for index, part in enumerate(plan.classes):
            if competes(part) or not any(part.fires_on(kind) for kind in STEP_TRIGGERS):
                continue
            step, decoder = self._eviction(plan, first, index), self._left_by(plan, first)
            if step is None or decoder is None:
                self._by_reference(plan, stores, index, scale)
                continue
            if len(stores) < plan.facts.layers:
                here = torch.cat([s.layer for s in stores]).to(step.sites)
                step = step.of(step.sites[torch.isin(step.sites[:, 0], here)])
            if len(step.sites):
                reach = first.reach if part.slides else None
                step(first, first.counts, first.fires[index], now, prompt, decoder.score, reach)

    def _left_by(self, plan: PolicyPlan, site: Site) -> DecodeStep | None:
        """Which decode has left its scores; none where some layer may have been read without leaving any."""
        reading = self._reading(plan, site)
        if reading is not None:
            return reading.decode
        dense = self._decoder(plan, site)
        return None if narrows_steps(plan) and dense is not None and dense.score is not None else dense

    def _eviction(self, plan: PolicyPlan, site: Site, index: int) -> EvictStep | None:
        key = (*_key(plan, site), index)
        if key not in self._evictions:
            try:
                rows = site.batch * plan.facts.kv_heads * plan.facts.layers
                module = library(plan).evict(index, At(site.k.device, rows, _capacity(site)))
                found = EvictStep.prepare(module, plan, index, site.batch, _capacity(site), site.k.device)
            except Unprintable:
                found = None
            self._evictions[key] = found
        return self._evictions[key]

    def _by_reference(self, plan: PolicyPlan, stores: list[Site], index: int, scale: float) -> None:
        for site in stores:
            firing = site.fires[index].nonzero().flatten().tolist()
            if firing and plan.heads(int(site.layer), index):
                evict.evict_class(plan, index, site, firing, scale)

    def insert(self, plan: PolicyPlan, cls: int, site: Site, k: Tensor, v: Tensor, state: Tensor | None) -> None:
        """As `evict.insert`, one launch."""
        if _packer(plan) is None:
            evict.insert(plan, cls, site, k, v, state)
            return
        keep, won = (torch.zeros(k.shape[:3], dtype=torch.bool, device=k.device) for _ in range(2))
        for b, new, peek in _pieces(site):
            for h in plan.heads(int(site.layer), cls):
                keep[b, h, k.shape[2] - new - peek : k.shape[2] - peek] = True
        self._pack(plan, site, k, v, state, keep, won)

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
        """As `evict.evict_prefill`: scores and winners by kernel where they have one, survivors in one launch."""
        if _packer(plan) is None or evict.in_place(plan, cls) or has_joint(plan, plan.classes[cls]):
            evict.evict_prefill(plan, cls, site, q, k, v, state, scale)
            return
        part, kv_heads = plan.classes[cls], plan.facts.kv_heads
        heads = list(plan.heads(int(site.layer), cls))
        keep, won = (torch.zeros(k.shape[:3], dtype=torch.bool, device=k.device) for _ in range(2))
        for b, new, peek in _pieces(site) if heads else ():
            columns = slice(k.shape[2] - new - peek, k.shape[2] - peek)
            if not int(site.fires[cls, b]):
                keep[b, heads, columns] = True
                continue
            fresh = sequence(site, b, q, k, v, state, kv_heads)
            rows, order, index = gather_rows(plan, site, [b], heads, needs_keys(plan, part), scale, fresh)
            if any(asks_narrowed(plan, formula) for formula in formulas_of(part)):
                rows = with_reads(plan, site, [b], heads, rows, fresh)
            rows = with_queries(plan, site, [b], heads, rows, query_sources(part), fresh)
            stays, wins = evict.decide(plan, cls, site, [b], heads, rows, order, _Kernels(plan, cls))
            width = stays.shape[1] - fresh.k.shape[1]
            _settle(site, index, stays[:, :width], wins[:, :width], part.by_position)
            new_columns = slice(width, width + fresh.real)
            keep[b, heads, columns], won[b, heads, columns] = stays[:, new_columns], wins[:, new_columns]
        self._pack(plan, site, k, v, state, keep, won)

    def _pack(
        self, plan: PolicyPlan, site: Site, k: Tensor, v: Tensor, state: Tensor | None, keep: Tensor, won: Tensor
    ) -> None:
        clock = site.clock
        first = clock[:, Clock.START] - (k.shape[2] - clock[:, Clock.NEW] - clock[:, Clock.PEEK])
        pos = (first[:, None, None] + torch.arange(k.shape[2], device=k.device)).expand(k.shape[:3]).int()
        if state is None:
            state = torch.zeros(len(plan.states), *k.shape[:3], device=k.device)
        module = library(plan).pack(At(k.device, k.shape[0] * k.shape[1], k.shape[2]))
        k, v = k.contiguous(), v.contiguous()
        prefill.append(module, site, k, v, pos, won.to(torch.uint8), state, keep, site.layer)


class _Kernels(Plainly):
    """Scores and winners of a prefill by kernel; what has no Triton form, and units, by the definition."""

    def __init__(self, plan: PolicyPlan, cls: int) -> None:
        self.plan, self.cls = plan, cls

    def score(self, term: Selection, rows: Rows, candidates: Tensor, unit: UnitPlan | None) -> Tensor:  # type: ignore[override]
        try:
            stages = library(self.plan).scores(term, At(rows.pos.device, *rows.pos.shape))
        except Unprintable:
            return super().score(term, rows, candidates, unit)
        # One source at most, or the score would have no form; other formulas of the class may ask for more.
        sources = list(sources_of([term.score]))
        narrowed = asks_narrowed(self.plan, term.score)
        if not stages or unit is not None or rows.k is None or rows.bias is not None or narrowed:
            return super().score(term, rows, candidates, unit)
        queries = [(rows.queries or {})[source] for source in sources]
        # Readable entries are resident or peeked; pos -1 marks a column that holds neither.
        readable = (as_read_by(rows, sources[0]) if sources else rows).readable
        pos = rows.pos.masked_fill(~readable, -1).int()[None]
        q = queries[0].q.flatten(0, 1)[None] if queries else rows.k.new_zeros(1, 1, 1, 1)
        qpos = queries[0].pos[:1].int() if queries else pos.new_zeros(1, 1)
        q, k, open_ = q.contiguous(), rows.k[None], candidates[None]
        return prefill.score(stages, q, k, pos, qpos, open_, rows.scale, **variant_of(self.plan, rows))[0]

    def choose(  # type: ignore[override]
        self, term: Selection, rows: Rows, values: Tensor, candidates: Tensor, n: Tensor, versus: Contest | None
    ) -> Tensor:
        try:
            module = library(self.plan).select(self.cls, term, At(values.device, *rows.pos.shape))
        except Unprintable:
            return super().choose(term, rows, values, candidates, n, versus)
        together = term.scope != "head"
        count = len(rows.pos)
        lines = [list(range(count))] if together else [[h] for h in range(count)]
        n = n.clamp(max=values.numel())  # more than there are is all of them
        if term.scope == "across" and term.fraction is None:
            if bool((n % count).any()):  # what heads were told to keep of their newest differs
                return super().choose(term, rows, values, candidates, n, versus)
            n = n // count  # the kernel takes the number per head
        heads = torch.tensor(lines, dtype=torch.int32, device=values.device)
        pos = rows.pos.int()[None]
        return prefill.winners(module, values[None].float(), candidates[None], pos, n[None].int(), heads)[0].bool()


def _growth(plan: PolicyPlan, states: tuple[StatePlan, ...], rows: Rows, fresh: Fresh) -> dict[str, Tensor]:
    """`states.growth` by kernel; what has no Triton form, by the definition."""
    assert rows.k is not None
    q = fresh.q.flatten(0, 1)[None].contiguous()
    pos = rows.pos.masked_fill(~rows.readable, -1).int()[None]
    grown, rest = {}, []
    for state in states:
        try:
            module = library(plan).state(state, At(rows.pos.device, *rows.pos.shape))
        except Unprintable:
            rest.append(state)
            continue
        if module is not None:
            qpos = fresh.pos[None].int()
            k, more = rows.k[None], variant_of(plan, rows)
            grown[state.name] = prefill.state_columns(module, q, k, pos, qpos, None, rows.scale, **more)[0]
    return grown | growth(tuple(rest), rows, fresh)


def _packer(plan: PolicyPlan) -> ModuleType | None:
    """The kernel that moves survivors into pages; None where the pools have no Triton form, as some head sizes."""
    try:
        return library(plan).pack()
    except Unprintable:
        return None


def _settle(site: Site, index: Tensor, keep: Tensor, won: Tensor, by_position: bool) -> None:
    """The resident part of a decision: winners are marked, losers go, pages come back."""
    if bool(won.any()):
        site.frozen[site.slot_matrix(index, won.shape[1])[won]] = 1
    compact(site, index, keep, by_position)


def _pieces(site: Site) -> list[tuple[int, int, int]]:
    """(sequence, real tokens, peeked tokens) of the sequences that bring something."""
    return [(b, new, peek) for b, (new, peek) in enumerate(site.clock[:, :2].tolist()) if new]


def _file_queries(site: Site, q: Tensor, start: Tensor, active: Tensor) -> None:
    window = site.ring.shape[2]
    if window:
        batch = torch.arange(site.batch, device=q.device)
        old = site.ring[batch, :, start % window]
        site.ring[batch, :, start % window] = torch.where(active[:, None, None] > 0, q[:, :, 0].to(old.dtype), old)


def _capacity(site: Site) -> int:
    """The most entries that a row's table can name, in powers of two so that scratch is rarely made anew."""
    return 1 << (site.table.shape[1] * site.page() - 1).bit_length()


def _key(plan: PolicyPlan, site: Site) -> tuple[object, ...]:
    return plan.digest, site.batch, _capacity(site), site.k.device, site.k.dtype
