"""`optimize`, `restore`, `use`: a Hugging Face model in, the same model out, its attention rewritten.

Nothing global is patched: the model and its decoder layers get a `forward` of their own, which `restore`
takes away again.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, cast

from torch import nn

from kvcompile.compiled import ATTENTION, INNER, LayerForward, Layers, no_copies
from kvcompile.cuda_graphs import step_graphs
from kvcompile.forward import Engine, OptimizedForward
from kvcompile.kernels import ops
from kvcompile.kernels.cpp_backend.build import tell
from kvcompile.kernels.errors import NO_TRITON, KvCompileError
from kvcompile.kernels.layout import Site
from kvcompile.kernels.offline import has_triton
from kvcompile.passes import Compiled, compile_policy
from kvcompile.passes.facts import model_facts
from kvcompile.passes.open_anchors import gathered_evictions
from kvcompile.passes.pipeline import probes_of
from kvcompile.passes.sites import AttentionSite, find_sites
from kvcompile.probe import run_probes
from kvcompile.rotary import RopeTable
from kvcompile.weights import load_weights

BACKENDS = ("auto", "reference", "cpu", "triton")


class Optimized:
    """What `optimize` leaves on a model: how it was compiled, and the way back."""

    def __init__(
        self,
        compiled: Compiled,
        forward: OptimizedForward,
        sites: tuple[AttentionSite, ...],
        backend: str,
        configs: list[tuple[nn.Module, Any]],
        generate: Any,
        request: tuple[Any, dict[str, Any]],
    ) -> None:
        self.compiled, self.forward, self.sites, self.backend = compiled, forward, sites, backend
        self.configs = configs  # every module with the configuration that it had
        self.generate = generate  # an instance's own generate, where it had one
        self.request = request  # policy and options, as they were given

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise no_copies()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise no_copies()


def optimize(
    model: nn.Module,
    policy: Any,
    *,
    backend: str = "auto",
    compile: str = "auto",
    name: str | None = None,
    tables: dict[str, str | Path] | None = None,
    max_bytes: int | None = None,
    **params: Any,
) -> nn.Module:
    """Rewrite a model's attention so that its KV cache follows a policy; returns the same model.

    policy: text (it has a line break), a path (ends in `.kvp` or holds a separator) or a library name.
    backend: `reference`, `cpu`, `triton`, or `auto` by the model's device. compile: how much torch.compile
    does behind the graph pass: `off`, `eager`, `inductor`, or `auto`, the measured default of the backend. On CUDA also
    `cudagraph` and `cudagraph+inductor`: as `eager` and `inductor`, and decode steps are captured and replayed.
    name: one policy of a file that holds several. tables: files that the policy stands on, by the head class,
    share or trained state that reads them. params: the policy's parameters, as numbers or as text of the language.
    A policy with probes runs them here, a forward of up to 10,000 tokens.

    Raises PolicyError for the policy, KvCompileError for the model. A model that is already optimised is
    restored first.
    """
    if max_bytes is not None:
        raise KvCompileError("max_bytes is not supported yet: see the peak that kvcompile.explain gives instead")
    sites = find_sites(model)
    chosen = _backend(backend, model)
    inner = _inner(compile, chosen)
    facts = model_facts(model)
    compiled = compile_policy(policy, facts, name=name, tables=tables, **params)
    asked = probes_of(compiled.resolved)
    if asked:  # only now, because a probe takes a forward and a policy with mistakes none
        probes = run_probes(model, sites, asked)
        compiled = compile_policy(policy, facts, name=name, tables=tables, probes=probes, **params)
    graphs = step_graphs(compiled.plan, chosen, next(model.parameters()).device) if compile in GRAPHED else None
    weights = load_weights(compiled.plan, dict(compiled.learned), next(model.parameters()).device)
    rope = RopeTable(model, sites) if compiled.plan.rotates else None
    restore(model)
    program = ops.Program(compiled.plan, ops.backend(chosen), weights)
    program.backend.prepare(compiled.plan)
    key = ops.register(program)
    layers = Layers(compiled.plan.name, inner)
    scale = float(sites[0].attention.scaling)  # type: ignore[arg-type]
    tail = gathered_evictions(compiled.plan, key, scale, len(Site._fields))
    engine = Engine(compiled.plan, key, chosen == "triton", layers, tail, scale, inner != "off", rope, graphs)
    forward = OptimizedForward(model, engine)
    before = vars(model).get("generate")
    request = (policy, {"backend": backend, "compile": compile, "name": name, "tables": tables, **params})
    model.__dict__["_kvcompile"] = Optimized(compiled, forward, sites, chosen, _own_config(model), before, request)
    try:
        model.set_attn_implementation(ATTENTION)  # type: ignore[operator]
        for site in sites:
            site.layer.forward = LayerForward(layers, site.layer, site.index)
        model.forward = forward
        model.__dict__["generate"] = _checked_generate(model)
    except BaseException:
        restore(model)
        raise
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo `optimize`: the model is as it was. A model that is not optimised is left alone."""
    state = vars(model).pop("_kvcompile", None)
    if state is None:
        return model
    state.forward.closed = True
    _put_back(model, state.forward, state.forward.original)
    for site in state.sites:
        own = vars(site.layer).get("forward")
        if isinstance(own, LayerForward):
            _put_back(site.layer, own, own.plain)
    vars(model).pop("generate", None)
    if state.generate is not None:
        model.__dict__["generate"] = state.generate
    for module, config in state.configs:
        module.config = config
    return model


def _own_config(model: nn.Module) -> list[tuple[nn.Module, Any]]:
    """Give the model a copy of its configuration: other models may share the object, and their attention is theirs."""
    old = model.config
    new = copy.deepcopy(old)
    pairs = {id(old): new} | {id(getattr(old, key)): getattr(new, key) for key in getattr(old, "sub_configs", ())}
    found = [(m, m.config) for m in model.modules() if id(getattr(m, "config", None)) in pairs]
    for module, config in found:
        module.config = pairs[id(config)]
    return found


def _put_back(module: nn.Module, ours: Any, original: Any) -> None:
    if vars(module).get("forward") is not ours:
        return  # someone has wrapped it since: theirs to undo
    if getattr(original, "__func__", None) is type(module).forward:
        del module.__dict__["forward"]
    else:
        module.forward = original


@contextlib.contextmanager
def use(model: nn.Module, policy: Any, **options: Any) -> Iterator[nn.Module]:
    """`optimize` for a block; when it ends, however it ends, the model is what it was before: untouched, or
    optimised for the policy that it had."""
    former = vars(model).get("_kvcompile")
    optimize(model, policy, **options)
    try:
        yield model
    finally:
        restore(model)
        if former is not None:
            optimize(model, former.request[0], **former.request[1])


def optimized(model: nn.Module) -> Optimized:
    """What `optimize` left on a model; an error that says so where it did not run."""
    state = vars(model).get("_kvcompile")
    if state is None:
        raise KvCompileError(
            f"this {type(model).__name__} is not optimised: call kvcompile.optimize(model, policy) first"
        )
    return cast(Optimized, state)


def _backend(backend: str, model: nn.Module) -> str:
    if backend not in BACKENDS:
        raise KvCompileError(f"unknown backend {backend!r}: one of {', '.join(BACKENDS)}")
    device = next(model.parameters()).device
    if backend == "auto":
        if device.type == "cuda" and not has_triton():
            tell(f"backend 'auto' runs the reference, which is slow: {NO_TRITON}")
            return "reference"
        return "triton" if device.type == "cuda" else "cpu"
    if backend == "triton" and not has_triton():
        raise KvCompileError(f"backend 'triton': {NO_TRITON}")
    if backend == "cpu" and device.type != "cpu":
        raise KvCompileError(f"backend 'cpu' with a model on {device}: use 'triton' or 'reference'")
    if backend == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
        raise KvCompileError(
            "backend 'triton' with a model on cpu: use 'cpu', move the model to a GPU, or set TRITON_INTERPRET=1 "
            "to run its kernels slowly on Triton's interpreter"
        )
    return backend


def _inner(compile: str, backend: str) -> str:
    known = ("auto", *INNER, *GRAPHED)
    if compile not in known:
        raise KvCompileError(f"unknown compile={compile!r}: one of {', '.join(known)}")
    if compile == "auto":
        return AUTO[backend]
    return GRAPHED.get(compile, compile)


# docs/architecture.md has the figures behind these; `triton` has not been measured yet.
AUTO = {"reference": "off", "cpu": "off", "triton": "eager"}
# What runs inside a captured step.
GRAPHED = {"cudagraph": "eager", "cudagraph+inductor": "inductor"}


def _checked_generate(model: nn.Module) -> Any:
    """generate() that refuses, before anything runs, what an evicting cache cannot do yet."""
    original = model.generate

    @functools.wraps(original)  # type: ignore[arg-type]
    def generate(*args: Any, **kwargs: Any) -> Any:
        positional = args[1] if len(args) > 1 else None
        given = kwargs.get("generation_config") or positional or model.generation_config

        def option(key: str) -> Any:
            return kwargs.get(key) if kwargs.get(key) is not None else getattr(given, key, None)

        if (option("num_beams") or 1) > 1:
            raise KvCompileError("beam search is not supported yet: it moves sequences between rows; use num_beams=1")
        if kwargs.get("assistant_model") is not None or option("prompt_lookup_num_tokens"):
            raise KvCompileError(
                "assisted decoding is not supported yet: rejected tokens would need evicted entries back"
            )
        if option("prefill_chunk_size"):
            raise KvCompileError(
                "prefill_chunk_size is not supported: write `at chunk(n)` in the policy, it cuts the prompt"
            )
        if option("use_cache") is False:
            raise KvCompileError("use_cache=False contradicts a cache policy: restore the model to run without a cache")
        if option("penalty_alpha"):
            raise KvCompileError("contrastive search is not supported yet: it needs several futures of one cache")
        if option("cache_implementation"):
            raise KvCompileError(
                f"cache_implementation={option('cache_implementation')!r} contradicts the policy's own cache"
            )
        return original(*args, **kwargs)  # type: ignore[operator]

    return generate
