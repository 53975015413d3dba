"""Both sides of a property of narrowed reads: generated C++ and the definition, forward for forward."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompile.kernels import ops
from kvcompile.kernels.cpp_backend.backend import Cpp
from kvcompile.kernels.cpp_backend.reads import Reads
from kvcompile.kernels.plan import PolicyPlan
from tests.kernels.layer_run import Run, drawn, forwards, noise

CLOSE = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 2e-3}


class Counted(Reads):
    """How often a kernel read, and how often it had to be the definition."""

    def __init__(self) -> None:
        super().__init__()
        self.ran = self.left = 0

    def step(self, *args: object) -> Tensor | None:  # type: ignore[override]
        return self._count(super().step(*args))  # type: ignore[arg-type]

    def prefill(self, *args: object) -> Tensor | None:  # type: ignore[override]
        return self._count(super().prefill(*args))  # type: ignore[arg-type]

    def _count(self, out: Tensor | None) -> Tensor | None:
        self.ran, self.left = self.ran + (out is not None), self.left + (out is None)
        return out


def same(plan: PolicyPlan, lengths: tuple[int, ...], cuts: int, steps: int, seed: int, slow: int = 0) -> None:
    """Both backends through the same forwards; `slow` of them run by the definition."""
    backend, sinks = Cpp(), noise(seed, 1, plan.facts.q_heads) if plan.facts.sinks else None
    backend._reads = counted = Counted()
    ours, truth = (Run(plan, b, len(lengths), sinks) for b in (backend, ops.backend("reference")))
    for run in (ours, truth):
        run.begin(lengths)
    close = CLOSE[plan.facts.dtype]
    for i, forward in enumerate(forwards(lengths, cuts, steps)):
        tensors = drawn(plan, forward, seed + 10 * i)
        got, want = (run.forward(forward, tensors) for run in (ours, truth))
        torch.testing.assert_close(got, want, rtol=close, atol=close)
        assert ours.store.length.tolist() == truth.store.length.tolist()
        assert torch.equal(ours.store.picked, truth.store.picked)
        for states in zip(_states(ours), _states(truth), strict=True):
            torch.testing.assert_close(*states)
    assert counted.ran and counted.left == slow


def _states(run: Run) -> list[Tensor]:
    """The states of each row's entries, those in position order."""
    rows = []
    for r, n in enumerate(run.site.length.tolist()):
        slots = run.site.slots(r, 0, n)
        rows.append(run.site.state[:, slots[run.site.pos[slots].argsort()]])
    return rows
