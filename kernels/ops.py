"""The `kvc` operators: what stands in a compiled graph for attention over a policy's cache.

`kvc::anchor_v1` is one attention site with its whole policy; executed as it is, it means the policy.
The graph pass opens it into the other operators, each one stage of the same site. All take the site's
tensors as one list in the order of `layout.Site`, pools whole and once, and the program's digest as a
constant, so that a changed policy is a changed graph. A changed schema needs a new name (`_v2`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from kvcompile.kernels import cpu, evict, reference, states
from kvcompile.kernels.cpp_backend.backend import Cpp
from kvcompile.kernels.cpp_backend.build import NoCompiler, compiler, tell
from kvcompile.kernels.layout import Site
from kvcompile.kernels.learned import fingerprint
from kvcompile.kernels.plan import STEP_TRIGGERS, PolicyPlan
from kvcompile.kernels.span import evict_span, measured_shares
from kvcompile.kernels.states import UNTRAINED, Weights

PHASES = ("chunk", "prefill.end", "step")


class Backend(Protocol):
    """What a backend brings; everything else is `evict` and `select`, common to all."""

    name: str

    def prepare(self, plan: PolicyPlan) -> None: ...
    def attend_prefill(
        self, plan: PolicyPlan, site: Site, q: Tensor, k: Tensor, v: Tensor, scale: float, weights: Weights = UNTRAINED
    ) -> Tensor: ...
    def observe(
        self, plan: PolicyPlan, site: Site, q: Tensor, k: Tensor, v: Tensor, scale: float, weights: Weights
    ) -> Tensor: ...
    def attend_step(
        self, plan: PolicyPlan, site: Site, q: Tensor, k: Tensor, v: Tensor, scale: float, weights: Weights
    ) -> Tensor: ...
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
    ) -> None: ...
    def insert(self, plan: PolicyPlan, cls: int, site: Site, k: Tensor, v: Tensor, state: Tensor | None) -> None: ...
    def evict_step(self, plan: PolicyPlan, sites: list[Site], scale: float) -> None: ...


class Reference:
    """The oracle."""

    name = "reference"

    def prepare(self, plan: PolicyPlan) -> None:
        """Nothing is built."""

    attend_prefill = staticmethod(reference.attend_prefill)
    observe = staticmethod(states.observe)
    attend_step = staticmethod(reference.attend_step)
    insert = staticmethod(evict.insert)
    evict_prefill = staticmethod(evict.evict_prefill)
    evict_step = staticmethod(evict.evict_step)


class Cpu(Reference):
    """Packed SDPA in place of the reference's loops."""

    name = "cpu"
    attend_prefill = staticmethod(cpu.attend_prefill)
    attend_step = staticmethod(cpu.attend_step)


def backend(name: str) -> Backend:
    """The backend of that name. Triton is imported when it is first asked for.

    `cpu` is generated C++ where the machine has a compiler, else packed SDPA, with a warning that says so.
    """
    if name == "triton":
        from kvcompile.kernels.triton_backend.backend import Triton

        return Triton()
    if name == "reference":
        return Reference()
    try:
        compiler()
    except NoCompiler as error:
        tell(f"the cpu backend runs packed SDPA and torch, which is slower: {error}")
        return Cpu()
    return Cpp()


@dataclass(frozen=True)
class Program:
    """A plan on a backend: what a site's digest stands for. `weights`: trained scores, named as in `learned`."""

    plan: PolicyPlan
    backend: Backend
    weights: Weights = field(default_factory=dict)

    @cached_property
    def evicts_in_step(self) -> bool:
        """As the plan says; asked for in every layer of every step."""
        return self.plan.evicts_in_step


_programs: dict[str, Program] = {}


def register(program: Program) -> str:
    """Make a program known to the operators; returns the digest by which graphs name it."""
    key = f"{program.plan.digest}:{program.backend.name}"
    if program.weights:
        key += f":{fingerprint(program.weights)}"  # the plan knows only their names
    _programs[key] = program
    return key


def program(site: str) -> Program:
    return _programs[site]


def anchor(q: Tensor, k: Tensor, v: Tensor, at: Site, scale: float, phase: str, site: str) -> Tensor:
    """What `kvc::anchor_v1` does, without its dispatch: for callers that `watched` tells that nobody looks."""
    known = program(site)
    plan, backend = known.plan, known.backend
    if phase == "step":
        out = backend.attend_step(plan, at, q, k, v, scale, known.weights)
        if known.evicts_in_step:
            backend.evict_step(plan, [at], scale)
        return out
    out = backend.attend_prefill(plan, at, q, k, v, scale, known.weights)
    state = backend.observe(plan, at, q, k, v, scale, known.weights) if plan.states else None
    for cls, judges in stages(plan, phase):
        if judges:
            backend.evict_prefill(plan, cls, at, q, k, v, state, scale)
        else:
            backend.insert(plan, cls, at, k, v, state)
    return out


def _anchor(q: Tensor, k: Tensor, v: Tensor, store: list[Tensor], scale: float, phase: str, site: str) -> Tensor:
    return anchor(q, k, v, Site(*store), scale, phase, site)


def stages(plan: PolicyPlan, phase: str) -> list[tuple[int, bool]]:
    """What follows the read of a prompt's piece: (class, whether it may decide; else its rows just take the piece)."""
    judging = [(cls, fires_in(plan, cls, phase)) for cls in range(len(plan.classes))]
    return [(cls, fires) for cls, fires in judging if fires or plan.classes[cls].rows_of is None]


def fires_in(plan: PolicyPlan, cls: int, phase: str) -> bool:
    """Whether a class may have to decide in a forward of this phase; which sequences do is data (`Site.fires`)."""
    kinds: tuple[str, ...] = ("chunk", "filled", "full", "when", "slide")
    if phase == "step":
        kinds = STEP_TRIGGERS
    elif phase == "prefill.end":
        if measured_shares(plan, cls):  # what they follow from has to be noted
            return True
        kinds = (*kinds, "prefill.end")
    return any(plan.classes[cls].fires_on(kind) for kind in kinds)


def _attend_prefill(q: Tensor, k: Tensor, v: Tensor, store: list[Tensor], scale: float, site: str) -> Tensor:
    p = program(site)
    return p.backend.attend_prefill(p.plan, Site(*store), q, k, v, scale, p.weights)


def _observe(q: Tensor, k: Tensor, v: Tensor, store: list[Tensor], scale: float, site: str) -> Tensor:
    p = program(site)
    return p.backend.observe(p.plan, Site(*store), q, k, v, scale, p.weights)


def _attend_step(q: Tensor, k: Tensor, v: Tensor, store: list[Tensor], scale: float, site: str) -> Tensor:
    p = program(site)
    return p.backend.attend_step(p.plan, Site(*store), q, k, v, scale, p.weights)


def _insert(k: Tensor, v: Tensor, state: Tensor | None, store: list[Tensor], cls: int, site: str) -> None:
    p = program(site)
    p.backend.insert(p.plan, cls, Site(*store), k, v, state)


def _evict_prefill(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, store: list[Tensor], scale: float, cls: int, site: str
) -> None:
    p = program(site)
    p.backend.evict_prefill(p.plan, cls, Site(*store), q, k, v, state, scale)


def _evict_step(stores: list[Tensor], layers: int, scale: float, site: str) -> None:
    p = program(site)
    p.backend.evict_step(p.plan, _sites(stores, layers), scale)


def _evict_span(stores: list[Tensor], layers: int, scale: float, phase: str, site: str) -> Tensor:
    return evict_span(program(site).plan, _sites(stores, layers), scale, phase == "step")


def _sites(stores: list[Tensor], layers: int) -> list[Site]:
    width = len(Site._fields)
    return [Site(*stores[i * width : (i + 1) * width]) for i in range(layers)]


def _like_output(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])


def _like_state(q: Tensor, k: Tensor, v: Tensor, store: list[Tensor], *_: object) -> Tensor:
    return q.new_empty((store[Site._fields.index("state")].shape[0], *k.shape[:3]), dtype=torch.float32)


def _like_parts(stores: list[Tensor], layers: int, scale: float, phase: str, site: str) -> Tensor:
    batch = stores[Site._fields.index("clock")].shape[0]
    return stores[0].new_empty((len(program(site).plan.shares), layers, batch))


def _nothing(*_: object) -> None:
    return None


_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def _as_without_autocast(name: str) -> Callable[..., Any]:
    """An operator under autocast, which would cast the pools in every step and the scores that decide."""

    def run(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return getattr(torch.ops.kvc, name)(*args)

    return run


# Library.define instead of custom_op: 5 against 51 microseconds a call with eight mutated tensors.
_library = torch.library.Library("kvc", "FRAGMENT")
_qkv = "Tensor q, Tensor k, Tensor v"
_SCHEMAS: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]] = {
    "anchor_v1": (f"({_qkv}, Tensor(a!)[] store, float scale, str phase, str site) -> Tensor", _anchor, _like_output),
    "attend_prefill_v1": (
        f"({_qkv}, Tensor(a!)[] store, float scale, str site) -> Tensor",
        _attend_prefill,
        _like_output,
    ),
    "attend_step_v1": (f"({_qkv}, Tensor(a!)[] store, float scale, str site) -> Tensor", _attend_step, _like_output),
    "observe_v2": (f"({_qkv}, Tensor(a!)[] store, float scale, str site) -> Tensor", _observe, _like_state),
    "insert_v1": (
        "(Tensor k, Tensor v, Tensor? state, Tensor(a!)[] store, int cls, str site) -> ()",
        _insert,
        _nothing,
    ),
    "evict_prefill_v1": (
        f"({_qkv}, Tensor? state, Tensor(a!)[] store, float scale, int cls, str site) -> ()",
        _evict_prefill,
        _nothing,
    ),
    "evict_step_v1": ("(Tensor(a!)[] stores, int layers, float scale, str site) -> ()", _evict_step, _nothing),
    "evict_span_v1": (
        "(Tensor(a!)[] stores, int layers, float scale, str phase, str site) -> Tensor",
        _evict_span,
        _like_parts,
    ),
}
for _name, (_schema, _run, _fake) in _SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.needs_fixed_stride_order,))
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    for _key in ("AutocastCPU", "AutocastCUDA"):
        _library.impl(_name, _as_without_autocast(_name), _key)
    torch.library.register_fake(f"kvc::{_name}", _fake, lib=_library)
