"""The optimiser: bounds, directions, schedules, and gates that find the head that matters."""

from __future__ import annotations

import math

import pytest
import torch

from kvcompile.kernels.errors import KvCompileError
from kvcompile.learning.gates import gates_of
from kvcompile.learning.objective import Objective
from kvcompile.learning.optimizer import Optimizer, cosine, trapezium
from tests.learning.learn_plans import learn_plan
from tests.models import random_model

MODEL = random_model()


def made(gate: str = "hard_concrete", steps: int = 100, lr: float | None = None) -> tuple:
    plan = learn_plan(MODEL, gate)
    gates, objective = gates_of(plan, torch.Generator().manual_seed(0)), Objective(plan, steps)
    return gates, objective, Optimizer(plan, gates, objective, steps, lr)


def test_decay_bounds_what_always_climbs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A multiplier whose gradient never changes its sign ends at lr / (lr * decay) = 10, less AdamW's eps."""
    gates, objective, optimizer = made(steps=400)
    monkeypatch.setattr(optimizer, "factor", lambda step: 1.0)
    optimizer._set_rates()
    for _ in range(300):
        objective.linear.grad, objective.square.grad = torch.tensor(-0.01), torch.tensor(0.01)
        gates.logits.grad = torch.full_like(gates.logits, 0.01)
        optimizer.step()
    assert float(objective.linear.detach()) == pytest.approx(-9.99999, abs=1e-5)  # up the gradient
    assert float(objective.square.detach()) == pytest.approx(9.99999, abs=1e-5)
    assert torch.allclose(gates.logits, torch.tensor(-9.99999), atol=1e-5)  # down it


def test_clipping_is_joint() -> None:
    gates, objective, optimizer = made()
    gates.logits.grad = torch.full_like(gates.logits, 3.0)
    objective.linear.grad, objective.square.grad = torch.tensor(4.0), torch.tensor(-5.0)
    seen = {}
    optimizer.adam.register_step_pre_hook(
        lambda *_: seen.update(gates=gates.logits.grad.clone(), square=objective.square.grad.clone())
    )
    norm = math.sqrt(6 * 9 + 16 + 25)
    assert optimizer.step() == pytest.approx(norm)
    assert torch.allclose(seen["gates"], torch.tensor(3 / norm)) and float(seen["square"]) == pytest.approx(-5 / norm)
    assert gates.logits.grad is None


def test_each_kind_has_the_published_numbers() -> None:
    _, _, optimizer = made()
    (gates, multipliers), plain = optimizer.adam.param_groups, made("clamp01")[2].adam.param_groups
    assert [g["weight_decay"] for g in (gates, multipliers)] == [0.1, 0.1] and gates["betas"] == (0.9, 0.95)
    assert multipliers["maximize"] and not gates["maximize"] and optimizer.rates == [1.0, 1.0]
    assert len(plain) == 1 and plain[0]["weight_decay"] == 0 and made("clamp01")[2].rates == [0.02]
    assert len(made("sparsemax")[2].adam.param_groups) == 1  # no Lagrangian, no multipliers
    assert made(lr=0.3)[2].rates == [0.3, 1.0]


def test_schedules() -> None:
    rates = [cosine(step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)]) and rates[10] == 1
    assert rates[99] == pytest.approx(0.01) and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[10 + 44] + rates[10 + 45] == pytest.approx(1.01, abs=0.02)
    assert [trapezium(step, 100) for step in (0, 1, 9, 19, 50, 80, 90, 99)] == pytest.approx(
        [0.1, 0.1, 0.5, 1, 1, 1, 0.5, 0.1]
    )
    for plain in (cosine, trapezium):
        assert all(0 < plain(step, total) <= 1 for total in (1, 2, 3, 11) for step in range(total))


def test_rates_follow_the_schedule_and_gates_are_clamped() -> None:
    gates, _, optimizer = made("clamp01", steps=10)
    for step in range(10):
        assert optimizer.adam.param_groups[0]["lr"] == pytest.approx(0.02 * trapezium(step, 10))
        gates.logits.grad = torch.full_like(gates.logits, -1.0)
        optimizer.step()
        assert gates.logits.tolist() == [[1.0] * 2] * 3


def test_a_state_goes_on_where_it_was_taken() -> None:
    def moved(gates, objective, optimizer, seeds) -> None:
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            for weight in optimizer.parameters:
                weight.grad = torch.randn(weight.shape, generator=generator)
            optimizer.step()

    gates, objective, optimizer = made(steps=12)
    moved(gates, objective, optimizer, range(5))
    state, at = optimizer.state(), [w.detach().clone() for w in optimizer.parameters]
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    moved(gates, objective, optimizer, range(5, 12))
    other = made(steps=12)
    with torch.no_grad():
        for weight, value in zip(other[2].parameters, at, strict=True):
            weight.copy_(value)
    other[2].restore(state)
    moved(*other, range(5, 12))
    assert all(torch.equal(a, b) for a, b in zip(optimizer.parameters, other[2].parameters, strict=True))
    wrong = {name: value.repeat(2, 1) if value.ndim else value for name, value in state.items()}
    with pytest.raises(KvCompileError, match="another model"):
        made()[2].restore(wrong)


@pytest.mark.parametrize("lr", [0.0, -1.0, math.inf, math.nan])
def test_rates_are_positive(lr: float) -> None:
    with pytest.raises(KvCompileError, match="above 0"):
        made(lr=lr)


def test_gradients_that_are_no_numbers_stop_the_run() -> None:
    gates, _, optimizer = made()
    gates.logits.grad = torch.full_like(gates.logits, math.nan)
    with pytest.raises(RuntimeError, match="non-finite"):
        optimizer.step()


@pytest.mark.parametrize("gate", ["hard_concrete", "sparsemax"])
def test_gates_find_the_heads_that_a_plain_loss_needs(gate: str) -> None:
    """Without a model: three heads cost when they are closed, the others nothing."""
    worth = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.5, 0.0]])
    gates, objective, optimizer = made(gate, steps=300)
    generator = torch.Generator().manual_seed(3)
    for step in range(300):
        gates.advance(step / 300)
        for _ in range(4):
            z = gates.sample(generator)
            loss = (worth * (1 - z)).sum() / 4
            if gate == "hard_concrete":
                loss = loss + objective.lagrange(z, max(0.5, 1 - step / 480)) / 4
            loss.backward()
        optimizer.step()
    best = gates.scores().flatten().argsort(descending=True)[:3].sort().values
    assert best.tolist() == [0, 3, 4]
    assert gates.scores().flatten()[best].min() > gates.scores().flatten()[[1, 2, 5]].max() + 0.3
    if gate == "sparsemax":
        assert gates.deterministic().tolist() == [[1, 0], [0, 1], [1, 0]]
