"""`KvCache`: the cache that an optimised model fills and `generate()` hands around.

A `transformers.Cache` whose logical length is what the model has seen, while its memory holds what the
policy keeps. Only the model that made it can extend it.
"""

from __future__ import annotations

import weakref
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import Cache

from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.plan import PolicyPlan
from kvcompile.run import Run
from kvcompile.sequences import Sequences
from kvcompile.store import ExtentStore, PagedStore


class KvCache(Cache):
    """Paged, ragged per (sequence, layer, KV head). Made by an optimised model, never by hand."""

    def __init__(self, plan: PolicyPlan, batch: int, paged: bool, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(layers=[])
        self.plan = plan
        self.batch = batch
        self.columns = 0  # columns of input_ids seen so far, padding included: what generate() counts
        self.store = (PagedStore if paged else ExtentStore)(plan, batch, dtype, device)
        self.loose = False  # whether entries have gone, or come from a prompt, since the store was settled
        self.sequences = Sequences(plan, batch)
        self.run = Run(plan, self.store, batch)
        weakref.finalize(self, self.run.close).atexit = False

    def positions(self, layer: int, row: int = 0) -> list[Tensor]:
        """Resident original positions of sequence `row`: one sorted int64 tensor per KV head.

        An entry that `fold mean` has left has no position and does not show here.
        """
        if not 0 <= layer < self.plan.facts.layers:
            raise KvCompileError(f"layer {layer} of a model with {self.plan.facts.layers} layers")
        if not 0 <= row < self.batch:
            raise KvCompileError(f"row {row} of a cache with {self.batch} sequences")
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

    def crop(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse("crop", "assisted decoding and crop() need evicted entries back")

    def reorder_cache(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse("reorder_cache", "beam search moves sequences between rows; use num_beams=1")

    def batch_repeat_interleave(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse("batch_repeat_interleave", "pass the prompt once per continuation instead")

    def batch_select_indices(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse("batch_select_indices", "sequences cannot be taken out of a running batch yet")

    def reset(self) -> NoReturn:
        _refuse("reset", "start from no cache: the model makes a new one")

    def __deepcopy__(self, memo: object) -> NoReturn:
        _refuse("a copy", "run the prompt again, or keep one cache per continuation")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        _refuse("pickling", "saving and restoring a cache is not built yet")


def _refuse(what: str, why: str) -> NoReturn:
    raise KvCompileError(f"KvCache does not support {what} yet: {why}")
