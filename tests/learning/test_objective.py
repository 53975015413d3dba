"""Losses: equal to plain formulas, additive over whatever they are cut into, and small in memory."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kvcompile.kernels.errors import KvCompileError
from kvcompile.learning import objective
from kvcompile.learning.gates import gates_of
from kvcompile.learning.mixing import mixed
from kvcompile.learning.objective import Objective, Totals, hidden_mse, next_token, target_at
from kvcompile.passes.sites import find_sites
from tests.learning.learn_plans import learn_plan, rows
from tests.models import random_model


@dataclass
class Lesson:
    ids: Tensor
    labels: Tensor
    answers: Tensor

    def row(self, index: int) -> Lesson:
        return Lesson(*(getattr(self, f.name)[index : index + 1] for f in dataclasses.fields(self)))


def lesson(batch: int = 3, length: int = 24) -> Lesson:
    """Rows with different numbers of labels and answers."""
    ids = rows(batch, length)
    labels = torch.cat([ids[:, 1:], torch.full((batch, 1), -100)], 1)
    answers = torch.zeros_like(ids, dtype=torch.bool)
    for row in range(batch):
        labels[row, : 4 * row] = -100
        answers[row, 6 + row : 10 + 3 * row] = True
    return Lesson(ids, labels, answers)


def opened(model: object) -> Tensor:
    return torch.rand(3, 2, generator=torch.Generator().manual_seed(2))


def gap(model: object, plan: object, target: float, z: Tensor) -> tuple[float, float]:
    made = Objective(plan, 10)
    with torch.no_grad():
        made.linear.fill_(2.0), made.square.fill_(3.0)
    return float(made.lagrange(z, target).detach()), float(1 - z.mean()) - (1 - target)


def test_next_token_is_cross_entropy_over_labels() -> None:
    model, batch, z = random_model(), lesson(), opened(None)
    plan = learn_plan(model, "sparsemax")
    with mixed(model, find_sites(model), plan) as mix, torch.no_grad():
        logits = model.lm_head(mix(batch.ids, z).student)
        truth = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100)
        loss, figures = Objective(plan, 10).loss(model, mix, batch, gates_of(plan), z, 0)
    assert float(loss) == pytest.approx(float(truth), rel=1e-5)
    assert figures["next_token"] == figures["loss"] == pytest.approx(float(truth), rel=1e-5)
    assert figures["kept"] == pytest.approx(float(z.mean()))


@pytest.mark.parametrize("positions", [1, 7, 64])
def test_logits_come_in_blocks_with_the_same_loss_and_gradient(positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = random_model(), lesson()
    hidden = torch.randn(3, 24, 128, requires_grad=True)
    total = Totals.of([batch]).labels
    truth = F.cross_entropy(model.lm_head(hidden).flatten(0, 1), batch.labels.flatten(), ignore_index=-100)
    wanted = torch.autograd.grad(truth, hidden)[0]
    monkeypatch.setattr(objective, "POSITIONS", positions)
    sizes: list[int] = []
    model.lm_head.register_forward_hook(lambda _, args, out: sizes.append(len(out)))
    loss = next_token(model, hidden, batch.labels, total)
    assert float(loss.detach()) == pytest.approx(float(truth.detach()), rel=1e-5)
    assert torch.allclose(torch.autograd.grad(loss, hidden)[0], wanted, atol=1e-6)
    assert max(sizes) <= positions and sum(sizes) == 2 * total  # once more in the backward pass


def test_hidden_states_are_compared_at_answers_alone() -> None:
    model, batch, z = random_model(), lesson(), opened(None)
    plan = learn_plan(model, "clamp01")
    with mixed(model, find_sites(model), plan) as mix, torch.no_grad():
        found = mix(batch.ids, z)
        loss, figures = Objective(plan, 10).loss(model, mix, batch, gates_of(plan), z, 0)
    each = [
        float(((found.student[b, t] - found.teacher[b, t]) ** 2).mean()) for b, t in batch.answers.nonzero().tolist()
    ]
    assert figures["hidden_mse"] == pytest.approx(sum(each) / len(each), rel=1e-4) and figures["hidden_mse"] > 0.01
    assert float(loss) == pytest.approx(figures["hidden_mse"] + 0.05 * float(z.mean()), rel=1e-5)


def test_open_gates_are_no_distance_from_the_teacher() -> None:
    model, batch = random_model(), lesson()
    plan = learn_plan(model, "clamp01")
    with mixed(model, find_sites(model), plan) as mix, torch.no_grad():
        found = mix(batch.ids, torch.ones(3, 2))
    assert float(hidden_mse(found, batch.answers, 1)) == pytest.approx(0, abs=1e-9)


def test_the_lagrangian_has_both_terms_and_both_signs() -> None:
    plan = learn_plan(random_model())
    for kept, target in ((0.75, 0.5), (0.25, 0.5)):
        value, apart = gap(None, plan, target, torch.full((3, 2), kept))
        assert apart == pytest.approx(target - kept)
        assert value == pytest.approx(2 * apart + 3 * apart**2)
    made, z = Objective(plan, 10), torch.full((3, 2), 0.75, requires_grad=True)
    made.lagrange(z, 0.5).backward()
    assert float(made.linear.grad) == pytest.approx(-0.25) and float(made.square.grad) == pytest.approx(0.0625)
    assert z.grad.tolist() == [[0.0, 0.0]] * 3  # both multipliers start at 0


def test_the_target_falls_in_a_straight_line_over_the_ramp() -> None:
    term = next(t for t in learn_plan(random_model()).terms if t.kind == "lagrange")
    assert [target_at(term, step, 10) for step in (0, 2, 4, 8, 9)] == pytest.approx([1, 0.875, 0.75, 0.5, 0.5])
    assert target_at(term, 4, 6) == pytest.approx(0.6)  # ceil(0.8 * 6) = 5 steps
    assert target_at(dataclasses.replace(term, ramp=None), 0, 10) == 0.5


@pytest.mark.parametrize("gate", ["hard_concrete", "clamp01"])
def test_parts_add_up_to_the_whole(gate: str) -> None:
    """Rows in one batch, one by one, and as if on two processes: the same loss, gradients and figures."""
    model, batch = random_model(), lesson()
    plan = learn_plan(model, gate)
    found = []
    with mixed(model, find_sites(model), plan) as mix:
        for cut in (
            [[batch]],
            [[batch.row(0), batch.row(1), batch.row(2)]],
            [[batch.row(0)], [batch.row(1), batch.row(2)]],
        ):
            gates, made = gates_of(plan, torch.Generator().manual_seed(0)), Objective(plan, 10)
            with torch.no_grad():
                made.linear.fill_(-2.0), made.square.fill_(3.0)
                gates.logits.mul_(0.1)
            totals, figures = Totals.of([part for process in cut for part in process]), []
            at = 0
            for process in cut:
                generator = torch.Generator().manual_seed(1)
                figures.append(
                    made.backward(
                        model, mix, process, gates, generator, 3, draws=2, first=at, sequences=3, totals=totals
                    )
                )
                at += sum(len(part.ids) for part in process)
            loss, kept = (sum(f[name] for f in figures) for name in ("loss", "kept"))
            found.append((loss, gates.logits.grad, made.linear.grad, kept))
    for loss, grad, linear, kept in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-4) and kept == pytest.approx(found[0][3], rel=1e-5)
        assert torch.allclose(grad, found[0][1], rtol=1e-3, atol=1e-6)
        assert (linear is None) == (gate == "clamp01")
        assert linear is None or float(linear) == pytest.approx(float(found[0][2]), rel=1e-4)


def test_every_draw_serves_its_own_sequences() -> None:
    """Two draws for two texts are what each text gives under its own draw, halved."""
    model, batch = random_model(), lesson(2)
    plan, grads = learn_plan(model), []
    texts = [batch.row(0), batch.row(1)]
    with mixed(model, find_sites(model), plan) as mix:
        for together in (True, False):
            gates, generator = gates_of(plan, torch.Generator().manual_seed(0)), torch.Generator().manual_seed(4)
            with torch.no_grad():
                gates.logits.mul_(0.1)
            objective = Objective(plan, 10)
            if together:
                objective.backward(model, mix, [batch], gates, generator, 3, draws=2)
            else:
                for text in texts:
                    loss, _ = objective.loss(
                        model, mix, text, gates, gates.sample(generator), 3, totals=Totals.of([batch]), share=0.5
                    )
                    loss.backward()
            grads.append(gates.logits.grad)
    assert torch.allclose(grads[0], grads[1], rtol=1e-3, atol=1e-6) and bool((grads[0] != 0).any())
    with (
        pytest.raises(KvCompileError, match="1 to 2 draws of gates, not 3"),
        mixed(model, find_sites(model), plan) as mix,
    ):
        Objective(plan, 10).backward(model, mix, [batch], gates, generator, 3, draws=3)


def test_sparsemax_is_told_how_far_the_training_is() -> None:
    model, batch = random_model(), lesson(1)
    plan = learn_plan(model, "sparsemax")
    gates = gates_of(plan)
    with mixed(model, find_sites(model), plan) as mix:
        figures = Objective(plan, 10).backward(model, mix, [batch], gates, None, 5)
    assert gates.temperature == pytest.approx(0.51) and figures["kept"] == pytest.approx(0.5)
    assert bool((gates.logits.grad != 0).all())


def test_what_cannot_be_scored_is_refused() -> None:
    model, batch = random_model(), lesson()
    nothing = Lesson(batch.ids, torch.full_like(batch.labels, -100), torch.zeros_like(batch.answers))
    for gate, why in (("hard_concrete", "nothing to predict"), ("clamp01", "nothing to compare")):
        plan = learn_plan(model, gate)
        with mixed(model, find_sites(model), plan) as mix, pytest.raises(KvCompileError, match=why):
            Objective(plan, 10).loss(model, mix, nothing, gates_of(plan), torch.ones(3, 2), 0)
    with pytest.raises(KvCompileError, match="1 step or more"):
        Objective(learn_plan(model), 0)
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(KvCompileError, match="final_logit_softcapping"):
        next_token(model, torch.zeros(1, 2, 128), torch.zeros(1, 2, dtype=torch.int64), 2)
