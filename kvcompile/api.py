"""`optimize`, `restore`, `use`: a Hugging Face model in, the same model out, its attention rewritten.

Nothing global is patched: the model and its decoder layers get a `forward` of their own, which `restore`
takes away again.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from kvcompile.compiled import ATTENTION, INNER, LayerForward, Layers, no_copies, variants_of
from kvcompile.cuda_graphs import step_graphs
from kvcompile.forward import Engine, OptimizedForward
from kvcompile.generating import CONTINUOUS, checked_generate, refuse_continuous
from kvcompile.guard import guarded
from kvcompile.kernels import ops
from kvcompile.kernels.cpp_backend.build import tell
from kvcompile.kernels.errors import NO_TRITON, KvCompileError
from kvcompile.kernels.layout import Site
from kvcompile.kernels.learned import fingerprint
from kvcompile.kernels.offline import has_triton
from kvcompile.kernels.ranks import sharded
from kvcompile.kernels.sizes import parse_bytes
from kvcompile.limits import Limit, with_sequences
from kvcompile.passes import Compiled, compile_policy
from kvcompile.passes.facts import model_facts, text_config
from kvcompile.passes.open_anchors import gathered_evictions
from kvcompile.passes.pipeline import probes_of
from kvcompile.passes.sites import AttentionSite, find_sites
from kvcompile.placement import agreed, home_of, local, local_bytes, of_all_processes, processes_of, spoken
from kvcompile.plain_graphs import is_plain
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
    max_bytes: int | str | None = None,
    positions: str | None = None,
    **params: Any,
) -> nn.Module:
    """Rewrite a model's attention so that its KV cache follows a policy; returns the same model.

    policy: text (it has a line break), a path (ends in `.kvp` or holds a separator) or a library name.
    backend: `reference`, `cpu`, `triton`, or `auto` by the model's device. compile: how much torch.compile
    does behind the graph pass: `off`, `eager`, `inductor`, or `auto`, the measured default of the backend. On CUDA also
    `cudagraph` and `cudagraph+inductor`: as `eager` and `inductor`, and decode steps are captured and replayed.
    name: one policy of a file that holds several. tables: files that the policy stands on, by the head class,
    share or trained state that reads them. params: the policy's parameters, as numbers or as text of the language.
    positions: only for a plain PyTorch model, which transformers did not make: the argument of its forward that takes
    positions, int64 [batch, tokens]. docs/plain_pytorch.md says what such a model must be like.
    max_bytes: what all caches of the model may take together, pools, fresh pieces and what stands beside, in bytes or
    as text such as "2GiB"; what has no room is refused before it runs, with CacheFull, and nothing is lost.
    A policy with probes runs them here, a forward of up to 10,000 tokens.

    Raises PolicyError for the policy, KvCompileError for the model. A model that is already optimised is
    restored first.
    """
    most = None if max_bytes is None else parse_bytes(max_bytes)
    if is_plain(model):
        from kvcompile.plain import optimize_plain  # which needs this module

        optimize_plain(
            model, policy, params, backend=backend, compile=compile, name=name, tables=tables, positions=positions
        )
        state = optimized(model)
        state.forward.engine.limit = Limit(most, model)
        state.request[1]["max_bytes"] = max_bytes
        return model
    if positions is not None:
        raise KvCompileError(f"positions={positions!r} is for plain PyTorch models; {type(model).__name__} is another")
    sites = find_sites(model)
    processes = processes_of(model, sites[0].attention)
    if processes is not None and most is not None:
        raise KvCompileError(
            "max_bytes is not supported where several processes share a model's heads: one might refuse a forward that "
            "the others wait in; see the peak that kvcompile.explain gives instead"
        )
    with agreed(processes) as said:
        home = home_of(sites)
        chosen = _backend(backend, model, home)
        inner = _inner(compile, chosen)
        facts = model_facts(model)
        compiled = compile_policy(policy, facts, name=name, tables=tables, **params)
        asked = probes_of(compiled.resolved)
        said += spoken(compiled.plan, chosen, inner)
    if asked:  # only now, because a probe takes a forward and a policy with mistakes none
        probes = of_all_processes(processes, run_probes(model, sites, asked))
        compiled = compile_policy(policy, facts, name=name, tables=tables, probes=probes, **params)
    whole = compiled.plan
    if processes is not None:
        compiled = replace(compiled, plan=sharded(whole, processes, processes.key, local_bytes(model)))
    graphs = step_graphs(compiled.plan, chosen, home) if compile in GRAPHED else None
    with agreed(processes) as said:
        weights = load_weights(whole, dict(compiled.learned), home)
        rope = RopeTable(model, sites) if whole.rotates else None
        program = ops.Program(compiled.plan, ops.backend(chosen), weights)
        program.backend.prepare(compiled.plan)
        said += [*spoken(whole, type(program.backend).__name__, inner), f"trained scores {fingerprint(weights)}"]
    restore(model)
    key = ops.register(program)
    scale = sites[0].scale
    layers = Layers(compiled.plan.name, inner, variants_of(compiled.plan.facts, scale))
    tail = gathered_evictions(compiled.plan, key, scale, len(Site._fields))
    sinks = tuple(local(cast(Tensor, site.attention.sinks)) for site in sites) if facts.sinks else ()
    engine = Engine(
        compiled.plan, key, chosen == "triton", layers, tail, scale, inner != "off", rope, graphs, sinks, home
    )
    engine.limit = Limit(most, model)
    forward = OptimizedForward(model, engine)
    before = vars(model).get("generate")
    options = {"backend": backend, "compile": compile, "name": name, "tables": tables, "max_bytes": max_bytes}
    request = (policy, {**options, **params})
    model.__dict__["_kvcompile"] = Optimized(compiled, forward, sites, chosen, _own_config(model), before, request)
    try:
        _set_attention(model)
        for site in sites:
            site.layer.forward = LayerForward(layers, site.layer, site.index)
        model.forward = forward
        generate = with_sequences(checked_generate(model, compiled.plan), engine.limit)
        model.__dict__["generate"] = guarded(generate, forward.traffic)
        model.__dict__.update({name: refuse_continuous for name in CONTINUOUS if hasattr(model, name)})
    except BaseException:
        restore(model)
        raise
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo `optimize`: the model is as it was. A model that is not optimised is left alone.

    Raises KvCompileError while the model is generating, in whichever thread.
    """
    state = vars(model).get("_kvcompile")
    if state is None:
        return model
    state.forward.traffic.refuse_under_way()
    del model.__dict__["_kvcompile"]
    state.forward.closed = True
    _put_back(model, state.forward, state.forward.original)
    for site in state.sites:
        own = vars(site.layer).get("forward")
        if isinstance(own, LayerForward):
            _put_back(site.layer, own, own.plain)
    for name in ("generate", *(n for n in CONTINUOUS if vars(model).get(n) is refuse_continuous)):
        vars(model).pop(name, None)
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


def _set_attention(model: Any) -> None:
    """Of a multimodal model only the language model's attention is ours."""
    outer, text = model.config, text_config(model.config)
    keys = [key for key in getattr(outer, "sub_configs", ()) if getattr(outer, key, None) is text and text is not outer]
    model.set_attn_implementation(dict.fromkeys(keys, ATTENTION) if keys else ATTENTION)


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


def _backend(backend: str, model: nn.Module, device: torch.device | None = None) -> str:
    """The backend that carries out attention on `device`, without it where the model's first parameter is."""
    if backend not in BACKENDS:
        raise KvCompileError(f"unknown backend {backend!r}: one of {', '.join(BACKENDS)}")
    device = next(model.parameters()).device if device is None else device
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
