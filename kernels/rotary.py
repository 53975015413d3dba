"""Rotary embeddings by table: turns keys and queries by their place in a row, and back.

Takes a table `rope` float32 [2, places, head_dim], cosine and sine of each place, half-split: channel c turns with
channel c + head_dim / 2 (RoFormer, arXiv:2104.09864, eq. 34, in the order of Llama's weights). Place 0 turns nothing.
Guarantees float32 inside, one rounding to the argument's dtype, and `back` undoing it up to that rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, place: Tensor, rope: Tensor, back: bool = False) -> Tensor:
    """x [..., n, head_dim] turned by `place`, int64 broadcastable to [..., n], each below the table's places."""
    half = x.shape[-1] // 2
    cos, sin = (table[:, :half][place] for table in rope)  # both halves of the channels have the same angles
    left, right = x.float().split(half, -1)
    sin = -sin if back else sin
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1).to(x.dtype)


def places(pos: Tensor, there: Tensor) -> Tensor:
    """Place of each entry: how many of its row's entries stand before it. int64 [rows, n].

    pos int64 [rows, n], there bool [rows, n]: which columns hold an entry. Entries without position (pos -1) have
    place 0 and count for no other; what is not there has any place below n.
    """
    return places_among(pos, pos, there)


def places_among(of: Tensor, pos: Tensor, there: Tensor) -> Tensor:
    """Place of positions `of` [rows, w] in rows given as in `places`: the entries before them, int64 [rows, w]."""
    beyond = torch.iinfo(pos.dtype).max
    line = torch.where(there & (pos >= 0), pos, beyond).sort(1).values
    return torch.searchsorted(line, of.contiguous())
