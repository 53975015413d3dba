"""The training step through torch.compile: the same loss and gradients, one graph for all layers, none broken."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from kvcompile.learning import mixing
from kvcompile.learning.gates import gates_of
from kvcompile.learning.mixing import mixed
from kvcompile.learning.objective import Objective
from kvcompile.learning.optimizer import Optimizer
from kvcompile.passes.sites import find_sites
from tests.learning.learn_plans import learn_plan
from tests.learning.test_objective import lesson
from tests.models import random_model

STEPS = 3


def trained(gate: str, compile: object, *, again: bool = False, keep: str = "sink(2) | recent(5)") -> tuple:
    """Losses and gradients of some steps."""
    model = random_model()
    if again:
        model.gradient_checkpointing_enable()
    plan = learn_plan(model, gate, local=keep)
    gates, made = gates_of(plan, torch.Generator().manual_seed(0)), Objective(plan, STEPS)
    optimizer, generator = Optimizer(plan, gates, made, STEPS), torch.Generator().manual_seed(1)
    with torch.no_grad():
        gates.logits.mul_(0.2)
    losses, grads = [], []
    with mixed(model, find_sites(model), plan, compile=compile) as mix:
        for step in range(STEPS):
            losses.append(made.backward(model, mix, [lesson()], gates, generator, step)["loss"])
            grads.append(gates.logits.grad.clone())
            optimizer.step()
    return torch.tensor(losses), torch.stack(grads)


@pytest.mark.parametrize(
    ("gate", "again", "keep", "graphs"),
    [
        ("hard_concrete", False, "sink(2) | recent(5)", 1),
        ("clamp01", True, "random(4, 1) | recent(3)", 2),
    ],
)
def test_a_compiled_step_is_the_same_step(gate: str, again: bool, keep: str, graphs: int) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    plain = trained(gate, "off", again=again, keep=keep)
    compiled = trained(gate, counter, again=again, keep=keep)
    assert torch.allclose(plain[0], compiled[0], atol=1e-5)
    assert torch.allclose(plain[1], compiled[1], atol=1e-5) and bool((plain[1] != 0).any((1, 2)).all())
    # fullgraph=True: a break would have been an error. One graph for three layers and three steps, and a teacher's own.
    assert counter.frame_count == graphs


def test_texts_of_other_lengths_need_no_graph_each() -> None:
    torch._dynamo.reset()
    model, counter = random_model(), CompileCounterWithBackend("eager")
    plan, z = learn_plan(model), torch.full((3, 2), 0.5)
    found, truth = [], []
    for compile, into in ((counter, found), ("off", truth)):
        with mixed(model, find_sites(model), plan, compile=compile) as mix, torch.no_grad():
            for length in (70, 90, 100, 81, 50, 126):
                into.append(mix(lesson(2, length).ids, z).student)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, truth, strict=True))
    assert counter.frame_count == 1


def test_a_layer_with_a_forward_of_its_own_is_left_uncompiled() -> None:
    model = random_model()
    layer, calls = model.model.layers[1], []
    plain = layer.forward

    def wrapped(*args: object, **kwargs: object) -> object:
        calls.append(1)
        return plain(*args, **kwargs)

    layer.forward = wrapped
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    with mixed(model, find_sites(model), learn_plan(model), compile=counter) as mix, torch.no_grad():
        mix(lesson().ids, torch.ones(3, 2))
    assert calls == [1] and counter.frame_count == 1 and layer.forward is wrapped
    assert isinstance(layer.forward, mixing._MixedForward) is False
