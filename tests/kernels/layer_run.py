"""One attention layer without a model: forwards of drawn queries, keys and values through a backend's operators.

Two runs of the same plan on different backends get the same tensors, and must read the same. Memory is reserved
generously; numbers and triggers are the product's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompile.extents import ExtentStore
from kvcompile.kernels import ops
from kvcompile.kernels.layout import Site
from kvcompile.kernels.plan import PolicyPlan
from kvcompile.sequences import Piece, Sequences

Forward = list[Piece]  # of each sequence its piece
Drawn = tuple[Tensor, Tensor, Tensor]


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def drawn(plan: PolicyPlan, forward: Forward, seed: int) -> Drawn:
    """q [B, q_heads, m, D] and k, v [B, kv_heads, m, D] of a forward, right-aligned, laid out as a model gives them."""
    facts, dtype = plan.facts, getattr(torch, plan.facts.dtype)
    width = max(piece.new for piece in forward)
    heads = (facts.q_heads, facts.kv_heads, facts.kv_heads)
    q, k, v = (noise(seed + i, len(forward), width, h, facts.head_dim).to(dtype) for i, h in enumerate(heads))
    return q.transpose(1, 2) * 1.5, k.transpose(1, 2), v.transpose(1, 2)


def forwards(lengths: tuple[int, ...], cuts: int, steps: int) -> list[Forward]:
    """Prompts of these lengths in pieces of at most `cuts` tokens, then so many steps of all sequences."""
    out = []
    for at in range(0, max(lengths), cuts):
        left = [max(0, min(cuts, n - at)) for n in lengths]
        out.append([Piece(n, ends=0 < n == total - at) for n, total in zip(left, lengths, strict=True)])
    return out + [[Piece(1, step=True) for _ in lengths] for _ in range(steps)]


class Run:
    """A plan of one layer on a backend, with a cache of its own; sinks [1, q_heads] where the plan has some."""

    def __init__(self, plan: PolicyPlan, backend: ops.Backend, batch: int, sinks: Tensor | None = None) -> None:
        self.plan, self.backend = plan, backend
        self.store = ExtentStore(plan, batch, getattr(torch, plan.facts.dtype), torch.device("cpu"), sinks)
        self.sequences = Sequences(plan, batch)
        backend.prepare(plan)
        self.key = ops.register(ops.Program(plan, backend))

    @property
    def site(self) -> Site:
        return self.store.site(0)

    def begin(self, lengths: tuple[int, ...]) -> None:
        self.sequences.begin_prefill(list(lengths))

    def prepare(self, forward: Forward) -> str:
        """Numbers and memory of a forward; its phase."""
        store, sequences = self.store, self.sequences
        clock, counts = sequences.numbers(forward)
        fires = sequences.fires(forward, store.lengths())
        store.cover(max(s.seen + p.new for s, p in zip(sequences.each, forward, strict=True)))
        store.reserve_more([piece.new for piece in forward])
        if all(piece.step for piece in forward):
            store.reserve_step(torch.ones(len(forward), dtype=torch.bool))
        for target, source in ((store.clock, clock), (store.counts, counts), (store.fires, fires)):
            target.copy_(torch.as_tensor(source))
        phase = "step" if all(piece.step for piece in forward) else "chunk"
        return "prefill.end" if any(piece.ends for piece in forward) else phase

    def forward(self, forward: Forward, tensors: Drawn) -> Tensor:
        """[B, m, q_heads, D]."""
        phase = self.prepare(forward)
        fires = self.store.fires.clone()
        scale = self.plan.facts.head_dim**-0.5
        out: Tensor = torch.ops.kvc.anchor_v1(*tensors, list(self.site), scale, phase, self.key)
        self.sequences.advance(forward, fires.tolist())
        return out
