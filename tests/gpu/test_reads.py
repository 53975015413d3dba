"""On a CUDA device: reads by generated kernels: files against their own torch, models against the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import kvcompile
from kvcompile.kernels.choose_listed import listed_specs
from kvcompile.kernels.headers import header_for
from kvcompile.kernels.plan import ClassPlan, PolicyPlan, Region
from kvcompile.kernels.render import load, render, write
from tests.kernels.triton_interpreted.plans import STEP
from tests.kernels.triton_interpreted.read_plans import EVERY, quest
from tests.models import tokens
from tests.reading import LIBRARY

pytestmark = pytest.mark.gpu

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

DEVICE = "cuda"
SHAPES = [(dtype, size, 4) for dtype in ("float32", "float16", "bfloat16") for size in (64, 128)]
SHAPES += [("bfloat16", 96, 3), ("bfloat16", 256, 4), ("bfloat16", 128, 1), ("bfloat16", 128, 16)]
POLICIES = ("quest", "moba", "infllm_v2", "powerattention", "seerattention", "sparse_transformer")
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 1e-1}
STEPS = 80  # after 200 tokens: landmarks grow on the way, at 256


def failing(plan: PolicyPlan, folder: Path) -> list[str]:
    """Kernels of a plan's reads that are not their own reference."""
    wrong = []
    for spec in listed_specs(plan):
        path = write(render(spec, header_for(plan, spec)), folder / f"{spec.name}_{spec.digest()}.py")
        if load(path).check():
            wrong.append(spec.name)
    return wrong


@pytest.mark.parametrize(("dtype", "head_dim", "group"), SHAPES)
def test_every_kernel_of_a_read_is_its_reference(dtype: str, head_dim: int, group: int, tmp_path: Path) -> None:
    wrong = {name: failing(make(dtype=dtype, head_dim=head_dim, group=group), tmp_path) for name, make in EVERY.items()}
    assert not any(wrong.values()), wrong


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_of_a_read_of_what_is_kept_are_their_reference(dtype: str, tmp_path: Path) -> None:
    window = ClassPlan("some", (Region("sink", 0), Region("recent", 0)), (STEP,), (), True)
    assert failing(quest(keep=window, dtype=dtype), tmp_path) == []


def test_kernels_of_a_single_row_are_their_reference(tmp_path: Path) -> None:
    assert failing(quest(kv_heads=1, dtype="bfloat16"), tmp_path) == []


def optimised(name: str, backend: str, compile: str, dtype: torch.dtype) -> Any:
    model = LIBRARY[name].model().to(DEVICE, dtype)
    return kvcompile.optimize(model, LIBRARY[name].policy, backend=backend, compile=compile, **LIBRARY[name].params)


def logits(model: Any, steps: int) -> torch.Tensor:
    """Of forced tokens after a batch of two prompts, one of them padded: [2, steps + 1, words]."""
    ids = torch.tensor([tokens(200, seed=1), tokens(200, seed=2)], device=DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :37] = 0
    forced = torch.tensor([tokens(steps, seed=3), tokens(steps, seed=4)], device=DEVICE)
    with torch.no_grad():
        out = model(ids, attention_mask=mask, logits_to_keep=1)
        cache, found = out.past_key_values, [out.logits]
        for i in range(steps):
            found.append(model(forced[:, i : i + 1], past_key_values=cache, logits_to_keep=1).logits)
    return torch.cat(found, 1).float()


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("compile", ["off", "eager"])
@pytest.mark.parametrize("name", POLICIES)
def test_reads_by_kernels_are_those_of_the_reference(name: str, compile: str, dtype: torch.dtype) -> None:
    """But for a step now and then: of units that all but tie another may be read."""
    expected = logits(optimised(name, "reference", "off", dtype), STEPS)
    found = logits(optimised(name, "triton", compile, dtype), STEPS)
    near = (found - expected).abs().amax(2) <= BOUNDS[dtype] * expected.abs().max()
    assert near.float().mean() >= (0.9 if dtype == torch.float32 else 0.75)


@pytest.mark.parametrize("name", ["quest", "moba", "powerattention"])
def test_replayed_steps_that_read_lists_are_the_steps(name: str) -> None:
    expected = logits(optimised(name, "triton", "eager", torch.float32), STEPS)
    model = optimised(name, "triton", "cudagraph", torch.float32)
    # Pages are handed out in any order, so sums differ in their last bits, and all but ties may fall otherwise.
    near = (logits(model, STEPS) - expected).abs().amax(2) <= 1e-4 * expected.abs().max()
    assert near.float().mean() >= 0.9
    assert kvcompile.report(model).cuda_graph_replays >= STEPS - 12


@pytest.mark.parametrize("compile", ["eager", "cudagraph"])
@pytest.mark.parametrize("name", ["quest", "moba", "powerattention"])
def test_steps_that_read_lists_wait_for_nothing(name: str, compile: str) -> None:
    model = optimised(name, "triton", compile, torch.bfloat16)
    step = torch.tensor([[7]], device=DEVICE)
    with torch.no_grad():
        cache = model(torch.tensor([tokens(200, seed=1)], device=DEVICE), logits_to_keep=1).past_key_values
        for _ in range(12):  # pools have grown, for at least as many steps as follow; graphs are captured
            model(step, past_key_values=cache, logits_to_keep=1)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(8 if compile == "eager" else 30):  # landmarks have room for 256 tokens
                model(step, past_key_values=cache, logits_to_keep=1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
