"""Linear layers of an optimised model: when they run by the kernel, and that nobody else's change is lost."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import kvcompile
from kvcompile.kernels.cpp_backend import project as projecting
from kvcompile.kernels.cpp_backend.build import says_why_not
from kvcompile.projections import Projections
from tests.models import random_model, tokens

pytestmark = [
    pytest.mark.skipif(says_why_not() is not None, reason=str(says_why_not())),
    pytest.mark.usefixtures("small_linear_layers"),
]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of what the kernel has taken."""
    found: list[tuple[int, ...]] = []
    plain = projecting.Project.__call__

    def counted(self: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        out = plain(self, x, weight, bias)
        if out is not None:
            found.append(tuple(weight.shape))
        return out

    monkeypatch.setattr(projecting.Project, "__call__", counted)
    return found


def linears(model: nn.Module) -> list[nn.Linear]:
    return [m for m in model.modules() if type(m) is nn.Linear]


def ids(n: int) -> Tensor:
    return torch.tensor([tokens(n)])


def prefilled(model: Any, n: int = 12) -> Any:
    with torch.no_grad():
        return model(ids(n)).past_key_values


def test_a_step_runs_each_linear_layer_by_the_kernel_and_means_the_same(calls: list[tuple[int, ...]]) -> None:
    model = random_model()
    with torch.no_grad():
        truth = model(ids(13)).logits[:, -1]
    kvcompile.optimize(model, "keep_all", backend="cpu")
    cache = prefilled(model)
    assert not calls  # a prompt's rows are many
    with torch.no_grad():
        found = model(ids(13)[:, 12:], past_key_values=cache).logits[:, -1]
    assert sorted(calls) == sorted(tuple(m.weight.shape) for m in linears(model))
    torch.testing.assert_close(found, truth, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", ("compile", "mode", "autocast", "profiler", "reference"))
def test_what_is_watched_or_compiled_runs_torchs_own(how: str, calls: list[tuple[int, ...]]) -> None:
    options = {"compile": "eager"} if how == "compile" else {"backend": "reference"} if how == "reference" else {}
    model = kvcompile.optimize(random_model(), "keep_all", **{"backend": "cpu", **options})
    cache, step = prefilled(model), ids(1)
    with torch.no_grad():
        if how == "mode":
            counter = FlopCounterMode(display=False)
            with counter:
                model(step, past_key_values=cache)
            assert counter.get_total_flops() > 0
        elif how == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                model(step, past_key_values=cache)
        elif how == "profiler":
            with torch.profiler.profile() as profile:
                model(step, past_key_values=cache)
            assert {"aten::linear", "kvc::anchor_v1"} <= {event.key for event in profile.key_averages()}
        else:
            model(step, past_key_values=cache)
    assert not calls


def test_outside_the_models_forward_a_linear_layer_is_as_it_was(calls: list[tuple[int, ...]]) -> None:
    model = kvcompile.optimize(random_model(), "keep_all", backend="cpu")
    layer = linears(model)[0]
    x = torch.randn(1, layer.in_features, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and not calls
    with torch.no_grad():
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert not calls


def test_new_weights_and_other_dtypes_are_seen_at_the_next_step() -> None:
    model = kvcompile.optimize(random_model(), "keep_all", backend="cpu")
    cache = prefilled(model)
    with torch.no_grad():
        model.lm_head.weight = nn.Parameter(torch.zeros_like(model.lm_head.weight))
        assert not model(ids(1), past_key_values=cache).logits.any()


def test_restore_leaves_no_forward_behind_and_others_stay() -> None:
    model = random_model()
    wrapped, hooked, special = linears(model)[:3]
    mine = lambda x: nn.Linear.forward(wrapped, x)  # noqa: E731
    wrapped.forward = mine  # type: ignore[method-assign]
    hooked._hf_hook = object()  # type: ignore[assignment]
    special.__class__ = type("Special", (nn.Linear,), {})
    kvcompile.optimize(model, "keep_all", backend="cpu")
    others = [m for m in linears(model) if m not in (wrapped, hooked)]
    assert wrapped.forward is mine and all("forward" in vars(m) for m in others)
    assert not any("forward" in vars(m) for m in (hooked, special))
    with pytest.raises(kvcompile.KvCompileError, match="copied"):
        copy.deepcopy(others[0])
    del hooked._hf_hook
    kvcompile.restore(model)
    assert wrapped.forward is mine and not any("forward" in vars(m) for m in model.modules() if m is not wrapped)


@pytest.mark.parametrize("part", ("mlp.down_proj", "self_attn"))
def test_a_part_that_somebody_compiles_whole_means_the_same(part: str) -> None:
    model = kvcompile.optimize(random_model(), "keep_all", backend="cpu" if part != "self_attn" else "reference")
    cache = prefilled(model)
    with torch.no_grad():
        truth = model(ids(1), past_key_values=cache.clone()).logits
        for layer in model.model.layers:
            layer.get_submodule(part).compile(backend="eager", fullgraph=True)
        torch.testing.assert_close(model(ids(1), past_key_values=cache).logits, truth, atol=1e-5, rtol=1e-5)


def test_models_that_share_layers_are_optimised_one_at_a_time() -> None:
    model = random_model()
    other = type(model)(copy.deepcopy(model.config))
    other.model = model.model
    kvcompile.optimize(model, "keep_all", backend="cpu")
    with pytest.raises(kvcompile.KvCompileError, match="another model"):
        kvcompile.optimize(other, "keep_all", backend="cpu")
    kvcompile.optimize(model, "keep_all", backend="cpu")  # its own layers are no other's
    kvcompile.restore(model)
    kvcompile.restore(kvcompile.optimize(other, "keep_all", backend="cpu"))
    assert not any("forward" in vars(m) for m in model.modules())


def test_a_forward_that_fails_leaves_the_switch_off() -> None:
    switch = Projections(None)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError), switch.during(True):
        raise RuntimeError
    assert not switch.on
