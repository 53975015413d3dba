"""Sets that queries read, put together as the language writes them: regions, and choices by scores, left to right.

The frame is that of `oracle_reads`. A score gives numbers of tokens or of units for one query head; a take gives the
winners of a contest; a choice is both. Plain dictionaries and loops, nothing of kvcompile.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction

import torch

from tests.oracle import Oracle
from tests.oracle_reads import Asked, Reading, Sets
from tests.oracle_states import covered

Score = Callable[[Asked, int], dict[int, float]]  # of a query head: numbers of tokens, or of units that are full
Chooses = Callable[[Asked, int, set[int]], set[int]]  # what a query head's choice adds to what is taken


@dataclass(slots=True)
class Union(Reading):
    """A union as the language writes it: `near(p, asked)` says what regions take; then each choice, in order."""

    near: Callable[[int, Asked], bool] = lambda p, asked: False
    choices: tuple[Chooses, ...] = ()
    when: Callable[[Oracle, int, int], bool] | None = None  # in place of triggers

    def fires(self, oracle: Oracle, layer: int, head: int) -> bool:
        if self.when is not None:
            return self.when(oracle, layer, head)
        return not self.triggers or oracle.piece.fires(*self.triggers)

    def read(self, asked: Asked) -> Sets:
        sets = []
        for g in range(asked.oracle.group):
            taken = asked.among(lambda p: self.near(p, asked))
            for choose in self.choices:
                taken = taken | choose(asked, g, taken)
            sets.append(taken)
        return sets


@dataclass(slots=True)
class PagesTogether(Reading):
    """`top(n) pages by sum[q in last(observe)] attn per head`: one choice for a forward, among the pages that are full
    before its newest query. What lies in pages that are not full before a query, that query reads."""

    size: int = 4
    n: int = 2
    observe: int = 3
    triggers: tuple[str, ...] = ("chunk",)
    chosen: dict[int, set[int]] = field(default_factory=dict)  # by KV head

    def prepare(self, oracle: Oracle, layer: int) -> None:
        for head, row in enumerate(oracle.rows[layer]):
            total = oracle.last_reads(row, self.observe).sum(1).mean(0)
            pages = Asked(oracle, layer, head, oracle.piece.now).units(self.size)
            scored = {u: math.fsum(total[p].item() for p in m) / len(m) for u, m in pages.items()}
            self.chosen[head] = {u for u, _ in oracle.best([(s, u, 0) for u, s in scored.items()], self.n)}

    def read(self, asked: Asked) -> Sets:
        return [asked.with_units(self.size, set(), self.chosen[asked.head])] * asked.oracle.group


def length(oracle: Oracle, layer: int, head: int) -> int:
    """`len` in a forward: entries of a row with the new ones, those that the next query can read."""
    reach, places = oracle.reach(layer), oracle.rows[layer][head].positions()
    return len([p for p in places if not reach or p > oracle.piece.now + 1 - reach])


Take = Callable[[Oracle, dict[int, float]], set[int]]  # the winners of a contest


def first(n: int | Callable[[Asked], int], sign: int = 1) -> Callable[[Asked], Take]:
    """`top(n)`, or with sign -1 `bottom(n)`."""

    def of(asked: Asked) -> Take:
        count = n if isinstance(n, int) else n(asked)
        return lambda oracle, scored: {u for u, _ in oracle.best([(sign * s, u, 0) for u, s in scored.items()], count)}

    return of


def part(share: Fraction) -> Callable[[Asked], Take]:
    """`top(share)` of the candidates."""
    return lambda asked: (
        lambda oracle, scored: {
            u for u, _ in oracle.best([(s, u, 0) for u, s in scored.items()], math.floor(share * len(scored)))
        }
    )


def cover(share: Fraction) -> Callable[[Asked], Take]:
    return lambda asked: (
        lambda oracle, scored: {u for u, _ in covered(oracle, [(s, u, 0) for u, s in scored.items()], share)}
    )


def over(limit: float) -> Callable[[Asked], Take]:
    """`where s > limit`."""

    def wins(oracle: Oracle, scored: dict[int, float]) -> set[int]:
        for s in scored.values():
            oracle.near(s, limit)
        return {u for u, s in scored.items() if s > limit}

    return lambda asked: wins


def of_tokens(score: Score, take: Callable[[Asked], Take]) -> Chooses:
    """Entries compete."""

    def choose(asked: Asked, g: int, taken: set[int]) -> set[int]:
        scores = score(asked, g)
        return take(asked)(asked.oracle, {p: scores[p] for p in asked.columns() if p not in taken})

    return choose


def of_pages(size: int, score: Score, take: Callable[[Asked], Take]) -> Chooses:
    """Units compete; what lies in none that is full is read."""

    def choose(asked: Asked, g: int, taken: set[int]) -> set[int]:
        scores = score(asked, g)
        scored = {u: scores[u] for u in asked.rivals(size, taken)}
        return asked.with_units(size, set(), take(asked)(asked.oracle, scored))

    return choose


def in_pages(size: int, score: Score, take: Callable[[Asked], Take]) -> Chooses:
    """`per UNIT`: entries compete inside of each unit that is full; what lies in none is read."""

    def choose(asked: Asked, g: int, taken: set[int]) -> set[int]:
        scores, full = score(asked, g), asked.units(size)
        found = asked.among(lambda p: p // size not in full)
        for members in full.values():
            found |= take(asked)(asked.oracle, {p: scores[p] for p in members if p not in taken})
        return found

    return choose


def mean_of_group(score: Score) -> Score:
    """`per head`: one choice for the query heads of a KV head."""
    return lambda asked, g: _mean([score(asked, each) for each in range(asked.oracle.group)])


def mean_of_heads(score: Score) -> Score:
    """`shared heads`: one for all KV heads."""

    def mean(asked: Asked, g: int) -> dict[int, float]:
        heads = range(asked.oracle.heads)
        return _mean([score(Asked(asked.oracle, asked.layer, h, asked.place), g) for h in heads])

    return mean


def _mean(each: list[dict[int, float]]) -> dict[int, float]:
    return {u: math.fsum(s[u] for s in each) / len(each) for u in each[0]}


def logit(asked: Asked, g: int) -> dict[int, float]:
    values = asked.oracle.logarithms(asked.layer, asked.head, asked.place)[g].tolist()
    return {p: values[p] for p in asked.columns()}


def attn(asked: Asked, g: int) -> dict[int, float]:
    values = asked.attention()[g].tolist()
    return {p: values[p] for p in asked.columns()}


def length_of_key(asked: Asked, g: int) -> dict[int, float]:
    return {p: asked.row.keys[p].norm().item() for p in asked.columns()}


def by_mean_key(size: int) -> Score:
    """dot(q, c), c = mean[i] k."""

    def score(asked: Asked, g: int) -> dict[int, float]:
        query = asked.queries[g]
        return {u: (query @ asked.row.keys[m].mean(0)).item() for u, m in asked.units(size).items()}

    return score


def by_softmax(size: int) -> Score:
    """softmax[u] dot(q, c)."""

    def score(asked: Asked, g: int) -> dict[int, float]:
        found = by_mean_key(size)(asked, g)
        return dict(zip(found, torch.softmax(torch.tensor(list(found.values())), 0).tolist(), strict=True))

    return score


def by_entries(size: int, score: Score) -> Score:
    """mean[i] of what entries score."""

    def mean(asked: Asked, g: int) -> dict[int, float]:
        scores = score(asked, g)
        return {u: math.fsum(scores[p] for p in m) / len(m) for u, m in asked.units(size).items()}

    return mean
