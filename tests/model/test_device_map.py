"""Models whose layers are placed one by one: offloaded weights, weights that are missing, attention on another device.

There is one device here, so a second one is fake: `FakeTensorMode` knows shapes and devices and refuses to mix them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

import kvcompile
from kvcompile.compiled import Anchor, attention
from kvcompile.extents import ExtentStore
from kvcompile.kernels import ops
from kvcompile.kernels.plan import ModelFacts
from kvcompile.pages import PagedStore
from kvcompile.passes import compile_policy
from tests.models import random_model
from tests.parallel import generated

POLICIES = [
    ("keep_all", {}),
    ("snapkv", {"budget": 12, "observe": 4, "pool": 3}),
    ("adakv", {"budget": 12, "observe": 4, "pool": 3}),
    ("h2o", {"heavy": 8, "local": 4}),
]


class Hook:
    """Offloads a module as accelerate does: weights wait outside, come for a call, and every tensor among the call's
    arguments, however deep in lists and tuples, is copied to the device that runs it."""

    offload = True

    def __init__(self, module: nn.Module) -> None:
        self.execution_device, self.plain = torch.device("cpu"), module.forward
        self.weights = {name: p.detach().clone() for name, p in module.named_parameters(recurse=False)}
        self.module = module
        self.drop()
        module._hf_hook = self
        module.forward = self.call

    def drop(self) -> None:
        for name in self.weights:
            setattr(self.module, name, nn.Parameter(torch.empty_like(self.weights[name], device="meta")))

    def call(self, *args: Any, **kwargs: Any) -> Any:
        for name, value in self.weights.items():
            setattr(self.module, name, nn.Parameter(value))
        out = self.plain(*_copied(args), **{key: _copied(value) for key, value in kwargs.items()})
        self.drop()
        return out


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_copied(x) for x in value))
    return type(value)(_copied(x) for x in value) if isinstance(value, (list, tuple)) else value


def by_stand_in(model: PreTrainedModel, folder: Path) -> None:
    for layer in model.model.layers[1:]:
        for module in layer.modules():
            if list(module.parameters(recurse=False)) or module is layer:
                Hook(module)


def by_accelerate(model: PreTrainedModel, folder: Path) -> None:
    from accelerate import dispatch_model

    where = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.rotary_emb", "model.norm", "lm_head"), "cpu")
    where |= {"model.layers.1": "disk", "model.layers.2": "disk"}
    dispatch_model(model, where, main_device="cpu", offload_dir=folder)


needs_accelerate = pytest.mark.skipif(not importlib.util.find_spec("accelerate"), reason="accelerate is not installed")


@pytest.mark.parametrize("place", [by_stand_in, pytest.param(by_accelerate, marks=needs_accelerate)])
@pytest.mark.parametrize(("policy", "params"), POLICIES)
def test_layers_whose_weights_are_offloaded_run_as_if_they_were_here(
    tmp_path: Path, policy: str, params: dict[str, Any], place: Callable[[PreTrainedModel, Path], None]
) -> None:
    expected = generated(random_model(), policy, params)
    model = random_model()
    place(model, tmp_path)
    assert next(model.model.layers[2].parameters()).is_meta
    assert generated(model, policy, params) == expected
    assert next(model.model.layers[2].parameters()).is_meta


def test_a_model_all_of_whose_weights_are_offloaded_is_probed_and_run(tmp_path: Path) -> None:
    changes = {"num_hidden_layers": 4, "max_position_embeddings": 256}
    expected = generated(random_model(**changes), "razor", {"n_sink": 2, "least": 6})
    model = random_model(**changes)
    for module in model.modules():
        if list(module.parameters(recurse=False)):
            Hook(module)
    assert generated(model, "razor", {"n_sink": 2, "least": 6}) == expected


def test_a_layer_without_weights_is_refused_by_name_and_the_model_stays_as_it_was() -> None:
    model = random_model()
    model.model.layers[1].to("meta")
    with pytest.raises(kvcompile.KvCompileError, match=r"model\.layers\.1 has its weights on meta"):
        kvcompile.optimize(model, "keep_all")
    assert "forward" not in vars(model)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("phase", ["prefill.end", "step"])
def test_a_layer_on_another_device_is_attended_to_where_the_cache_is(paged: bool, phase: str) -> None:
    facts = ModelFacts(layers=1, q_heads=4, kv_heads=2, head_dim=64)
    plan = compile_policy("h2o", facts).plan
    key = ops.register(ops.Program(plan, ops.backend("reference")))
    n = 1 if phase == "step" else 9
    home, layer = torch.device("cuda:0"), torch.device("cuda:1")
    like = (PagedStore if paged else ExtentStore)(plan, 2, torch.float32, torch.device("cpu")).site(0)
    with FakeTensorMode():
        site = [torch.empty(t.shape, dtype=t.dtype, device=home) for t in like]
        q, k, v = (torch.empty(2, heads, n, 64, device=layer) for heads in (4, 2, 2))
        out, _ = attention(nn.Module(), q, k, v, None, 0.125, kvc=Anchor(phase, key, site))
    assert (out.shape, out.device) == ((2, n, 4, 64), layer)
