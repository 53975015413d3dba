"""Rules of the systems that choose runs, compare layers, divide by what the prompt shows, or leave something behind.

Written by hand from the publications and the language's rules, as plain loops; the frame is that of `oracle_policies`.
Losers are merged or folded here in place: keys and values of what stays change, nothing else does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from tests.oracle import Folded, Oracle, Piece, Row
from tests.oracle_policies import KeepAll, Streaming, keep_set, split

Likeness = Callable[[Oracle, Row, int, list[int]], Tensor]  # of a loser to each survivor

# -- runs of tokens, chosen by the first layer of a group --------------------------------------------------------------


@dataclass(slots=True)
class ChunkKV(KeepAll):
    """Liu et al. 2025: runs of `size` tokens by their mean attention from the last queries, one answer for all heads
    and for `layers_shared` layers in a row. A run counts once all its positions have been seen; until then it stays."""

    budget: int = 32
    observe: int = 8
    size: int = 4
    layers_shared: int = 2

    def runs(self, oracle: Oracle, group: int, piece: Piece) -> int:
        """How many runs group `group` of layers may keep."""
        return (self.budget - self.observe) // self.size

    def decide_all(self, oracle: Oracle, piece: Piece) -> None:
        if not piece.fires("prefill.end"):
            return
        for group, first in enumerate(range(0, oracle.layers, self.layers_shared)):
            won = self._winners(oracle, oracle.rows[first], self.runs(oracle, group, piece), piece)
            for layer in range(first, min(first + self.layers_shared, oracle.layers)):
                for row in oracle.rows[layer]:
                    waiting = {p for p in row.positions() if not self._full(p // self.size, piece)}
                    recent = {p for p in row.positions() if p > piece.now - self.observe}
                    keep_set(row, won | waiting | recent)

    def _full(self, run: int, piece: Piece) -> bool:
        return (run + 1) * self.size - 1 <= piece.now

    def _winners(self, oracle: Oracle, rows: list[Row], n: int, piece: Piece) -> set[int]:
        total = torch.stack([oracle.last_reads(row, self.observe).sum(1).mean(0) for row in rows]).mean(0)
        recent, candidates = split(rows[0], lambda p: p > piece.now - self.observe)
        scored = []
        for run in sorted({p // self.size for p in candidates}):
            if self._full(run, piece):
                members = [p for p in recent + candidates if p // self.size == run]
                scored.append((total[members].mean().item(), run, 0))
        chosen = {run for run, _ in oracle.best(scored, n)}
        return {p for p in candidates if p // self.size in chosen}


@dataclass(slots=True)
class WindowKV(ChunkKV):
    """Zuo et al. 2025: the same with budgets that fall from group to group; the total is the mean of a group."""

    beta: int = 14

    def runs(self, oracle: Oracle, group: int, piece: Piece) -> int:
        groups = -(-oracle.layers // self.layers_shared)
        total = self.budget - self.observe
        return falling(total, groups, self.beta, piece.prompt, self.observe)[group] // self.size


# -- budgets that follow from the prompt -------------------------------------------------------------------------------


@dataclass(slots=True)
class PrefixKV(KeepAll):
    """Wang et al. 2024: each layer keeps what holds the same part of its attention mass; first 4 and newest stay."""

    budget: Fraction = Fraction(1, 5)

    def decide_all(self, oracle: Oracle, piece: Piece) -> None:
        if not piece.fires("prefill.end"):
            return
        scores = [forward_sum(rows) for rows in oracle.rows]
        columns = [
            [scores[layer][p].item() for p in oracle.rows[layer][0].positions()] for layer in range(oracle.layers)
        ]
        parts = covering(oracle, math.floor(self.budget * piece.prompt), columns)
        for layer, rows in enumerate(oracle.rows):
            first, candidates = split(rows[0], lambda p: p < 4 or p == piece.now)
            scored = [(scores[layer][p].item(), p, 0) for p in candidates]
            chosen = {p for p, _ in oracle.best(scored, parts[layer] - 5)}
            for row in rows:
                keep_set(row, set(first) | chosen)


@dataclass(slots=True)
class D2O(KeepAll):
    """Wan et al. 2024: layers whose accumulated attention varies much keep less; a loser that is like a survivor, by
    the running mean of likeness, is merged into it. The first two layers and the last keep all."""

    budget: Fraction = Fraction(1, 5)
    sink: int = 4
    beta: float = 0.5
    parts: list[int] = field(default_factory=list)
    means: dict[tuple[int, int], float] = field(default_factory=dict)

    def on_read(self, row: Row, reads: Tensor) -> None:
        row.acc += reads.mean(0)

    def decide_all(self, oracle: Oracle, piece: Piece) -> None:
        layers = range(2, oracle.layers - 1)
        if not piece.fires("prefill.end", "step") or not layers:
            return
        if piece.fires("prefill.end"):
            spread = [-sum(variance(row) for row in oracle.rows[layer]) / oracle.heads for layer in layers]
            self.parts = by_softmax(oracle, math.floor(self.budget * piece.prompt), spread)
        for layer, part in zip(layers, self.parts, strict=True):
            for head, row in enumerate(oracle.rows[layer]):
                protected, candidates = split(row, lambda p, b=part: p < self.sink or p > piece.now - b // 4)
                scored = [(row.acc[p].item(), p, 0) for p in candidates]
                survivors = set(protected) | {p for p, _ in oracle.best(scored, 3 * part // 4)}
                self._merge(oracle, (layer, head), row, sorted(survivors))

    def _merge(self, oracle: Oracle, place: tuple[int, int], row: Row, survivors: list[int]) -> None:
        losers = [p for p in row.positions() if p not in survivors]
        nearest = {p: most_like(oracle, row, p, survivors, cosine) for p in losers} if survivors else {}
        if nearest:
            mean = sum(likeness for _, likeness in nearest.values()) / len(nearest)
            before = self.means.get(place, mean)
            self.means[place] = self.beta * before + (1 - self.beta) * mean
        joined = {}
        for p, (target, likeness) in nearest.items():
            oracle.near(likeness, self.means[place])
            if likeness >= self.means[place]:
                joined[p] = (target, likeness)
        merge(row, joined)
        keep_set(row, set(survivors))


# -- what losers leave behind ------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Elastic(KeepAll):
    """Liu et al. 2024: what the prompt attends to, one choice for all heads; each loser is averaged into the entry
    nearest by position. In decode the window slides on, and what won stays."""

    budget: Fraction = Fraction(1, 5)
    sink: int = 1
    window: int = 25

    def decide(self, oracle: Oracle, layer: int, heads: list[int], piece: Piece) -> None:
        rows = [oracle.rows[layer][head] for head in heads]
        if piece.fires("prefill.end"):
            scores = forward_sum(rows)
            near, candidates = split(rows[0], lambda p: p < self.sink or p > piece.now - self.window)
            n = math.floor(self.budget * piece.prompt) - self.sink - self.window
            won = {p for p, _ in oracle.best([(scores[p].item(), p, 0) for p in candidates], n)}
            stays = sorted(won | set(near))
            for row in rows:
                row.frozen[sorted(won)] = True
                losers = [p for p in row.positions() if p not in stays]
                merge(row, {p: (most_like(oracle, row, p, stays, closeness)[0], 1.0) for p in losers if stays})
                keep_set(row, set(stays))
        elif piece.fires("step"):
            for row in rows:
                near, others = split(row, lambda p: p < self.sink or p > piece.now - self.window)
                keep_set(row, set(near) | {p for p in others if row.frozen[p]})


@dataclass(slots=True)
class Razor(KeepAll):
    """Tang et al. 2024: heads that a probe finds keep all. The others keep sinks and a window that grows with the
    sequence; the rest becomes one entry that weighs as many tokens as it stands for."""

    sink: int = 4
    least: int = 16
    part: int = 5
    induction: Fraction = Fraction(14, 100)
    echo: Fraction = Fraction(1, 100)
    far: set[tuple[int, int]] | None = None  # found at the first decision

    def decide(self, oracle: Oracle, layer: int, heads: list[int], piece: Piece) -> None:
        if not piece.fires("prefill.end", "step"):
            return
        if self.far is None:
            echo, induction = probed(oracle)
            self.far = best_heads(oracle, induction, self.induction) | best_heads(oracle, echo, self.echo)
        window = max(self.least, piece.now // self.part)
        for head in heads:
            if (layer, head) in self.far:
                continue
            row = oracle.rows[layer][head]
            kept, losers = split(row, lambda p: p < self.sink or p > piece.now - window)
            fold_mean(row, losers)
            keep_set(row, set(kept))


def probed(oracle: Oracle) -> tuple[Tensor, Tensor]:
    """Echo and induction of each KV head [layers, heads], the larger of its query heads': the mean attention of the
    tokens of three repeats to the same token one repeat before, and to the one after that.

    The text repeats a quarter of the model's positions, of tokens in the order of a permutation with seed 0.
    """
    model, config = oracle.model, oracle.model.config
    usual = torch.tensor([t for t in range(config.vocab_size) if t not in (config.bos_token_id, config.pad_token_id)])
    length = config.max_position_embeddings // 4
    order = usual[torch.randperm(len(usual), generator=torch.Generator().manual_seed(0))]
    before = config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        reads = model(order[:length].repeat(4)[None], use_cache=False, output_attentions=True).attentions
    model.set_attn_implementation(before)
    queries = torch.arange(length, 4 * length)
    found = []
    for target in (queries - length, queries - length + 1):
        mean = torch.stack([layer[0][:, queries, target].mean(1) for layer in reads])
        found.append(mean.view(oracle.layers, oracle.heads, oracle.group).amax(2))
    return found[0], found[1]


def best_heads(oracle: Oracle, scores: Tensor, part: Fraction) -> set[tuple[int, int]]:
    """The (layer, head) pairs of the `part` of all heads that score highest, truncated; ties to the lower layer."""
    scored = [(scores[layer, h].item(), layer, h) for layer in range(oracle.layers) for h in range(oracle.heads)]
    return set(oracle.best(scored, math.floor(part * len(scored))))


@dataclass(slots=True)
class StreamingCompact(Streaming):
    """Xiao et al. 2023 as published: keys before RoPE, rotated by their place in the cache at every read."""

    compact: ClassVar[bool] = True


@dataclass(slots=True)
class FreqKV(KeepAll):
    """Kai et al. 2025: when the row is full, what is neither sink nor recent becomes its lower frequencies."""

    compact: ClassVar[bool] = True
    sink: int = 8
    size: int = 32
    recent: int = 8
    part: Fraction = Fraction(1, 2)

    def decide(self, oracle: Oracle, layer: int, heads: list[int], piece: Piece) -> None:
        for head in heads:
            row = oracle.rows[layer][head]
            if len(row) >= self.size:
                kept, losers = split(row, lambda p: p < self.sink or p > piece.now - self.recent)
                keep_set(row, set(kept) | set(fold_dct(row, losers, self.part)))


# -- pieces of the rules: shares ---------------------------------------------------------------------------------------


def falling(total: int, groups: int, beta: int, prompt: int, observe: int) -> list[int]:
    """The published pyramid over `groups`: linear, exactly `total * groups` in sum, uniform where the prompt is short
    or all of it fits."""
    room = prompt - observe
    if groups == 1 or prompt < 2 * total or total >= room:
        return [total] * groups
    high = min(room, 2 * total - total // beta)
    low = 2 * total - high
    return largest_remainders([high - Fraction(g * (high - low), groups - 1) for g in range(groups)], total * groups)


def largest_remainders(exact: Sequence[Fraction], total: int) -> list[int]:
    """Whole numbers near `exact` whose sum is `total`; where parts are equal the earlier one is rounded up."""
    whole = [math.floor(x) for x in exact]
    order = sorted(range(len(exact)), key=lambda i: (whole[i] - exact[i], i))
    for i in order[: total - sum(whole)]:
        whole[i] += 1
    return whole


def by_weights(total: int, weights: Sequence[Fraction]) -> list[int]:
    """`total` on average, in proportion to the weights."""
    return largest_remainders([total * len(weights) * w / sum(weights) for w in weights], total * len(weights))


def by_softmax(oracle: Oracle, total: int, numbers: Sequence[float]) -> list[int]:
    """Parts of `total * len(numbers)` in proportion to their softmax; notes where a remainder decided narrowly."""
    powers = [math.exp(x - max(numbers)) for x in numbers]
    weights = [Fraction(p / sum(powers)) for p in powers]
    exact = [total * len(weights) * w / sum(weights) for w in weights]
    rests = sorted((float(x - math.floor(x)) for x in exact), reverse=True)
    up = round(sum(rests))
    if 0 < up < len(rests):
        oracle.near(1 + rests[up - 1], 1 + rests[up])
    return largest_remainders(exact, total * len(weights))


def covering(oracle: Oracle, total: int, scores: Sequence[Sequence[float]]) -> list[int]:
    """Per layer how many of its best entries it needs for the same part of its own mass, `total` on average.

    The entry that comes after mass m of its layer is wanted before one that comes after more.
    """
    wanted = []
    for layer, column in enumerate(scores):
        clean = [s if s > 0 else 0.0 for s in column]
        mass = sum(clean)
        parts = sorted((s / mass if mass else 1 / len(clean) for s in clean), reverse=True)
        before = 0.0
        for k, part in enumerate(parts):
            wanted.append((before, layer, k))
            before += part
    wanted.sort()
    n = total * len(scores)
    if 0 < n < len(wanted):
        oracle.near(wanted[n - 1][0], wanted[n][0])
    return [sum(layer == mine for _, mine, _ in wanted[:n]) for layer in range(len(scores))]


def variance(row: Row) -> float:
    """Of the resident entries' accumulated attention, as a sample; of one entry 0, since x / 0 is 0."""
    found = row.acc[row.positions()]
    return found.var().item() if len(found) > 1 else 0.0


def forward_sum(rows: list[Row]) -> Tensor:
    """Probabilities that this forward's queries gave each entry, summed, mean over all query heads of a layer; [T]."""
    return torch.stack([row.reads.sum(1).mean(0) for row in rows]).mean(0)


# -- pieces of the rules: losers ---------------------------------------------------------------------------------------


def cosine(oracle: Oracle, row: Row, p: int, survivors: list[int]) -> Tensor:
    """Of keys as queries read them now."""
    places = row.positions()
    keys = dict(zip(places, oracle.turned(row.keys[places], 0), strict=True))
    return torch.stack([keys[p] @ keys[s] / (keys[p].norm() * keys[s].norm()) for s in survivors])


def closeness(oracle: Oracle, row: Row, p: int, survivors: list[int]) -> Tensor:
    """Minus the distance of positions."""
    return -torch.tensor([abs(p - s) for s in survivors], dtype=torch.float32)


def most_like(oracle: Oracle, row: Row, p: int, survivors: list[int], likeness: Likeness) -> tuple[int, float]:
    """The survivor most like loser p, the older one on ties, and how like it is."""
    values = likeness(oracle, row, p, survivors)
    [(best, _)] = oracle.best([(values[i].item(), s, 0) for i, s in enumerate(survivors)], 1)
    return best, values[survivors.index(best)].item()


def merge(row: Row, joined: dict[int, tuple[int, float]]) -> None:
    """Losers p into survivors: joined[p] = (survivor, weight); the survivor weighs 1, a negative weight is 0."""
    keys, values = row.keys.clone(), row.values.clone()
    for survivor in {target for target, _ in joined.values()}:
        own = {p: max(0.0, w) for p, (target, w) in joined.items() if target == survivor}
        mass = 1 + sum(own.values())
        row.keys[survivor] = (keys[survivor] + sum(w * keys[p] for p, w in own.items())) / mass
        row.values[survivor] = (values[survivor] + sum(w * values[p] for p, w in own.items())) / mass
        row.count[survivor] += sum(row.count[p] for p in own)


def fold_mean(row: Row, losers: list[int]) -> None:
    """All losers, and what was folded before, as one mean weighted by the tokens that each stands for."""
    if not losers:
        return
    weights = [row.count[p].item() for p in losers]
    keys, values = [row.keys[p] for p in losers], [row.values[p] for p in losers]
    if row.folded is not None:
        weights, keys, values = (
            [row.folded.count, *weights],
            [row.folded.key, *keys],
            [row.folded.value, *values],
        )
    total = sum(weights)
    row.folded = Folded(
        sum(w * k for w, k in zip(weights, keys, strict=True)) / total,
        sum(w * v for w, v in zip(weights, values, strict=True)) / total,
        total,
    )


def fold_dct(row: Row, losers: list[int], part: Fraction) -> list[int]:
    """The losers' keys and values as their lowest frequencies; returns the positions that hold them now."""
    n = len(losers)
    if not n:
        return []
    m = max(1, math.floor(part * n))
    down, up = cosines(n)[:m], cosines(m)
    keys = math.sqrt(m / n) * up.T @ (down @ row.keys[losers].double())
    values = math.sqrt(m / n) * up.T @ (down @ row.values[losers].double())
    return stand(row, losers, keys.float(), values.float())


def fold_pool(row: Row, losers: list[int], run: int) -> list[int]:
    """The losers' keys and values as means of `run` in a row, the last one of what is left."""
    runs = [losers[i : i + run] for i in range(0, len(losers), run)]
    if not runs:
        return []
    keys = torch.stack([row.keys[r].mean(0) for r in runs])
    values = torch.stack([row.values[r].mean(0) for r in runs])
    return stand(row, losers, keys, values)


def stand(row: Row, losers: list[int], keys: Tensor, values: Tensor) -> list[int]:
    """Puts m entries at positions of the n losers, spread evenly."""
    m, n = len(keys), len(losers)
    places = [losers[j * n // m] for j in range(m)]
    row.keys[places], row.values[places] = keys, values
    return places


def cosines(n: int) -> Tensor:
    """The orthonormal cosine transform (DCT-II) of n numbers, float64 [frequency, place]."""
    frequency, place = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)[None]
    basis = torch.cos(math.pi * frequency * (2 * place + 1) / (2 * n)) * math.sqrt(2 / n)
    basis[0] /= math.sqrt(2)
    return basis
