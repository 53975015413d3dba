"""Gates: golden values, exact projections against brute force, gradients, ranks."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from kvcompile.kernels.errors import KvCompileError
from kvcompile.learning.gates import Clamped, HardConcrete, Sparsemax, capped_simplex, gates_of
from tests.learning.learn_plans import learn_plan
from tests.models import random_model

LOG_ALPHA = torch.tensor([[4, 2, 0.5, 0, -0.5, -2, -4, 4.5]])


def near(value: Tensor, golden: list[float], digits: int) -> bool:
    return torch.allclose(value.flatten().double(), torch.tensor(golden).double(), rtol=0, atol=0.6 * 10**-digits)


def test_golden_values_of_hard_concrete() -> None:
    """Made by running the published code on the same numbers."""
    gates = HardConcrete(LOG_ALPHA)
    closed = [0.0036894, 0.0266333, 0.1092333, 0.1681778, 0.2500029, 0.5990247, 0.9169343, 0.0022410]
    assert near(gates.closed().detach(), closed, 7)
    soft = [0.9918374, 0.9168273, 0.6456563, 0.5, 0.3543437, 0, 0, 0.9955037]
    assert near(gates.deterministic(), soft, 7)
    for u, golden in (
        (0.5, [1, 1, 0.7150, 0.5, 0.2850, 0, 0, 1]),
        (0.1, [1, 0.4119, 0, 0, 0, 0, 0, 1]),
        (0.01, [0.2487, 0, 0, 0, 0, 0, 0, 0.4573]),
    ):
        assert near(gates.at(torch.full_like(LOG_ALPHA, u)).detach(), golden, 4)


def test_drawn_gates_are_zero_as_often_as_they_should() -> None:
    gates = HardConcrete(LOG_ALPHA.expand(4000, 8).clone())
    drawn = gates.sample(torch.Generator().manual_seed(0))
    assert bool(((drawn >= 0) & (drawn <= 1)).all()) and bool(drawn.isfinite().all())
    assert torch.allclose((drawn == 0).float().mean(0), gates.closed()[0], atol=0.02)


def test_a_generator_repeats_its_gates() -> None:
    gates = HardConcrete(LOG_ALPHA)
    first, other = (gates.sample(torch.Generator().manual_seed(seed)) for seed in (7, 8))
    assert torch.equal(first, gates.sample(torch.Generator().manual_seed(7))) and not torch.equal(first, other)


def test_deterministic_zeros_are_counted_layer_by_layer() -> None:
    low, high = torch.full((1, 4), -5.0), torch.full((1, 4), 5.0)
    found = HardConcrete(torch.cat([low, high])).deterministic()
    assert (found == 0).sum(1).tolist() == [4, 0]
    ties = HardConcrete(torch.full((1, 4), -2.0)).deterministic()  # 0.599 * 4 rounds to 2: lower heads first
    assert (ties == 0).tolist() == [[True, True, False, False]]


def test_ranks_have_no_ties_where_deterministic_values_do() -> None:
    gates = HardConcrete(torch.tensor([[-5.0, -6.0, 3.0], [2.0, 4.0, 1.0]]))
    assert gates.deterministic()[0, :2].tolist() == [0, 0]
    assert gates.scores().tolist() == [[-5, -6, 3], [2, 4, 1]]
    order = gates.scores().flatten().argsort()
    assert bool((gates.deterministic().flatten()[order].diff() >= 0).all())


def test_the_start_of_each_kind() -> None:
    model = random_model()
    seeded = lambda seed: gates_of(learn_plan(model), torch.Generator().manual_seed(seed))  # noqa: E731
    logits = seeded(0).logits.detach()
    assert logits.shape == (3, 2) and logits.dtype == torch.float32
    assert bool(((logits - 4).abs() < 0.05).all()) and len(logits.unique()) == 6
    assert torch.equal(logits, seeded(0).logits) and not torch.equal(logits, seeded(1).logits)
    assert gates_of(learn_plan(model, "clamp01")).sample().tolist() == [[1.0] * 2] * 3
    assert gates_of(learn_plan(model, "sparsemax")).sample().tolist() == [[0.5] * 2] * 3


def test_clamped_gates_stay_within_their_range_and_can_leave_its_ends() -> None:
    gates = Clamped(torch.tensor([[1.0, 0.0, 0.4]]))
    gates.sample().sum().backward()
    assert gates.logits.grad.tolist() == [[1, 1, 1]]  # at the ends, too: a gate starts at 1
    with torch.no_grad():
        gates.logits += torch.tensor([[0.5, -0.5, 0.1]])
    assert gates.sample().tolist() == [[1.0, 0.0, 0.5]]
    gates.after_step()
    assert gates.logits.tolist() == [[1.0, 0.0, 0.5]]


def brute_force(x: Tensor, total: int) -> Tensor:
    """Every way to say which entries are 1, which are 0 and which between; the nearest that is allowed."""
    best, found = float("inf"), None
    for kinds in itertools.product((0, 1, 2), repeat=len(x)):
        z = torch.tensor([float(kind == 1) for kind in kinds], dtype=x.dtype)
        free = torch.tensor([kind == 2 for kind in kinds])
        if free.any():
            z[free] = x[free] - (x[free].sum() - (total - z.sum())) / free.sum()
        if abs(float(z.sum()) - total) > 1e-9 or float(z.min()) < -1e-12 or float(z.max()) > 1 + 1e-12:
            continue
        apart = float(((z - x) ** 2).sum())
        if apart < best:
            best, found = apart, z
    assert found is not None
    return found


@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("total", range(6))
def test_the_projection_is_the_nearest_point(total: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(total)
    for _ in range(5):
        x = spread * torch.randn(5, generator=generator, dtype=torch.float64)
        z = capped_simplex(x, total)
        assert torch.allclose(z, brute_force(x, total), atol=1e-9)
        assert abs(float(z.sum()) - total) < 1e-9


def test_projections_of_equal_and_of_far_numbers() -> None:
    assert torch.allclose(capped_simplex(torch.zeros(2, 3), 2), torch.full((2, 3), 1 / 3))
    assert capped_simplex(torch.tensor([100.0, -3, 50, 2]), 2).tolist() == [1, 0, 1, 0]
    assert capped_simplex(torch.tensor([5.0, 5, 5, -100]), 1).tolist() == pytest.approx([1 / 3] * 3 + [0])
    with pytest.raises(ValueError, match="never sum to 3"):
        capped_simplex(torch.zeros(2), 3)


def test_the_gradient_of_the_projection_is_exact() -> None:
    x = torch.tensor([0.3, -0.2, 2.0, 0.1, -3.0], dtype=torch.float64, requires_grad=True)
    z = capped_simplex(x, 2)
    assert (z == 1).any() and (z == 0).any() and int(((z > 0) & (z < 1)).sum()) == 3  # all three kinds
    assert torch.autograd.gradcheck(lambda y: capped_simplex(y, 2), x)
    hard = torch.tensor([9.0, -9.0], requires_grad=True)
    capped_simplex(hard, 1).sum().backward()
    assert hard.grad.tolist() == [0, 0]


def test_sparsemax_hardens_and_always_holds_its_count() -> None:
    gates = Sparsemax(torch.tensor([[0.4, 0.1, 0.0], [-0.1, 0.3, 0.2]]), 3, ramp=0.5)
    soft = gates.sample()
    assert bool(((soft > 0) & (soft < 1)).all()) and float(soft.sum().detach()) == pytest.approx(3)
    gates.advance(0.25)
    assert gates.temperature == pytest.approx(0.51)
    gates.advance(0.5)
    assert gates.temperature == pytest.approx(0.02)
    assert gates.sample().tolist() == [[1, 0, 0], [0, 1, 1]]
    gates.advance(0.9)
    assert gates.temperature == pytest.approx(0.02)


def test_gates_that_cannot_be() -> None:
    with pytest.raises(KvCompileError, match="low < 0"):
        HardConcrete(LOG_ALPHA, low=0.1)
    with pytest.raises(KvCompileError, match="7 of 6 heads"):
        Sparsemax(torch.zeros(2, 3), 7)
    with pytest.raises(KvCompileError, match="temperature above 0"):
        Sparsemax(torch.zeros(2, 3), 2, temperature=0)
