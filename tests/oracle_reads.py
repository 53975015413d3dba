"""What each query reads under the systems of sparse attention, written by hand from publications and the language.

The frame: a `Reader` says for a layer which positions each query of this forward reads, and holds sets between firings;
a `Reading` is one published set, asked query by query as plain loops over positions (`Asked`). Scores over units see
units whose last position comes before the query; what lies in no such unit is read. Uses nothing of kvcompile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import Tensor

from tests.oracle import Oracle, Piece, Row
from tests.oracle_states import covered, hashed

Sets = list[set[int]]  # one per query head of a KV head


@dataclass(frozen=True, slots=True)
class Asked:
    """One query of one KV head as it is about to read; its own entry is in the row already."""

    oracle: Oracle
    layer: int
    head: int
    place: int

    @property
    def row(self) -> Row:
        return self.oracle.rows[self.layer][self.head]

    @property
    def queries(self) -> Tensor:
        """[G, D], rotated."""
        return self.row.queries[:, self.place]

    def columns(self) -> list[int]:
        """Resident positions that the model lets it read, its own among them."""
        reach = self.oracle.reach(self.layer)
        return [p for p in self.row.positions() if p <= self.place and (not reach or p > self.place - reach)]

    def attention(self) -> Tensor:
        """Probabilities [G, T] over all that it may read, 0 elsewhere."""
        return self.oracle.attention(self.layer, self.head, self.place)

    def among(self, test: Callable[[int], bool]) -> set[int]:
        return {p for p in self.columns() if test(p)}

    def units(self, size: int, stride: int = 0) -> dict[int, list[int]]:
        """Members of each unit that ends before the query: resident, inside the model's window; units without are
        left out."""
        stride = stride or size
        found, there = {}, self.columns()
        for u in range(self.place // stride + 1):
            members = [p for p in there if u * stride <= p < u * stride + size]
            if u * stride + size - 1 < self.place and members:
                found[u] = members
        return found

    def with_units(self, size: int, near: set[int], chosen: set[int]) -> set[int]:
        """What is read where blocks `chosen` won: these, a region, and the blocks that are not full."""
        full = self.units(size)
        return near | self.among(lambda p: p // size in chosen or p // size not in full)

    def rivals(self, size: int, near: set[int]) -> dict[int, list[int]]:
        """Members of the full blocks in which something lies outside the region."""
        return {u: members for u, members in self.units(size).items() if not near.issuperset(members)}

    def best(self, scored: dict[int, float], n: int) -> set[int]:
        return {u for u, _ in self.oracle.best([(s, u, 0) for u, s in scored.items()], n)}


@dataclass(slots=True)
class Reading:
    """A set, computed anew in forwards at which one of `triggers` fires; none: in every forward."""

    triggers: tuple[str, ...] = ()

    def fires(self, oracle: Oracle, layer: int, head: int) -> bool:
        return not self.triggers or oracle.piece.fires(*self.triggers)

    def prepare(self, oracle: Oracle, layer: int) -> None:
        """Once per layer of a forward in which it fires, for what is one choice of all queries."""

    def read(self, asked: Asked) -> Sets:
        """What each query head reads beside its own entry."""
        raise NotImplementedError


@dataclass(slots=True)
class Reader:
    """`of(layer, KV head)` gives the readings of a row, none: all is read. A forward in which none fires: a prefill
    reads all, a step what the newest query of the latest firing forward read, and all that came later."""

    of: Callable[[int, int], Sequence[Reading]]
    off: frozenset[int] = frozenset()
    held: dict[tuple[int, int], tuple[Sets, int]] = field(default_factory=dict)
    firing: dict[int, list[list[Reading]]] = field(default_factory=dict)  # of the newest forward: [layer][KV head]
    seen: dict[int, list[list[Sets]]] = field(default_factory=dict)  # of the newest forward: [layer][KV head][query]

    def sets(self, oracle: Oracle, layer: int) -> list[list[Sets]]:
        """Positions that each query reads, [KV head][query][query head of the group]."""
        self.firing[layer] = [[r for r in self.of(layer, h) if r.fires(oracle, layer, h)] for h in range(oracle.heads)]
        prepared: list[Reading] = []
        for reading in (r for readings in self.firing[layer] for r in readings):
            if not any(reading is other for other in prepared):
                prepared.append(reading)
                reading.prepare(oracle, layer)
        piece: Piece = oracle.piece
        self.seen[layer] = []
        for head, firing in enumerate(self.firing[layer]):
            assert len(firing) < 2, "two sets for one row in one forward"
            if not firing and piece.kind == "prefill":
                self.held.pop((layer, head), None)
            found = self._row(oracle, layer, head, range(piece.start, piece.now + 1))
            if firing:
                self.held[layer, head] = found[-1], piece.now
            self.seen[layer].append(found)
        return self.seen[layer]

    def peeked(self, oracle: Oracle, layer: int) -> list[list[Sets]]:
        """The same of the piece's peeked queries, whose entries are in the rows for as long as they read."""
        places = range(oracle.piece.now + 1, oracle.piece.now + 1 + oracle.piece.peeked)
        return [self._row(oracle, layer, head, places) for head in range(oracle.heads)]

    def _row(self, oracle: Oracle, layer: int, head: int, places: range) -> list[Sets]:
        firing, found = self.firing[layer][head], []
        for place in places:
            asked = Asked(oracle, layer, head, place)
            columns = set(asked.columns())
            if firing:
                sets = firing[0].read(asked)
            elif (layer, head) in self.held:
                chosen, until = self.held[layer, head]
                sets = [s | {p for p in columns if p > until} for s in chosen]
            else:
                sets = [columns] * oracle.group
            found.append([(s | {place}) & columns for s in sets])
        return found


def everywhere(*readings: Reading) -> Reader:
    return Reader(lambda layer, head: readings)


def in_layers(first: int, *readings: Reading) -> Reader:
    """From layer `first` on."""
    return Reader(lambda layer, head: readings if layer >= first else ())


@dataclass(slots=True)
class Dense(Reading):
    """All, as steps do after prompts that methods for prompts alone have narrowed."""

    triggers: tuple[str, ...] = ("step",)

    def read(self, asked: Asked) -> Sets:
        return [set(asked.columns())] * asked.oracle.group


# -- static patterns ---------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Window(Reading):
    """The first `sink` and the last `window` tokens."""

    sink: int = 2
    window: int = 8

    def read(self, asked: Asked) -> Sets:
        return [asked.among(lambda p: p < self.sink or p > asked.place - self.window)] * asked.oracle.group


@dataclass(slots=True)
class PowerAttention(Reading):
    """Chen et al. 2025: block i reads a sink, a window, and the blocks i - 1, i - 2, i - 4, ..."""

    size: int = 4
    sink: int = 2
    window: int = 6

    def read(self, asked: Asked) -> Sets:
        near, block = [], asked.place // self.size
        distances = [2**k for k in range(64)]
        for p in asked.columns():
            if p < self.sink or p > asked.place - self.window or block - p // self.size in distances:
                near.append(p)
        return [set(near)] * asked.oracle.group


@dataclass(slots=True)
class BigBird(Reading):
    """Zaheer et al. 2020: global, local and random tokens; random are those of the smallest hashes so far."""

    block: int = 2
    n: int = 4
    seed: int = 0
    window: int | None = None  # tokens, None: three blocks

    def read(self, asked: Asked) -> Sets:
        order = sorted(range(asked.place + 1), key=lambda p: (hashed(self.seed, asked.layer, asked.head, p), p))
        random = set(order[: self.n])
        window = 3 * self.block if self.window is None else self.window
        near = asked.among(lambda p: p < self.block or p > asked.place - window or p in random)
        return [near] * asked.oracle.group


@dataclass(slots=True)
class Fixed(Reading):
    """Child et al. 2019, the fixed pattern with one summary cell: the query's own block up to itself, and of every
    block one cell, here the one at a multiple of the block's size."""

    size: int = 4
    start: int = 0  # of the first block

    def read(self, asked: Asked) -> Sets:
        def block(p: int) -> int:
            return (p - self.start) // self.size

        near = asked.among(lambda p: block(p) == block(asked.place) or p % self.size == 0)
        return [near] * asked.oracle.group


# -- blocks chosen by what stands for their keys -----------------------------------------------------------------------


@dataclass(slots=True)
class Quest(Reading):
    """Tang et al. 2024: of each page the bound that no key of it can pass; the newest page is read always."""

    page: int = 4
    budget: int = 12
    triggers: tuple[str, ...] = ("step",)

    def read(self, asked: Asked) -> Sets:
        sets = []
        own = asked.among(lambda p: p // self.page == asked.place // self.page)
        for query in asked.queries:
            bounds = {}
            for u, members in asked.rivals(self.page, own).items():
                low, high = asked.row.keys[members].amin(0), asked.row.keys[members].amax(0)
                bounds[u] = sum(max(q * a, q * b) for q, a, b in channels(query, low, high))
            sets.append(asked.with_units(self.page, own, asked.best(bounds, self.budget // self.page)))
        return sets


def channels(*vectors: Tensor) -> zip:
    return zip(*(v.double().tolist() for v in vectors), strict=True)


@dataclass(slots=True)
class MoBA(Reading):
    """Lu et al. 2025: the gate is the query's product with a block's mean key; the own block is one of the n."""

    size: int = 4
    n: int = 3
    triggers: tuple[str, ...] = ("chunk", "step")

    def read(self, asked: Asked) -> Sets:
        own = asked.among(lambda p: p // self.size == asked.place // self.size)
        rivals = asked.rivals(self.size, own)
        gates = [{u: (q @ asked.row.keys[m].mean(0)).item() for u, m in rivals.items()} for q in asked.queries]
        return [asked.with_units(self.size, own, asked.best(gate, self.n - 1)) for gate in gates]


@dataclass(slots=True)
class InfLLMV2(Reading):
    """Zhao et al. 2025: softmax over overlapping kernels, summed over the group; a block scores as its best kernel."""

    n: int = 64
    sink: int = 64
    window: int = 2048
    kernel: int = 32
    stride: int = 16
    block: int = 64
    triggers: tuple[str, ...] = ("chunk", "step")

    def read(self, asked: Asked) -> Sets:
        near = asked.among(lambda p: p < self.sink or p > asked.place - self.window)
        kernels = asked.units(self.kernel, self.stride)
        if not kernels:
            return [set(asked.columns())] * asked.oracle.group
        logits = torch.stack([asked.queries @ asked.row.keys[m].mean(0) for m in kernels.values()], 1)
        weight = dict(zip(kernels, torch.softmax(logits, 1).sum(0).tolist(), strict=True))
        scored = {}
        for u in asked.rivals(self.block, near):
            first, last = u * self.block, (u + 1) * self.block - 1
            scored[u] = max(
                w for k, w in weight.items() if k * self.stride <= last and k * self.stride + self.kernel > first
            )
        return [asked.with_units(self.block, near, asked.best(scored, self.n))] * asked.oracle.group


@dataclass(slots=True)
class Seer(Reading):
    """Gao et al. 2024 with the identity for its gate: the query against a block's least, largest and mean key,
    softmax over blocks, mean over the group; blocks over a threshold."""

    size: int = 4
    tau: float = 0.05
    triggers: tuple[str, ...] = ("chunk",)

    def read(self, asked: Asked) -> Sets:
        full = asked.units(self.size)
        chosen = set()
        if full:
            keys = [asked.row.keys[m] for m in full.values()]
            pooled = [asked.queries @ x for k in keys for x in [k.amin(0) + k.amax(0) + k.mean(0)]]
            scores = torch.softmax(torch.stack(pooled, 1), 1).mean(0)
            for u, score in zip(full, scores.tolist(), strict=True):
                asked.oracle.near(score, self.tau)
                if score > self.tau:
                    chosen.add(u)
        return [asked.with_units(self.size, set(), chosen)] * asked.oracle.group


@dataclass(slots=True)
class SeerR(Reading):
    """Gao et al. 2025 with the identity for its gate: the group's mean query against a block's mean key, both after
    RoPE; one choice per KV head."""

    size: int = 4
    budget: int = 12
    triggers: tuple[str, ...] = ("step",)

    def read(self, asked: Asked) -> Sets:
        query = asked.queries.mean(0)
        full = asked.units(self.size)
        logits = [query @ asked.row.keys[m].mean(0) for m in full.values()]
        scores = torch.softmax(torch.stack(logits), 0).tolist() if full else []
        rivals = asked.rivals(self.size, set())
        scored = {u: s for u, s in zip(full, scores, strict=True) if u in rivals}
        chosen = asked.best(scored, self.budget // self.size)
        return [asked.with_units(self.size, set(), chosen)] * asked.oracle.group


# -- single tokens -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Tidal(Reading):
    """Yang et al. 2024: layers `pickers` read all, and note the n tokens of largest logits of each query head; the
    layers after each read those."""

    n: int = 8
    triggers: tuple[str, ...] = ("step",)
    pickers: tuple[int, ...] = (2, 13)
    chosen: dict[tuple[int, int], set[int]] = field(default_factory=dict)  # by KV head and query head of its group

    def read(self, asked: Asked) -> Sets:
        columns = asked.columns()
        heads = range(asked.oracle.group)
        if asked.layer < min(self.pickers):
            return [set(columns) for _ in heads]
        if asked.layer not in self.pickers:
            return [asked.among(lambda p, g=g: p in self.chosen[asked.head, g]) for g in heads]
        logits = asked.oracle.logarithms(asked.layer, asked.head, asked.place)
        for g in heads:
            scored = {p: logits[g, p].item() for p in columns}
            self.chosen[asked.head, g] = asked.best(scored, self.n)
        return [set(columns) for _ in heads]


@dataclass(slots=True)
class SampleAttention(Reading):
    """Zhu et al. 2024: every so-manieth query's exact attention, summed by column; the fewest columns that hold `mass`
    of what lies outside the window, for all queries of the forward, beside each one's own window."""

    mass: Fraction = Fraction(95, 100)
    rows: Fraction = Fraction(5, 100)
    window: Fraction = Fraction(8, 100)
    triggers: tuple[str, ...] = ("chunk",)
    columns: dict[int, set[int]] = field(default_factory=dict)  # by KV head

    def near(self, oracle: Oracle, query: int) -> Callable[[int], bool]:
        width = math.floor(self.window * oracle.piece.prompt)
        return lambda p: p > query - width

    def prepare(self, oracle: Oracle, layer: int) -> None:
        piece = oracle.piece
        for head, row in enumerate(oracle.rows[layer]):
            total = torch.zeros(len(row.resident))
            for place in range(piece.start, piece.start + piece.tokens):
                if math.floor(place * self.rows) > math.floor((place - 1) * self.rows):
                    total += oracle.attention(layer, head, place).mean(0)
            near = self.near(oracle, piece.now)
            scored = [(total[p].item(), p, 0) for p in row.positions() if not near(p)]
            self.columns[head] = {p for p, _ in covered(oracle, scored, self.mass)}

    def read(self, asked: Asked) -> Sets:
        near, columns = self.near(asked.oracle, asked.place), self.columns[asked.head]
        return [asked.among(lambda p: near(p) or p in columns)] * asked.oracle.group


@dataclass(slots=True)
class Vertical(Reading):
    """Jiang et al. 2024, the vertical lines: of the last queries' attention the n largest columns, for all queries,
    beside sinks and each one's own window. alone: each query head by its own, else all of a group by their mean."""

    sink: int = 2
    window: int = 4
    n: int = 6
    observe: int = 8
    triggers: tuple[str, ...] = ("chunk",)
    alone: bool = False
    columns: dict[int, Sets] = field(default_factory=dict)

    def near(self, query: int) -> Callable[[int], bool]:
        return lambda p: p < self.sink or p > query - self.window

    def prepare(self, oracle: Oracle, layer: int) -> None:
        near = self.near(oracle.piece.now)
        for head, row in enumerate(oracle.rows[layer]):
            totals = oracle.last_reads(row, self.observe).sum(1)
            self.columns[head] = []
            for total in totals if self.alone else [totals.mean(0)] * oracle.group:
                scored = [(total[p].item(), p, 0) for p in row.positions() if not near(p)]
                self.columns[head].append({p for p, _ in oracle.best(scored, self.n)})

    def read(self, asked: Asked) -> Sets:
        near = self.near(asked.place)
        return [asked.among(lambda p, c=columns: near(p) or p in c) for columns in self.columns[asked.head]]
