"""The forward of an optimised model: cuts prompts into the policy's pieces and keeps the host's account.

Stands in the model's `forward` as an instance attribute. Every forward that reaches the layers is
right-aligned, without padding inside a row and with explicit positions; no mask exists below this file.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, fx

from kvcompile.cache import KvCache
from kvcompile.compiled import ATTENTION, Call, Layers, no_copies
from kvcompile.cuda_graphs import AHEAD, StepGraphs
from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.plan import PolicyPlan
from kvcompile.kernels.span import waits
from kvcompile.padding import Columns, columns_of, gather_columns, scatter_columns
from kvcompile.reserve import reserve_prefill
from kvcompile.rotary import RopeTable
from kvcompile.run import Stopwatch
from kvcompile.sequences import Piece
from kvcompile.store import PagedStore, on_device, to_device
from kvcompile.stub import StubCache


@dataclass
class Engine:
    """What an optimised model runs on; `tail` is the gathered eviction of a decode step."""

    plan: PolicyPlan
    site: str
    paged: bool
    layers: Layers
    tail: fx.GraphModule | None
    scale: float
    compiled: bool
    rope: RopeTable | None = None  # where the policy turns keys by itself
    graphs: StepGraphs | None = None  # where steps are replayed

    @functools.cached_property
    def waiting(self) -> dict[bool, list[int]]:
        """The classes that are decided after the last layer, of a step and of a piece."""
        return {step: list(waits(self.plan, step)) for step in (True, False)}


class OptimizedForward:
    """Callable in place of `model.forward`, with the same signature."""

    def __init__(self, model: Any, engine: Engine) -> None:
        self.original = model.forward
        self.engine = engine
        self.run: Any = None  # account of the cache that ran last
        self.model = model
        self.closed = False
        functools.update_wrapper(self, self.original)

    def __call__(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        if self.closed:  # restored, but someone's wrapper still calls us
            return self.original(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                past_key_values=past_key_values, inputs_embeds=inputs_embeds, labels=labels, use_cache=use_cache,
                logits_to_keep=logits_to_keep, **kwargs,
            )  # fmt: skip
        _refuse_unsupported(self.model, kwargs)
        tokens = input_ids if input_ids is not None else inputs_embeds
        if tokens is None or (input_ids is not None and inputs_embeds is not None):
            raise KvCompileError("give exactly one of input_ids and inputs_embeds")
        as_tuple = kwargs.pop("return_dict", None) is False
        # A cache outlives the mode that it was made in, and inference tensors could not be written to later.
        with torch.inference_mode(False), torch.no_grad():
            cache = self._cache(past_key_values, tokens)
            columns = columns_of(tokens, attention_mask)
            _check_positions(cache, columns, position_ids)
            if _wants_hidden_states(self.model, kwargs):
                _refuse_pieces(self.engine.plan, columns, tokens.shape[1])
            output = self._forward(tokens, columns, cache, logits_to_keep, kwargs, input_ids is None)
            cache.columns += tokens.shape[1]
            if cache.loose:
                cache.store.settle()
                cache.loose = False
            output.past_key_values = cache if use_cache is not False else None
            if labels is not None:
                loss = self.model.loss_function(output.logits, labels, self.model.config.vocab_size, **kwargs)
                output = type(output)(loss=loss, **{key: value for key, value in output.items() if key != "loss"})
        return output.to_tuple() if as_tuple else output

    def _cache(self, past: Any, tokens: Tensor) -> KvCache:
        engine = self.engine
        if past is not None and not isinstance(past, KvCache) and past.get_seq_length() > 0:
            raise KvCompileError(
                f"past_key_values is a {type(past).__name__} that already holds tokens; an optimised model continues "
                "only a KvCache of its own (take it from `past_key_values` of an earlier output)"
            )
        if isinstance(past, KvCache):
            if past.plan.digest != engine.plan.digest or isinstance(past.store, PagedStore) != engine.paged:
                raise KvCompileError("this KvCache was filled under another policy, model or backend")
            if past.batch != tokens.shape[0]:
                raise KvCompileError(f"this KvCache holds {past.batch} sequences, the input {tokens.shape[0]}")
            self.run = past.run
            return past
        self.run = None  # a finished run's memory goes before the new one's comes
        dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        if str(dtype) != f"torch.{engine.plan.facts.dtype}":
            raise KvCompileError(
                f"the model is {dtype} now, and was torch.{engine.plan.facts.dtype} when optimised: optimise it again"
            )
        cache = KvCache(engine.plan, tokens.shape[0], engine.paged, dtype, tokens.device)
        if engine.graphs is not None:
            cache.store.ahead = AHEAD
        self.run = cache.run
        return cache

    def _forward(
        self, tokens: Tensor, columns: Columns, cache: KvCache, keep: int | Tensor, kwargs: dict[str, Any], embeds: bool
    ) -> Any:
        """Steps and prefills of one call; a batch that mixes them runs once for each kind."""
        each = cache.sequences.each
        steps = [c if len(c) == 1 and s.prefilled else [] for c, s in zip(columns, each, strict=True)]
        prefills = [[] if s else c for c, s in zip(columns, steps, strict=True)]
        name = "inputs_embeds" if embeds else "input_ids"
        if not any(prefills):
            return self._step(tokens, steps, cache, keep, kwargs, name)
        if not any(steps):
            return self._prefill(tokens, prefills, cache, keep, kwargs, name)
        if _wants_hidden_states(self.model, kwargs):
            raise KvCompileError("output_hidden_states is not supported where some sequences step and others prefill")
        step = self._step(tokens, steps, cache, keep, kwargs, name)
        prefill = self._prefill(tokens, prefills, cache, keep, kwargs, name)
        stepping = torch.tensor([bool(s) for s in steps], device=tokens.device)[:, None, None]
        prefill.logits = torch.where(stepping, step.logits, prefill.logits)
        return prefill

    def _step(
        self, tokens: Tensor, columns: Columns, cache: KvCache, keep: int | Tensor, kwargs: dict[str, Any], name: str
    ) -> Any:
        pieces = [Piece(len(c), step=True) if c else Piece(0) for c in columns]
        wide = tokens.shape[1] > 1
        newest = gather_columns(tokens, columns, 1) if wide else tokens
        positions = to_device(torch.tensor([[s.seen] for s in cache.sequences.each]), tokens.device)
        output = self._run(newest, positions, pieces, "step", cache, 0, kwargs, name)
        if wide and not _last_only(keep):
            output.logits = _keep(scatter_columns(output.logits, columns, pieces, None, tokens.shape[1]), keep)
        return output

    def _prefill(
        self, tokens: Tensor, columns: Columns, cache: KvCache, keep: int | Tensor, kwargs: dict[str, Any], name: str
    ) -> Any:
        plan = self.engine.plan
        cache.sequences.begin_prefill([len(c) for c in columns])
        size = plan.chunk or max(1, max(len(c) for c in columns))
        count = max(1, max(-(-len(c) // size) for c in columns))
        aligned = count == 1 and _aligned(columns, tokens.shape[1])
        if not aligned and kwargs.get("output_hidden_states"):
            raise KvCompileError(
                "output_hidden_states is not supported for prompts that are cut or padded on the right"
            )
        last_only = isinstance(keep, int) and keep == 1
        logits: Tensor | None = None
        cuts = [_cut(columns, j * size, size, plan.peek) for j in range(count)]
        reserve_prefill(cache, [cut.pieces for cut in cuts])
        for parts, both, pieces in cuts:
            ends = [p.ends for p in pieces]
            width = tokens.shape[1] if aligned else max(p.new + p.peek for p in pieces)
            positions = _positions(cache, pieces, width, tokens.device)
            piece = tokens if aligned else gather_columns(tokens, both, width)
            phase = "prefill.end" if any(ends) else "chunk"
            wanted = keep if aligned else int(last_only)
            output = self._run(piece, positions, pieces, phase, cache, wanted, kwargs, name)
            if aligned:
                return output
            if last_only:
                done = torch.tensor(ends, device=tokens.device)[:, None, None]
                logits = output.logits if logits is None else torch.where(done, output.logits, logits)
            else:
                logits = scatter_columns(output.logits, parts, pieces, logits, tokens.shape[1])
        assert logits is not None
        output.logits = logits if last_only else _keep(logits, keep)
        return output

    def _run(
        self, tokens: Tensor, positions: Tensor, pieces: list[Piece], phase: str, cache: KvCache,
        keep: int | Tensor, kwargs: dict[str, Any], name: str,
    ) -> Any:  # fmt: skip
        """One forward through the layers: numbers in, memory reserved, account kept."""
        engine, store, sequences = self.engine, cache.store, cache.sequences
        if engine.rope is not None:
            store.rope = engine.rope.upto(_places(engine.plan, cache, tokens.shape[1]))
        if engine.plan.compact:  # the model leaves queries and keys unturned, every read turns them by place
            positions = torch.zeros_like(positions)
        clock, counts = sequences.numbers(pieces)
        fires = sequences.fires(pieces, store.lengths() if _asks_length(engine.plan) else None)
        store.reach(max(s.seen + p.new for s, p in zip(sequences.each, pieces, strict=True)))
        if phase == "step":
            store.reserve_step(torch.tensor([p.new > 0 for p in pieces]))
        for target, source in ((store.clock, clock), (store.counts, counts), (store.fires, fires)):
            target.copy_(to_device(source, store.device))
        cache.run.before(pieces, store.lengths(), tokens.shape[1])
        # A piece of one token would specialise the graph of longer ones.
        compiled = engine.compiled and (phase == "step" or tokens.shape[1] > 1)
        sites = store.sites()
        evicts = phase == "step" and bool(fires.any())

        def forward(tokens: Tensor, positions: Tensor) -> Any:
            call = Call(phase, engine.site, sites, compiled)
            output = self.original(
                **{name: tokens}, attention_mask=None, position_ids=positions, past_key_values=StubCache(),
                use_cache=True, logits_to_keep=keep, return_dict=True, kvc=call, **kwargs,
            )  # fmt: skip
            if evicts:
                self._evict_opened(call)
            return output

        with on_device(store.device), Stopwatch(store.device, wait=phase != "step") as watch:
            if phase == "step" and engine.graphs is not None and self._graphable(keep, kwargs):
                output = engine.graphs.run(store, forward, tokens, positions, (name, keep, evicts))
            else:
                output = forward(tokens, positions)
            parts = self._evict_span(Call(phase, engine.site, sites, compiled), fires, phase == "prefill.end")
        cache.loose |= phase != "step" or evicts
        if parts is not None:
            sequences.measure(parts, pieces)
        sequences.advance(pieces, fires)
        cache.run.timed(watch.seconds, phase == "step", sum(p.new for p in pieces))
        return output

    def _graphable(self, keep: int | Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether a step's output is its logits alone, however it was called."""
        plain = isinstance(keep, int) and all(value is None or value is False for value in kwargs.values())
        return plain and not _wants_hidden_states(self.model, kwargs)

    def _evict_opened(self, call: Call) -> None:
        """The launch after the last layer; layers that ran as anchors have evicted by themselves."""
        engine = self.engine
        if engine.tail is None or not call.opened:
            return
        if len(call.opened) == len(call.sites):
            engine.tail(*[t for site in call.sites for t in site])
            return
        stores = [t for index in call.opened for t in call.sites[index]]
        torch.ops.kvc.evict_step_v1(stores, len(call.opened), engine.scale, call.site)

    def _evict_span(self, call: Call, fires: Tensor, ends: bool) -> Tensor | None:
        """Decisions that wait for the last layer, however the layers ran; gives measured shares where prompts end."""
        plan = self.engine.plan
        waiting = self.engine.waiting[call.phase == "step"]
        measures = ends and any(share.measured for share in plan.shares)
        if not measures and not (waiting and bool(fires[waiting].any())):
            return None
        stores = [t for site in call.sites for t in site]
        parts = torch.ops.kvc.evict_span_v1(stores, len(call.sites), self.engine.scale, call.phase, call.site)
        return parts if measures else None

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise no_copies()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise no_copies()


def _asks_length(plan: PolicyPlan) -> bool:
    return any(t.kind == "full" for c in plan.classes for t in c.triggers)


def _positions(cache: KvCache, pieces: list[Piece], width: int, device: torch.device) -> Tensor:
    """Logical positions of right-aligned tokens, int64 [batch, width]; 0 where there is none."""
    start = torch.tensor([s.seen for s in cache.sequences.each])[:, None]
    used = torch.tensor([p.new + p.peek for p in pieces])[:, None]
    offset = torch.arange(width) - (width - used)
    return to_device(torch.where(offset >= 0, start + offset, 0), device)


def _places(plan: PolicyPlan, cache: KvCache, width: int) -> int:
    """Places that a forward of so many columns can ask for: of a row's entries, or original positions."""
    held = int(cache.store.lengths().max()) if plan.compact else max(s.seen for s in cache.sequences.each)
    return held + width


class _Cut(NamedTuple):
    """One piece of a prompt: its real columns, the same with peeked ones, and what that makes of each sequence."""

    parts: Columns
    both: Columns
    pieces: list[Piece]


def _cut(columns: Columns, start: int, size: int, peek: int) -> _Cut:
    """Each sequence's tokens start..start+size-1 from its own first; its last tokens run along unless it ends here."""
    parts = [c[start : start + size] for c in columns]
    ends = [bool(p) and start + size >= len(c) for p, c in zip(parts, columns, strict=True)]
    tails = [c[-peek:] if peek and p and not e else [] for c, p, e in zip(columns, parts, ends, strict=True)]
    pieces = [Piece(len(p), len(t), e) for p, t, e in zip(parts, tails, ends, strict=True)]
    return _Cut(parts, [p + t for p, t in zip(parts, tails, strict=True)], pieces)


def _keep(logits: Tensor, keep: int | Tensor) -> Tensor:
    return logits[:, slice(-keep, None) if isinstance(keep, int) else keep]


def _last_only(keep: int | Tensor) -> bool:
    return isinstance(keep, int) and keep == 1


def _aligned(columns: Columns, width: int) -> bool:
    """Whether every sequence's tokens stand at the right edge, without gaps."""
    return all(c == list(range(width - len(c), width)) for c in columns)


def _check_positions(cache: KvCache, columns: Columns, position_ids: Tensor | None) -> None:
    """Positions are the sequence's own count; others would contradict the policy, which tests them."""
    if position_ids is None or position_ids.device.type != "cpu":
        return
    given = position_ids.expand(len(columns), -1).tolist() if position_ids.ndim == 2 else None
    for b, (cols, seq) in enumerate(zip(columns, cache.sequences.each, strict=True)):
        expected = list(range(seq.seen, seq.seen + len(cols)))
        if given is None or [given[b][c] for c in cols if c < len(given[b])] != expected:
            raise KvCompileError(
                f"position_ids of sequence {b} are not {seq.seen} to {seq.seen + len(cols) - 1}, which its tokens are: "
                "positions of one's own are not supported"
            )


def _wants_hidden_states(model: Any, kwargs: dict[str, Any]) -> bool:
    wanted = kwargs.get("output_hidden_states")
    return bool(model.config.output_hidden_states if wanted is None else wanted)


def _refuse_pieces(plan: PolicyPlan, columns: Columns, width: int) -> None:
    cut = plan.chunk is not None and any(len(c) > plan.chunk for c in columns)
    if cut or not _aligned(columns, width):
        raise KvCompileError("output_hidden_states is not supported for prompts that are cut or padded on the right")


def _refuse_unsupported(model: Any, kwargs: dict[str, Any]) -> None:
    if model.config._attn_implementation != ATTENTION:
        raise KvCompileError(
            f"the attention implementation was changed to {model.config._attn_implementation!r} after optimize: "
            "restore the model, change it, then optimise again"
        )
    if model.training and torch.is_grad_enabled():
        raise KvCompileError("an optimised model is for inference: call model.eval(), or restore it before training")
    if kwargs.get("output_attentions"):
        raise KvCompileError("output_attentions is not supported: no attention matrix exists; restore the model first")
