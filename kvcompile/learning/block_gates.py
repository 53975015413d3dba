"""Block gates as they are trained and saved: two maps per layer, to a file that `learned(...)` reads.

Takes a plan and random numbers; gives a module whose parameters are those of `kernels.gates`, and `LearnedGates` to
save. Guarantees: random numbers come from the generator that is handed in; a file is replaced in one step.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvcompile.gate_files import gate_bytes
from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.gates import Gate
from kvcompile.learning.masks import write
from kvcompile.passes.learning import DistilPlan
from kvcompile.passes.trained_gates import Trained


class BlockGates(nn.Module):
    """The gates of all layers. rope: angles per position in gate space, [width / 2], or None."""

    def __init__(self, plan: DistilPlan, rope: Tensor | None, generator: torch.Generator) -> None:
        super().__init__()
        facts, gate = plan.facts, plan.gate
        heads, wide = (facts.kv_heads, facts.group) if gate.joined else (facts.q_heads, 1)
        shapes = (
            (heads, wide * facts.head_dim, gate.width),
            (facts.kv_heads, len(gate.landmarks) * facts.head_dim, gate.width),
        )
        made = [[_xavier(shape, generator) for shape in shapes] for _ in range(facts.layers)]
        self.q = nn.ParameterList([nn.Parameter(q) for q, _ in made])
        self.k = nn.ParameterList([nn.Parameter(k) for _, k in made])
        self.rope = rope

    def layer(self, index: int, device: torch.device) -> Gate:
        """One layer's gate on a device; gradients reach the parameters wherever they are."""
        rope = None if self.rope is None else self.rope.to(device)
        return Gate(self.q[index].to(device), self.k[index].to(device), rope=rope)

    def tensors(self) -> dict[str, Tensor]:
        """Copies by the names of files, on the host."""
        found = {} if self.rope is None else {"rope": self.rope}
        for index, (q, k) in enumerate(zip(self.q, self.k, strict=True)):
            found |= {f"layers.{index}.q": q, f"layers.{index}.k": k}
        return {name: tensor.detach().float().cpu().clone() for name, tensor in found.items()}


def _xavier(shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Uniform within sqrt(6 / (in + out)) of 0, for each head."""
    bound = (6 / (shape[1] + shape[2])) ** 0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def trained_on(plan: DistilPlan) -> Trained:
    """What files say of gates that were trained by a plan."""
    gate = plan.gate
    queries, keys = "pooled" if gate.pooled else "each", "raw.k" if gate.raw else "k"
    return Trained(gate.size, gate.offset, queries, keys, gate.landmarks)


@dataclass(frozen=True)
class LearnedGates:
    """What `learn` found for a trained score.

    tensors: by the names of files. provenance: JSON values. history: one dict a step: `step`, `loss` (the mean of the
    divergences, in nats), `recall` (how many of the truly best eighth of a query's units are among the gate's best
    eighth), `grad_norm`.
    """

    tensors: Mapping[str, Tensor]
    trained: Trained
    provenance: dict[str, Any] = field(default_factory=dict)
    history: tuple[dict[str, Any], ...] = ()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a .safetensors file for `learned(...)`; KvCompileError where it cannot be written."""
        target = Path(path)
        if target.suffix != ".safetensors":
            raise KvCompileError(f"cannot save gates as {target.name!r}: name a file that ends in .safetensors")
        write(target, gate_bytes(self.tensors, self.trained, self.provenance))
        return target
