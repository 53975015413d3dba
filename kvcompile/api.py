"""`optimize`, `restore`, `use`: a Hugging Face model in, the same model out, its attention rewritten.

Nothing global is patched: the model, its decoder layers and on the CPU their linear layers get a `forward` of their
own, which `restore` takes away again.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, cast

from torch import nn

from kvcompile.building import Choice, Request, choose, engine_of, prepare
from kvcompile.compiled import ATTENTION, LayerForward, no_copies
from kvcompile.dsl.diagnostics import PolicyWarning, in_one_line
from kvcompile.forward import Engine, OptimizedForward
from kvcompile.generating import CONTINUOUS, checked_generate, refuse_continuous
from kvcompile.guard import guarded
from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.sizes import parse_bytes
from kvcompile.limits import Limit, with_sequences
from kvcompile.off import silence
from kvcompile.passes import Compiled
from kvcompile.passes.facts import text_config
from kvcompile.passes.sites import AttentionSite, find_sites
from kvcompile.placement import processes_of
from kvcompile.plain_graphs import is_plain
from kvcompile.replacing import Replaced, put_back


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
        request: Request,
    ) -> None:
        self.compiled, self.forward, self.sites, self.backend = compiled, forward, sites, backend
        self.configs = configs  # every module with the configuration that it had
        self.generate = generate  # an instance's own generate, where it had one
        self.request = request
        self.replaced: list[Replaced] = []  # forwards of modules inside layers

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
    max_bytes: what all caches of the model may take together, in each process that holds heads of it: pools, fresh
    pieces and what stands beside, in bytes or as text such as "2GiB"; what has no room is refused before it runs, with
    CacheFull, and nothing is lost.
    A policy with probes runs them here, a forward of up to 10,000 tokens.

    Warns (PolicyWarning) of what `kvcompile check` warns of, with its place in the policy; each once in a process.
    Raises PolicyError for the policy, KvCompileError for the model. A model that is already optimised is
    restored first.
    """
    most = None if max_bytes is None else parse_bytes(max_bytes)
    request = Request(policy, backend, compile, name, tables, max_bytes, positions, params)
    if is_plain(model):
        from kvcompile.plain import optimize_plain  # which needs this module

        return optimize_plain(model, request, Limit(most, model))
    if positions is not None:
        raise KvCompileError(f"positions={positions!r} is for plain PyTorch models; {type(model).__name__} is another")
    sites = find_sites(model)
    _refuse_shared(model, sites)
    limit = Limit(most, model)
    processes = processes_of(model, sites[0].attention)
    choice = choose(model, sites, processes, request)
    parts = prepare(model, sites, processes, choice)
    tell_warnings(choice.compiled)
    restore(model)
    _install(model, sites, choice, engine_of(sites, choice, parts, limit), request)
    return model


def tell_warnings(compiled: Compiled) -> None:
    """Warn of what is odd about a policy, at the line outside of this package that brought it."""
    for found in compiled.diagnostics:
        if found.severity == "warning":
            _tell(in_one_line(found))


@functools.cache
def _tell(message: str) -> None:
    depth, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals["__name__"].split(".")[0] in ("kvcompile", "contextlib"):
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, PolicyWarning, stacklevel=depth)


def _refuse_shared(model: nn.Module, sites: tuple[AttentionSite, ...]) -> None:
    """KvCompileError where layers carry the forwards of another optimised model, whose `restore` would take ours."""
    state = vars(model).get("_kvcompile")
    mine = None if state is None else state.forward.engine.layers
    for site in sites:
        own = vars(site.layer).get("forward")
        if isinstance(own, LayerForward) and own.layers is not mine:
            raise KvCompileError(
                f"layer {site.index} of this {type(model).__name__} belongs to another model, too, which is optimised: "
                "call kvcompile.restore on that one first, or give each model layers of its own"
            )


def _install(
    model: nn.Module, sites: tuple[AttentionSite, ...], choice: Choice, engine: Engine, request: Request
) -> None:
    """Give the model and its decoder layers forwards of their own, and the model a generate(); all or nothing."""
    forward = OptimizedForward(model, engine)
    before, configs = vars(model).get("generate"), _own_config(model)
    state = Optimized(choice.compiled, forward, sites, choice.backend, configs, before, request)
    model.__dict__["_kvcompile"] = state
    try:
        _set_attention(model)
        state.replaced = silence(sites, engine.plan.off)
        if engine.projections is not None:
            state.replaced += engine.projections.put_into([*(site.layer for site in sites), *_head_of(model)])
        for site in sites:
            site.layer.forward = LayerForward(engine.layers, site.layer, site.index)
        model.forward = forward
        generate = with_sequences(checked_generate(model, engine.plan), engine.limit)
        model.__dict__["generate"] = guarded(generate, forward.traffic)
        model.__dict__.update({name: refuse_continuous for name in CONTINUOUS if hasattr(model, name)})
    except BaseException:
        restore(model)
        raise


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
    put_back(model, state.forward, state.forward.original)
    for site in state.sites:
        own = vars(site.layer).get("forward")
        if isinstance(own, LayerForward):
            put_back(site.layer, own, own.plain)
    for replaced in state.replaced:
        replaced.undo()
    for name in ("generate", *(n for n in CONTINUOUS if vars(model).get(n) is refuse_continuous)):
        vars(model).pop(name, None)
    if state.generate is not None:
        model.__dict__["generate"] = state.generate
    for module, config in state.configs:
        module.config = config
    return model


def _head_of(model: Any) -> list[nn.Module]:
    """The layer that makes logits, where the model has one."""
    head = model.get_output_embeddings()
    return [] if head is None else [head]


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
            optimize(model, former.request.policy, **former.request.arguments())


def optimized(model: nn.Module) -> Optimized:
    """What `optimize` left on a model; an error that says so where it did not run."""
    state = vars(model).get("_kvcompile")
    if state is None:
        raise KvCompileError(
            f"this {type(model).__name__} is not optimised: call kvcompile.optimize(model, policy) first"
        )
    return cast(Optimized, state)
