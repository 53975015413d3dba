"""NaN in keys and values, reported with its place: looked for only when a forward's logits hold NaN.

Takes a cache, a call's logits and a way to run the call again on no cache; raises KvCompileError that names the first
layer at fault. Guarantees: healthy logits cost one sum; NaN that no key or value has part in passes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kvcompile.cache import KvCache
from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.layout import Clock, Site
from kvcompile.kernels.ranks import everyone, gathered

WORDS = ("keys", "values", "keys and values")


class Place(NamedTuple):
    """Where NaN stands first: layers in order, then sequences, KV heads, positions (-1: an entry without one); what:
    index into `WORDS`."""

    layer: int
    sequence: int
    head: int
    position: int
    what: int


NOWHERE = Place(1 << 30, 0, 0, 0, 0)


def refuse_nan(cache: KvCache, logits: Tensor, again: Callable[[], None], seen: Sequence[int]) -> None:
    """KvCompileError where logits [batch, n, vocabulary] hold NaN that comes from keys or values.

    again: runs the call's tokens once more, layer by layer, on a cache that is thrown away; what a policy dropped at
    once is seen there. seen: tokens that each sequence had before the call. Reads `logits` on the host, so call it
    where the host waits anyway.
    """
    guard = cache.guard
    if guard.touched != "step":
        guard.watched = True
    if not guard.watched or not _has_nan(logits):
        return
    first = _earliest(cache, min(_resident(cache), _fresh(again, seen)))
    if first == NOWHERE:
        guard.watched = False  # the model's own NaN: not looked into again at every step
        return
    where = f"position {first.position}" if first.position >= 0 else "an entry that stands for several"
    raise KvCompileError(
        f"the {WORDS[first.what]} of layer {first.layer} hold NaN (sequence {first.sequence}, KV head {first.head}, "
        f"{where}), so the logits do: look at the weights and the input of that layer, and for numbers too large for "
        "its dtype (float16 ends at 65504: load the model in bfloat16 or float32); then start without this cache"
    )


def _earliest(cache: KvCache, mine: Place) -> Place:
    """The first place of all processes that hold heads, so that all of them raise, or none. Heads are the model's."""
    plan = cache.plan
    if plan.shard is None:
        return mine
    told = mine if mine == NOWHERE else mine._replace(head=mine.head + plan.first_head)
    heard = gathered(plan, torch.tensor(told, device=cache.store.device), everyone(plan))
    return min(Place(*one.tolist()) for one in heard)


def _has_nan(logits: Tensor) -> bool:
    # A sum is one pass; infinities of both signs give NaN as well, so it only raises the question.
    return math.isnan(float(logits.sum())) and bool(logits.isnan().any())


def _resident(cache: KvCache) -> Place:
    """The first NaN among the entries that the cache holds."""
    heads = cache.plan.facts.kv_heads
    lengths = cache.store.lengths().tolist()
    for layer, by_sequence in enumerate(lengths):
        site = cache.store.site(layer)
        for row, n in enumerate(n for sequence in by_sequence for n in sequence):
            slots = site.slots(site.base(heads) + row, 0, n)
            keys, values = site.k[slots].isnan().any(1), site.v[slots].isnan().any(1)
            if bool((keys | values).any()):
                at = int(site.pos[slots][keys | values].min())
                return Place(layer, row // heads, row % heads, at, _what(keys, values))
    return NOWHERE


class _Watch(TorchDispatchMode):
    """Notes the first layer of a forward whose fresh keys or values hold NaN. Does not stop there: other processes that
    hold heads of the model would wait for this one."""

    def __init__(self) -> None:
        super().__init__()
        self.found = NOWHERE

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.kvc.anchor_v1.default and self.found == NOWHERE:
            self._look(args[1], args[2], Site(*args[3]))
        return func(*args, **(kwargs or {}))

    def _look(self, k: Tensor, v: Tensor, site: Site) -> None:
        """k, v [batch, kv_heads, n, head_dim], each sequence's own tokens right-aligned."""
        clock = site.clock.cpu()
        used = (clock[:, Clock.NEW] + clock[:, Clock.PEEK])[:, None, None]
        n = k.shape[2]
        real = torch.arange(n) >= n - used
        keys, values = (t.isnan().any(3).cpu() & real for t in (k, v))
        places = (keys | values).nonzero()
        if len(places):
            b, head, column = places[0].tolist()
            position = int(clock[b, Clock.START]) + column - (n - int(used[b]))
            self.found = Place(int(site.layer), b, head, position, _what(keys[b, head], values[b, head]))


def _fresh(again: Callable[[], None], seen: Sequence[int]) -> Place:
    """The first NaN among all keys and values that the call brings, whatever becomes of them."""
    watch = _Watch()
    # No memory for a second run, or not within max_bytes: then what is resident has to do.
    with contextlib.suppress(RuntimeError, KvCompileError), watch:
        again()
    found = watch.found
    return found if found == NOWHERE else found._replace(position=found.position + seen[found.sequence])


def _what(keys: Tensor, values: Tensor) -> int:
    return 2 if bool(keys.any()) and bool(values.any()) else int(not bool(keys.any()))
