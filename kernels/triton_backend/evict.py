"""Launches the eviction after a step: all layers, sequences and heads of one head class at once."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from kvcompile.kernels.plan import PolicyPlan
from kvcompile.kernels.triton_backend.pools import PagedPools, tensors


def sites(plan: PolicyPlan, cls: int, together: bool, device: torch.device) -> Tensor:
    """Which heads decide with which: int32 [n, 1 + heads], a layer and its heads, padded with -1.

    together: whether the heads of a layer share or compete; else each is a site of its own.
    """
    groups = [(layer, plan.heads(layer, cls)) for layer in range(plan.facts.layers)]
    if not together:
        groups = [(layer, (head,)) for layer, heads in groups for head in heads]
    groups = [(layer, heads) for layer, heads in groups if heads]
    width = max((len(heads) for _, heads in groups), default=1)
    lines = [[layer, *heads, *[-1] * (width - len(heads))] for layer, heads in groups]
    return torch.tensor(lines, dtype=torch.int32, device=device).reshape(-1, 1 + width)


@dataclass(frozen=True)
class EvictStep:
    """The evict kernel of one head class with its sites and scratch."""

    module: ModuleType
    sites: Tensor
    scratch: Tensor

    @classmethod
    def prepare(
        cls, module: ModuleType, plan: PolicyPlan, index: int, batch: int, capacity: int, device: torch.device
    ) -> EvictStep:
        """capacity: the most entries that a row of this class may have, the new ones included."""
        where = sites(plan, index, module.TOGETHER, device)
        return cls(module, where, module.make_scratch(where, batch, capacity))

    def of(self, sites: Tensor) -> EvictStep:
        """The same for some sites only, int32 [n, 1 + heads]."""
        return EvictStep(self.module, sites.contiguous(), self.scratch)

    def __call__(
        self,
        pools: PagedPools,
        counts: Tensor,
        fires: Tensor,
        now: Tensor,
        prompt: Tensor,
        score: Tensor | None,
        reach: Tensor | None = None,
    ) -> None:
        """Drop the losers in place and give pages back.

        counts int [layers, counts, B]; fires uint8 [B]: rows of a sequence with 0 are left alone; now, prompt
        int [B]; score: `DecodeStep.score`, or None where the policy judges by states or regions alone; reach int32
        [layers], the windows of a class that slides.
        """
        self.module.launch(
            **tensors(pools), sites=self.sites, counts=counts, fires=fires, now=now, prompt=prompt, score=score,
            scratch=self.scratch, **({} if reach is None else {"reach": reach}),
        )  # fmt: skip
