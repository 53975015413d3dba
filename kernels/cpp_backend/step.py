"""A decode step by generated C++: append, attend and score in one call a layer, then evictions in one call a class.

Takes what the operators take; where the policy's step, or a class of it, has no C++ form, its caller or the definition
runs instead. Guarantees: the same meaning as `reference`, to rounding; the same bits on every run.
"""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvcompile.kernels import evict
from kvcompile.kernels.choose import decode_spec, evict_spec
from kvcompile.kernels.cpp_backend.library import cpp_library
from kvcompile.kernels.cpp_backend.site import CSite, c_site
from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.layout import Site
from kvcompile.kernels.plan import STEP_TRIGGERS, PolicyPlan
from kvcompile.kernels.span import competes

_address, _long, _int = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_Strides = _long * 6
_BESIDE = {"softcap": ctypes.c_float, "sinks": _address, "sliding": _long}  # in the order of decode's arguments


class _Left(threading.local):
    """What decode leaves for the evictions of the same forward, by layer: of each thread its own."""

    def __init__(self) -> None:
        self.score: dict[int, Tensor] = {}


@dataclass(slots=True)
class _Kernels:
    """A plan's functions; None where one has no C++ form."""

    plan: PolicyPlan
    dtype: torch.dtype
    decode: Any
    scores: bool
    variants: frozenset[str]  # softcap, sinks, sliding: what decode takes beside
    evictions: dict[int, Any]
    reach: dict[int, tuple[int, ...]]  # what an eviction takes beside: where its class slides, its window
    left: _Left

    @classmethod
    def of(cls, plan: PolicyPlan) -> _Kernels:
        library = cpp_library(plan)
        loaded = library.find(decode_spec)
        made = cls(plan, getattr(torch, plan.facts.dtype), None, False, frozenset(), {}, {}, _Left())
        if loaded is None:
            return made
        spec = decode_spec(plan)
        made.scores, made.variants = "score" in dict(spec.holes), frozenset(_BESIDE) & dict(spec.facts).keys()
        made.decode = loaded.decode
        made.decode.argtypes = [_address] * 6 + [ctypes.c_float, _int] + [_address] * made.scores
        made.decode.argtypes += [kind for name, kind in _BESIDE.items() if name in made.variants]
        made.decode.restype = _long
        for index, part in enumerate(plan.classes):
            if any(part.fires_on(kind) for kind in STEP_TRIGGERS) and not competes(part):
                found = library.find(evict_spec, index)
                if found is not None:
                    found.evict.argtypes = [_address, _long, _address, _long, _long, _address, _int]
                    found.evict.argtypes += [_long] * part.slides
                    found.evict.restype = None
                    made.evictions[index] = found.evict
                    made.reach[index] = (plan.class_reach(index),) * part.slides
        return made

    def beside(self, site: Site, layer: int) -> tuple[float, ...]:
        """What decode takes of the model's attention, in the order of `_BESIDE`."""
        if not self.variants:
            return ()
        facts = self.plan.facts
        asked = {"softcap": facts.softcap, "sinks": 0, "sliding": facts.reach(layer)}
        if "sinks" in self.variants:
            asked["sinks"] = site.sink[layer].data_ptr()
        return tuple(asked[name] for name in _BESIDE if name in self.variants)

    def room(self, layer: int, slots: int) -> Tensor:
        """Where the scores of a layer's slots lie, float32 [>= slots]; made anew when the pool has grown."""
        score = self.left.score
        found = score.get(layer)
        if found is None or len(found) < slots:
            found = score[layer] = torch.empty(slots)
        return found


class Steps:
    """The step kernels of the plans of a backend, and what one step's calls leave for its evictions."""

    def __init__(self) -> None:
        self._known: dict[int, _Kernels] = {}

    def _kernels(self, plan: PolicyPlan) -> _Kernels:
        # By identity, as it is asked for in every layer: to hash a plan is to walk over all of it.
        found = self._known.get(id(plan))
        if found is None:
            found = self._known[id(plan)] = _Kernels.of(plan)
        return found

    def attend(self, plan: PolicyPlan, site: Site, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor | None:
        """As `reference.attend_step`; None where there is no kernel.

        Raises:
            KvCompileError: a row has no room for its entry; nothing has been changed.
        """
        kernels = self._kernels(plan)
        if kernels.decode is None or not (q.dtype == k.dtype == v.dtype == site.k.dtype == kernels.dtype):
            return None
        q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
        out = q.new_empty(q.shape[0], 1, q.shape[1], q.shape[3])
        here = c_site(site, plan.facts.kv_heads)
        strides = _Strides(q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1))
        extra = (kernels.room(here.layer, site.k.shape[0]).data_ptr(),) if kernels.scores else ()
        failed = kernels.decode(
            ctypes.addressof(here), q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(),
            ctypes.addressof(strides), scale, torch.get_num_threads(), *extra, *kernels.beside(site, here.layer),
        )  # fmt: skip
        if failed:
            raise KvCompileError(
                f"row {failed - 1} of layer {here.layer} has no room for one more entry: "
                f"reserve it before the step, as `Store.reserve_step` does"
            )
        return out

    def evict(self, plan: PolicyPlan, sites: list[Site], scale: float) -> None:
        """As `evict.evict_step`; the layers' reads came from `attend`, in this forward."""
        if not bool(sites[0].fires[: len(plan.classes)].any()):
            return
        kernels = self._kernels(plan)
        ready = kernels.evictions and not plan.picks and sites[0].k.dtype == kernels.dtype
        left = kernels.left.score
        if not ready or (kernels.scores and any(int(site.layer) not in left for site in sites)):
            evict.evict_step(plan, sites, scale)
            return
        here = (CSite * len(sites))(*(c_site(site, plan.facts.kv_heads) for site in sites))
        scores = None
        if kernels.scores:
            scores = (_address * len(sites))(*(left[site.layer].data_ptr() for site in here))
        for index, part in enumerate(plan.classes):
            if index in kernels.evictions:
                heads = _heads(plan, index, [site.layer for site in here])
                kernels.evictions[index](
                    ctypes.addressof(here), len(sites), ctypes.addressof(heads), len(heads) // len(sites), index,
                    None if scores is None else ctypes.addressof(scores), torch.get_num_threads(),
                    *kernels.reach[index],
                )  # fmt: skip
            elif not competes(part):
                _by_definition(plan, sites, index, scale)


def _heads(plan: PolicyPlan, index: int, layers: list[int]) -> Any:
    """A class's heads in these layers, int32 [layers, most], flat, padded with -1."""
    lines = [plan.heads(layer, index) for layer in layers]
    most = max(1, *map(len, lines))
    return (ctypes.c_int32 * (most * len(lines)))(*(h for line in lines for h in (*line, *[-1] * (most - len(line)))))


def _by_definition(plan: PolicyPlan, sites: list[Site], index: int, scale: float) -> None:
    for site in sites:
        firing = site.fires[index].nonzero().flatten().tolist()
        if firing and plan.heads(int(site.layer), index):
            evict.evict_class(plan, index, site, firing, scale)
