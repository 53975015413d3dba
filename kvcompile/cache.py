"""`KvCache`: the cache that an optimised model fills and `generate()` hands around.

A `transformers.Cache` whose logical length is what the model has seen, while its memory holds what the
policy keeps. Only the model that made it can extend it.
"""

from __future__ import annotations

import contextlib
import operator
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import Cache

from kvcompile import moving
from kvcompile.drafting import why_not
from kvcompile.extents import ExtentStore
from kvcompile.guard import Guard
from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.plan import PolicyPlan
from kvcompile.limits import allocated, room_in_all
from kvcompile.pages import PagedStore
from kvcompile.run import Run
from kvcompile.sequences import Sequences
from kvcompile.spans import Spans, table_bytes
from kvcompile.store import on_device


class KvCache(Cache):
    """Paged, ragged per (sequence, layer, KV head). Made by an optimised model, never by hand."""

    def __init__(
        self,
        plan: PolicyPlan,
        batch: int,
        paged: bool,
        dtype: torch.dtype,
        device: torch.device,
        sinks: Tensor | None = None,
    ) -> None:
        """sinks: float32 [layers, q_heads], where the model's softmax has one more logit per query head."""
        super().__init__(layers=[])
        self.plan = plan
        self.batch = batch
        self.columns = 0  # columns of input_ids seen so far, padding included: what generate() counts
        self.store = (PagedStore if paged else ExtentStore)(plan, batch, dtype, device, sinks)
        self.loose = False  # whether entries have gone, or come from a prompt, since the store was settled
        self.sequences = Sequences(plan, batch)
        self.run = Run(plan, self.store, batch)
        self.guard = Guard()
        self._drafted = False  # whether the latest tokens are a draft that crop() has not answered yet
        self._ring: list[tuple[int, int, Tensor]] = []  # of each sequence: start and stop of a draft, queries replaced
        weakref.finalize(self, self.run.close).atexit = False

    def positions(self, layer: int, row: int = 0) -> list[Tensor]:
        """Resident original positions of sequence `row`: one sorted int64 tensor per KV head.

        An entry that `fold mean` has left has no position and does not show here. KvCompileError for a layer or a row
        that is not there; none counts from the end.
        """
        layer, row = _whole(layer, "layer"), _whole(row, "row")
        layers = self.plan.facts.layers
        if not 0 <= layer < layers:
            raise KvCompileError(f"layer {layer} of a model with {layers} layers: give one of 0 to {layers - 1}")
        if not 0 <= row < self.batch:
            raise KvCompileError(f"row {row} of a cache with {self.batch} sequences: give one of 0 to {self.batch - 1}")
        return [pos[pos >= 0] for pos in self.store.positions(layer, row)]

    def nbytes(self) -> int:
        """Bytes that the policy's entries hold: page waste, positions and states included."""
        return self.store.bytes_resident()

    def stats(self) -> dict[str, object]:
        """Lengths, bytes, footprint and peak so far, in the keys of the report."""
        return self.run.numbers()

    # -- transformers.Cache -------------------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen, padding included: generate() slices its inputs by it."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1

    @property
    def is_compileable(self) -> bool:
        # generate() would compile the model a second time, around our own compiled layers.
        return False

    @property
    def is_initialized(self) -> bool:
        return self.columns > 0

    @property
    def max_batch_size(self) -> int:
        return self.batch

    def __len__(self) -> int:
        return self.plan.facts.layers

    def __repr__(self) -> str:
        return f"KvCache({self.plan.name}, batch={self.batch}, seen={self.columns}, bytes={self.nbytes()})"

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise KvCompileError("this KvCache belongs to an optimised model: pass it to that model, no other can fill it")

    def crop(self, tokens: int) -> None:
        """Go back: `tokens` < 0 takes so many of the newest tokens from every sequence, `tokens` > 0 cuts each to so
        many, 0 leaves all as it is (as in transformers). A whole number, perhaps a tensor of one.

        KvCompileError, and nothing has changed, where a sequence's policy has decided with tokens that would go, or
        where its states have grown by what they read.
        """
        tokens = _whole(tokens, "crop: tokens")
        with self._own():
            slides, self._drafted = self._drafted and any(self.plan.facts.windows), False
            seen = [max(0, s.seen + tokens) if tokens <= 0 else min(s.seen, tokens) for s in self.sequences.each]
            if tokens == 0 and not slides:
                return
            for b, n in enumerate(seen):
                reason = self.sequences.fixed(b, n)
                if reason:
                    raise KvCompileError(
                        f"sequence {b} cannot be cropped to {n} tokens: {reason}; reset() empties the cache, and a "
                        "clone() taken earlier still has what has gone"
                    )
            gone = [s.seen - n for s, n in zip(self.sequences.each, seen, strict=True)]
            cut = [b for b, n in enumerate(gone) if n or slides]
            moving.unshare(self.store, cut)
            for b in cut:
                self._crop(b, seen[b], slides)
            self.columns -= max(gone)
            self.store.tell([s.spans for s in self.sequences.each])

    def _crop(self, b: int, seen: int, slides: bool) -> None:
        """One sequence; slides: entries that have left their layer's sliding window go, too."""
        seq = self.sequences.each[b]
        gone = seq.seen - seen
        moving.cut(self.store, b, seen, slides)
        if slides:
            seq.decided = seen
        since = self._put_back(b, seen)
        self.run.take_back(b, gone, gone if seen >= seq.prompt else seq.steps)
        self.sequences.crop(b, seen, since)
        seq.spans = None if seq.spans is None else seq.spans.upto(seen)

    def tell(self, spans: Sequence[Spans | None]) -> None:
        """What is said of each sequence's stretches and positions, from now on.

        CacheFull, and nothing has changed, where their tables have no room.
        """
        store, size = self.store, table_bytes(self.plan, spans)
        if size > store.segment.nbytes + store.links.nbytes:  # they will stand beside those that are there
            store.limit.admit(store, store.bytes_allocated() + size)
        allocated(lambda: store.tell(spans), size)
        for seq, of in zip(self.sequences.each, spans, strict=True):
            seq.spans = of

    def remember(self, new: list[int]) -> None:
        """Before a draft of so many tokens per sequence: keep what it will overwrite of the newest queries."""
        self._drafted, self._ring = True, []
        for b, n in enumerate(new if self.plan.ring else []):
            start = self.sequences.each[b].seen
            slots = torch.arange(start, start + min(n, self.plan.ring), device=self.store.device) % self.plan.ring
            self._ring.append((start, start + n, self.store.ring[:, b, :, slots].clone()))

    def _put_back(self, b: int, seen: int) -> int | None:
        """Undo a draft's changes to the newest queries from position `seen` on; since when they are known, if so."""
        start, stop, saved = self._ring[b] if self._ring else (0, -1, self.store.ring)
        if stop != self.sequences.each[b].seen or seen < start:
            if seen < start:  # what was kept is of tokens that are gone, however many come in again
                self._ring[b] = (0, -1, saved)
            return None
        lost = torch.arange(seen, start + saved.shape[2], device=self.store.device)
        self.store.ring[:, b, :, lost % self.plan.ring] = saved[:, :, lost - start]
        return start

    def select(self, sequences: Sequence[int] | Tensor) -> None:
        """Sequence i becomes what `sequences[i]` was. Any order; repeats make several continuations of one prefix, and
        what is not named is released. On pages repeats share them, in extents they are copied."""
        chosen = _numbers(sequences)
        wrong = [b for b in chosen if not 0 <= b < self.batch]
        if wrong or not chosen:
            named = f"sequence {wrong[0]}" if wrong else "no sequence at all"
            raise KvCompileError(f"{named} of a cache with {self.batch} sequences cannot be selected")
        with self._own():
            if chosen == list(range(self.batch)):
                return
            moving.select(self.store, chosen)
            self.sequences.select(chosen)
            self.run.select(chosen)
            self.batch = len(chosen)
            self._ring = []
            self.store.tell([s.spans for s in self.sequences.each])

    def clone(self) -> KvCache:
        """A cache of its own with the same content; both go on apart from each other."""
        return KvCache.join([self])

    @staticmethod
    def join(caches: Sequence[KvCache]) -> KvCache:
        """A new cache that holds the sequences of all these, in order; they stay as they are.

        KvCompileError where they are not of one policy, layout, dtype and device; CacheFull where the copies do not
        fit beside them. `get_seq_length` is the largest.
        """
        listed: list[object] = [] if isinstance(caches, KvCache) or not isinstance(caches, Iterable) else list(caches)
        many = [c for c in listed if isinstance(c, KvCache)]
        if not many or len(many) < len(listed):
            raise KvCompileError(f"join takes a list of at least one cache of an optimised model, not {caches!r:.60}")
        first = many[0]
        for other in many[1:]:
            first._refuse_stranger(other)
        with contextlib.ExitStack() as stack:
            for cache in many:
                stack.enter_context(cache._own())
            made = first._like(sum(c.batch for c in many))
            made.sequences.each = [s.copy() for c in many for s in c.sequences.each]
            with room_in_all(made.store):
                moving.join(made.store, [c.store for c in many])
                made.tell([s.spans for s in made.sequences.each])
            made.columns = max(c.columns for c in many)
            made.run.take_over([c.run for c in many])
        return made

    def _like(self, batch: int) -> KvCache:
        """An empty cache of the same kind, under the same limit."""
        store = self.store
        sinks = store.sink if store.sink.shape[0] else None
        made = KvCache(self.plan, batch, isinstance(store, PagedStore), store.dtype, store.device, sinks)
        made.store.ahead = store.ahead
        store.limit.watch(made.store)
        return made

    def _refuse_stranger(self, other: KvCache) -> None:
        mine, its = self.store, other.store
        if other.plan.digest != self.plan.digest:
            raise KvCompileError(f"caches of {self.plan.name} and {other.plan.name} cannot be joined: one policy only")
        if (type(mine), mine.dtype, mine.device) != (type(its), its.dtype, its.device):
            raise KvCompileError("caches of different backends, dtypes or devices cannot be joined")

    def reset(self) -> None:
        """Forget all sequences; the cache is as new, for as many sequences as before."""
        with self.guard.held(), torch.inference_mode(False):
            fresh = self._like(self.batch)
            self.store.become(fresh.store)
            self.run.start()
            self.sequences, self.columns, self.loose = fresh.sequences, 0, False
            self._drafted, self._ring = False, []
            self.guard.fault = ""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """`select`, as beam search calls it."""
        self.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """`select`, each sequence so many times in a row, at least once."""
        repeats = _whole(repeats, "batch_repeat_interleave: repeats")
        if repeats < 1:
            raise KvCompileError(f"batch_repeat_interleave: repeats={repeats}; every sequence stays at least once")
        self.select([b for b in range(self.batch) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """`select`, by numbers or by a mask, a tensor bool [batch]."""
        if isinstance(indices, Tensor) and indices.dtype == torch.bool:
            if indices.shape != (self.batch,):
                raise KvCompileError(
                    f"a mask of shape {list(indices.shape)} for a cache with {self.batch} sequences: give one of "
                    f"[{self.batch}]"
                )
            indices = indices.nonzero().flatten()
        self.select(indices)

    @property
    def is_croppable(self) -> bool:
        """Whether tokens that were decoded can be taken back whenever that is asked."""
        return not why_not(self.plan)

    @contextlib.contextmanager
    def _own(self) -> Iterator[None]:
        """An operation between forwards: this thread's, on whole content, on the cache's device."""
        # A cache outlives the mode that it was made in, and inference tensors could not be written to later.
        with self.guard.held(), torch.inference_mode(False), torch.no_grad(), on_device(self.store.device):
            self.guard.refuse_fault()
            yield

    def __deepcopy__(self, memo: object) -> KvCache:
        return self.clone()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise KvCompileError(
            "a KvCache cannot be pickled: kvcompile.save_cache(model, cache, path) writes it to a file"
        )


def _whole(value: object, what: str) -> int:
    """A whole number, as somebody has written it; transformers has some on the device."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise KvCompileError(f"{what} must be a whole number, not {value!r:.60}") from None


def _numbers(sequences: object) -> list[int]:
    """Numbers of sequences, as somebody has written them."""
    given = sequences.tolist() if isinstance(sequences, Tensor) else sequences
    try:
        listed = list(given)  # type: ignore[call-overload]
        mask = any(isinstance(b, bool) for b in listed)
        numbers = [operator.index(b) for b in listed]
    except TypeError:
        raise KvCompileError(f"select takes a list of numbers of sequences, not {sequences!r:.60}") from None
    if mask:
        raise KvCompileError("select takes numbers of sequences; a mask is for batch_select_indices, as a tensor")
    return numbers
