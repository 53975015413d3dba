"""Launches decode attention: one layer of one step, append and scores included."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from kvcompile.kernels.triton_backend.pools import PagedPools, tensors


@dataclass(frozen=True)
class DecodeStep:
    """The decode kernel of a policy with its scratch, which all layers share.

    score: float32 [all rows, capacity], what the eviction after the step judges; None where no class does.
    """

    module: ModuleType
    scratch: dict[str, Tensor | int]
    score: Tensor | None

    @classmethod
    def prepare(
        cls,
        module: ModuleType,
        layers: int,
        rows: int,
        capacity: int,
        device: torch.device,
        target: int | None = None,
    ) -> DecodeStep:
        """rows: of one layer, batch times KV heads. capacity: the most entries that any row may have.

        target: work units that a launch aims at; None: as many as the file says per multiprocessor.
        """
        wants = module.WRITES_SCORE
        score = torch.zeros(layers * rows, capacity, device=device) if wants else None
        return cls(module, module.make_scratch(rows, capacity, device, target), score)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pools: PagedPools,
        now: Tensor,
        active: Tensor,
        layer: Tensor,
        scale: float,
        **variant: float | Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Append and attend.

        q [B, Hq, D]; k, v [B, Hkv, D], last dimension contiguous; now int [B]: the new token's position;
        active int [B]: 0 where a sequence has no token in this step; layer int [1]; all on the device.
        variant: as `attend.variant`, where the file has them.
        Returns out [B, 1, Hq, D] in q's dtype (zeros where inactive) and lse float32 [B, Hq], natural.
        """
        with_pools = tensors(pools)
        out, lse = self.module.launch(
            q, k, v, now, active, **with_pools, layer=layer, scale=scale, score=self.score, scratch=self.scratch,
            **variant,
        )  # fmt: skip
        return out, lse
