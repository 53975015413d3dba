"""Runs decoder layers of an optimised model: as they are, or through torch.compile with our graph pass.

One callable per phase, compiled once and shared by all layers: a layer's identity reaches the graph as
tensors, so compile time does not grow with depth.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn, cast

import torch
from torch import Tensor, fx, nn
from transformers import AttentionInterface

from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.layout import Site
from kvcompile.passes.dump import dump_graph
from kvcompile.passes.open_anchors import OpenAnchors

ATTENTION = "kvcompile"
INNER = ("off", "eager", "inductor")


class Anchor(NamedTuple):
    """What one layer's call hands its attention: the phase, the program's digest, the site's tensors."""

    phase: str
    site: str
    store: list[Tensor]


@dataclass
class Call:
    """One forward of the whole model: its phase, program, sites in layer order, and whether graphs are used.

    `opened`: layers whose graph ran without the evictions of a step, which are still to come.
    """

    phase: str
    site: str
    sites: list[Site]
    compiled: bool
    opened: list[int] = field(default_factory=list)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    kvc: Anchor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: one anchor operator a site. Returns [batch, n, q_heads, head_dim]."""
    if kvc is None:
        raise KvCompileError(
            "an optimised model's layers run only inside the model's own forward: call the model itself"
        )
    refuse_variants(module, attention_mask, kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = torch.ops.kvc.anchor_v1(query, key, value, kvc.store, scale, kvc.phase, kvc.site)
    return out, None


AttentionInterface.register(ATTENTION, attention)


def refuse_variants(module: nn.Module, attention_mask: Tensor | None, kwargs: dict[str, Any]) -> None:
    """KvCompileError where a layer asks its attention for what no policy is carried out under yet."""
    for name in ("sliding_window", "softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise KvCompileError(f"{type(module).__name__} asks for {name}, which is not supported yet")
    if attention_mask is not None:
        raise KvCompileError(f"{type(module).__name__} makes an attention mask of its own, which is not supported yet")


@dataclass(frozen=True)
class GraphRecord:
    """One compiled graph: phase, text before and after the pass, anchors opened, torch's name of the compilation."""

    phase: str
    before: str
    after: str
    anchors: int
    compilation: str


@dataclass
class Layers:
    """The compiled callables of one optimised model and what is known of them."""

    policy: str
    inner: str
    records: list[GraphRecord] = field(default_factory=list)
    breaks: list[str] = field(default_factory=list)
    _callables: dict[tuple[str, type[nn.Module]], Callable[..., Any]] = field(default_factory=dict)

    @property
    def recompiles(self) -> int:
        """Graphs beyond the first of each (phase, layer class)."""
        return max(0, len(self.records) - len(self._callables))

    def run(self, call: Call, layer: nn.Module, index: int, plain: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """One decoder layer's forward under a call."""
        kwargs["kvc"] = Anchor(call.phase, call.site, list(call.sites[index]))
        # A forward that someone else has put there does more than the class's own, so it runs as it is.
        if not call.compiled or self.breaks or getattr(plain, "__func__", None) is not type(layer).forward:
            return plain(*args, **kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        key = (call.phase, type(layer))
        if key not in self._callables:
            self._callables[key] = shared_callable(call.phase, type(layer), self._backend(call.phase))
        if call.phase != "step":
            mark_lengths(hidden, kwargs)
        _mark_pools(call.sites[index])
        try:
            out = self._callables[key](layer, *args, **kwargs)
        except (torch._dynamo.exc.Unsupported, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            # Eager anchors mean the same, so the run goes on; the report says that a graph broke and why.
            self.breaks.append(str(error))
            return plain(*args, **kwargs)
        call.opened.append(index)
        return out

    def _backend(self, phase: str) -> Callable[..., Any]:
        def backend(module: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
            before = module.print_readable(print_output=False)
            anchors = OpenAnchors(phase)(module.graph)
            module.recompile()
            after = module.print_readable(print_output=False)
            # A restarted analysis hands the same compilation over again: the later graph is the one that stays.
            compilation = str(torch._guards.CompileContext.current_compile_id())
            self.records = [r for r in self.records if r.compilation != compilation]
            self.records.append(GraphRecord(phase, before, after, anchors, compilation))
            dump_graph(self.policy, f"graph-{phase}-before.txt", before)
            dump_graph(self.policy, f"graph-{phase}-after.txt", after)
            if self.inner == "inductor":
                from torch._inductor.compile_fx import compile_fx

                return cast(Callable[..., Any], compile_fx(module, inputs))
            return module.forward

        return backend


def shared_callable(phase: str, layer_class: type[nn.Module], backend: str | Callable[..., Any]) -> Callable[..., Any]:
    def run(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return layer_class.forward(layer, *args, **kwargs)

    # torch keeps compiled code per code object: each phase has its own, so that phases are no recompiles.
    code = run.__code__.replace(co_name=f"{layer_class.__name__}_{phase.replace('.', '_')}")
    own = types.FunctionType(code, run.__globals__, code.co_name, run.__defaults__, run.__closure__)
    return torch.compile(own, backend=backend, fullgraph=True)


def mark_lengths(hidden: Tensor, kwargs: dict[str, Any]) -> None:
    tensors = [hidden, kwargs.get("position_ids"), *(kwargs.get("position_embeddings") or ())]
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.ndim >= 2:
            torch._dynamo.maybe_mark_dynamic(tensor, 1)


def _mark_pools(site: Site) -> None:
    # Without this a pool whose size happens to equal some other size is taken to be bound to it.
    for pool in (site.k, site.v, site.pos, site.frozen, site.free):
        torch._dynamo.maybe_mark_dynamic(pool, 0)
    torch._dynamo.maybe_mark_dynamic(site.state, 1)
    torch._dynamo.maybe_mark_dynamic(site.table, 1 if site.paged else 0)
    for table, dim in ((site.picked, 3), (site.rope, 1)):
        if table.shape[dim]:
            torch._dynamo.maybe_mark_dynamic(table, dim)


class LayerForward:
    """Stands in a decoder layer's `forward`; hands calls that carry a `Call` to `Layers`, all others through."""

    def __init__(self, layers: Layers, layer: nn.Module, index: int) -> None:
        self.layers, self.layer, self.index = layers, layer, index
        self.plain = layer.forward

    def __call__(self, *args: Any, kvc: Call | None = None, **kwargs: Any) -> Any:
        if kvc is None:
            return self.plain(*args, **kwargs)
        return self.layers.run(kvc, self.layer, self.index, self.plain, args, kwargs)

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise no_copies()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise no_copies()


def no_copies() -> KvCompileError:
    return KvCompileError(
        "an optimised model cannot be copied or pickled: its copy would go on running the original's weights. "
        "Call kvcompile.restore(model) first, copy, then optimise the copy."
    )
