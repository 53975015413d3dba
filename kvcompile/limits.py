"""`max_bytes`: what the caches of one model may take together, held before anything is allocated.

Takes the limit and the stores of the model's live caches; gives leave to grow, or `CacheFull` with the figures.
Guarantees: whatever is refused has changed nothing, in no process that holds heads of the model; a device that is
full is the same error, and so is a way on.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.ranks import told
from kvcompile.kernels.sizes import size_text

if TYPE_CHECKING:
    from kvcompile.cache import KvCache
    from kvcompile.store import Store

T = TypeVar("T")
# The stores of a model's live caches, whatever it was optimised for when they were made.
_STORES: WeakKeyDictionary[nn.Module, WeakSet[Store]] = WeakKeyDictionary()
_CHANGES = threading.RLock()  # a set of stores that one thread goes through must not change in another


class CacheFull(KvCompileError):
    """There is no room for the tokens to come; the cache is as it was before them.

    needed, limit: bytes, limit None where the device itself is full. cache: the one that was to grow, from which a
    model with a larger limit goes on; sequences: int64 [batch, tokens] that generate() has made so far, its prompt
    among them, where a limit was set.
    """

    def __init__(self, message: str, needed: int, limit: int | None) -> None:
        super().__init__(message)
        self.needed, self.limit = needed, limit
        self.cache: KvCache | None = None
        self.sequences: Tensor | None = None


class Limit:
    """What the live caches of one model may take together; `most` None: whatever there is."""

    def __init__(self, most: int | None, model: nn.Module | None = None) -> None:
        self.most = most
        self.stores: WeakSet[Store] = WeakSet() if model is None else _STORES.setdefault(model, WeakSet())

    def watch(self, store: Store) -> None:
        """A store counts from now on, and asks here before it grows."""
        store.limit = self
        if store not in self.stores:
            with _CHANGES:
                self.stores.add(store)

    def has_room(self, store: Store, total: int) -> bool:
        """Whether a store may stand at so many bytes, beside what the model's other caches hold."""
        if self.most is None or self.others(store) + total <= self.most:
            return True
        gc.collect()  # caches that nobody has any more
        return self.others(store) + total <= self.most

    def others(self, store: Store) -> int:
        """Bytes that the model's other live caches have allocated."""
        with _CHANGES:
            live = list(self.stores)
        return sum(other.bytes_allocated() for other in live if other is not store)

    def admit(self, store: Store, total: int) -> None:
        """CacheFull unless a store may stand at so many bytes while the next tokens come in."""
        if not self.has_room(store, total):
            self.refuse(store, total, "The next tokens need", _WAYS)

    def refuse(self, store: Store, total: int, what: str, ways: str) -> NoReturn:
        """The error, with its figures."""
        assert self.most is not None
        others = self.others(store)
        beside = f", beside {size_text(others)} of the model's other caches" if others else ""
        raise CacheFull(
            f"max_bytes is {size_text(self.most)} ({self.most} bytes). {what} {size_text(total)} ({total} bytes) at "
            f"the peak{beside}: {others + total - self.most} bytes more than allowed. Nothing of it has run. {ways}",
            others + total,
            self.most,
        )


_KEPT = (
    "All tokens so far are in the cache, `cache` of this error (`sequences` has them where generate() ran): release "
    "sequences (cache.select) or let other caches go"
)
_WAYS = f"{_KEPT}, or optimise the model again with a larger max_bytes, and go on with the same cache"
UNLIMITED = Limit(None)


def allocated(make: Callable[[], T], size: int) -> T:
    """What `make` makes of memory, `size` bytes; CacheFull where the device has no more."""
    try:
        return make()
    except (RuntimeError, MemoryError) as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CacheFull(
            f"no memory for {size_text(size)} more of cache ({said}). Nothing of the next tokens has run. {_KEPT}, or "
            "free memory on the device, and go on with the same cache",
            size,
            None,
        ) from error


@contextlib.contextmanager
def room_in_all(store: Store) -> Iterator[None]:
    """A block that finds memory for a store: in every process that holds heads of the model, or in none.

    CacheFull in each of them where one has refused. Nothing in the block may exchange anything with other processes.
    Costs an exchange where a limit is set and several processes hold the heads, else nothing.
    """
    plan, limit = store.plan, store.limit
    if plan.shard is None or limit.most is None:
        yield
        return
    try:
        yield
    except Exception as error:
        figures = (error.needed, error.limit or 0) if isinstance(error, CacheFull) else (0, 0)
        told(plan, (1, *figures), store.device)
        raise
    heard = told(plan, (0, 0, 0), store.device)
    full = next((rank for rank, (refused, _, _) in enumerate(heard) if refused), None)
    if full is None:
        return
    _, needed, most = heard[full]
    said = f"{needed} bytes at the peak where max_bytes is {most}" if most else "see its own error"
    raise CacheFull(
        f"process {full} of {plan.shard.world} has no room for its heads: {said}. Nothing of it has run in any "
        f"process. {_WAYS}",
        needed,
        most or None,
    )


def with_sequences(generate: Callable[..., Any], limit: Limit) -> Callable[..., Any]:
    """A generate() whose CacheFull has the tokens that it has made so far."""
    if limit.most is None:
        return generate

    @functools.wraps(generate)
    def keeping(*args: Any, **kwargs: Any) -> Any:
        latest: list[Tensor] = []
        if len(args) < 4:  # else the caller's stopping criteria are among the positional arguments
            kwargs["stopping_criteria"] = _with_witness(kwargs.get("stopping_criteria"), latest)
        try:
            return generate(*args, **kwargs)
        except CacheFull as error:
            error.sequences = latest[0] if latest else None
            raise

    return keeping


def _with_witness(given: Any, latest: list[Tensor]) -> Any:
    """The caller's stopping criteria, and one that never stops: it sees all tokens after each new one."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Witness(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            latest[:] = [input_ids]
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    return StoppingCriteriaList([*(given or ()), Witness()])
