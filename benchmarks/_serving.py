"""A server on one cache: sequences are let in, step together, end or are cancelled, in any order.

`Server` takes an optimised model, gives its requests their greedy tokens. `arrivals` draws requests; `conserved` says
whether every slot of a cache is either free or held by exactly the rows that may hold it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from kvcompile.extents import ExtentStore


@dataclass(slots=True)
class Request:
    """A prompt, how many tokens are wanted, when it arrives and when, if ever, it is cancelled (ticks)."""

    number: int
    prompt: list[int]
    wanted: int
    arrives: int
    cancelled: int | None
    tokens: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Traffic:
    """What arrives: requests a tick, means of lengths in tokens (log-normal, cut off), the part that is cancelled."""

    rate: float = 0.05
    prompt: int = 60
    answer: int = 40
    longest: int = 400
    cancelled: float = 0.15
    vocabulary: int = 256


def arrivals(traffic: Traffic, ticks: int, seed: int) -> Iterator[Request]:
    """Requests in the order in which they arrive, the same ones for the same seed."""
    dice = random.Random(seed)
    at, number = 0.0, 0
    while True:
        at += dice.expovariate(traffic.rate)
        if at >= ticks:
            return
        prompt, wanted = (_length(dice, mean, traffic.longest) for mean in (traffic.prompt, traffic.answer))
        leaves = int(at) + dice.randrange(1, wanted + 1) if dice.random() < traffic.cancelled else None
        words = [dice.randrange(3, traffic.vocabulary) for _ in range(prompt)]
        yield Request(number, words, wanted, int(at), leaves)
        number += 1


def _length(dice: random.Random, mean: int, longest: int) -> int:
    return max(1, min(longest, round(dice.lognormvariate(0.0, 0.8) * mean)))


class Server:
    """Requests of one policy on one cache. `most`: sequences at a time; further ones wait their turn."""

    def __init__(self, model: Any, most: int) -> None:
        self.model, self.most = model, most
        self.cache: Any = None
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self.peak = 0  # bytes that the cache held at most
        self.steps = self.admitted = 0

    def tick(self, now: int) -> list[Request]:
        """One token for all that run, then let in what has arrived. Returns what has ended or was cancelled."""
        gone = self._release(now)
        if self.running:
            newest = torch.tensor([[r.tokens[-1]] for r in self.running])
            self._take(self.running, self._forward(newest, self.cache))
            self.steps += 1
        while self.waiting and len(self.running) < self.most:
            self._admit(self.waiting.pop(0))
        return gone

    def _admit(self, request: Request) -> None:
        output = self._forward(torch.tensor([request.prompt]), None)
        self._take([request], output)
        fresh = output.past_key_values
        self.cache = fresh if self.cache is None else type(fresh).join([self.cache, fresh])
        self.running.append(request)
        self.admitted += 1

    def _forward(self, tokens: torch.Tensor, cache: Any) -> Any:
        output = self.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        self.peak = max(self.peak, output.past_key_values.nbytes())
        return output

    @staticmethod
    def _take(requests: list[Request], output: Any) -> None:
        for request, token in zip(requests, output.logits[:, -1].argmax(-1).tolist(), strict=True):
            request.tokens.append(token)

    def _release(self, now: int) -> list[Request]:
        def over(r: Request) -> bool:
            return len(r.tokens) >= r.wanted or (r.cancelled is not None and now >= r.cancelled)

        gone = [r for r in self.running if over(r)] + [r for r in self.waiting if over(r)]
        stay = [i for i, r in enumerate(self.running) if not over(r)]
        if self.running and not stay:
            self.cache = None
        elif len(stay) < len(self.running):
            self.cache.select(stay)
        self.running = [self.running[i] for i in stay]
        self.waiting = [r for r in self.waiting if not over(r)]
        return gone


def replay(model: Any, request: Request) -> tuple[int | None, float]:
    """The request alone: the first token that differs from what it was given, or None; and how far apart the two best
    logits were there (0 where nothing differs)."""
    tokens, cache = torch.tensor([request.prompt]), None
    for at, given in enumerate(request.tokens):
        output = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        best = output.logits[0, -1].topk(2)
        if int(best.indices[0]) != given:
            return at, float(best.values[0] - best.values[1])
        tokens, cache = torch.tensor([[given]]), output.past_key_values
    return None, 0.0


def conserved(cache: Any) -> bool:
    """Whether memory is neither lost nor given out twice: extents lie apart and within their pool; every page is free
    or held, and no page is held twice but by rows that share a prefix."""
    store = cache.store
    if isinstance(store, ExtentStore):
        return all(_apart(table, pool.slots) for table, pool in zip(store.table.tolist(), store.pools, strict=True))
    page = store.plan.page
    held: Counter[int] = Counter()
    for row, n in zip(store.table.tolist(), store.length.flatten().tolist(), strict=True):
        held.update(row[: -(-n // page)])
    free = store.free[: int(store.top)].tolist()
    return len(set(free)) == len(free) and not held.keys() & set(free) and len(free) + len(held) == len(store.free)


def _apart(extents: list[list[int]], slots: int) -> bool:
    ends = 0
    for start, capacity in sorted(e for e in extents if e[1]):
        if start < ends:
            return False
        ends = start + capacity
    return ends <= slots
