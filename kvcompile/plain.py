"""The plain PyTorch route: models that call `scaled_dot_product_attention` themselves, without transformers.

Takes an nn.Module whose forward gets token ids int64 [batch, n] first and gives logits; `optimize` comes here for
models that transformers did not make. `model(ids)` is then a prefill under the policy, `session(model)` goes on from
call to call. Guarantees that a trial against the untouched model ran before any of it is relied on.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from kvcompile.api import Optimized, optimized, restore, tell_warnings
from kvcompile.backends import backend_for
from kvcompile.building import Request
from kvcompile.cache import KvCache
from kvcompile.compiled import no_copies
from kvcompile.forward import Engine, OptimizedForward
from kvcompile.guard import Traffic
from kvcompile.kernels import ops
from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.layout import Site
from kvcompile.kernels.plan import ModelFacts
from kvcompile.kernels.spans import span_names
from kvcompile.limits import Limit
from kvcompile.passes import Compiled, compile_policy
from kvcompile.passes.open_anchors import gathered_evictions
from kvcompile.passes.pipeline import probes_of
from kvcompile.plain_graphs import PlainModel
from kvcompile.weights import load_weights

TRIED = (5, 1, 2)  # a prompt, a step, another turn: what a trial feeds, so many tokens at a time
# Largest difference of two logits in a trial, as a part of the largest logit.
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}


def optimize_plain(model: nn.Module, request: Request, limit: Limit) -> nn.Module:
    """`optimize` for a plain model; returns the same model.

    `request.positions`: the forward's argument that takes positions, int64 [batch, n]; without it such a model cannot
    go on from a cache, unless it has none. Runs the model on eight token ids, 0 to 7, to find its attentions and to try
    them. Raises PolicyError for the policy, KvCompileError for the model.
    """
    if request.compile not in ("auto", "eager"):
        raise KvCompileError(f"compile={request.compile!r} with a plain PyTorch model: only 'eager' is supported yet")
    weight = next(model.parameters(), None)
    if weight is None:
        raise KvCompileError(f"{type(model).__name__} has no attention that can be rewritten: it has no weights")
    chosen = backend_for(request.backend, weight.device)
    original = _untouched(model)
    _check_signature(model, original, request.positions)
    plain = PlainModel(model, original, request.positions, str(request.policy))
    ids = _trial_ids(model)
    with torch.inference_mode(False), torch.no_grad():
        truth = plain.forward(ids, _places(ids)).logits
    facts = plain.graphs.facts
    if facts is None:
        raise KvCompileError(
            "torch.compile is switched off (TORCH_COMPILE_DISABLE or TORCHDYNAMO_DISABLE), without which no graph of a "
            "plain PyTorch model can be rewritten: unset it"
        )
    compiled = request.compiled(facts)
    plain.graphs.policy = compiled.plan.name
    _refuse_policy(compiled)
    trouble = _try(plain, ids, truth, facts)
    plain.graphs.forget()  # what the trial ran
    engine = _engine(plain, compiled, chosen)
    engine.limit = limit
    tell_warnings(compiled)
    restore(model)
    forward = PlainForward(model, plain, OptimizedForward(plain, engine), trouble)
    own = vars(model).get("generate")
    # It has what report, inspect and restore ask a forward for.
    state = cast(OptimizedForward, forward)
    model.__dict__["_kvcompile"] = Optimized(compiled, state, (), chosen, [], own, request)
    model.forward = forward
    return model


def _untouched(model: nn.Module) -> Callable[..., Any]:
    """The model's forward without ours. Where someone has wrapped ours, which the wrapper calls, it is closed now."""
    state: Optimized | None = vars(model).get("_kvcompile")
    if state is not None and vars(model).get("forward") is state.forward:
        return cast(Callable[..., Any], state.forward.original)
    return restore(model).forward


class PlainForward:
    """Stands in a plain model's `forward`: each call is a prompt of its own; `step` goes on from a cache."""

    def __init__(self, model: nn.Module, plain: PlainModel, inner: OptimizedForward, trouble: str | None) -> None:
        self.model, self.plain, self.inner, self.trouble = model, plain, inner, trouble
        self.original = plain.original
        self.closed = False
        functools.update_wrapper(self, self.original)

    @property
    def engine(self) -> Engine:
        return self.inner.engine

    @property
    def run(self) -> Any:
        return self.inner.run

    @property
    def traffic(self) -> Traffic:
        return self.inner.traffic

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.closed:
            return self.original(*args, **kwargs)
        given = inspect.signature(self.original).bind_partial(*args, **kwargs).arguments
        first, *others = inspect.signature(self.original).parameters
        if first not in given:
            raise KvCompileError(f"{self.plain.name} was given no {first!r}: it takes token ids [batch, n]")
        places = given.get(self.plain.positions or "")
        extra = [key for key in others if key != self.plain.positions and given.get(key) is not None]
        if extra:
            raise KvCompileError(
                f"{self.plain.name} was given {extra[0]!r}: an optimised plain model takes token ids"
                + (f" and {self.plain.positions!r}" if self.plain.positions else "")
                + "; call kvcompile.restore(model) first"
            )
        return self.advance(given[first], places, None)[0]

    def advance(self, ids: Tensor, places: Tensor | None, cache: KvCache | None) -> tuple[Any, KvCache]:
        """Token ids int64 [batch, n] on a cache, or on a new one: what the model returns for them, and the cache."""
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point() or not ids.numel():
            raise KvCompileError(f"{self.plain.name} takes token ids, integers [batch, n] with n of at least 1")
        plan = self.inner.engine.plan
        if self.trouble is not None and (cache is not None or (plan.chunk or ids.shape[1]) < ids.shape[1]):
            what = "go on from a cache" if cache is not None else f"read a prompt in pieces of {plan.chunk} tokens"
            raise KvCompileError(f"{self.plain.name} cannot {what}: {self.trouble}")
        keep = int(self.plain.last_only)
        output = self.inner(input_ids=ids, position_ids=places, past_key_values=cache, logits_to_keep=keep)
        return self.plain.wrap(output.logits), output.past_key_values

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise no_copies()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise no_copies()


class Session:
    """One batch of sequences of an optimised plain model, fed call by call. `cache` is its KvCache, None at first."""

    def __init__(self, forward: PlainForward) -> None:
        self._forward = forward
        self.cache: KvCache | None = None

    @property
    def length(self) -> int:
        """Tokens seen so far."""
        return 0 if self.cache is None else self.cache.columns

    def __call__(self, ids: Tensor) -> Any:
        """Feed the next tokens, int64 [batch, n]: a prompt or a turn, or with n = 1 after it a step of decoding.

        Returns what the model's own forward returns for these tokens. Positions go on by themselves.
        """
        if self._forward.closed:
            raise KvCompileError("this session's model was restored or optimised again: begin a new session")
        out, self.cache = self._forward.advance(ids, None, self.cache)
        return out


def session(model: nn.Module) -> Session:
    """A new session of a plain PyTorch model that `optimize` has rewritten; a model may have several."""
    forward = optimized(model).forward
    if not isinstance(forward, PlainForward):
        raise KvCompileError(
            f"{type(model).__name__} is a transformers model: call model.generate(...), or hand "
            "past_key_values from call to call"
        )
    return Session(forward)


def _engine(plain: PlainModel, compiled: Compiled, chosen: str) -> Engine:
    plan, graphs = compiled.plan, plain.graphs
    weights = load_weights(plan, dict(compiled.learned), next(plain.parameters()).device)
    program = ops.Program(plan, ops.backend(chosen), weights)
    program.backend.prepare(plan)
    key = ops.register(program)
    tail = gathered_evictions(plan, key, graphs.scale, len(Site._fields))
    return Engine(plan, key, chosen == "triton", graphs, tail, graphs.scale, True)


def _try(plain: PlainModel, ids: Tensor, truth: Tensor, facts: ModelFacts) -> str | None:
    """Run the rewritten graphs with everything kept against the untouched model's logits.

    Returns why the model cannot go on from a cache, None where it can. Raises where even a whole prompt differs.
    """
    inner = OptimizedForward(plain, _engine(plain, compile_policy("keep_all", facts), "reference"))
    whole = inner(input_ids=ids, logits_to_keep=int(plain.last_only)).logits
    off = _off(whole, truth)
    if not off <= TOLERANCE[facts.dtype]:
        raise KvCompileError(
            f"{plain.name} is not what its graph shows: with nothing evicted its logits are off by {off:.1e} of the "
            "largest, so its attentions cannot be replaced"
        )
    if plain.graphs.counts is not None:
        return (
            f"it counts positions from 0 in every forward ({plain.graphs.counts}). Give its forward an argument for "
            'positions, int64 [batch, n], and name it: optimize(model, policy, positions="...")'
        )
    cache, start = None, 0
    for n in TRIED:
        try:
            output = inner(input_ids=ids[:, start : start + n], past_key_values=cache, logits_to_keep=1)
        except KvCompileError as error:
            return str(error)
        cache, start = output.past_key_values, start + n
    off = _off(output.logits[:, -1:], truth[:, -1:])
    if off <= TOLERANCE[facts.dtype]:
        return None
    return (
        f"fed piece by piece, with nothing evicted, its logits are off by {off:.1e} of the largest: something besides "
        "attention reads other tokens (a convolution, a norm over tokens), or positions are counted inside; name an "
        'argument for positions by optimize(model, policy, positions="...")'
    )


def _off(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).abs().max() / truth.abs().max().clamp(min=1e-30))


def _trial_ids(model: nn.Module) -> Tensor:
    device = next(model.parameters()).device
    sizes = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    return (torch.arange(sum(TRIED), device=device) % min(sizes, default=sum(TRIED)))[None]


def _places(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)


def _check_signature(model: nn.Module, forward: Callable[..., Any], positions: str | None) -> None:
    """Token ids first, then only what has a default, but for positions."""
    known = inspect.signature(forward).parameters
    if positions is not None and positions not in list(known)[1:]:
        raise KvCompileError(
            f"positions={positions!r}: the forward of {type(model).__name__} has no such argument after its token ids; "
            f"it has {', '.join(known) or 'none'}"
        )
    needed = [
        p.name for p in known.values() if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    missing = [name for name in needed[1:] if name != positions]
    if not known or missing:
        raise KvCompileError(
            f"{type(model).__name__} has no attention that can be rewritten: its forward must do with token ids"
            + (f", and needs {missing[0]!r}, too" if missing else "")
            + (": if these are positions, name them by positions=..." if missing and positions is None else "")
        )


def _refuse_policy(compiled: Compiled) -> None:
    asked = probes_of(compiled.resolved)
    if asked:
        raise KvCompileError(
            f"policy {compiled.plan.name!r} measures heads of the model, which needs a transformers model: give the "
            "heads as a table"
        )
    if compiled.plan.off:
        raise KvCompileError(
            f"policy {compiled.plan.name!r} takes out the attention of whole layers (`off`), which needs a "
            "transformers model: in a graph nothing tells which part of a layer is its attention"
        )
    if span_names(compiled.plan):
        raise KvCompileError(
            f"policy {compiled.plan.name!r} reads by stretches of a prompt (`span`), which come with a call of a "
            "transformers model"
        )
    if compiled.plan.rotates:
        raise KvCompileError(
            f"policy {compiled.plan.name!r} turns keys by itself (`positions compact`, `raw.k`), which needs the "
            "rotary embedding of a transformers model"
        )
