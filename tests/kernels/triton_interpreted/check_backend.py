"""The whole backend on the interpreter: a model generates what it generates under the reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvcompile
from kvcompile.kernels import reference
from kvcompile.kernels.choose import unprintable
from kvcompile.kernels.plan import ModelFacts
from kvcompile.passes.pipeline import compile_policy

MIXED = """
heads far = table("far.tsv")
policy mixed(n_sink=2, window=7):
    far: keep all
    rest: keep sink(n_sink) | recent(window)
    at chunk, step
"""
POLICIES: dict[str, dict[str, object]] = {
    "streaming": {"n_sink": 2, "window": 12},
    "h2o": {"heavy": 8, "local": 8},
    "tova": {"budget": 20},
    "adakv": {"budget": 24, "observe": 8},
    "knorm": {"budget": 20},
    "snapkv_chunked": {"observe": 8, "c": 64, "ratio": "50%"},
    "lagkv": {"n_sink": 4, "lag": 8},
    MIXED: {},
}


def generate(policy: str, backend: str, head_dim: int = 64, **options: object) -> tuple[torch.Tensor, list[list[int]]]:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=head_dim, vocab_size=97,
    )  # fmt: skip
    model = kvcompile.optimize(LlamaForCausalLM(config).eval(), policy, backend=backend, compile="off", **options)
    ids = torch.randint(0, 97, (2, 40))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    done = model.generate(
        ids, attention_mask=mask, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True,
        pad_token_id=0,
    )  # fmt: skip
    cache = done.past_key_values
    return torch.stack(done.logits), [
        p.tolist() for layer in range(2) for b in range(2) for p in cache.positions(layer, b)
    ]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda text: text.split("(")[0].split()[-1])
def test_a_model_generates_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    monkeypatch.setenv("KVC_CACHE", str(tmp_path))
    (tmp_path / "far.tsv").write_text("1\t0\n0\t0\n")
    monkeypatch.chdir(tmp_path)
    logits, kept = generate(policy, "reference", **POLICIES[policy])
    calls = []
    monkeypatch.setattr(reference, "attend_step", lambda *a: calls.append(a))
    got, got_kept = generate(policy, "triton", **POLICIES[policy])
    assert got_kept == kept
    assert (got - logits).abs().max() < 1e-5
    assert not calls, "a step fell back to the reference"
    assert list(tmp_path.glob("kernels/*/decode_*.py"))


@pytest.mark.parametrize("policy", ["streaming", "h2o"])
def test_a_head_size_without_kernels_runs_as_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    monkeypatch.setenv("KVC_CACHE", str(tmp_path))
    logits, kept = generate(policy, "reference", 96, **POLICIES[policy])
    got, got_kept = generate(policy, "triton", 96, **POLICIES[policy])
    assert got_kept == kept
    assert (got - logits).abs().max() < 1e-5


def test_what_falls_back_is_listed() -> None:
    facts = ModelFacts(2, 4, 2, 64)
    plans = {name: compile_policy(name, facts, **POLICIES[name]).plan for name in ("h2o", "tova", "adakv", "lagkv")}
    for name in ("h2o", "tova", "adakv"):
        assert unprintable(plans[name]) == ()
    places = {reason.split(":")[0] for reason in unprintable(plans["lagkv"])}
    assert places == {"class all, after a step", "class all, prefill"}
