"""Keep rules with states, noise, conditions and several sets, by hand from publications and the language's rules.

The first half holds whole policies in the shape of `oracle_policies`, the second what tests of single clauses combine:
a `Judge` decides by two functions, `InTurn` lets several decide one after the other, and regions and selections are
functions from a row to positions. Positions are sets of ints, scores lists of floats in the order of their positions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.oracle import Oracle, Piece, Row
from tests.oracle_policies import KeepAll, keep_set, pooled, split

WORD = 2**32

# -- drawn by a hash --------------------------------------------------------------------------------------------------


def mixed(x: int) -> int:
    """A 32-bit finaliser: every bit of x reaches every bit of the result."""
    x ^= x >> 16
    x = x * 0x7FEB352D % WORD
    x ^= x >> 15
    x = x * 0x846CA68B % WORD
    return x ^ (x >> 16)


def hashed(seed: int, *values: int) -> int:
    x = seed % WORD
    for value in values:
        x = mixed(x ^ (value % WORD))
    return x


def gumbel(seed: int, layer: int, query_head: int, query: int, entry: int) -> float:
    """Standard Gumbel noise of one query of one query head (counted over the layer) at one entry, by positions."""
    u = ((hashed(seed, layer, query_head, query, entry) >> 9) + 0.5) / 2**23
    return -math.log(-math.log(u))


# -- policies ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Keyformer(KeepAll):
    """Adnan et al. 2024: H2O whose softmax is over noisy logits that get flatter with each step; of the prompt."""

    heavy: Fraction = Fraction(14, 100)
    local: Fraction = Fraction(6, 100)
    seed: int = 0

    def starts(self) -> dict[str, float | None]:
        return {"noisy": 0.0}

    def on_query(self, oracle: Oracle, layer: int, head: int, place: int) -> None:
        row = oracle.rows[layer][head]
        columns, logits = oracle.logits(row, place)
        for g in range(oracle.group):
            noise = torch.tensor([gumbel(self.seed, layer, head * oracle.group + g, place, p) for p in columns])
            flattened = (logits[g] + noise) / (1 + 0.01 * oracle.piece.step)
            row.states["noisy"][columns] += torch.softmax(flattened, 0) / oracle.group

    def decide(self, oracle: Oracle, layer: int, heads: list[int], piece: Piece) -> None:
        if not piece.fires("prefill.end", "step"):
            return
        heavy, local = math.floor(self.heavy * piece.prompt), math.floor(self.local * piece.prompt)
        for head in heads:
            row = oracle.rows[layer][head]
            near, candidates = split(row, lambda p: p > piece.now - local)
            keep_set(row, set(near) | top(oracle, row.states["noisy"][candidates].tolist(), candidates, heavy))


@dataclass(slots=True)
class Lazy(KeepAll):
    """Zhang et al. 2025 (LazyEviction): an entry is due to recur within the longest gap it has shown so far.

    seen is the last query that gave it more than alpha (some head of the group), gap the longest wait between two
    such queries, 1 at first. Every `window` steps a row longer than `budget` is cut to it.
    """

    budget: int = 16
    window: int = 2
    alpha: float = 0.0001

    def starts(self) -> dict[str, float | None]:
        return {"seen": None, "gap": 1.0}

    def on_query(self, oracle: Oracle, layer: int, head: int, place: int) -> None:
        row = oracle.rows[layer][head]
        columns, logits = oracle.logits(row, place)
        most = torch.softmax(logits, 1).amax(0).tolist()
        for p, read in zip(columns, most, strict=True):
            oracle.near(read, self.alpha)
            if read > self.alpha:
                wait = place - row.states["seen"][p].item()
                row.states["gap"][p] = max(row.states["gap"][p].item(), wait)
                row.states["seen"][p] = place

    def decide(self, oracle: Oracle, layer: int, heads: list[int], piece: Piece) -> None:
        if piece.kind != "step" or piece.step % self.window:
            return
        for head in heads:
            row = oracle.rows[layer][head]
            if len(row.positions()) > self.budget:
                keep_set(row, self.due(oracle, row, piece))

    def due(self, oracle: Oracle, row: Row, piece: Piece) -> set[int]:
        """The last `window` entries, and of the others those that are most likely to be read again."""
        near, candidates = split(row, lambda p: p > piece.now - self.window)
        scores = []
        for p in candidates:
            seen, gap = row.states["seen"][p].item(), row.states["gap"][p].item()
            scores.append(sigmoid(-(piece.now - seen) / gap) + sigmoid(-1 / gap))
        return set(near) | top(oracle, scores, candidates, self.budget - self.window)


@dataclass(slots=True)
class RKV(KeepAll):
    """Cai et al. 2025 (R-KV): pooled attention of the last queries less likeness to the other keys, as a softmax.

    Likeness is the mean cosine with all keys of the row, itself included: the product of its direction and the mean
    direction. Every `buffer` steps a row longer than `budget` is cut to it.
    """

    budget: int = 16
    observe: int = 4
    buffer: int = 2
    pool: int = 7
    weight_attn: float = 0.1

    def decide(self, oracle: Oracle, layer: int, heads: list[int], piece: Piece) -> None:
        if piece.kind != "step" or piece.step % self.buffer:
            return
        for head in heads:
            row = oracle.rows[layer][head]
            places = row.positions()
            if len(places) <= self.budget:
                continue
            near, candidates = split(row, lambda p: p > piece.now - self.observe)
            attention = oracle.last_reads(row, self.observe).mean(1).mean(0)
            important = pooled([attention[p].item() for p in candidates], self.pool, "max")
            directions = F.normalize(row.keys[places], dim=1)
            likeness = torch.softmax(directions @ directions.mean(0), 0).tolist()
            alike = [likeness[places.index(p)] for p in candidates]
            w = self.weight_attn
            scores = [w * a - (1 - w) * b for a, b in zip(important, alike, strict=True)]
            keep_set(row, set(near) | top(oracle, scores, candidates, self.budget - self.observe))


@dataclass(slots=True)
class ExpectedAttention(KeepAll):
    """Devoto et al. 2025: queries as normal variables, E[exp(logit)] = exp(mean + variance / 2), times value norm.

    Mean and sample variance are over the last `observe` queries. An entry that some of them could not read is newer
    than the oldest, has no variance, and takes no part in the softmax; the row keeps such entries as recent ones.
    """

    budget: int = 16
    sink: int = 4
    observe: int = 4

    def decide(self, oracle: Oracle, layer: int, heads: list[int], piece: Piece) -> None:
        if not piece.fires("prefill.end"):
            return
        for head in heads:
            row = oracle.rows[layer][head]
            always, candidates = split(row, lambda p: p < self.sink or p > piece.now - self.observe)
            logits = last_logits(oracle, row, self.observe)
            read_by_all = [p for p in row.positions() if not logits[:, :, p].isinf().any()]
            queries = logits.shape[1]
            expected = torch.zeros(oracle.group, len(row.resident))
            for g in range(oracle.group):
                seen = logits[g][:, read_by_all]
                variance = seen.var(0) if queries > 1 else torch.zeros(len(read_by_all))
                expected[g, read_by_all] = torch.softmax(seen.mean(0) + variance / 2, 0)
            score = row.values.norm(dim=1) * expected.mean(0)
            n = self.budget - self.sink - self.observe
            keep_set(row, set(always) | top(oracle, score[candidates].tolist(), candidates, n))


@dataclass(slots=True)
class CriticalKV(KeepAll):
    """Feng et al. 2025: half of the budget by SnapKV's score, half of what is left by it times the value's norm."""

    budget: int = 16
    observe: int = 4
    pool: int = 7

    def decide(self, oracle: Oracle, layer: int, heads: list[int], piece: Piece) -> None:
        if not piece.fires("prefill.end"):
            return
        half = math.floor(Fraction(self.budget - self.observe, 2))
        for head in heads:
            row = oracle.rows[layer][head]
            near, candidates = split(row, lambda p: p > piece.now - self.observe)
            attention = oracle.last_reads(row, self.observe).sum(1).mean(0)
            scores = pooled([attention[p].item() for p in candidates], self.pool, "max")
            first = top(oracle, scores, candidates, half)
            rest = [p for p in candidates if p not in first]
            scores = pooled([attention[p].item() for p in rest], self.pool, "max")
            weighed = [(s + 0.0001) * row.values[p].norm().item() for s, p in zip(scores, rest, strict=True)]
            keep_set(row, set(near) | first | top(oracle, weighed, rest, half))


@dataclass(slots=True)
class Locret(KeepAll):
    """Huang et al. 2024: a trained head scores each entry from its token's q, k and v; the end of each piece stays.

    The head's input are the token's queries of all heads, then its keys, then its values, as attention has them.
    """

    budget: int = 16
    stable: int = 4
    chunk: int | None = 8

    def decide(self, oracle: Oracle, layer: int, heads: list[int], piece: Piece) -> None:
        if not piece.fires("chunk"):
            return
        rows = oracle.rows[layer]
        trained = trained_heads(oracle.layers, oracle.heads, oracle.group, rows[0].keys.shape[1])
        w1, b1, w2, b2 = (trained.get(f"layers.{layer}.{part}") for part in ("w1", "b1", "w2", "b2"))
        for head in heads:
            near, candidates = split(rows[head], lambda p: p > piece.now - self.stable)
            scores = []
            for p in candidates:
                token = [*(row.queries[:, p].flatten() for row in rows), *(row.keys[p] for row in rows)]
                x = w1 @ torch.cat([*token, *(row.values[p] for row in rows)])
                x = x if b1 is None else x + b1
                scores.append((w2[head] @ (x * torch.sigmoid(x)) + (0 if b2 is None else b2[head])).item())
            keep_set(rows[head], set(near) | top(oracle, scores, candidates, self.budget - self.stable))


@functools.cache
def trained_heads(layers: int, heads: int, group: int, dim: int) -> dict[str, Tensor]:
    """Random retaining heads: layers.L.w1 [24, in] and w2 [KV heads, 24], in some layers b1 [24] and b2 [KV heads]."""
    generator = torch.Generator().manual_seed(12)
    width = dim * heads * (group + 2)
    found = {}
    for layer in range(layers):
        shapes = {"w1": (24, width), "w2": (heads, 24), "b1": (24,), "b2": (heads,)}
        for part in list(shapes)[: 2 + layer % 3]:
            spread = 0.5 if part in ("b1", "b2") else shapes[part][1] ** -0.5
            found[f"layers.{layer}.{part}"] = torch.randn(*shapes[part], generator=generator) * spread
    return found


# -- what single clauses are tested with ------------------------------------------------------------------------------

Fires = Callable[[Oracle, Row, Piece], bool]
Keeps = Callable[[Oracle, int, int, Piece], set[int]]
Updates = Callable[[Oracle, int, int, int], None]


@dataclass(slots=True)
class Judge(KeepAll):
    """`fires(oracle, row, piece)` says when, `keeps(oracle, layer, head, piece)` what; `updates` as `on_query`."""

    fires: Fires | None = None
    keeps: Keeps | None = None
    first: dict[str, float | None] = field(default_factory=dict)
    updates: Updates | None = None

    def starts(self) -> dict[str, float | None]:
        return self.first

    def on_query(self, oracle: Oracle, layer: int, head: int, place: int) -> None:
        if self.updates is not None:
            self.updates(oracle, layer, head, place)

    def decide(self, oracle: Oracle, layer: int, heads: list[int], piece: Piece) -> None:
        # All heads choose from what was there before, also where they choose together.
        chosen = {
            h: self.keeps(oracle, layer, h, piece) for h in heads if self.fires(oracle, oracle.rows[layer][h], piece)
        }
        for head, kept in chosen.items():
            keep_set(oracle.rows[layer][head], kept)


@dataclass(slots=True)
class InTurn(KeepAll):
    """Several sets for the same rows: each decides when it fires, in the order written."""

    rules: tuple[KeepAll, ...] = ()

    def __post_init__(self) -> None:
        self.chunk = min((r.chunk for r in self.rules if r.chunk), default=None)

    def starts(self) -> dict[str, float | None]:
        return {name: start for rule in self.rules for name, start in rule.starts().items()}

    def on_query(self, oracle: Oracle, layer: int, head: int, place: int) -> None:
        for rule in self.rules:
            rule.on_query(oracle, layer, head, place)

    def decide(self, oracle: Oracle, layer: int, heads: list[int], piece: Piece) -> None:
        for rule in self.rules:
            rule.decide(oracle, layer, heads, piece)


@dataclass(slots=True)
class ByLayer(KeepAll):
    """One rule per layer of the model; a rule may stand for several layers."""

    rules: tuple[KeepAll, ...] = ()

    def __post_init__(self) -> None:
        self.chunk = min((r.chunk for r in self.rules if r.chunk), default=None)

    def starts(self) -> dict[str, float | None]:
        return {name: start for rule in self.rules for name, start in rule.starts().items()}

    def on_query(self, oracle: Oracle, layer: int, head: int, place: int) -> None:
        self.rules[layer].on_query(oracle, layer, head, place)

    def decide(self, oracle: Oracle, layer: int, heads: list[int], piece: Piece) -> None:
        self.rules[layer].decide(oracle, layer, heads, piece)


class Filled:
    """`filled(n)` of one set: n entries came in since it last fired, by this or by the `others` beside it."""

    def __init__(self, n: int, *others: str) -> None:
        self.n, self.others, self.since, self.until, self.now = n, others, 0, -1, False

    def __call__(self, oracle: Oracle, row: Row, piece: Piece) -> bool:
        if piece.now != self.until:  # the first row of this forward
            self.until, self.since = piece.now, self.since + piece.tokens
            self.now = self.since >= self.n or piece.fires(*self.others)
            self.since = 0 if self.now else self.since
        return self.now


def at(*triggers: str) -> Fires:
    return lambda oracle, row, piece: piece.fires(*triggers)


def end_or_every(n: int) -> Fires:
    """`at prefill.end, every(n)`."""
    return lambda oracle, row, piece: piece.fires("prefill.end") or (piece.step > 0 and piece.step % n == 0)


def top(oracle: Oracle, scores: Sequence[float], places: Sequence[int], n: int) -> set[int]:
    """Positions of the n best; scores in the order of `places`."""
    return {p for p, _ in oracle.best([(s, p, 0) for s, p in zip(scores, places, strict=True)], n)}


def covered(oracle: Oracle, scored: list[tuple[float, int, int]], part: Fraction) -> list[tuple[int, int]]:
    """The fewest best of (score, position, head) that hold `part` of all scores; what is negative or NaN holds none."""
    masses = [(s if s > 0 else 0.0, p, h) for s, p, h in scored]
    masses.sort(key=lambda m: (-m[0], m[1], m[2]))
    wanted = float(part) * math.fsum(m for m, _, _ in masses)
    chosen, before = [], 0.0
    for mass, place, head in masses:
        oracle.near(before, wanted)
        if not before < wanted:
            oracle.near(masses[len(chosen) - 1][0] if chosen else 0.0, mass)
            break
        chosen.append((place, head))
        before += mass
    return chosen


def drawn(oracle: Oracle, layer: int, head: int, piece: Piece, n: int, seed: int) -> set[int]:
    """`random(n, seed)`: of all positions so far those with the smallest hashes."""
    order = sorted(range(piece.now + 1), key=lambda p: (hashed(seed, layer, head, p), p))
    return set(order[:n])


def last_logits(oracle: Oracle, row: Row, width: int) -> Tensor:
    """Scaled logits [G, w, T] of the row's newest queries, -inf where one may not read."""
    total = len(row.resident)
    first = max(0, total - width)
    out = torch.full((oracle.group, total - first, total), -math.inf)
    for place in range(first, total):
        columns, logits = oracle.logits(row, place)
        out[:, place - first, columns] = logits
    return out


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))
