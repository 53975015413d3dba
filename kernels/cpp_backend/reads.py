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
from kvcompile.kernels.choose_reads import blocks_spec, grain_of, marks_spec, spans_spec, units_spec
from kvcompile.kernels.cpp_backend.library import CppLibrary, cpp_library
from kvcompile.kernels.cpp_backend.prefill import Piece, piece_of
from kvcompile.kernels.cpp_backend.site import CSite, c_site, layer_of
from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.layout import Clock, Site
from kvcompile.kernels.marks import MarksLayout, layout_of
from kvcompile.kernels.plan import PolicyPlan, ReadRule
from kvcompile.kernels.reads import narrows

_address, _long, _int, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_Strides = _long * 6
_BESIDE = {"softcap": _float, "sinks": _address, "sliding": _long}  # in the order of the arguments of spans
_UNCONDITIONED = 1  # judge.UNCONDITIONED


class _Reader(ctypes.Structure):
    """`struct Reader` of templates/_reader.cpp.jinja, field by field."""

    _fields_ = [
        *((name, _address) for name in ("choose", "live", "marks", "edges")),
        *((name, _long) for name in ("marks_b", "edges_b", "sets", "words", "grain")),
        ("picked", _address),
        *((name, _long) for name in ("places", "head", "layer")),
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
    """A rule's two functions, by address; `choose` is None where it chooses nothing."""

    choose: int | None
    live: int
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
    _readers: dict[int, tuple[object, Any]] = field(default_factory=dict)
    _marks: dict[int, tuple[object, Any]] = field(default_factory=dict)
    _narrows: dict[int, tuple[bytes, bool]] = field(default_factory=dict)

    def readers(self, site: Site, layer: int) -> Any:
        """How each KV head of a layer reads in this forward; None where it needs the definition."""
        new, fires = _news(site), _fires_of(site)
        where = (site.marks.data_ptr(), site.marks.shape[2], site.edges.data_ptr(), site.picked.data_ptr())
        key = new, fires, where, site.picked.shape
        known = self._readers.get(layer)
        if known is None or known[0] != key:
            own = tuple(b for b, n in enumerate(new) if n)
            lines = site.fires[len(self.plan.classes) :].tolist()
            known = self._readers[layer] = key, _readers(self, site, layer, own, lines)
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
            made.spans.argtypes = [_address] * 7 + [_float, _int, *(_BESIDE[name] for name in made.beside)]
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

    def _addresses(self, found: ctypes.CDLL, read: int, index: int) -> _Rule:
        spec, rule = units_spec(self.plan, read, index), self.plan.reads[read].rules[index]
        chooses = spec.fact("rank") != "none"
        choose = ctypes.cast(found.choose, _address).value if chooses else None
        live = ctypes.cast(found.live, _address).value
        assert live is not None
        size = spec.number("size") if chooses else 0
        return _Rule(choose, live, spec.number("sets"), size, grain_of(self.plan, rule))


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
        readers = kernels.readers(site, here.layer)
        if readers is None or not _mark(kernels, site, here, None, None):
            return None
        out = q.new_empty(q.shape[0], 1, q.shape[1], q.shape[3])
        strides = _Strides(q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1))
        failed = kernels.spans(
            ctypes.addressof(here), ctypes.addressof(readers), q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(),
            ctypes.addressof(strides), scale, torch.get_num_threads(), *_beside(kernels, site, here.layer),
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
        readers = kernels.readers(site, here.layer)
        if readers is None or not _mark(kernels, site, here, k, v):
            return None
        sink = site.sink[here.layer] if facts.sinks else None
        out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], q.shape[3])
        piece: Piece = piece_of(q, k, v, out, scale, sink=sink, cap=facts.softcap, reach=facts.reach(here.layer))
        kernels.blocks(
            ctypes.addressof(piece), ctypes.addressof(here), ctypes.addressof(readers), torch.get_num_threads()
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


def _readers(kernels: _Kernels, site: Site, layer: int, active: tuple[int, ...], fires: list[list[int]]) -> Any:
    plan, layout = kernels.plan, kernels.layout
    reading = plan.reading(layer)
    rules = {read: _firing(kernels, read, active, fires) for read in set(reading) - {-1}}
    if any(rule == _SLOW for rule in rules.values()):
        return None
    made = (_Reader * len(reading))()
    width, edges = layout.width * layout.itemsize, 8 * layout.edges
    for head, read in enumerate(reading):
        found = rules.get(read)
        if found is None:
            continue
        assert isinstance(found, _Rule)
        reader, line = layout.readers[layer][head], made[head]
        line.choose, line.live, line.sets, line.grain = found.choose, found.live, found.sets, found.grain
        line.words = -(-(site.marks.shape[2] * layout.span // found.size + 1) // 64) if found.size else 0
        if found.choose is not None:
            blocks = site.marks.shape[2]
            line.marks = site.marks[reader].data_ptr()
            line.edges = site.edges[reader].data_ptr() if layout.evicts[reader] else None
            line.marks_b, line.edges_b = blocks * width, blocks * edges
        line.picked, line.places = site.picked.data_ptr(), site.picked.shape[3]
        line.head, line.layer = head + plan.first_head, layer
    return made


_SLOW = "definition"


def _firing(kernels: _Kernels, read: int, active: tuple[int, ...], fires_of: list[list[int]]) -> _Rule | str | None:
    """The rule of a read that every sequence of this forward goes by; None: they read all; or `_SLOW`."""
    plan = kernels.plan
    line = sum(len(other.rules) for other in plan.reads[:read])
    lines = fires_of[line : line + len(plan.reads[read].rules)]
    found: list[int] = []
    for index, (rule, bits) in enumerate(zip(plan.reads[read].rules, lines, strict=True)):
        fires = {_fires(rule, bits[b]) for b in active}
        if fires == {False}:
            continue
        if fires != {True} or rule.pick is not None:
            return _SLOW
        found.append(index)
    if not found:
        return None
    if len(found) > 1:
        return _SLOW
    return kernels.rule(read, found[0]) or _SLOW


def _fires(rule: ReadRule, bits: int) -> bool | None:
    """Whether a rule fires for a sequence; None: that follows from a condition."""
    if not rule.triggers or bits & _UNCONDITIONED:
        return True
    return None if bits else False


def _mark(kernels: _Kernels, site: Site, here: CSite, k: Tensor | None, v: Tensor | None) -> bool:
    """Bring the layer's landmarks up to date; False where they have no C++ form."""
    layout = kernels.layout
    heads = [h for h, reader in enumerate(layout.readers[here.layer]) if reader >= 0]
    if not heads:  # regions alone
        return True
    if kernels.marks is None:
        return False
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
