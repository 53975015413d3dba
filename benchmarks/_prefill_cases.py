"""Who takes part in a prefill with local heads: our C++ kernel, dense causal SDPA, FlexAttention with the same masks.

A local KV head reads its first `sink` keys and its newest `window` ones, the query's own among them; the others read
all that came before. FlexAttention gets block masks that say so, made before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from _flex import flex, local_mask
from _turns import Absent, Contestant
from torch import Tensor


def contestants(n: int, sink: int, window: int, sizes: tuple[int, int, int], dtype: torch.dtype) -> list[Contestant]:
    """`sizes`: query heads, KV heads, head_dim. Results are compared as [q_heads, n, head_dim]."""
    q_heads, kv_heads, width = sizes
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, q_heads, n, width), (1, kv_heads, n, width), (1, kv_heads, n, width))
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    local = {"none": 0, "half": kv_heads // 2, "all": kv_heads}
    dense = "SDPA, dense causal"
    found = []
    for word, heads in local.items():
        run = _ours(q, k, v, sink, window, heads)
        like = dense if not heads else f"FlexAttention, {word} local"
        found.append(Contestant(f"kvcompile, {word} local", run, like=like, view=lambda out: out[0].transpose(0, 1)))
    found.append(Contestant(dense, dense_causal(q, k, v), view=lambda out: out.reshape(q_heads, n, width)))
    for word, heads in local.items():
        like = dense if not heads else None
        run = _flex(q, k, v, sink, window, heads)
        found.append(Contestant(f"FlexAttention, {word} local", run, like=like, view=lambda out: out[0]))
    return found


def _ours(q: Tensor, k: Tensor, v: Tensor, sink: int, window: int, heads: int) -> Callable[[], Tensor]:
    """The first `heads` KV heads are local; window 0 means dense."""
    sinks, windows = (torch.zeros(k.shape[1], dtype=torch.int32) for _ in range(2))
    sinks[:heads], windows[:heads] = sink, window

    def run() -> Tensor:
        try:
            from kvcompile.kernels.cpp_backend.prefill import attend
        except ImportError:
            raise Absent("not built: kvcompile.kernels.cpp_backend has no prefill kernel here") from None
        return attend(q, k, v, sinks, windows, q.shape[3] ** -0.5)

    return run


def dense_causal(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """Keys stand once for their group (a stride of 0), which reads less than enable_gqa does."""
    group = q.shape[1] // k.shape[1]
    asking = q[0].unflatten(0, (k.shape[1], group))
    keys, values = (t[0][:, None].expand(-1, group, -1, -1) for t in (k, v))
    return lambda: F.scaled_dot_product_attention(asking, keys, values, is_causal=True)


def _flex(q: Tensor, k: Tensor, v: Tensor, sink: int, window: int, heads: int) -> Callable[[], Tensor]:
    compiled = flex()
    mask = cache(lambda: local_mask(q.shape[2], sink, window, k.shape[1], heads, q.shape[1] // k.shape[1]))
    return lambda: compiled(q, k, v, block_mask=mask(), enable_gqa=True)
