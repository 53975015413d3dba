"""On a CUDA device: the triton backend against the reference, and files that check and time themselves.

Run by `make gpu`. Everything here is skipped by the default suite.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import kvcompile
from kvcompile.kernels.triton_backend import attend, backend
from tests.driving import LIBRARY, Sample, Sizes
from tests.models import random_model, tokens

pytestmark = pytest.mark.gpu

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

SIZES = Sizes(budget=40, observe=8, chunk=64, percent=25)
# Kept sets are compared in fp32 only: elsewhere rounding decides between near ties.
BOUNDS = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def generate(model: Any, backend: str, sample: Sample, folder: Path, compile: str) -> tuple[torch.Tensor, list[Any]]:
    """Logits of 24 steps after a batch of two prompts, one of them padded, and the positions kept."""
    kvcompile.optimize(model, sample.policy, backend=backend, compile=compile, **sample.options(folder))
    ids = torch.tensor([tokens(200, seed=1), tokens(200, seed=2)], device="cuda")
    mask = torch.ones_like(ids)
    mask[0, :37] = 0
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    layers = range(model.config.num_hidden_layers)
    kept = [p.tolist() for layer in layers for row in range(2) for p in out.past_key_values.positions(layer, row)]
    return torch.stack(out.logits), kept


CASES = [(name, compile, torch.float32) for name in LIBRARY for compile in ("off", "eager")]
CASES += [(name, "eager", torch.bfloat16) for name in LIBRARY]
CASES += [(name, "eager", torch.float16) for name in ("keep_all", "h2o", "snapkv", "tova", "prulong")]


@pytest.mark.parametrize(("name", "compile", "dtype"), CASES, ids=str)
def test_triton_equals_the_reference(name: str, compile: str, dtype: torch.dtype, tmp_path: Path) -> None:
    sample = LIBRARY[name](SIZES)
    model = sample.model().to("cuda", dtype)
    expected, kept = generate(model, "reference", sample, tmp_path, "off")
    found, found_kept = generate(model, "triton", sample, tmp_path, compile)
    scale = expected.abs().max()
    if dtype == torch.float32:
        assert found_kept == kept
        assert (found - expected).abs().max() <= BOUNDS[dtype] * scale
    else:
        assert (found[0] - expected[0]).abs().max() <= BOUNDS[dtype] * scale


def test_a_long_prompt_by_torch_is_what_the_kernel_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.tensor([tokens(300, seed=1), tokens(300, seed=2)], device="cuda")
    dense, found, taken = backend.dense, [], []
    monkeypatch.setattr(backend, "dense", lambda *some: (taken.append(1), dense(*some))[1])
    for long in (64, 1 << 30):
        monkeypatch.setattr(attend, "LONG", long)
        model = random_model("llama64").to("cuda", torch.bfloat16)
        kvcompile.optimize(model, "keep_all", backend="triton")
        with torch.no_grad():
            found.append(model(ids).logits)
    assert len(taken) == model.config.num_hidden_layers
    assert (found[0] - found[1]).abs().max() <= BOUNDS[torch.bfloat16] * found[1].abs().max()


@pytest.mark.parametrize("name", ["streaming", "h2o", "snapkv", "tova", "adakv", "knorm"])
def test_generated_files_check_and_time_themselves(name: str, tmp_path: Path) -> None:
    model = random_model("llama128").to("cuda", torch.bfloat16)
    sample = LIBRARY[name](SIZES)
    kvcompile.optimize(model, sample.policy, backend="triton", compile="off", **sample.options(tmp_path))
    for kernel in kvcompile.inspect(model).kernels.values():
        command = [sys.executable, str(kernel.path), "--check", "--bench"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{kernel.name}: {done.stdout}{done.stderr}"
        print(f"{kernel.name}: {done.stdout.strip()}")
