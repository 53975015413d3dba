"""The keep rule of each policy that runs, written by hand from its publication and the language's rules.

Each rule has `chunk` (pieces of a prompt, None: whole), `peek` (prompt tokens run along with each piece but the last),
`on_read(row, reads)` for one query's probabilities [G, T], `on_query(oracle, layer, head, place)` for what else a query
changes, `starts()` for the states that it changes, and `decide(oracle, layer, heads, piece)`, which clears the resident
flags of what the policy drops after a forward (`decide_all`: of all layers). Counts are exact and truncated once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from tests.oracle import Oracle, Piece, Row


@dataclass(slots=True)
class KeepAll:
    chunk: int | None = None
    peek: int = 0
    compact: ClassVar[bool] = False  # `positions compact`

    def starts(self) -> dict[str, float | None]:
        """States that `on_query` changes and their first values; None: the entry's own position."""
        return {}

    def on_read(self, row: Row, reads: Tensor) -> None:
        """No state."""

    def on_query(self, oracle: Oracle, layer: int, head: int, place: int) -> None:
        """No state."""

    def decide(self, oracle: Oracle, layer: int, heads: list[int], piece: Piece) -> None:
        """Nothing is ever dropped."""

    def decide_all(self, oracle: Oracle, piece: Piece) -> None:
        """After the last layer; rules that compare layers have their own."""
        for layer in range(oracle.layers):
            self.decide(oracle, layer, list(range(oracle.heads)), piece)


@dataclass(slots=True)
class Streaming(KeepAll):
    """Xiao et al. 2023, at original positions: the first `sink` and the last `window`, after each piece and step."""

    sink: int = 4
    window: int = 16

    def decide(self, oracle: Oracle, layer: int, heads: list[int], piece: Piece) -> None:
        if piece.fires("chunk", "step"):
            for head in heads:
                keep_only(oracle.rows[layer][head], lambda p: p < self.sink or p > piece.now - self.window)


@dataclass(slots=True)
class H2O(KeepAll):
    """Zhang et al. 2023: accumulated attention, mean over the query group; `heavy` and `local` of the prompt."""

    heavy: Fraction = Fraction(1, 10)
    local: Fraction = Fraction(1, 10)

    def on_read(self, row: Row, reads: Tensor) -> None:
        row.acc += reads.mean(0)

    def decide(self, oracle: Oracle, layer: int, heads: list[int], piece: Piece) -> None:
        if not piece.fires("prefill.end", "step"):
            return
        heavy, local = math.floor(self.heavy * piece.prompt), math.floor(self.local * piece.prompt)
        for head in heads:
            row = oracle.rows[layer][head]
            recent = {p for p in row.positions() if p > piece.now - local}
            scored = [(row.acc[p].item(), p, 0) for p in row.positions() if p not in recent]
            keep_set(row, recent | {p for p, _ in oracle.best(scored, heavy)})


@dataclass(slots=True)
class SnapKV(KeepAll):
    """Li et al. 2024: attention of the last `observe` queries, group mean, then max pooling over the candidates."""

    budget: int = 32
    observe: int = 8
    pool: int = 7
    pooling: str = "max"

    def scores(self, oracle: Oracle, row: Row, candidates: list[int]) -> list[float]:
        total = oracle.last_reads(row, self.observe).sum(1).mean(0)
        return pooled([total[p].item() for p in candidates], self.pool, self.pooling)

    def top(self, oracle: Oracle, layer: int, piece: Piece) -> int:
        return self.budget - self.observe

    def decide(self, oracle: Oracle, layer: int, heads: list[int], piece: Piece) -> None:
        if not piece.fires("prefill.end"):
            return
        for head in heads:
            row = oracle.rows[layer][head]
            recent, candidates = split(row, lambda p: p > piece.now - self.observe)
            scored = [(s, p, 0) for s, p in zip(self.scores(oracle, row, candidates), candidates, strict=True)]
            chosen = {p for p, _ in oracle.best(scored, self.top(oracle, layer, piece))}
            keep_set(row, set(recent) | chosen)


@dataclass(slots=True)
class PyramidKV(SnapKV):
    """Cai et al. 2024: SnapKV's score, budgets that fall linearly with the layer."""

    beta: int = 20

    def top(self, oracle: Oracle, layer: int, piece: Piece) -> int:
        return pyramid(self.budget - self.observe, oracle.layers, self.beta, piece.prompt, self.observe)[layer]


@dataclass(slots=True)
class AdaKV(SnapKV):
    """Feng et al. 2024: the heads of a layer compete for one budget, each with a floor of its equal share."""

    floor: Fraction = Fraction(1, 5)

    def decide(self, oracle: Oracle, layer: int, heads: list[int], piece: Piece) -> None:
        if not piece.fires("prefill.end"):
            return
        n = self.budget - self.observe
        safe = math.floor(self.floor * n)
        kept: dict[int, set[int]] = {}
        rest: list[tuple[float, int, int]] = []
        floors = 0
        for head in heads:
            row = oracle.rows[layer][head]
            recent, candidates = split(row, lambda p: p > piece.now - self.observe)
            scored = [(s, p, head) for s, p in zip(self.scores(oracle, row, candidates), candidates, strict=True)]
            first = set(oracle.best(scored, safe)) if safe else set()
            kept[head] = set(recent) | {p for p, _ in first}
            rest += [s for s in scored if (s[1], head) not in first]
            floors += len(first)
        for place, head in oracle.best(rest, n * len(heads) - floors):
            kept[head].add(place)
        for head in heads:
            keep_set(oracle.rows[layer][head], kept[head])


@dataclass(slots=True)
class SnapKVChunked(SnapKV):
    """SnapKV during prefill, as PruLong's evaluation patches it: each piece is judged by the prompt's last queries."""

    ratio: Fraction = Fraction(3, 10)

    def __post_init__(self) -> None:
        self.peek = self.observe

    def decide(self, oracle: Oracle, layer: int, heads: list[int], piece: Piece) -> None:
        if not piece.fires("chunk"):
            return
        n = math.floor(self.ratio * piece.tokens)
        for head in heads:
            row = oracle.rows[layer][head]
            frozen, candidates = split(row, lambda p, row=row: bool(row.frozen[p]))
            observed: list[int] = []
            if piece.last:
                total = oracle.last_reads(row, self.observe).sum(1).mean(0)
                observed = [p for p in candidates if p > piece.now - self.observe]
                candidates = [p for p in candidates if p not in observed]
            else:
                total = row.reads[:, piece.tokens :].sum(1).mean(0)
            scores = pooled([total[p].item() for p in candidates], self.pool, self.pooling)
            scored = [(s, p, 0) for s, p in zip(scores, candidates, strict=True)]
            won = {p for p, _ in oracle.best(scored, n - len(observed))} | set(observed)
            keep_set(row, set(frozen) | won)
            for p in won:
                row.frozen[p] = True


@dataclass(slots=True)
class TOVA(KeepAll):
    """Oren et al. 2024: attention of the newest query, mean over all heads, one answer for the layer."""

    budget: int = 16

    def decide(self, oracle: Oracle, layer: int, heads: list[int], piece: Piece) -> None:
        if not piece.fires("prefill.end", "step"):
            return
        rows = [oracle.rows[layer][head] for head in heads]
        total = torch.stack([oracle.last_reads(row, 1).sum(1).mean(0) for row in rows]).mean(0)
        scored = [(total[p].item(), p, 0) for p in rows[0].positions()]
        chosen = {p for p, _ in oracle.best(scored, self.budget)}
        for row in rows:
            keep_set(row, chosen)


@dataclass(slots=True)
class KNorm(KeepAll):
    """Devoto et al. 2024: the smallest keys stay."""

    budget: int = 16

    def decide(self, oracle: Oracle, layer: int, heads: list[int], piece: Piece) -> None:
        if not piece.fires("prefill.end"):
            return
        for head in heads:
            row = oracle.rows[layer][head]
            norm = row.keys.pow(2).sum(1).sqrt()
            scored = [(-norm[p].item(), p, 0) for p in row.positions()]
            keep_set(row, {p for p, _ in oracle.best(scored, self.budget)})


@dataclass(slots=True)
class KeyDiff(KeepAll):
    """Park et al. 2025: keys least similar to the mean direction stay."""

    budget: int = 16

    def decide(self, oracle: Oracle, layer: int, heads: list[int], piece: Piece) -> None:
        if not piece.fires("prefill.end"):
            return
        for head in heads:
            row = oracle.rows[layer][head]
            places = row.positions()
            keys = row.keys[places]
            anchor = (keys / keys.norm(dim=1, keepdim=True)).mean(0)
            cosine = (keys @ anchor) / (keys.norm(dim=1) * anchor.norm())
            scored = [(-cosine[i].item(), p, 0) for i, p in enumerate(places)]
            keep_set(row, {p for p, _ in oracle.best(scored, self.budget)})


@dataclass(slots=True)
class LagKV(KeepAll):
    """Liang et al. 2025: a lot is judged by the value range of the next one, once both are full; no attention.

    `std` is the sample deviation (n - 1), as in the authors' code; a channel without range counts as 0.
    """

    sink: int = 4
    lag: int = 8
    ratio: Fraction = Fraction(1, 2)

    def decide(self, oracle: Oracle, layer: int, heads: list[int], piece: Piece) -> None:
        full = max(0, piece.now + 1 - self.sink) // self.lag
        for head in heads:
            row = oracle.rows[layer][head]
            if full - row.judged >= 2:
                for lot in range(row.judged, full - 1):
                    self._judge(oracle, row, lot)
                row.judged = full - 1

    def _judge(self, oracle: Oracle, row: Row, lot: int) -> None:
        first = self.sink + lot * self.lag
        own = slice(first, first + self.lag)
        following = slice(first + self.lag, first + 2 * self.lag)
        # The following lot is always complete here: it has been seen in full and is judged after this one.
        score = lag_score(row.keys[own], row.keys[following]) + lag_score(row.values[own], row.values[following])
        scored = [(score[i].item(), first + i, 0) for i in range(self.lag)]
        chosen = {p for p, _ in oracle.best(scored, math.floor(self.ratio * self.lag))}
        for p in range(first, first + self.lag):
            row.resident[p] = p in chosen
            row.frozen[p] = p in chosen


@dataclass(slots=True)
class Classes(KeepAll):
    """Two head classes from a 0/1 mask [layer][KV head]: rule `one` where it is 1, rule `zero` elsewhere."""

    mask: tuple[tuple[int, ...], ...] = ()
    one: KeepAll | None = None
    zero: KeepAll | None = None

    def __post_init__(self) -> None:
        sizes = [r.chunk for r in (self.one, self.zero) if r.chunk]
        self.chunk = min(sizes, default=None)

    def on_read(self, row: Row, reads: Tensor) -> None:
        self.one.on_read(row, reads)
        self.zero.on_read(row, reads)

    def starts(self) -> dict[str, float | None]:
        return self.one.starts() | self.zero.starts()

    def on_query(self, oracle: Oracle, layer: int, head: int, place: int) -> None:
        (self.one if self.mask[layer][head] else self.zero).on_query(oracle, layer, head, place)

    def decide(self, oracle: Oracle, layer: int, heads: list[int], piece: Piece) -> None:
        for bit, rule in ((1, self.one), (0, self.zero)):
            mine = [h for h in heads if self.mask[layer][h] == bit]
            if mine:
                rule.decide(oracle, layer, mine, piece)


def prulong(mask: tuple[tuple[int, ...], ...], sink: int, window: int, chunk: int) -> Classes:
    """Bhaskar et al. 2025 (and, with other numbers, DuoAttention): masked heads keep all, the others stream."""
    return Classes(mask=mask, one=KeepAll(chunk=chunk), zero=Streaming(chunk=chunk, sink=sink, window=window))


# -- pieces of the rules ----------------------------------------------------------------------------------------------


def split(row: Row, taken: Callable[[int], bool]) -> tuple[list[int], list[int]]:
    """Resident positions that a region takes, and the candidates that are left, both in position order."""
    places = row.positions()
    return [p for p in places if taken(p)], [p for p in places if not taken(p)]


def keep_only(row: Row, test: Callable[[int], bool]) -> None:
    keep_set(row, {p for p in row.positions() if test(p)})


def keep_set(row: Row, kept: set[int]) -> None:
    """Drops every resident position outside `kept`; what was dropped before stays dropped."""
    for p in row.positions():
        if p not in kept:
            row.resident[p] = False


def pooled(scores: list[float], width: int, how: str) -> list[float]:
    """Centred pooling over the candidates with holes closed; max ignores absent neighbours, avg counts them as 0."""
    half = width // 2
    windows = [scores[max(0, i - half) : i + half + 1] for i in range(len(scores))]
    return [max(w) if how == "max" else sum(w) / width for w in windows]


def pyramid(total: int, layers: int, beta: int, prompt: int, observe: int) -> list[int]:
    """Entries per layer: linear, `total` on average, exactly `total * layers` in sum; uniform for short prompts."""
    if layers == 1 or prompt < 2 * total:
        return [total] * layers
    low = total // beta
    high = 2 * total - low
    if high > prompt - observe:
        high = prompt - observe
        low = 2 * total - high
    exact = [Fraction(high) - Fraction(layer * (high - low), layers - 1) for layer in range(layers)]
    budgets = [math.floor(x) for x in exact]
    spare = total * layers - sum(budgets)
    by_remainder = sorted(range(layers), key=lambda layer: (-(exact[layer] - budgets[layer]), layer))
    for layer in by_remainder[:spare]:
        budgets[layer] += 1
    return budgets


def lag_score(own: Tensor, following: Tensor) -> Tensor:
    """softmax over tokens of the deviation over channels of `own` scaled by the range of `following`; [m, D] -> [m]."""
    low, high = following.min(0).values, following.max(0).values
    scaled = torch.where(high > low, (own - low) / (high - low), 0.0)
    return torch.softmax(scaled.std(1), 0)
