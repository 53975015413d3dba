"""Noise that belongs to places: a hash of seed, layer, head and positions, and Gumbel noise made of it.

Takes whole numbers, gives the same values on every device, in every batch and however a prompt is cut, because no
generator stands behind them. Masked to 32 bits after each step; the mixer is an xor-shift-multiply one.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def hashed(seed: int, *values: int | Tensor) -> Tensor:
    """A 32-bit hash as int64, of the shape that the values have together (int64, broadcast; -1 counts as 2^32 - 1).

    Hash the coarse values first: each is mixed in at the shape reached so far.
    """
    x = torch.tensor(seed & _MASK)
    for value in values:
        part = value & _MASK
        x = _mixed((x.to(part.device) if isinstance(part, Tensor) else x) ^ part)
    return x


def _mixed(x: Tensor) -> Tensor:
    """Bijective on 32 bits. Products overflow 64 bits, whose low 32 bits are still right."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def gumbel(seed: int, layer: int, heads: Tensor, group: int, queries: Tensor, entries: Tensor) -> Tensor:
    """Gumbel noise of each query head, query and entry: float32 [rows, group, w, n].

    heads int64 [rows], KV heads; queries int64 [rows, w] and entries int64 [rows, n], original positions.
    -log(-log(u)), u uniform in (0, 1) with 23 bits.
    """
    query_heads = heads[:, None] * group + torch.arange(group, device=heads.device)
    x = hashed(seed, layer, query_heads[:, :, None, None], queries[:, None, :, None], entries[:, None, None, :])
    u = ((x >> 9).float() + 0.5) / 2**23
    return -torch.log(-torch.log(u))
