"""What block gates learn from: the model's own attention, block by block, and how far gates are from it.

Takes queries and keys of one layer; gives, for one KV head and some queries at a time, the part of each unit in what is
read. Guarantees: memory for a block of one KV head's queries, never tokens x tokens; only units that are full before
the query count, as when the policy runs. Sources: SeerAttention (arXiv:2410.13276): the largest weight of each block of
queries and keys, normalised; SeerAttention-R (arXiv:2506.08889): of each query and block of keys, over its query heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcompile.dsl.learn_gate import GateBlock
from kvcompile.kernels.gates import Gate, logits

WIDE = 1 << 22  # weights of one KV head that are held at a time
PART = 8  # of a query's units, the best eighth is what gates are judged by


@dataclass(frozen=True)
class Text:
    """One layer's view of one text. q float32 [kv_heads, group, n, head_dim], k [kv_heads, n, head_dim]: as attention
    sees them; asked, held: the same as gates see them; scale: of the logits."""

    q: Tensor
    k: Tensor
    asked: Tensor
    held: Tensor
    scale: float


@dataclass(frozen=True)
class Asked:
    """Some of a gate's queries: `first` to `last` - 1 are the text's queries behind them; which: each one's unit;
    place: its position for RoPE, int64 [m]."""

    first: int
    last: int
    which: Tensor
    place: Tensor


def units_of(gate: GateBlock, tokens: int) -> int:
    """How many units are full before the last query of a text."""
    return max(0, (tokens - 1 - gate.offset) // gate.size)


def rows_of(gate: GateBlock, tokens: int) -> int:
    """How many of a gate's queries in a text have units to choose from."""
    units = units_of(gate, tokens)
    if not units:
        return 0
    return units if gate.pooled else tokens - gate.offset - gate.size


def landmarks(gate: GateBlock, keys: Tensor, units: int) -> Tensor:
    """Pooled keys of the first units: keys [kv_heads, n, head_dim]; [kv_heads, units, landmarks * head_dim]."""
    blocks = keys[:, gate.offset : gate.offset + units * gate.size].unflatten(1, (units, gate.size))
    pooled = {"min": blocks.amin, "max": blocks.amax, "mean": blocks.mean}
    return torch.cat([pooled[fn](2) for fn in gate.landmarks], -1)


def asked_in(gate: GateBlock, tokens: int, group: int) -> Iterator[Asked]:
    """The gate's queries of a text, so many at a time that the weights behind them fit."""
    begin, most = gate.offset + gate.size, max(1, WIDE // (group * tokens))
    step = gate.size * max(1, most // gate.size) if gate.pooled else most
    for first in range(begin, tokens, step):
        last = min(first + step, tokens)
        if gate.pooled:
            which = torch.arange((first - gate.offset) // gate.size, (last - 1 - gate.offset) // gate.size + 1)
            yield Asked(first, last, which, gate.offset + which * gate.size)
        else:
            place = torch.arange(first, last)
            yield Asked(first, last, (place - gate.offset) // gate.size, place)


def true_parts(gate: GateBlock, text: Text, head: int, some: Asked, units: int) -> Tensor:
    """The part of each unit in what the gate's queries read, float32 [group or 1, m, units]; rows sum to 1."""
    q, k = text.q[head, :, some.first : some.last], text.k[head]
    places = torch.arange(some.first, some.last, device=q.device)
    later = torch.arange(len(k), device=q.device) > places[:, None]
    attn = torch.softmax((q @ k.T * text.scale).masked_fill(later, float("-inf")), -1)
    parts = attn[..., gate.offset : gate.offset + units * gate.size].unflatten(-1, (units, gate.size)).amax(-1)
    if gate.pooled:
        short = -parts.shape[1] % gate.size
        parts = F.pad(parts, (0, 0, 0, short)).unflatten(1, (-1, gate.size)).amax(2)
    if gate.joined:
        parts = parts.amax(0, keepdim=True)
    parts = parts.masked_fill(~_open(some, units, q.device), 0.0)
    return parts / parts.sum(-1, keepdim=True).clamp(min=torch.finfo(parts.dtype).tiny)


def gate_logits(gate: GateBlock, weights: Gate, text: Text, head: int, some: Asked, units: int) -> Tensor:
    """What the gate says of the same units, float32 [group or 1, m, units], -inf where none is to be chosen."""
    one, device = slice(head, head + 1), text.q.device
    q = text.asked[one, :, some.first : some.last]
    if gate.pooled:
        short = -q.shape[2] % gate.size
        there = F.pad(q.new_ones(q.shape[2]), (0, short)).unflatten(0, (-1, gate.size)).sum(1)
        q = F.pad(q, (0, 0, 0, short)).unflatten(2, (-1, gate.size)).sum(3) / there[:, None]
    starts = gate.offset + gate.size * torch.arange(units, device=device)
    kv_heads, group = text.q.shape[:2]
    marks = landmarks(gate, text.held[one], units)
    found = logits(
        weights.asked(q, one, some.place.to(device)), weights.held(marks, one, starts, group, kv_heads)
    )[0]  # fmt: skip
    return found.masked_fill(~_open(some, units, device), float("-inf"))


def divergence(target: Tensor, found: Tensor) -> Tensor:
    """KL(target || softmax of logits), the sum over all rows, float32."""
    log = torch.log_softmax(found, -1)
    return torch.where(target > 0, target * (target.clamp(min=1e-30).log() - log), 0.0).sum()


def recalled(target: Tensor, found: Tensor, some: Asked) -> tuple[Tensor, Tensor]:
    """How many of each query's truly best units, an eighth of them and one at least, are among the gate's as many best:
    the sum of these parts, and of how many queries it is. A query with one unit has nothing to choose."""
    choice = some.which.to(found.device)
    best = (choice.clamp(min=1) + PART - 1) // PART
    truly, said = (x.argsort(-1, descending=True).argsort(-1) < best[:, None] for x in (target, found))
    hits = (truly & said).sum(-1) / best
    real = choice > 1
    return hits[:, real].sum(), real.sum() * len(hits)


def _open(some: Asked, units: int, device: torch.device) -> Tensor:
    """Which units each query may choose: those before its own, bool [m, units]."""
    return (torch.arange(units) < some.which[:, None]).to(device)
