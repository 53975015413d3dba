"""Who may use a model and its caches at a time, and what a forward that failed has left behind.

`Traffic` (one per optimised model): forwards of several threads run one after the other; `restore` is refused while
one is under way. `Guard` (one per cache): one thread at a time, and none after a forward that ended half way.
Guarantees: nothing waits for another cache's generate(), only for its forward; no lock outlives an error.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from kvcompile.kernels.errors import KvCompileError

GRACE = 1.0  # seconds that a call which is about to return is given
_SHOWN = 160  # characters of a foreign error that a message shows


class Traffic:
    """The calls that are inside one optimised model, by thread."""

    def __init__(self) -> None:
        self.forwards = threading.RLock()  # pools, graphs and operators' scratch are for one forward at a time
        self._changed = threading.Condition()
        self._inside: dict[int, int] = {}

    @contextmanager
    def inside(self) -> Iterator[None]:
        """A generate() or forward of the model, for as long as it takes."""
        me = threading.get_ident()
        with self._changed:
            self._inside[me] = self._inside.get(me, 0) + 1
        try:
            yield
        finally:
            with self._changed:
                self._inside[me] -= 1
                if not self._inside[me]:
                    del self._inside[me]
                    self._changed.notify_all()

    def refuse_under_way(self) -> None:
        """KvCompileError while a call is inside, in whichever thread; to be asked before the model changes."""
        with self._changed:
            mine = threading.get_ident() in self._inside
            # A streamer tells its reader of the end before generate() has returned.
            if mine or not self._changed.wait_for(lambda: not self._inside, GRACE):
                raise KvCompileError(
                    f"the model is generating in {'this' if mine else 'another'} thread: optimize, restore and the end "
                    "of a `use` block change the model, so they have to wait until every generate() has returned"
                )


class Guard:
    """One cache's. touched: phase of the latest forward that has reached the layers in this call, "" for none;
    fault: why the cache cannot go on; watched: whether NaN in logits is looked into."""

    def __init__(self) -> None:
        self.touched = ""
        self.fault = ""
        self.watched = True
        self._turn = threading.RLock()

    @contextmanager
    def held(self) -> Iterator[None]:
        """The cache is this thread's. KvCompileError where another thread is in the middle of something with it."""
        if not self._turn.acquire(blocking=False):
            raise KvCompileError(
                "this KvCache is in use by another thread: a cache is one conversation, and two that extend it would "
                "mix their tokens; give each thread a cache of its own (cache.clone(), or cache.select for a shared "
                "prefix), or wait"
            )
        try:
            yield
        finally:
            self._turn.release()

    @contextmanager
    def extending(self) -> Iterator[None]:
        """A call that adds tokens. If it fails after layers took some of them, the cache is refused from then on."""
        with self.held():
            self.refuse_fault()
            self.touched = ""
            try:
                yield
            except BaseException as error:
                if self.touched:
                    self.fault = f"{type(error).__name__}: {error}".splitlines()[0][:_SHOWN]
                raise

    def refuse_fault(self) -> None:
        """KvCompileError where an earlier forward has left layers that do not agree."""
        if self.fault:
            raise KvCompileError(
                f"an earlier forward on this KvCache failed half way ({self.fault}), so its layers hold different "
                "tokens: go on from a clone or a saved cache of before, or run the conversation again without a cache"
            )


def guarded(generate: Callable[..., Any], traffic: Traffic) -> Callable[..., Any]:
    """A model's generate() that counts as inside, and holds the cache that it goes on from, until it returns."""

    @functools.wraps(generate)
    def alone(*args: Any, **kwargs: Any) -> Any:
        guard = getattr(kwargs.get("past_key_values"), "guard", None)
        with traffic.inside(), guard.held() if isinstance(guard, Guard) else nullcontext():
            return generate(*args, **kwargs)

    return alone
