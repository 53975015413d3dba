"""Learn plans and tokens for the tests of this folder."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompile.passes.facts import model_facts
from kvcompile.passes.learning import LearnPlan, compile_learn
from tests.models import tokens

GATES = {
    "hard_concrete": "hard_concrete(init=4.0)",
    "clamp01": "clamp01(init=1)",
    "sparsemax": "sparsemax(keep=50%)",
}
LOSSES = {
    "hard_concrete": "next_token + lagrange(mean(z), target=50%, ramp=80%)",
    "clamp01": "hidden_mse(answer_tokens) + 0.05 * mean(z)",
    "sparsemax": "next_token",
}
STREAMING = "sink(2) | recent(5)"


def learn_plan(
    model: object, gate: str = "hard_concrete", *, full: str = "all", local: str = STREAMING, loss: str | None = None
) -> LearnPlan:
    """The learn block of a policy whose heads keep `full` or `local`, bound to a model."""
    text = f"""
heads far = table("none.tsv", top=50%)
heads near = rest

policy pair():
    far: keep {full}
    near: keep {local}
    at chunk, step

learn far for pair:
    gate z = {GATES[gate]} per head
    mix z * far + (1 - z) * near
    loss {loss or LOSSES[gate]}
    freeze weights
"""
    return compile_learn(text, model_facts(model))


def rows(batch: int, length: int) -> Tensor:
    """Token ids, int64 [batch, length]."""
    return torch.tensor([tokens(length, seed=seed) for seed in range(batch)])
