"""The `cpu` backend where a C++ compiler is at hand: generated kernels, and packed SDPA for what has no C++ form.

Takes what `ops.Backend` takes. Guarantees: the same meaning as `reference`, to rounding, whichever way a part ran.
"""

from __future__ import annotations

from torch import Tensor

from kvcompile.kernels import cpu, evict, states
from kvcompile.kernels.cpp_backend import piece
from kvcompile.kernels.cpp_backend.library import cpp_library
from kvcompile.kernels.cpp_backend.reads import Reads
from kvcompile.kernels.cpp_backend.step import Steps
from kvcompile.kernels.layout import Site
from kvcompile.kernels.plan import PolicyPlan
from kvcompile.kernels.states import UNTRAINED, Weights


class Cpp:
    """Every part asks its kernel first; None says that there is none. One instance per optimised model."""

    name = "cpu"

    def __init__(self) -> None:
        self._steps, self._reads = Steps(), Reads()

    def prepare(self, plan: PolicyPlan) -> None:
        """Build the policy's kernels, before any time is taken."""
        cpp_library(plan).build()

    def attend_prefill(
        self, plan: PolicyPlan, site: Site, q: Tensor, k: Tensor, v: Tensor, scale: float, weights: Weights = UNTRAINED
    ) -> Tensor:
        if self._reads.narrows(plan, site):
            out = self._reads.prefill(plan, site, q, k, v, scale)
        else:
            out = piece.attend_prefill(plan, site, q, k, v, scale)
        return cpu.attend_prefill(plan, site, q, k, v, scale, weights) if out is None else out

    def observe(
        self, plan: PolicyPlan, site: Site, q: Tensor, k: Tensor, v: Tensor, scale: float, weights: Weights
    ) -> Tensor:
        return states.observe(plan, site, q, k, v, scale, weights, piece.growth_of(plan))

    def attend_step(
        self, plan: PolicyPlan, site: Site, q: Tensor, k: Tensor, v: Tensor, scale: float, weights: Weights
    ) -> Tensor:
        by = self._reads.step if self._reads.narrows(plan, site) else self._steps.attend
        out = by(plan, site, q, k, v, scale)
        return cpu.attend_step(plan, site, q, k, v, scale, weights) if out is None else out

    def insert(self, plan: PolicyPlan, cls: int, site: Site, k: Tensor, v: Tensor, state: Tensor | None) -> None:
        evict.insert(plan, cls, site, k, v, state)

    def evict_prefill(
        self,
        plan: PolicyPlan,
        cls: int,
        site: Site,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: Tensor | None,
        scale: float,
    ) -> None:
        evict.evict_prefill(plan, cls, site, q, k, v, state, scale, piece.means_of(plan, cls))

    def evict_step(self, plan: PolicyPlan, sites: list[Site], scale: float) -> None:
        """All layers of a step, class by class; a class without a kernel goes by the definition."""
        self._steps.evict(plan, sites, scale)
