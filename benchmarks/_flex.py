"""FlexAttention as a contestant: compiled when it is first called, and the block masks of local heads."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

BLOCK = 128


def flex() -> Callable[..., Any]:
    """FlexAttention, compiled for the sizes of its first call."""
    compiled = cache(lambda: torch.compile(flex_attention, dynamic=False))
    return lambda *args, **options: compiled()(*args, **options)


def forget() -> None:
    """Drop what was compiled, so that the next sizes are not taken for more of the same."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def local_mask(n: int, sink: int, window: int, kv_heads: int, heads: int, group: int) -> BlockMask:
    """One block mask for all query heads; the lists of blocks are made once a kind of head, not once a head."""

    def dense(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i >= j

    def near(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & ((i - j < window) | (j < sink))

    def mixed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & ((i - j < window) | (j < sink) | (h >= heads * group))

    if heads in (0, kv_heads):
        return create_block_mask(near if heads else dense, None, None, n, n, device="cpu", BLOCK_SIZE=BLOCK)
    kinds = [create_block_mask(kind, None, None, n, n, device="cpu", BLOCK_SIZE=BLOCK) for kind in (near, dense)]
    counts = heads * group, (kv_heads - heads) * group
    lists = [
        torch.cat([getattr(kind, name).expand(-1, count, *getattr(kind, name).shape[2:])
                   for kind, count in zip(kinds, counts, strict=True)], 1).contiguous()
        for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
    ]  # fmt: skip
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, mask_mod=mixed, seq_lengths=(n, n))
