"""Narrowed reads by generated C++: landmarks, then one call in which each head reads what its rule says, or all.

Takes what the operators take, in forwards in which some head of the layer reads less than all; None where a rule that
fires, or what it leaves behind, has no C++ form. Guarantees: the same meaning as `reference`, to rounding.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvcompile.kernels import reference
from kvcompile.kernels.choose_reads import (
    blocks_spec,
    chooses_entries,
    entries_spec,
    grain_of,
    marks_spec,
    spans_spec,
    units_spec,
)
from kvcompile.kernels.cpp_backend.library import CppLibrary, cpp_library
from kvcompile.kernels.cpp_backend.prefill import Piece, piece_of
from kvcompile.kernels.cpp_backend.site import CSite, c_site, layer_of
from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.layout import Clock, Site
from kvcompile.kernels.marks import MarksLayout, layout_of
from kvcompile.kernels.plan import PolicyPlan, ReadRule
from kvcompile.kernels.reads import HELD, holds_sets, narrows

_address, _long, _int, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_Strides = _long * 6
_BESIDE = {"softcap": _float, "sinks": _address, "sliding": _long}  # in the order of the arguments of spans
_UNCONDITIONED = 1  # judge.UNCONDITIONED


class _Reader(ctypes.Structure):
    """`struct Reader` of templates/_reader.cpp.jinja, field by field."""

    _fields_ = [
        *((name, _address) for name in ("choose", "live", "listed", "entries", "marks", "edges")),
        *((name, _long) for name in ("marks_b", "edges_b", "sets", "words", "grain")),
        ("picked", _address),
        *((name, _long) for name in ("places", "head", "layer", "held", "rests", "slot")),
    ]


class _Marks(ctypes.Structure):
    """`struct Marks` of templates/marks.cpp.jinja, field by field."""

    _fields_ = [
        *((name, _address) for name in ("marks", "edges", "marked", "heads", "evicts", "k", "v")),
        ("k_strides", _long * 3),
        ("v_strides", _long * 3),
        *((name, _long) for name in ("columns", "readers", "blocks")),
    ]


@dataclass(frozen=True, slots=True)
class _Rule:
    """A rule's functions, by address: `choose` is None where it chooses no units, `entries` where no single entries,
    `listed` where its regions reach into units that can be chosen."""

    choose: int | None
    live: int
    listed: int | None
    entries: int | None
    sets: int
    size: int  # of the units that it chooses; 0: none
    grain: int


@dataclass(slots=True)
class _Kernels:
    """A plan's functions; None where one has no C++ form."""

    plan: PolicyPlan
    dtype: torch.dtype
    layout: MarksLayout
    library: CppLibrary
    spans: Any
    blocks: Any
    marks: Any
    beside: tuple[str, ...] = ()  # what spans takes of the model's attention
    rules: dict[tuple[int, int], _Rule | None] = field(default_factory=dict)
    # Of each layer the latest, and what it was of: a step asks for them anew in every layer.
    _readers: dict[int, tuple[object, _Readers | None]] = field(default_factory=dict)
    _marks: dict[int, tuple[object, Any]] = field(default_factory=dict)
    _narrows: dict[int, tuple[bytes, bool]] = field(default_factory=dict)

    def readers(self, site: Site, layer: int, step: bool) -> _Readers | None:
        """How each KV head of a layer reads in this forward; None where it needs the definition."""
        new, fires = _news(site), _fires_of(site)
        where = (site.marks.data_ptr(), site.marks.shape[2], site.edges.data_ptr(), site.picked.data_ptr())
        key = new, fires, where, site.picked.shape, step
        known = self._readers.get(layer)
        if known is None or known[0] != key:
            own = tuple(b for b, n in enumerate(new) if n)
            lines = site.fires[len(self.plan.classes) :].tolist()
            known = self._readers[layer] = key, _readers(self, site, layer, own, lines, step)
        return known[1]

    def narrows(self, site: Site) -> bool:
        """`reads.narrows`, remembered as long as the same triggers fire."""
        layer, fires = layer_of(site), _fires_of(site)
        known = self._narrows.get(layer)
        if known is None or known[0] != fires:
            known = self._narrows[layer] = fires, narrows(self.plan, site)
        return known[1]

    @classmethod
    def of(cls, plan: PolicyPlan) -> _Kernels:
        library = cpp_library(plan)
        spans, blocks, marks = (library.find(make) for make in (spans_spec, blocks_spec, marks_spec))
        made = cls(plan, getattr(torch, plan.facts.dtype), layout_of(plan), library, None, None, None)
        if spans is not None:
            facts = dict(spans_spec(plan).facts)
            made.beside = tuple(name for name in _BESIDE if facts.get(name))
            made.spans = spans.spans
            made.spans.argtypes = [_address] * 8 + [_float, _int, *(_BESIDE[name] for name in made.beside)]
            made.spans.restype = _long
        if blocks is not None:
            made.blocks = blocks.blocks
            made.blocks.argtypes, made.blocks.restype = [_address] * 3 + [_int], None
        if marks is not None:
            made.marks = marks.marks
            made.marks.argtypes, made.marks.restype = [_address] * 2 + [_int], None
        return made

    def rule(self, read: int, index: int) -> _Rule | None:
        if (read, index) not in self.rules:
            found = self.library.find(units_spec, read, index)
            self.rules[read, index] = None if found is None else self._addresses(found, read, index)
        return self.rules[read, index]

    def _addresses(self, found: ctypes.CDLL, read: int, index: int) -> _Rule | None:
        spec, rule = units_spec(self.plan, read, index), self.plan.reads[read].rules[index]
        chooses = spec.fact("rank") != "none"
        choose = ctypes.cast(found.choose, _address).value if chooses else None
        live = ctypes.cast(found.live, _address).value
        assert live is not None
        listed = ctypes.cast(found.listed, _address).value if hasattr(found, "listed") else None
        size, entries = spec.number("size") if chooses else 0, None
        if chooses_entries(rule):
            single = self.library.find(entries_spec, read, index)
            if single is None:
                return None
            entries = ctypes.cast(single.entries, _address).value
        return _Rule(choose, live, listed, entries, spec.number("sets"), size, grain_of(self.plan, rule))


class Reads:
    """The kernels of narrowed reads of the plans of a backend."""

    def __init__(self) -> None:
        self._known: dict[int, _Kernels] = {}

    def _kernels(self, plan: PolicyPlan) -> _Kernels:
        # By identity, as in `step.Steps`; the plan is held, so that its identity stays its own.
        found = self._known.get(id(plan))
        if found is None:
            found = self._known[id(plan)] = _Kernels.of(plan)
        return found

    def narrows(self, plan: PolicyPlan, site: Site) -> bool:
        """As `reads.narrows`."""
        return bool(plan.reads) and self._kernels(plan).narrows(site)

    def step(self, plan: PolicyPlan, site: Site, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor | None:
        """As `reference.attend_step`; None where there is no kernel.

        Raises:
            KvCompileError: a row has no room for its entry; nothing has been changed.
        """
        kernels = self._kernels(plan)
        if kernels.spans is None or not _as_planned(kernels, site, q, k, v):
            return None
        q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
        here = c_site(site, plan.facts.kv_heads)
        found = kernels.readers(site, here.layer, step=True)
        if found is None or (found.chooses and not _mark(kernels, site, here, None, None)):
            return None
        out = q.new_empty(q.shape[0], 1, q.shape[1], q.shape[3])
        strides = _Strides(q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1))
        failed = kernels.spans(
            ctypes.addressof(here), ctypes.addressof(found.reads), ctypes.addressof(found.picks), q.data_ptr(),
            k.data_ptr(), v.data_ptr(), out.data_ptr(), ctypes.addressof(strides), scale,
            torch.get_num_threads(), *_beside(kernels, site, here.layer),
        )  # fmt: skip
        if failed:
            raise KvCompileError(
                f"row {failed - 1} of layer {here.layer} has no room for one more entry: "
                f"reserve it before the step, as `Store.reserve_step` does"
            )
        return out

    def prefill(self, plan: PolicyPlan, site: Site, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor | None:
        """As `reference.attend_prefill`; None where there is no kernel."""
        kernels = self._kernels(plan)
        if kernels.blocks is None or not _as_planned(kernels, site, q, k, v):
            return None
        q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
        here, facts = c_site(site, plan.facts.kv_heads), plan.facts
        found = kernels.readers(site, here.layer, step=False)
        if found is None or (found.chooses and not _mark(kernels, site, here, k, v)):
            return None
        sink = site.sink[here.layer] if facts.sinks else None
        out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], q.shape[3])
        piece: Piece = piece_of(q, k, v, out, scale, sink=sink, cap=facts.softcap, reach=facts.reach(here.layer))
        kernels.blocks(
            ctypes.addressof(piece), ctypes.addressof(here), ctypes.addressof(found.reads), torch.get_num_threads()
        )
        for b, (new, peek, start) in enumerate(site.clock[:, :3].tolist()) if site.ring.shape[2] else ():
            reference.file_queries(site, b, q[b, :, q.shape[2] - new - peek :], new, start)
        return out


def _fires_of(site: Site) -> bytes:
    """What fires for whom, as it lies in memory."""
    return ctypes.string_at(site.fires.data_ptr(), site.fires.numel())


def _news(site: Site) -> list[int]:
    """Of each sequence the tokens that it brings."""
    clock = (_long * site.clock.numel()).from_address(site.clock.data_ptr())
    return clock[Clock.NEW :: Clock.WIDTH]


def _as_planned(kernels: _Kernels, site: Site, q: Tensor, k: Tensor, v: Tensor) -> bool:
    return q.dtype == k.dtype == v.dtype == site.k.dtype == kernels.dtype


def _beside(kernels: _Kernels, site: Site, layer: int) -> list[float]:
    """What spans takes of the model's attention, in the order of `_BESIDE`."""
    facts = kernels.plan.facts
    asked = {"softcap": facts.softcap, "sinks": site.sink[layer].data_ptr() if facts.sinks else 0}
    return [(asked | {"sliding": facts.reach(layer)})[name] for name in kernels.beside]


def _readers(
    kernels: _Kernels, site: Site, layer: int, active: tuple[int, ...], fires: list[list[int]], step: bool
) -> _Readers | None:
    plan = kernels.plan
    reading = plan.reading(layer)
    reads, picks = (_Reader * len(reading))(), (_Reader * len(reading))()
    chooses = False
    held = [state.name for state in plan.states].index(HELD) if step and holds_sets(plan) else -1
    for head, read in enumerate(reading):
        rules = _Firing(None, None) if read < 0 else _firing(kernels, read, active, fires)
        if rules is None or (not step and (rules.pick or (rules.reads and rules.reads.entries))):
            return None
        line = reads[head]
        _fill(line, kernels, site, layer, head, rules.reads)
        line.held = held if read >= 0 and plan.reads[read].holds else -1
        line.rests = line.held >= 0 and not rules.fires
        if line.rests:
            line.sets = plan.facts.group
        _fill(picks[head], kernels, site, layer, head, rules.pick)
        picks[head].slot = rules.slot
        chooses |= any(rule is not None and rule.choose is not None for rule in (rules.reads, rules.pick))
    return _Readers(reads, picks, chooses)


@dataclass(frozen=True, slots=True)
class _Readers:
    """What the KV heads of a layer read, and what they choose for later layers: arrays of `_Reader`.

    chooses: whether a head chooses by landmarks, in either.
    """

    reads: Any
    picks: Any
    chooses: bool


def _fill(line: _Reader, kernels: _Kernels, site: Site, layer: int, head: int, rule: _Rule | None) -> None:
    """What a rule makes of a head's line; of no rule nothing is chosen, and all is read."""
    plan, layout = kernels.plan, kernels.layout
    line.sets = 1
    line.picked, line.places = site.picked.data_ptr(), site.picked.shape[3]
    line.head, line.layer = head + plan.first_head, layer
    if rule is None:
        return
    line.choose, line.live, line.listed, line.entries = rule.choose, rule.live, rule.listed, rule.entries
    line.sets, line.grain = rule.sets, rule.grain
    line.words = -(-(site.marks.shape[2] * layout.span // rule.size + 1) // 64) if rule.size else 0
    if rule.choose is not None:
        reader, blocks = layout.readers[layer][head], site.marks.shape[2]
        line.marks = site.marks[reader].data_ptr()
        line.edges = site.edges[reader].data_ptr() if layout.evicts[reader] else None
        line.marks_b, line.edges_b = blocks * layout.width * layout.itemsize, blocks * 8 * layout.edges


@dataclass(frozen=True, slots=True)
class _Firing:
    """The rules of a read that every sequence of a forward goes by. reads: None where they read all, or go on with a
    former set; fires: whether one says what is read; slot: where the choice of `pick` goes."""

    reads: _Rule | None
    pick: _Rule | None
    fires: bool = False
    slot: int = 0


def _firing(kernels: _Kernels, read: int, active: tuple[int, ...], fires_of: list[list[int]]) -> _Firing | None:
    """None: the definition has to say it, since sequences differ, or a rule has no function."""
    plan = kernels.plan
    line = sum(len(other.rules) for other in plan.reads[:read])
    lines = fires_of[line : line + len(plan.reads[read].rules)]
    made: dict[bool, _Rule | None] = {False: None, True: None}
    slot, fires = 0, False
    for index, (rule, bits) in enumerate(zip(plan.reads[read].rules, lines, strict=True)):
        firing, picks = {_fires(rule, bits[b]) for b in active}, rule.pick is not None
        if firing == {False}:
            continue
        if firing != {True} or made[picks] is not None or (fires and not picks):
            return None
        if rule.narrows:
            made[picks] = kernels.rule(read, index)
            if made[picks] is None:
                return None
        slot = slot if rule.pick is None else rule.pick
        fires |= not picks
    return _Firing(made[False], made[True], fires, slot)


def _fires(rule: ReadRule, bits: int) -> bool | None:
    """Whether a rule fires for a sequence; None: that follows from a condition."""
    if not rule.triggers or bits & _UNCONDITIONED:
        return True
    return None if bits else False


def _mark(kernels: _Kernels, site: Site, here: CSite, k: Tensor | None, v: Tensor | None) -> bool:
    """Bring the layer's landmarks up to date; False where they have no C++ form.

    Forwards that choose nothing leave them as they are: what has become full is added when they are next asked for.
    """
    layout = kernels.layout
    if kernels.marks is None:
        return False
    heads = [h for h, reader in enumerate(layout.readers[here.layer]) if reader >= 0]
    key = site.marks.data_ptr(), site.edges.data_ptr(), site.marked.data_ptr(), site.marks.shape
    known = kernels._marks.get(here.layer)
    if known is None or known[0] != key:
        first = layout.readers[here.layer][heads[0]]  # a layer's readers follow each other
        of = (ctypes.c_int32 * len(heads))(*heads)
        evicts = (ctypes.c_uint8 * len(heads))(*(layout.evicts[first + i] for i in range(len(heads))))
        made = _Marks(
            marks=site.marks[first].data_ptr(), edges=site.edges[first].data_ptr(),
            marked=site.marked[first].data_ptr(), heads=ctypes.addressof(of), evicts=ctypes.addressof(evicts),
            readers=len(heads), blocks=site.marks.shape[2],
        )  # fmt: skip
        known = kernels._marks[here.layer] = key, (made, of, evicts)
    asked = _Marks.from_buffer_copy(known[1][0])  # another thread may be in the same layer
    if k is not None and v is not None:
        asked.k, asked.v, asked.columns = k.data_ptr(), v.data_ptr(), k.shape[2]
        asked.k_strides, asked.v_strides = ((_long * 3)(*t.stride()[:3]) for t in (k, v))
    kernels.marks(ctypes.addressof(here), ctypes.addressof(asked), torch.get_num_threads())
    return True
