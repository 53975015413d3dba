"""The other contestants: SDPA by its flash and cuDNN kernels, FlexAttention compiled, topk with gather."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from measuring import Bench, Figures
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

Masked = Callable[[], Callable[[], Tensor]]  # a call whose mask is made once
KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def sdpa(bench: Bench, name: str, q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Callable[[], Tensor]:
    """SDPA by one of its kernels, grouped heads left to it; in a dry run by whichever takes the CPU's tensors."""
    kinds = [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION] if bench.dry else [KERNELS[name]]
    grouped = q.shape[1] != k.shape[1]

    def run() -> Tensor:
        with sdpa_kernel(kinds):
            return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

    return run


def fastest(bench: Bench, runs: list[Callable[[], Tensor]]) -> float:
    """Seconds of the fastest of some forms of one question; a form that the kernel refuses costs only itself.

    Raises:
        RuntimeError: it refuses all of them.
    """
    times, refused = [], None
    for run in runs:
        try:
            times.append(bench.seconds(run))
        except RuntimeError as error:
            refused = error
    if refused is not None and not times:
        raise refused
    return min(times)


@cache
def flex(dry: bool) -> Any:
    """FlexAttention, compiled for the shapes that it is called with; in a dry run as it is."""
    from torch.nn.attention.flex_attention import flex_attention

    if dry:
        return flex_attention
    # A run has a dozen shapes, each a compilation of its own; torch gives up after eight.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def flex_decode(bench: Bench, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> Callable[[], Tensor]:
    """One token over rows of `lengths` int [B, Hkv], None: all there are.

    q [B, Hkv, group, D]: the query heads of a KV head stand as queries, which lets it split rows among programs even
    where every KV head has a block mask of its own.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    mask = None
    if lengths is not None:

        def held(b: Tensor, h: Tensor, q_at: Tensor, kv_at: Tensor) -> Tensor:
            return kv_at < lengths[b, h]

        mask = create_block_mask(held, q.shape[0], q.shape[1], q.shape[2], k.shape[2], device=str(bench.device))
    attend = flex(bench.dry)
    return lambda: attend(q, k, v, block_mask=mask)


def flex_prefill(
    bench: Bench, q: Tensor, k: Tensor, v: Tensor, local: Tensor, sink: int, window: int
) -> Callable[[], Tensor]:
    """Causal attention of a prompt; heads with `local` int [Hq] not 0 read `sink` first and `window` newest entries."""
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(b: Tensor, h: Tensor, q_at: Tensor, kv_at: Tensor) -> Tensor:
        near = (kv_at > q_at - window) | (kv_at < sink) | (local[h] == 0)
        return (kv_at <= q_at) & near

    compiled = {} if bench.dry else {"_compile": True}
    mask = create_block_mask(sees, 1, q.shape[1], q.shape[2], k.shape[2], device=str(bench.device), **compiled)
    attend = flex(bench.dry)
    return lambda: attend(q, k, v, block_mask=mask, enable_gqa=True)


def flex_blocks(bench: Bench, q: Tensor, k: Tensor, v: Tensor, reads: Tensor, size: int) -> Callable[[], Tensor]:
    """Causal attention of a prompt; reads bool [Hq, blocks, blocks]: which blocks one of `size` queries reads."""
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(b: Tensor, h: Tensor, q_at: Tensor, kv_at: Tensor) -> Tensor:
        return (kv_at <= q_at) & reads[h, q_at // size, kv_at // size]

    compiled = {} if bench.dry else {"_compile": True}
    mask = create_block_mask(sees, 1, q.shape[1], q.shape[2], k.shape[2], device=str(bench.device), **compiled)
    attend = flex(bench.dry)
    return lambda: attend(q, k, v, block_mask=mask, enable_gqa=True)


def of_a_prompt(
    bench: Bench, figures: Figures, ours: Callable[[], Tensor], q: Tensor, k: Tensor, v: Tensor, masked: Masked
) -> None:
    """Milliseconds of SDPA's kernels, dense, and of FlexAttention as `masked` makes it, beside figures["ours"].

    q [1, Hq, M, D], k, v [1, Hkv, M, D]; ours gives [1, M, Hq, D]. error: of ours against FlexAttention, relative to
    the largest output; over_dense: how many times faster ours is than the better SDPA.
    """
    for name in KERNELS:
        run = sdpa(bench, name, q, k, v, causal=True)
        bench.attempt(figures, name, lambda run=run: bench.seconds(run) * 1e3)  # type: ignore[misc]

    def flexed() -> float:
        run = masked()
        mine, theirs = ours().transpose(1, 2).float(), run().float()
        figures["error"] = float((mine - theirs).abs().max() / theirs.abs().max())
        return bench.seconds(run) * 1e3

    bench.attempt(figures, "flex", flexed)
    known = [figures[name] for name in KERNELS if figures.get(name)]
    figures["over_dense"] = min(known) / figures["ours"] if known and figures["ours"] else None


def topk_gather(k: Tensor, v: Tensor, score: Tensor, keep: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """What eager policies do: the best entries by score [B, H, N], copied out of keys and values [B, H, N, D]."""

    def run() -> tuple[Tensor, Tensor]:
        at = score.topk(keep, dim=-1).indices[..., None].expand(-1, -1, -1, k.shape[3])
        return k.gather(2, at), v.gather(2, at)

    return run
