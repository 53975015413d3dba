"""Runs decoder layers of an optimised model: as they are, or through torch.compile with our graph pass.

One callable per phase and kind of layer, compiled once and shared by all such layers: a layer's identity reaches the
graph as tensors, so compile time does not grow with depth.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn, cast

import torch
from torch import Tensor, fx, nn
from transformers import AttentionInterface

from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.layout import Site
from kvcompile.kernels.ops import anchor
from kvcompile.kernels.plan import ModelFacts
from kvcompile.passes.dump import dump_graph
from kvcompile.passes.families import CARRIERS
from kvcompile.passes.open_anchors import OpenAnchors

ATTENTION = "kvcompile"
INNER = ("off", "eager", "inductor")


class Variant(NamedTuple):
    """What the plan takes a layer's attention for; the layer must ask for the same. window 0: none, softcap 0: none."""

    scale: float
    window: int
    softcap: float
    sinks: bool
    q_heads: int
    kv_heads: int
    head_dim: int


def variants_of(facts: ModelFacts, scale: float) -> tuple[Variant, ...]:
    """Of every layer."""
    shape = facts.q_heads, facts.kv_heads, facts.head_dim
    return tuple(Variant(scale, facts.reach(i), facts.softcap, facts.sinks, *shape) for i in range(facts.layers))


class Anchor(NamedTuple):
    """What one layer's call hands its attention: the phase, the program's digest, the site's tensors, and what the
    layer is expected to ask for (None: not checked). A list of tensors goes through the operator, a site past it."""

    phase: str
    site: str
    store: list[Tensor] | Site
    variant: Variant | None = None


class Closed:
    """An anchor that hooks do not look into: accelerate's would copy its tensors to the layer's device, and what is
    written to copies is lost."""

    __slots__ = ("anchor",)

    def __init__(self, anchor: Anchor) -> None:
        self.anchor = anchor


@dataclass
class Call:
    """One forward of the whole model: its phase, program, sites in layer order, and whether graphs are used.

    `direct`: nothing looks at operators, see `watched`. `opened`: layers whose graph ran without the evictions of a
    step, which are still to come.
    """

    phase: str
    site: str
    sites: list[Site]
    compiled: bool
    direct: bool = False
    opened: list[int] = field(default_factory=list)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    kvc: Anchor | Closed | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: one anchor operator a site. Returns [batch, n, q_heads, head_dim].

    A layer on another device than the cache has its attention carried out where the cache is. What autocast brings in
    another dtype than the cache's is cast.
    """
    if kvc is None and isinstance(kwargs.get("position_ids"), (Anchor, Closed)):
        kvc = kwargs["position_ids"]
    if isinstance(kvc, Closed):
        kvc = kvc.anchor
    if kvc is None:
        raise KvCompileError(
            "an optimised model's layers run only inside the model's own forward: call the model itself"
        )
    if attention_mask is not None:
        raise KvCompileError(f"{type(module).__name__} makes an attention mask of its own, which is not supported yet")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if kvc.variant is not None:
        _check_variant(module, kvc.variant, scale, query, key, value, kwargs)
    home, dtype = kvc.store[1].device, kvc.store[1].dtype
    if query.device == home and query.dtype == key.dtype == value.dtype == dtype:
        if isinstance(kvc.store, Site) and not torch.compiler.is_compiling():  # somebody may compile a layer by itself
            return anchor(query, key, value, kvc.store, scale, kvc.phase, kvc.site), None
        return torch.ops.kvc.anchor_v1(query, key, value, list(kvc.store), scale, kvc.phase, kvc.site), None
    moved = (t.to(home, dtype) for t in (query, key, value))
    return torch.ops.kvc.anchor_v1(*moved, list(kvc.store), scale, kvc.phase, kvc.site).to(query.device), None


AttentionInterface.register(ATTENTION, attention)


def _check_variant(
    module: nn.Module, plan: Variant, scale: float, query: Tensor, key: Tensor, value: Tensor, asked: dict[str, Any]
) -> None:
    """KvCompileError where a layer asks for other attention than its plan was made for. Host numbers only."""
    # A layer that does not name its window has it from the mask, which follows the configuration as the plan does.
    window = (asked["sliding_window"] or 0) if "sliding_window" in asked else plan.window
    softcap = asked.get("softcap") or 0.0
    sinks = asked.get("s_aux") is not None
    width = query.shape[3] if query.shape[3] == key.shape[3] == value.shape[3] else -1
    asks = Variant(scale, window, softcap, sinks, query.shape[1], key.shape[1], width)
    if asks == plan:
        return
    odd = [f"{name} {a} instead of {b}" for name, a, b in zip(Variant._fields, asks, plan, strict=True) if a != b]
    raise KvCompileError(
        f"layer {getattr(module, 'layer_idx', '?')} ({type(module).__name__}) asks for attention with "
        f"{', '.join(odd)}: the model's configuration says otherwise, or has changed since optimize. Make them agree, "
        "then optimise again; if they do agree, this kind of model is not supported"
    )


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
    variants: tuple[Variant, ...]
    off: tuple[int, ...] = ()  # layers without attention
    records: list[GraphRecord] = field(default_factory=list)
    breaks: list[str] = field(default_factory=list)
    _callables: dict[tuple[str, int], Callable[..., Any]] = field(default_factory=dict)
    _kinds: dict[object, int] = field(default_factory=dict)

    @property
    def recompiles(self) -> int:
        """Graphs beyond the first of each (phase, kind of layer)."""
        return max(0, len(self.records) - len(self._callables))

    def kind(self, layer: nn.Module, index: int) -> int:
        """The number of a layer's kind: layers of one kind run one graph."""
        variant = None if index in self.off else self.variants[index]
        return self._kinds.setdefault((variant, kind_of(layer)), len(self._kinds))

    def run(self, call: Call, at: LayerForward, args: Any, kwargs: Any) -> Any:
        """One decoder layer's forward under a call."""
        layer, index, plain = at.layer, at.index, at.plain
        live = index not in self.off
        if live:
            site = call.sites[index]
            given = Anchor(call.phase, call.site, site if call.direct else list(site), self.variants[index])
            kwargs[CARRIERS.get(type(layer).__name__, "kvc")] = Closed(given) if at.hooked else given
        # A forward that someone else has put there does more than the class's own, so it runs as it is.
        if not call.compiled or self.breaks or getattr(plain, "__func__", None) is not type(layer).forward:
            return plain(*args, **kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        key = (call.phase, at.kind)
        if key not in self._callables:
            self._callables[key] = shared_callable(call.phase, type(layer), self._backend(call.phase), at.kind)
        if call.phase != "step":
            mark_lengths(hidden, kwargs)
        _mark_pools(call.sites[index])
        try:
            out = self._callables[key](layer, *args, **kwargs)
        except (torch._dynamo.exc.Unsupported, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            # Eager anchors mean the same, so the run goes on; the report says that a graph broke and why.
            self.breaks.append(str(error))
            return plain(*args, **kwargs)
        if live:
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


_NUMBERS = re.compile(r"(layer|block)_?(idx|id|index|number|num)?|idx|index")


def kind_of(layer: nn.Module) -> object:
    """What a graph of a layer may depend on, hashable: its modules, their plain attributes but for the layer's own
    number, and the shapes of its weights."""
    modules = []
    for name, module in layer.named_modules():
        plain = {k: v for k, v in vars(module).items() if v is None or isinstance(v, bool | int | float | str)}
        for key in [k for k in plain if k == "training" or _NUMBERS.fullmatch(k)]:
            del plain[key]
        modules.append((name, type(module), tuple(sorted(plain.items()))))
    return tuple(modules), tuple((name, p.shape, p.dtype) for name, p in layer.named_parameters())


def shared_callable(
    phase: str, layer_class: type[nn.Module], backend: str | Callable[..., Any], kind: int = 0
) -> Callable[..., Any]:
    def run(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return layer_class.forward(layer, *args, **kwargs)

    # torch keeps compiled code per code object: each phase and kind has its own, so that neither is a recompile. What
    # torch has learned of sizes that change it keeps by name.
    code = run.__code__.replace(co_name=f"{layer_class.__name__}_{kind}_{phase.replace('.', '_')}")
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
    grows = ((site.picked, 3), (site.rope, 1), (site.marks, 2), (site.edges, 2))
    for table, dim in (*grows, (site.segment, 1), (site.links, 2), (site.links, 3)):
        if table.shape[dim]:
            torch._dynamo.maybe_mark_dynamic(table, dim)


class LayerForward:
    """Stands in a decoder layer's `forward`; hands calls that carry a `Call` to `Layers`, all others through."""

    def __init__(self, layers: Layers, layer: nn.Module, index: int) -> None:
        self.layers, self.layer, self.index = layers, layer, index
        self.plain = layer.forward
        self.kind = layers.kind(layer, index)
        self.hooked = any(hasattr(module, "_hf_hook") for module in layer.modules())

    def __call__(self, *args: Any, kvc: Call | None = None, **kwargs: Any) -> Any:
        if kvc is None:
            return self.plain(*args, **kwargs)
        return self.layers.run(kvc, self, args, kwargs)

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise no_copies()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise no_copies()


def no_copies() -> KvCompileError:
    return KvCompileError(
        "an optimised model cannot be copied or pickled: its copy would go on running the original's weights. "
        "Call kvcompile.restore(model) first, copy, then optimise the copy."
    )
