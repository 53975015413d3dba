"""Where the triton backend took the reference, to be held against what `unprintable` lists."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from kvcompile.kernels import evict, reference
from kvcompile.kernels.plan import Selection
from kvcompile.kernels.select import Plainly
from kvcompile.kernels.triton_backend import backend


def listed(reasons: tuple[str, ...]) -> set[str]:
    """The kinds of places that `unprintable` names: decode, pack, after a step, prefill, state."""
    places = [reason.split(":")[0] for reason in reasons]
    return {"state" if place.startswith("state ") else place.split(", ")[-1] for place in places}


@contextmanager
def fallbacks() -> Iterator[set[str]]:
    """The kinds of places, named as `listed` does, where the reference stood in for a kernel meanwhile."""
    taken: set[str] = set()
    inside: list[str] = []

    def watched(
        place: str, run: Callable[..., Any], counts: Callable[..., bool] = lambda *_: True
    ) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if not inside and counts(*args):
                taken.add(place)
            inside.append(place)
            try:
                return run(*args)
            finally:
                inside.pop()

        return call

    def needs_stages(term: Selection, *_: object) -> bool:
        return term.score.op != "state"  # a state is its own score

    with pytest.MonkeyPatch.context() as patch:
        for owner, name, place in (
            (reference, "attend_step", "decode"),
            (reference, "attend_prefill", "prefill attention"),
            (evict, "insert", "pack"),
            (evict, "evict_class", "after a step"),
            (evict, "evict_prefill", "prefill"),
        ):
            patch.setattr(owner, name, watched(place, getattr(owner, name)))
        patch.setattr(Plainly, "score", staticmethod(watched("prefill", Plainly.score, needs_stages)))
        patch.setattr(Plainly, "choose", staticmethod(watched("prefill", Plainly.choose)))
        patch.setattr(
            backend, "growth", watched("state", backend.growth, lambda states, *_: any(s.add for s in states))
        )
        yield taken
