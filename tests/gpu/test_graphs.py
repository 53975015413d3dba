"""On a CUDA device: replayed steps are the steps, nothing waits, and memory that is given up is free."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

import kvcompile
from tests.driving import LIBRARY, Sizes
from tests.models import random_model, tokens

pytestmark = pytest.mark.gpu

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

SIZES = Sizes(budget=40, observe=8, chunk=64, percent=25)
STEPS = 300
POLICIES = ["keep_all", "streaming", "h2o", "tova", "prulong"]


def optimised(name: str, compile: str, folder: Path) -> Any:
    model = random_model("llama64").to("cuda")
    sample = LIBRARY[name](SIZES)
    return kvcompile.optimize(model, sample.policy, backend="triton", compile=compile, **sample.options(folder))


def decode(model: Any, steps: int) -> tuple[torch.Tensor, list[list[int]]]:
    """Logits of forced tokens after a batch of two prompts, one of them padded, and the positions kept."""
    ids = torch.tensor([tokens(200, seed=1), tokens(200, seed=2)], device="cuda")
    mask = torch.ones_like(ids)
    mask[0, :37] = 0
    forced = torch.tensor([tokens(steps, seed=3), tokens(steps, seed=4)], device="cuda")
    with torch.no_grad():
        out = model(ids, attention_mask=mask, logits_to_keep=1)
        cache, logits = out.past_key_values, [out.logits]
        for i in range(steps):
            logits.append(model(forced[:, i : i + 1], past_key_values=cache, logits_to_keep=1).logits)
    layers = range(model.config.num_hidden_layers)
    return torch.cat(logits, 1), [
        p.tolist() for layer in layers for row in range(2) for p in cache.positions(layer, row)
    ]


@pytest.mark.parametrize("compile", ["cudagraph", "cudagraph+inductor"])
@pytest.mark.parametrize("name", POLICIES)
def test_replayed_steps_are_the_steps(name: str, compile: str, tmp_path: Path) -> None:
    expected, kept = decode(optimised(name, "eager", tmp_path), STEPS)
    model = optimised(name, compile, tmp_path)
    found, found_kept = decode(model, STEPS)
    # Pages are handed out in any order, so sums differ in their last bits.
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert found_kept == kept
    report = kvcompile.report(model)
    assert report.graph_breaks == 0
    assert 1 <= report.cuda_graphs <= 6
    assert report.cuda_graph_replays >= STEPS - 12


@pytest.mark.parametrize("compile", ["eager", "cudagraph"])
@pytest.mark.parametrize("name", [*POLICIES, "snapkv"])
def test_steps_wait_for_nothing(name: str, compile: str, tmp_path: Path) -> None:
    model = optimised(name, compile, tmp_path)
    step = torch.tensor([[7]], device="cuda")
    with torch.no_grad():
        cache = model(torch.tensor([tokens(200, seed=1)], device="cuda"), logits_to_keep=1).past_key_values
        for _ in range(12):  # pools have grown, for at least as many steps as follow; graphs are captured
            model(step, past_key_values=cache, logits_to_keep=1)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(8 if compile == "eager" else 100):
                model(step, past_key_values=cache, logits_to_keep=1)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def held() -> int:
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


@pytest.mark.parametrize("compile", ["eager", "cudagraph"])
def test_memory_that_a_policy_gives_up_is_free(compile: str) -> None:
    """Device memory beside the weights: with a quarter of the entries about a quarter, and none after the cache."""
    taken, said = {}, {}
    step = torch.tensor([[7]] * 4, device="cuda")
    ids = torch.tensor([tokens(2000, seed=b) for b in range(4)], device="cuda")
    for name, params in (("keep_all", {}), ("snapkv", {"budget": 500})):
        model = random_model("llama128", max_position_embeddings=4096).to("cuda", torch.bfloat16)
        kvcompile.optimize(model, name, backend="triton", compile=compile, **params)
        with torch.no_grad():
            for _ in range(2):  # the first run makes scratch that the model keeps
                before = held()
                cache = model(ids, logits_to_keep=1).past_key_values
                for _ in range(6):
                    model(step, past_key_values=cache, logits_to_keep=1)
                taken[name], said[name] = held() - before, cache.store.bytes_allocated()
                del cache
                model.forward.run = None
        assert held() - before < 1 << 20, "memory is held after the cache is gone"
        kvcompile.restore(model)
    assert said["snapkv"] < 0.5 * said["keep_all"]  # room for steps to come included
    for name in taken:
        assert taken[name] <= said[name] * 1.05 + (4 << 20), name


def test_graphs_are_worth_their_capture(tmp_path: Path) -> None:
    """A step of a small model is all launches: replayed it takes the host less time than launched one by one."""
    seconds = {}
    step = torch.tensor([[7]], device="cuda")
    for compile in ("eager", "cudagraph"):
        model = optimised("keep_all", compile, tmp_path)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.no_grad():
            cache = model(torch.tensor([tokens(200)], device="cuda"), logits_to_keep=1).past_key_values
            for _ in range(8):
                model(step, past_key_values=cache, logits_to_keep=1)
            torch.cuda.synchronize()
            begin.record()
            for _ in range(100):
                model(step, past_key_values=cache, logits_to_keep=1)
            end.record()
            torch.cuda.synchronize()
        seconds[compile] = begin.elapsed_time(end) / 100
    print(seconds)
    assert seconds["cudagraph"] < seconds["eager"]
