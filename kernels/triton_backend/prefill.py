"""Launches what follows the attention of a prefill: state columns, score stages, winners, survivors to pages."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from kvcompile.kernels.triton_backend.pools import PagedPools, tensors


def state_columns(
    module: ModuleType, q: Tensor, k: Tensor, pos: Tensor, qpos: Tensor, lse: Tensor | None, scale: float,
    **variant: float | Tensor,
) -> Tensor:  # fmt: skip
    """What all queries of a piece add to a state: float32 [B, Hkv, N].

    q [B, Hq, n, D], k [B, Hkv, N, D]; pos int32 [B, Hkv, N], -1 where no entry is; qpos int32 [B, n], -1 where
    no query is; lse float32 [B, Hq, n], natural, over all that each query may read; None lets the kernel find it.
    variant: as `attend.variant_of`, where the file has them.
    """
    columns: Tensor = module.launch(q, k, pos, qpos, scale, lse=lse, **variant)
    return columns


def score(
    stages: tuple[tuple[str, ModuleType], ...], q: Tensor, k: Tensor, pos: Tensor, qpos: Tensor, candidates: Tensor,
    scale: float, **variant: float | Tensor,
) -> Tensor:  # fmt: skip
    """A selection's score through its stages: float32 [B, Hkv, N], meaningless outside `candidates`.

    q [B, Hq, W, D] and qpos int32 [B, W]: the queries that the score asks for; candidates bool [B, Hkv, N];
    columns in position order where the score pools. variant: as `attend.variant_of`, where the columns' file has them.
    """
    value = torch.empty(0)
    for template, module in stages:
        if template == "columns":
            value = module.launch(q, k, pos, qpos, scale, **variant)
        elif template == "keys":
            value = module.launch(k, pos)
        else:
            flat = (value.flatten(0, 1), pos.flatten(0, 1), candidates.flatten(0, 1))
            value = module.launch(*(part.contiguous() for part in flat)).view_as(value)
    return value


def winners(
    module: ModuleType, scores: Tensor, candidates: Tensor, pos: Tensor, wanted: Tensor, heads: Tensor
) -> Tensor:
    """The winners of a selection: uint8 [B, Hkv, N].

    wanted int [B, Hkv]: how many per head; heads int32 [groups, HEADS]: which heads decide together, padded with -1
    (`evict.sites` of one layer, without its first column).
    """
    args = (scores, candidates, pos, wanted)
    chosen: Tensor = module.launch(*(arg.contiguous() for arg in args), heads)
    return chosen


def append(
    module: ModuleType,
    pools: PagedPools,
    k: Tensor,
    v: Tensor,
    pos: Tensor,
    frozen: Tensor,
    state: Tensor,
    keep: Tensor,
    layer: Tensor,
) -> None:
    """Survivors to the rows of one layer, in order; pages are taken as needed.

    k, v [B, Hkv, N, D]; pos int32, frozen uint8, keep uint8 or bool [B, Hkv, N]; state float32 [states, B, Hkv, N].
    """
    module.launch(
        k,
        v,
        pos.contiguous(),
        frozen.contiguous(),
        state.contiguous(),
        keep.contiguous(),
        **tensors(pools),
        layer=layer,
    )
