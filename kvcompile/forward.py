"""The forward of an optimised model: cuts prompts into the policy's pieces and keeps the host's account.

Stands in the model's `forward` as an instance attribute. Every forward that reaches the layers is
right-aligned, without padding inside a row and with explicit positions; no mask exists below this file.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, fx

from kvcompile.cache import KvCache
from kvcompile.compiled import Call, Layers, no_copies
from kvcompile.cuda_graphs import AHEAD, StepGraphs
from kvcompile.cuts import (
    cuts_of,
    is_aligned,
    keep_columns,
    last_only,
    last_position,
    next_positions,
    places_of,
    positions_of,
)
from kvcompile.drafting import drafted
from kvcompile.guard import Traffic
from kvcompile.health import refuse_nan
from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.plan import PolicyPlan
from kvcompile.kernels.span import waits
from kvcompile.kernels.watched import watched
from kvcompile.limits import CacheFull, Limit, room_in_all
from kvcompile.multimodal import Inputs, with_images
from kvcompile.padding import Columns, columns_of, gather_columns, scatter_columns
from kvcompile.pages import PagedStore
from kvcompile.passes.facts import text_config
from kvcompile.projections import Projections
from kvcompile.refusals import (
    check_positions,
    refuse_beside,
    refuse_empty,
    refuse_pieces,
    refuse_unsupported,
    wants_hidden_states,
)
from kvcompile.reserve import reserve_prefill
from kvcompile.rotary import RopeTable, angles_upto
from kvcompile.run import Stopwatch
from kvcompile.sequences import Piece
from kvcompile.spans import Spans
from kvcompile.store import on_device, to_device
from kvcompile.stub import StubCache
from kvcompile.telling import said_of, take_spans


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
    projections: Projections | None = None  # linear layers that run by a kernel of their own
    sink_logits: tuple[Tensor, ...] = ()  # [q_heads] of each layer, the model's own parameters
    home: torch.device | None = None  # where caches lie; None: where their first tokens are
    limit: Limit = field(default_factory=lambda: Limit(None))  # on the bytes of all its caches

    def sinks(self) -> Tensor | None:
        """The model's sink logits as a cache takes them, float32 [layers, q_heads]; None where it has none."""
        return torch.stack([s.detach().float() for s in self.sink_logits]) if self.sink_logits else None

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
        self.traffic = Traffic()
        self._configs: tuple[Any, Any] = None, None  # the model's, and that of the language model in it
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
        config = self._text_config()
        refuse_unsupported(self.model, config, kwargs)
        tokens = input_ids if input_ids is not None else inputs_embeds
        if tokens is None or (input_ids is not None and inputs_embeds is not None):
            raise KvCompileError("give exactly one of input_ids and inputs_embeds")
        refuse_empty(tokens)
        as_tuple = kwargs.pop("return_dict", None) is False
        spans = kwargs.pop("spans", None)
        with _plain_tensors(), self.traffic.inside():
            cache = self._cache(past_key_values, tokens)
            columns = columns_of(tokens, attention_mask)
            embedded = input_ids is None
            if config is not self.model.config:
                with self.traffic.forwards:
                    tokens, embedded, kwargs = with_images(self.model, self.original, Inputs(tokens, embedded, kwargs))
            check_positions(cache, columns, position_ids)
            take_spans(cache, columns, said_of(self.model) if spans is None else spans)
            refuse_beside(self.engine.plan, columns, tokens.shape[1], kwargs)
            if wants_hidden_states(self.model, kwargs):
                refuse_pieces(self.engine.plan, columns, tokens.shape[1])
            with cache.guard.extending(), self.traffic.forwards:
                output = self._extended(tokens, columns, cache, logits_to_keep, kwargs, embedded)
            output.past_key_values = cache if use_cache is not False else None
            if labels is not None:
                loss = self.model.loss_function(output.logits, labels, config.vocab_size, **kwargs)
                output = type(output)(loss=loss, **{key: value for key, value in output.items() if key != "loss"})
        return output.to_tuple() if as_tuple else output

    def _text_config(self) -> Any:
        """The language model's configuration; transformers takes as long to find it as a small layer takes to run."""
        config, found = self._configs
        if config is not self.model.config:
            self._configs = config, found = self.model.config, text_config(self.model.config)
        return found

    def _extended(
        self, tokens: Tensor, columns: Columns, cache: KvCache, keep: int | Tensor, kwargs: dict[str, Any], embeds: bool
    ) -> Any:
        """A call's output, its tokens taken over into the cache; nothing of it is where no layer has run."""
        self.run = cache.run
        former = [(s.seen, s.prompt, s.steps, s.prefilled) for s in cache.sequences.each]
        try:
            output = self._forward(tokens, columns, cache, keep, kwargs, embeds)
        except BaseException as error:
            if isinstance(error, CacheFull):
                error.cache = cache
            if not cache.guard.touched:
                for s, was in zip(cache.sequences.each, former, strict=True):
                    s.seen, s.prompt, s.steps, s.prefilled = was
            raise
        cache.columns += tokens.shape[1]
        if cache.loose:
            cache.store.settle()
            cache.loose = False
        if cache.store.device.type == "cpu" or cache.guard.touched != "step":  # elsewhere a step must not wait
            seen = [was[0] for was in former]
            spans = [s.spans for s in cache.sequences.each]
            refuse_nan(cache, output.logits, lambda: self._again(tokens, columns, seen, spans, kwargs, embeds), seen)
        return output

    def _again(
        self, tokens: Tensor, columns: Columns, seen: list[int], spans: list[Spans | None], kwargs: dict[str, Any],
        embeds: bool,
    ) -> None:  # fmt: skip
        """A call once more, layer by layer, on a cache of its own that holds nothing; positions are those of before."""
        cache, engine = self.new_cache(tokens.shape[0], tokens.device), self.engine
        each = zip(spans, seen, columns, strict=True)
        cache.tell([Spans(positions=tuple((s or Spans()).places(n, len(c)))) for s, n, c in each])
        self.engine = replace(engine, compiled=False, graphs=None, tail=None)
        try:
            self._forward(tokens, columns, cache, 1, kwargs, embeds)
        finally:
            self.engine = engine

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
            engine.limit.watch(past.store)
            return past
        self.run = None  # a finished run's memory goes before the new one's comes
        return self.new_cache(tokens.shape[0], tokens.device)

    def new_cache(self, batch: int, device: torch.device) -> KvCache:
        """An empty cache of the model's policy. KvCompileError where the model's dtype has changed meanwhile."""
        engine = self.engine
        dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        if str(dtype) != f"torch.{engine.plan.facts.dtype}":
            raise KvCompileError(
                f"the model is {dtype} now, and was torch.{engine.plan.facts.dtype} when optimised: optimise it again"
            )
        cache = KvCache(engine.plan, batch, engine.paged, dtype, engine.home or device, engine.sinks())
        engine.limit.watch(cache.store)
        if engine.graphs is not None:
            cache.store.ahead = AHEAD
        return cache

    def _forward(
        self, tokens: Tensor, columns: Columns, cache: KvCache, keep: int | Tensor, kwargs: dict[str, Any], embeds: bool
    ) -> Any:
        """Steps and prefills of one call; a batch that mixes them runs once for each kind."""
        each = cache.sequences.each
        draft = drafted(self.model)
        if draft is not None and tokens.shape[1] > 1:
            prompt = 0 if all(s.prefilled for s in each) else draft.prompt or tokens.shape[1]
            if prompt < tokens.shape[1]:
                return self._draft(tokens, columns, cache, prompt, keep, kwargs, embeds)
        steps = [c if len(c) == 1 and s.prefilled else [] for c, s in zip(columns, each, strict=True)]
        prefills = [[] if s else c for c, s in zip(columns, steps, strict=True)]
        name = "inputs_embeds" if embeds else "input_ids"
        if not any(prefills):
            return self._step(tokens, steps, cache, keep, kwargs, name)
        if not any(steps):
            return self._prefill(tokens, prefills, cache, keep, kwargs, name)
        if wants_hidden_states(self.model, kwargs):
            raise KvCompileError("output_hidden_states is not supported where some sequences step and others prefill")
        # Before the step runs, since a prefill that has no room must not leave half of the call behind.
        reserve_prefill(cache, [cut.pieces for cut in cuts_of(prefills, self.engine.plan)], [bool(s) for s in steps])
        step = self._step(tokens, steps, cache, keep, kwargs, name)
        prefill = self._prefill(tokens, prefills, cache, keep, kwargs, name)
        stepping = torch.tensor([bool(s) for s in steps], device=tokens.device)[:, None, None]
        prefill.logits = torch.where(stepping, step.logits, prefill.logits)
        return prefill

    def _draft(
        self, tokens: Tensor, columns: Columns, cache: KvCache, prompt: int, keep: int | Tensor,
        kwargs: dict[str, Any], embeds: bool,
    ) -> Any:  # fmt: skip
        """A call whose columns from `prompt` on are candidates: steps, in one forward, that crop() may take back."""
        width = tokens.shape[1] - prompt
        if prompt and (wants_hidden_states(self.model, kwargs) or not isinstance(keep, int)):
            raise KvCompileError("assisted decoding supports neither output_hidden_states nor a choice of logits")
        name = "inputs_embeds" if embeds else "input_ids"
        before = [[c for c in cols if c < prompt] for cols in columns]
        whole = isinstance(keep, int) and not 0 < keep <= width
        first = None
        if prompt:
            reserve_prefill(cache, [cut.pieces for cut in cuts_of(before, self.engine.plan)], draft=width)
            early = keep - width if whole and keep else 0
            first = self._prefill(tokens[:, :prompt], before, cache, early if whole else 1, kwargs, name)
        rest = [[c - prompt for c in cols if c >= prompt] for cols in columns]
        if width == 1:
            output = self._step(tokens[:, prompt:], rest, cache, keep, kwargs, name)
        else:
            if not is_aligned(rest, width):
                raise KvCompileError("padding among the candidates of assisted decoding is not supported")
            pieces = [Piece(len(c), step=True) for c in rest]
            cache.remember([p.new for p in pieces])
            with room_in_all(cache.store):
                cache.store.reserve_more([p.new for p in pieces])
            positions = positions_of(cache, pieces, width, tokens.device)
            wanted = 0 if whole else keep
            output = self._run(tokens[:, prompt:], positions, pieces, "chunk", cache, wanted, kwargs, name)
        if whole and first is not None:
            output.logits = torch.cat([first.logits, output.logits], 1)
        return output

    def _step(
        self, tokens: Tensor, columns: Columns, cache: KvCache, keep: int | Tensor, kwargs: dict[str, Any], name: str
    ) -> Any:
        pieces = [Piece(len(c), step=True) if c else Piece(0) for c in columns]
        wide = tokens.shape[1] > 1
        newest = gather_columns(tokens, columns, 1) if wide else tokens
        output = self._run(newest, next_positions(cache, tokens.device), pieces, "step", cache, 0, kwargs, name)
        if wide and not last_only(keep):
            output.logits = keep_columns(scatter_columns(output.logits, columns, pieces, None, tokens.shape[1]), keep)
        return output

    def _prefill(
        self, tokens: Tensor, columns: Columns, cache: KvCache, keep: int | Tensor, kwargs: dict[str, Any], name: str
    ) -> Any:
        plan = self.engine.plan
        cache.sequences.begin_prefill([len(c) for c in columns])
        cuts = cuts_of(columns, plan)
        count = len(cuts)
        aligned = count == 1 and is_aligned(columns, tokens.shape[1])
        if not aligned and kwargs.get("output_hidden_states"):
            raise KvCompileError(
                "output_hidden_states is not supported for prompts that are cut or padded on the right"
            )
        newest = last_only(keep)
        logits: Tensor | None = None
        reserve_prefill(cache, [cut.pieces for cut in cuts])
        last = last_position(cache, columns)
        for parts, both, pieces in cuts:
            ends = [p.ends for p in pieces]
            width = tokens.shape[1] if aligned else max(p.new + p.peek for p in pieces)
            positions = positions_of(cache, pieces, width, tokens.device)
            piece = tokens if aligned else gather_columns(tokens, both, width)
            phase = "prefill.end" if any(ends) else "chunk"
            wanted = keep if aligned else int(newest)
            with angles_upto(self.model, last) if count > 1 else contextlib.nullcontext():
                output = self._run(piece, positions, pieces, phase, cache, wanted, kwargs, name)
            if aligned:
                return output
            if newest:
                done = torch.tensor(ends, device=tokens.device)[:, None, None]
                logits = output.logits if logits is None else torch.where(done, output.logits, logits)
            else:
                logits = scatter_columns(output.logits, parts, pieces, logits, tokens.shape[1])
        assert logits is not None
        output.logits = logits if newest else keep_columns(logits, keep)
        return output

    def _run(
        self, tokens: Tensor, positions: Tensor, pieces: list[Piece], phase: str, cache: KvCache,
        keep: int | Tensor, kwargs: dict[str, Any], name: str,
    ) -> Any:  # fmt: skip
        """One forward through the layers: numbers in, memory reserved, account kept."""
        engine, store, sequences = self.engine, cache.store, cache.sequences
        if engine.rope is not None:
            store.rope = engine.rope.upto(places_of(engine.plan, cache, tokens.shape[1]))
        if engine.plan.compact:  # the model leaves queries and keys unturned, every read turns them by place
            positions = torch.zeros_like(positions)
        clock, counts = sequences.numbers(pieces)
        lines = sequences.fires(pieces, store.lengths() if _asks_length(engine.plan) else None)
        fires = torch.tensor(lines, dtype=torch.uint8)
        decides = any(any(line) for line in lines[: len(engine.plan.classes)])
        with room_in_all(store):
            store.cover(max(s.seen + p.new for s, p in zip(sequences.each, pieces, strict=True)))
            if isinstance(store, PagedStore):
                store.separate(fires, [p.new for p in pieces], phase == "step")
            if phase == "step":
                store.reserve_step(torch.tensor([p.new > 0 for p in pieces]))
            store.admit_piece(tokens.shape[1])
        for target, source in ((store.clock, clock), (store.counts, counts), (store.fires, fires)):
            target.copy_(to_device(source, store.device))
        cache.run.before(pieces, store.lengths(), tokens.shape[1], decides)
        # A piece of one token would specialise the graph of longer ones.
        compiled = engine.compiled and (phase == "step" or tokens.shape[1] > 1)
        sites, direct = store.sites(), not compiled and not watched()
        evicts = phase == "step" and decides

        def forward(tokens: Tensor, positions: Tensor) -> Any:
            call = Call(phase, engine.site, sites, compiled, direct)
            output = self.original(
                **{name: tokens}, attention_mask=None, position_ids=positions, past_key_values=StubCache(),
                use_cache=True, logits_to_keep=keep, return_dict=True, kvc=call, **kwargs,
            )  # fmt: skip
            if evicts:
                self._evict_opened(call)
            return output

        cache.guard.touched = phase
        running = contextlib.nullcontext() if engine.projections is None else engine.projections.during(direct)
        with on_device(store.device), running, Stopwatch(store.device, wait=phase != "step") as watch:
            if phase == "step" and engine.graphs is not None and self._graphable(keep, kwargs):
                output = engine.graphs.run(store, forward, tokens, positions, (name, keep, evicts))
            else:
                output = forward(tokens, positions)
            parts = self._evict_span(Call(phase, engine.site, sites, compiled), lines, phase == "prefill.end")
        cache.loose |= phase != "step" or evicts
        if parts is not None:
            sequences.measure(parts, pieces)
        sequences.advance(pieces, lines)
        cache.run.timed(watch.seconds, all(p.step or not p.new for p in pieces), sum(p.new for p in pieces))
        return output

    def _graphable(self, keep: int | Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether a step's output is its logits alone, however it was called."""
        plain = isinstance(keep, int) and all(value is None or value is False for value in kwargs.values())
        return plain and not wants_hidden_states(self.model, kwargs)

    def _evict_opened(self, call: Call) -> None:
        """The launch after the last layer; layers that ran as anchors have evicted by themselves."""
        engine = self.engine
        if engine.tail is None or not call.opened:
            return
        stores = [t for index in call.opened for t in call.sites[index]]
        if len(call.opened) + len(engine.plan.off) == len(call.sites):
            engine.tail(*stores)
            return
        torch.ops.kvc.evict_step_v1(stores, len(call.opened), engine.scale, call.site)

    def _evict_span(self, call: Call, lines: list[list[int]], ends: bool) -> Tensor | None:
        """Decisions that wait for the last layer, however the layers ran; gives measured shares where prompts end."""
        plan = self.engine.plan
        waiting = self.engine.waiting[call.phase == "step"]
        measures = ends and any(share.measured for share in plan.shares)
        if not measures and not any(any(lines[cls]) for cls in waiting):
            return None
        stores = [t for site in call.sites for t in site]
        parts = torch.ops.kvc.evict_span_v1(stores, len(call.sites), self.engine.scale, call.phase, call.site)
        return parts if measures else None

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise no_copies()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise no_copies()


def _plain_tensors() -> contextlib.AbstractContextManager[object]:
    """No gradients, and no inference tensors: a cache outlives the mode that it was made in, and is written to."""
    if not torch.is_inference_mode_enabled():  # to enter a mode that is on already takes a twentieth of a small step
        return torch.no_grad() if torch.is_grad_enabled() else contextlib.nullcontext()
    both = contextlib.ExitStack()
    both.enter_context(torch.inference_mode(False))
    both.enter_context(torch.no_grad())
    return both


def _asks_length(plan: PolicyPlan) -> bool:
    return any(t.kind == "full" for c in plan.classes for t in c.triggers)
