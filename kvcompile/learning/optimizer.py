"""The optimiser of gates and multipliers, by kind of gate, with its schedule and its clipping.

Takes a learn plan, gates and objective; gives an `Optimizer` with step, state and way back. Guarantees: one rate
schedule for all parameters, gates clamped after each step where their kind says so, state without pickled objects.
Sources: PruLong (arXiv 2506.17121) for hard concrete and sparsemax, DuoAttention (2410.10819) for clamp01.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvcompile.kernels.errors import KvCompileError
from kvcompile.learning.gates import Gates
from kvcompile.learning.objective import Objective

if TYPE_CHECKING:
    from kvcompile.passes.learning import LearnPlan

BETAS = (0.9, 0.95)
WARM_UP, FLOOR = 0.1, 0.01


@dataclass(frozen=True, slots=True)
class Settings:
    """Rate of the gates, weight decay of gates and multipliers, largest norm of all gradients together, schedule.

    The decay takes lr * decay of each parameter per step. AdamW moves it by about lr, so its size stays below
    1 / decay, about 10: a bound on logits and multipliers that the method depends on.
    """

    lr: float
    decay: float
    clip: float | None
    cosine: bool  # else DuoAttention's trapezium


SETTINGS = {
    "hard_concrete": Settings(1.0, 0.1, 1.0, True),
    "sparsemax": Settings(1.0, 0.1, 1.0, True),
    "clamp01": Settings(0.02, 0.0, None, False),
}


class Optimizer:
    """AdamW over gates and multipliers; the multipliers climb where the gates descend, at the published rate of 1."""

    def __init__(
        self, learn_plan: LearnPlan, gates: Gates, objective: Objective, total_steps: int, lr: float | None = None
    ) -> None:
        """lr: the rate of the gates in place of their kind's own. KvCompileError for one that is not above 0."""
        if lr is not None and not 0 < lr < math.inf:
            raise KvCompileError(f"a learning rate is above 0, not {lr}")
        self.settings = SETTINGS[learn_plan.gate.kind]
        self.gates, self.total_steps, self.taken = gates, total_steps, 0
        self.rates = [self.settings.lr if lr is None else lr]
        groups: list[dict[str, Any]] = [{"params": [gates.logits]}]
        if any(term.kind == "lagrange" for term in learn_plan.terms):
            groups.append({"params": [objective.linear, objective.square], "maximize": True})
            self.rates.append(SETTINGS["hard_concrete"].lr)
        self.adam = torch.optim.AdamW(groups, betas=BETAS, weight_decay=self.settings.decay)
        self._set_rates()

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """All that is moved, gates first."""
        return [weight for group in self.adam.param_groups for weight in group["params"]]

    def factor(self, step: int) -> float:
        """What every rate is multiplied by at a step, counted from 0."""
        plain = cosine if self.settings.cosine else trapezium
        return plain(step, self.total_steps)

    def step(self) -> float:
        """Clip, move, clamp, forget the gradients. Returns the norm that all gradients had together."""
        largest = math.inf if self.settings.clip is None else self.settings.clip
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, largest, error_if_nonfinite=True)
        self.adam.step()
        self.gates.after_step()
        self.adam.zero_grad()
        self.taken += 1
        self._set_rates()
        return float(norm)

    def state(self) -> dict[str, torch.Tensor]:
        """All that a later process needs to go on, beside the parameters themselves: copies, by name."""
        found = {"taken": torch.tensor(self.taken)}
        for index, weight in enumerate(self.parameters):
            found |= {
                f"{index}.{name}": value.detach().cpu().clone() for name, value in self.adam.state[weight].items()
            }
        return found

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from `state()`. KvCompileError for a state of other parameters."""
        for index, weight in enumerate(self.parameters):
            own = {name.partition(".")[2]: value for name, value in state.items() if name.startswith(f"{index}.")}
            if any(value.ndim and value.shape != weight.shape for value in own.values()):
                raise KvCompileError("this state of the optimiser belongs to another model or policy")
            self.adam.state[weight] = {
                name: value.clone() if name == "step" else value.to(weight.device, weight.dtype).clone()
                for name, value in own.items()
            }
        self.taken = int(state["taken"])
        self._set_rates()

    def _set_rates(self) -> None:
        for group, rate in zip(self.adam.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.factor(min(self.taken, self.total_steps - 1))


def cosine(step: int, total: int) -> float:
    """A straight rise over the first tenth of the steps, none of which stands still, then a cosine to 0.01."""
    rise = math.ceil(WARM_UP * total)
    if step < rise:
        return (step + 1) / rise
    done = (step - rise) / max(1, total - 1 - rise)
    return FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * min(1.0, done))) / 2


def trapezium(step: int, total: int) -> float:
    """Up over the first fifth of the steps, down over the last one, never below a tenth."""
    return min(1.0, max((step + 1) / (total / 5), 0.1), max((total - step) / (total / 5), 0.1))
