"""How stretches and positions of a prompt reach its cache: `spans=` of a call or of generate().

Takes what a call brings and the cache that it fills. Guarantees: spans that do not fit the sequences, their tokens or
the policy are refused before anything runs, and so is a prompt without them under a policy that reads by them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from kvcompile.cache import KvCache
from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.plan import PolicyPlan
from kvcompile.kernels.spans import span_names
from kvcompile.limits import room_in_all
from kvcompile.padding import Columns
from kvcompile.spans import Spans, as_list


@dataclass(slots=True)
class _Said:
    """What the generate() of `model` that is running in this thread was given; its first forward takes it."""

    model: Any
    spans: Any


_current: ContextVar[_Said | None] = ContextVar("spans", default=None)


@contextmanager
def saying(model: Any, spans: Any) -> Iterator[None]:
    """A generate() whose first forward is given these spans."""
    token = _current.set(_Said(model, spans))
    try:
        yield
    finally:
        _current.reset(token)


def said_of(model: Any) -> Any:
    """What this thread's generate() was given for the next forward of `model`; None where nothing is left of it."""
    current = _current.get()
    if current is None or current.model is not model:
        return None
    spans, current.spans = current.spans, None
    return spans


def take_spans(cache: KvCache, columns: Columns, given: Any) -> None:
    """Put what a call brings into its cache, before it runs. KvCompileError where it does not fit, CacheFull where its
    tables have no room."""
    with cache.guard.held():  # another thread's forward may be reading by them
        each = cache.sequences.each
        if given is not None:
            spans = spans_of(given, cache.batch)
            refuse_spans(cache.plan, spans, [len(c) for c in columns], [s.seen for s in each])
            with room_in_all(cache.store):
                cache.tell(spans)
        elif not any(s.seen for s in each):
            refuse_missing(cache.plan)
            if any(s.spans is not None for s in each):  # of a call that has failed
                cache.tell([None] * cache.batch)


def spans_of(given: Any, batch: int) -> list[Spans | None]:
    """One for each sequence of a call. generate() repeats sequences for beams and for several answers, and so here."""
    each = [given] if isinstance(given, Spans) or given is None else as_list(given, "a call")
    odd = [s for s in each if not (s is None or isinstance(s, Spans))]
    if odd or not each or batch % len(each):
        said = f"{type(odd[0]).__name__} is none" if odd else f"there are {len(each)} for {batch} sequences"
        raise KvCompileError(f"spans= takes a kvcompile.Spans, or a list with one or None for each sequence: {said}")
    return [s for s in each for _ in range(batch // len(each))]


def refuse_spans(plan: PolicyPlan, each: list[Spans | None], tokens: list[int], seen: list[int]) -> None:
    """KvCompileError where spans do not fit the sequences of a call, their tokens, or the policy."""
    if any(seen):
        raise KvCompileError(
            f"spans say what the tokens of a prompt are, and this cache has seen {max(seen)} tokens already: give them "
            "with the first call of a conversation; what comes later belongs to no stretch"
        )
    for b, (spans, n) in enumerate(zip(each, tokens, strict=True)):
        if spans is not None and spans.tokens > n:
            late = [name for name, _, stop in spans.segments if stop > n]
            what = f"stretch {late[0]!r}" if late else "a list of positions"
            raise KvCompileError(f"{what} of sequence {b} reaches token {spans.tokens}, and its prompt has {n}")
    placed = any(s is not None and s.positions is not None for s in each)
    if not placed and not span_names(plan) and any(s is not None for s in each):
        raise KvCompileError(
            f"policy {plan.name} has no span(...), so these stretches would change nothing: choose a policy that reads "
            'by them (`attend span("self") | span("sources")`), or give positions'
        )
    if placed and plan.rotates:
        raise KvCompileError(
            f"policy {plan.name} turns keys by itself (`positions compact`, `raw.k`), so positions of one's own are "
            "not supported under it: leave `positions` out, or keep original positions"
        )


def refuse_peeked(plan: PolicyPlan) -> None:
    """KvCompileError: peeked tokens run at positions that other tokens' stretches are noted for."""
    if plan.peek and span_names(plan):
        raise KvCompileError(
            f"policy {plan.name} has both `q in peek({plan.peek})` and span(...), which is not supported: score by "
            "`q in last(w)` at prefill.end"
        )


def refuse_missing(plan: PolicyPlan) -> None:
    """KvCompileError: the policy reads by stretches, and a prompt came without."""
    names = span_names(plan)
    if names:
        raise KvCompileError(
            f"policy {plan.name} reads by stretches of the text ({', '.join(f'span({n!r})' for n in names)}), and this "
            "prompt came without: generate(..., spans=kvcompile.Spans([(name, start, stop), ...])), or None in a list "
            "for a sequence that has none"
        )
