"""Gates: one number z in [0, 1] per layer and KV head, how it is drawn, and what is learned of it.

Takes the gate of a learn block; gives a module with the parameter `logits`, float32 [layers, kv_heads]. Guarantees:
random numbers come from the generator that is handed in, on the CPU, so a saved generator repeats a run anywhere.
Sources: PruLong (arXiv 2506.17121) after Louizos et al. (1712.01312); DuoAttention (2410.10819); SparseK (2406.16747).
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvcompile.kernels.errors import KvCompileError

if TYPE_CHECKING:
    from kvcompile.passes.learning import LearnPlan

EPS = 1e-8  # u is drawn from (EPS, 1 - EPS)
SPREAD = 0.01  # standard deviation of a hard concrete gate's first logits
LOW, HIGH, TEMPERATURE = -0.1, 1.1, 2 / 3
HARDEST = 0.02  # part of its first temperature that a sparsemax gate ends with


class Gates(nn.Module):
    """What all kinds of gates share. `logits` is what the optimiser moves; higher always means: keep."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.float())

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Gates for one forward, float32 [layers, kv_heads] in [0, 1], differentiable."""
        raise NotImplementedError

    def deterministic(self) -> Tensor:
        """Gates without chance, float32 [layers, kv_heads] in [0, 1], detached."""
        with torch.no_grad():
            return self.sample()

    def scores(self) -> Tensor:
        """What heads are ranked by, float32 [layers, kv_heads] on the CPU, detached."""
        return self.logits.detach().float().cpu().clone()

    def after_step(self) -> None:
        """To be called after each step of the optimiser."""

    def advance(self, progress: float) -> None:
        """Tell the gates which part of the training is over, in [0, 1], before a step."""


class HardConcrete(Gates):
    """Stretched and clipped binary concrete gates; `logits` is log alpha.

    Ranked by log alpha. The published masks rank the deterministic values, of which whole groups per layer are exactly
    0: beyond them, chance decides which heads are chosen. Log alpha orders the others alike and has no such ties.
    """

    def __init__(self, logits: Tensor, low: float = LOW, high: float = HIGH, temperature: float = TEMPERATURE) -> None:
        super().__init__(logits)
        if not (low < 0 < 1 < high and temperature > 0):
            raise KvCompileError(
                f"hard concrete gates need low < 0, high > 1, temperature > 0, not {low:g}, {high:g}, {temperature:g}"
            )
        self.low, self.high, self.temperature = low, high, temperature

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        u = torch.empty(self.logits.shape).uniform_(EPS, 1 - EPS, generator=generator)
        return self.at(u.to(self.logits.device))

    def at(self, u: Tensor) -> Tensor:
        """The gates that uniform numbers give, of the shape of the logits."""
        drawn = torch.sigmoid((u.log() - (1 - u).log() + self.logits) / self.temperature)
        return (drawn * (self.high - self.low) + self.low).clamp(0, 1)

    def closed(self) -> Tensor:
        """The probability that a drawn gate is exactly 0, of the shape of the logits."""
        edge = torch.tensor(-self.low / self.high, dtype=self.logits.dtype, device=self.logits.device)
        return torch.sigmoid(self.temperature * edge.log() - self.logits)

    @torch.no_grad()
    def deterministic(self) -> Tensor:
        """In each layer the expected number of zeros, rounded, is 0, lowest first; the others stay soft."""
        soft = torch.sigmoid(self.logits / self.temperature * 0.8)
        zeros = self.closed().sum(1).round().long()
        rank = soft.argsort(dim=1, stable=True).argsort(dim=1)
        return torch.where(rank < zeros[:, None], torch.zeros_like(soft), soft)


class Clamped(Gates):
    """The number itself, clamped to [0, 1] in the forward and, in place, after each step."""

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        return self.logits.clamp(0, 1)

    @torch.no_grad()
    def after_step(self) -> None:
        self.logits.clamp_(0, 1)


class Sparsemax(Gates):
    """Gates whose sum is an exact number of heads: logits / temperature, projected on {0 <= z <= 1, sum z = heads}.

    The temperature falls in a straight line over the first `ramp` of the training to 2 % of what it was. By then the
    logits lie further apart than that, and all gates but those of equal heads are 0 or 1.
    """

    def __init__(self, logits: Tensor, heads: int, temperature: float = 1.0, ramp: float = 1.0) -> None:
        super().__init__(logits)
        if not 0 <= heads <= logits.numel():
            raise KvCompileError(f"{heads} of {logits.numel()} heads cannot be kept")
        if temperature <= 0 or not 0 < ramp <= 1:
            raise KvCompileError(f"sparsemax gates need a temperature above 0 and a ramp in (0, 1], not {ramp}")
        self.heads, self.first, self.ramp = heads, temperature, ramp
        self.temperature = temperature

    def advance(self, progress: float) -> None:
        done = min(1.0, max(0.0, progress) / self.ramp)
        self.temperature = self.first * (1 - (1 - HARDEST) * done)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        return capped_simplex(self.logits / self.temperature, self.heads)


def capped_simplex(x: Tensor, total: int) -> Tensor:
    """The nearest point to x among those with 0 <= z <= 1 and sum z = total, of x's shape; exact, with its gradient.

    z = clip(x - t, 0, 1). The sum falls in straight pieces as t grows, with breaks at every x and x - 1; t lies
    between the two breaks whose sums enclose `total`. Entries strictly inside share their gradient's mean.
    """
    if not 0 <= total <= x.numel():
        raise ValueError(f"{x.numel()} numbers in [0, 1] never sum to {total}")
    flat = x.flatten().double()
    with torch.no_grad():
        breaks = torch.cat([flat, flat - 1]).sort().values
        sums = _above(flat, breaks) - _above(flat, breaks + 1)  # never rises
        at = max(0, int((sums >= total).sum()) - 1)  # rounding may leave even the first sum below
        after = min(at + 1, len(breaks) - 1)
        middle = (breaks[at] + breaks[after]) / 2
        one = flat - middle >= 1
        free = (flat - middle > 0) & ~one
    t = (flat[free].sum() - (total - int(one.sum()))) / max(1, int(free.sum()))
    return torch.where(free, (flat - t).clamp(0, 1), one.double()).to(x.dtype).view_as(x)


def _above(x: Tensor, t: Tensor) -> Tensor:
    """For each t the sum of max(x_i - t, 0)."""
    rising = x.sort().values
    later = F.pad(rising.flip(0).cumsum(0).flip(0), (0, 1))
    first = torch.searchsorted(rising, t)
    return later[first] - (len(x) - first) * t


def gates_of(plan: LearnPlan, generator: torch.Generator | None = None) -> Gates:
    """The gates that a learn block asks for, at their start, on the CPU. KvCompileError where they cannot be made."""
    shape = (plan.plan.facts.layers, plan.plan.facts.kv_heads)
    gate, options = plan.gate, {name: float(value) for name, value in plan.gate.options}
    start = torch.full(shape, float(gate.init))
    match gate.kind:
        case "hard_concrete":
            kept = {key: options[key] for key in ("low", "high", "temperature") if key in options}
            return HardConcrete(start + SPREAD * torch.randn(shape, generator=generator), **kept)
        case "clamp01":
            return Clamped(start)
        case "sparsemax":
            if plan.keep is None:
                raise KvCompileError(
                    f"sparsemax gates for {plan.heads!r} need the part of the heads to keep: `keep=30%`"
                )
            heads = int(Fraction(plan.keep) * start.numel())
            return Sparsemax(start, heads, **{key: options[key] for key in ("temperature", "ramp") if key in options})
    raise KvCompileError(f"unknown gate {gate.kind!r}: one of hard_concrete, clamp01, sparsemax")
