"""What queries read by trained gates over blocks, written by hand from publications and the format of gate files.

Random gates of a model's shape, the very numbers that a file gets; what a gate says of blocks, query head by query head
and block by block; readings for `oracle_reads.Reader` that choose by it. Uses nothing of kvcompile.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.oracle_reads import Asked, Reading, Sets

EPS = 1e-6


@dataclass(frozen=True, slots=True)
class Gates:
    """Gates over blocks of `size` tokens from token 0 on, by the largest, least and mean keys before rotation.

    pooled: the mean of a block's queries asks, at the block's first position; else each query, at its own.
    joined: the query heads of a KV head give one logit together; else each its own. normed: RMS norms in gate space.
    """

    size: int = 4
    pooled: bool = True
    joined: bool = False
    normed: bool = False
    width: int = 8

    def metadata(self) -> dict[str, str]:
        """What a file says of them."""
        about = {
            "format": "kvcompile block gates",
            "version": 1,
            "unit": self.size,
            "offset": 0,
            "queries": "pooled" if self.pooled else "each",
            "keys": "raw.k",
            "landmarks": ["max", "min", "mean"],
        }
        return {"kvcompile": json.dumps(about)}


@functools.cache
def weights(gates: Gates, layers: int, kv_heads: int, group: int, dim: int) -> dict[str, Tensor]:
    """Random weights by the names of a file, float32, of every layer and head others."""
    generator = torch.Generator().manual_seed(7)
    heads, asking = (kv_heads, group * dim) if gates.joined else (kv_heads * group, dim)
    found = {"rope": torch.tensor([100.0 ** (-2 * c / gates.width) for c in range(gates.width // 2)])}
    for layer in range(layers):
        found[f"layers.{layer}.q"] = 0.15 * torch.randn(heads, asking, gates.width, generator=generator)
        found[f"layers.{layer}.k"] = 0.15 * torch.randn(kv_heads, 3 * dim, gates.width, generator=generator)
        for norm in ("q_norm", "k_norm") if gates.normed else ():
            found[f"layers.{layer}.{norm}"] = 0.5 + torch.rand(gates.width, generator=generator)
    return found


# -- what a gate says --------------------------------------------------------------------------------------------------


def logits(gates: Gates, asked: Asked) -> dict[int, list[float]]:
    """Of each block that ends before the query, its logits: one, or one per query head of the group."""
    oracle = asked.oracle
    given = weights(gates, oracle.layers, oracle.heads, oracle.group, asked.row.keys.shape[1])
    rope, place = given["rope"], asked.place
    maps, norms = ({w: given.get(f"layers.{asked.layer}.{w}{end}") for w in "qk"} for end in ("", "_norm"))
    places = [place]
    if gates.pooled:
        place = place // gates.size * gates.size
        forward = range(oracle.piece.start, oracle.piece.now + 1)
        places = [p for p in forward if place <= p < place + gates.size]
    queries = unturned(asked, asked.row.queries[:, places], places).mean(1)
    vectors = [queries.flatten()] if gates.joined else list(queries)
    questions = []
    for g, vector in enumerate(vectors):
        mine = vector @ maps["q"][asked.head * len(vectors) + g]
        questions.append(turned(normed(mine, norms["q"]), place, rope))
    found = {}
    for u, members in asked.units(gates.size).items():
        keys = unturned(asked, asked.row.keys[members], members)
        mark = torch.cat([keys.amax(0), keys.amin(0), keys.mean(0)])
        block = turned(normed(mark @ maps["k"][asked.head], norms["k"]), u * gates.size, rope)
        found[u] = [sum(a * b for a, b in zip(q, block, strict=True)) / math.sqrt(gates.width) for q in questions]
    return found


def parts(gates: Gates, asked: Asked) -> dict[int, float]:
    """Of each such block its part: softmax over blocks, mean over the query heads."""
    found = logits(gates, asked)
    if not found:
        return {}
    return dict(zip(found, torch.softmax(torch.tensor(list(found.values())), 0).mean(1).tolist(), strict=True))


def unturned(asked: Asked, x: Tensor, places: list[int]) -> Tensor:
    """x [.., n, D] as the model's RoPE has turned it to `places`, before it was turned."""
    angles = torch.outer(torch.tensor(places).float(), asked.oracle.model.model.rotary_emb.inv_freq)
    left, right = x.chunk(2, -1)
    return torch.cat([left * angles.cos() + right * angles.sin(), right * angles.cos() - left * angles.sin()], -1)


def normed(x: Tensor, weight: Tensor | None) -> list[float]:
    values = x.tolist()
    if weight is None:
        return values
    length = math.sqrt(sum(v * v for v in values) / len(values) + EPS)
    return [v / length * w for v, w in zip(values, weight.tolist(), strict=True)]


def turned(x: list[float], place: int, rope: Tensor) -> list[float]:
    """Channels c and c + width / 2 as a pair, by its angle per position."""
    half, out = len(x) // 2, list(x)
    for c, angle in enumerate(rope.tolist()):
        cos, sin = math.cos(place * angle), math.sin(place * angle)
        out[c], out[c + half] = x[c] * cos - x[c + half] * sin, x[c + half] * cos + x[c] * sin
    return out


# -- what is read by it ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Threshold(Reading):
    """Gao et al. 2024: blocks whose part is over a threshold, and those that are not full before the query."""

    gates: Gates = Gates()
    tau: float = 0.05
    triggers: tuple[str, ...] = ("chunk",)

    def read(self, asked: Asked) -> Sets:
        chosen = set()
        for u, part in parts(self.gates, asked).items():
            asked.oracle.near(part, self.tau)
            if part > self.tau:
                chosen.add(u)
        return [asked.with_units(self.gates.size, set(), chosen)] * asked.oracle.group


@dataclass(slots=True)
class Best(Reading):
    """Gao et al. 2025: of each KV head the blocks with the largest parts, as many as fill the budget."""

    gates: Gates = Gates()
    budget: int = 12
    triggers: tuple[str, ...] = ("step",)

    def read(self, asked: Asked) -> Sets:
        chosen = asked.best(parts(self.gates, asked), self.budget // self.gates.size)
        return [asked.with_units(self.gates.size, set(), chosen)] * asked.oracle.group
