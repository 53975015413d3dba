"""Models with soft-cap, sinks and sliding windows on the `cpu` backend, against the reference: prompts of uneven
length, cut or whole, then more steps than any window is long, so that entries leave it again and again."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import kvcompile
from kvcompile.kernels import ops
from kvcompile.kernels.cpp_backend.build import says_why_not
from tests.driving import kept, padded
from tests.families import family_model, prompt

WINDOW, STEPS = 16, 104
FAMILIES = ("gemma2", "gemma3", "gpt_oss", "mistral_sliding")
SNAPKV = """policy small(budget=12):
    score s = maxpool(mean[g] sum[q in {newest}(4)] attn, 5)
    keep recent(4) | top(budget - 4) by s {scope}
    at {when}
"""
H2O = """policy small:
    state acc = 0
    on attend: acc += mean[g] sum[q] attn
    keep recent(4) | top(8) by acc per head
    at {when}, step
"""
POLICIES = {
    "keep_all": ("keep_all", {}),
    "snapkv": (SNAPKV.format(scope="per head", when="prefill.end", newest="last"), {}),
    "snapkv, cut": (SNAPKV.format(scope="per head", when="chunk(13)", newest="peek"), {}),
    "h2o": (H2O.format(when="prefill.end"), {}),
    "h2o, cut": (H2O.format(when="chunk(13)"), {}),
    "streaming": ("streaming", {"n_sink": 2, "window": 10}),
    "adakv": (SNAPKV.format(scope="across heads floor 20%", when="prefill.end", newest="last"), {}),
    "adakv, cut": (SNAPKV.format(scope="across heads floor 20%", when="chunk(13)", newest="peek"), {}),
}  # fmt: skip
QUICK = {
    ("gemma2", "h2o, cut"), ("gemma3", "snapkv, cut"), ("gpt_oss", "adakv"), ("mistral_sliding", "streaming"),
}  # fmt: skip
PAIRS = [(family, policy) for family in FAMILIES for policy in POLICIES]


def slow_but(pairs: list[tuple[str, str]], quick: set[tuple[str, str]]) -> list[object]:
    """Parameters of a test, marked slow where they are not among the quick ones."""
    return [pytest.param(*pair, marks=() if pair in quick else pytest.mark.slow) for pair in pairs]


@dataclass(frozen=True)
class Run:
    """Logits [steps, batch, vocabulary] of the newest tokens; before each step the kept positions, by sequence; the
    cache's bytes at the end."""

    logits: Tensor
    kept: list[object]
    nbytes: int


@cache
def model_of(family: str) -> PreTrainedModel:
    return family_model(family, sliding_window=WINDOW)


def run(model: PreTrainedModel, policy: str, backend: str) -> Run:
    """A prompt of 47 and one of 31 tokens, then the same tokens for everybody."""
    text, params = POLICIES[policy]
    ids, mask = padded([prompt(47), prompt(31, 1)], "left")
    forced = torch.tensor([prompt(STEPS, 2), prompt(STEPS, 3)])
    layers, logits, seen = model.config.num_hidden_layers, [], []
    with torch.no_grad(), kvcompile.use(model, text, backend=backend, **params):
        out = model(input_ids=ids, attention_mask=mask, use_cache=True)
        for step in range(STEPS):
            cache = out.past_key_values
            logits.append(out.logits[:, -1])
            seen.append([kept(cache, layers, row) for row in range(len(ids))])
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            out = model(
                input_ids=forced[:, step : step + 1], attention_mask=mask, past_key_values=cache, use_cache=True
            )
    return Run(torch.stack(logits), seen, cache.nbytes())


def compare(family: str, policy: str) -> None:
    model = model_of(family)
    found, truth = run(model, policy, "cpu"), run(model, policy, "reference")
    assert (found.logits - truth.logits).abs().max() <= 1e-4 * max(1.0, truth.logits.abs().max())
    assert found.kept == truth.kept
    assert found.nbytes == truth.nbytes, "entries that have left a window leave their memory, too"
    kinds = getattr(model.config, "layer_types", None) or ["sliding_attention"] * model.config.num_hidden_layers
    most = WINDOW - 1 + max(1, WINDOW // 8)
    for rows in found.kept[-1]:
        held = [max(map(len, heads)) for heads, kind in zip(rows, kinds, strict=True) if kind == "sliding_attention"]
        assert held and max(held) <= most


@pytest.mark.skipif(says_why_not() is not None, reason="no C++ compiler")
@pytest.mark.parametrize(("family", "policy"), slow_but(PAIRS, QUICK))
def test_generated_kernels_say_what_the_reference_says(family, policy):
    compare(family, policy)


@pytest.mark.parametrize(("family", "policy"), slow_but(PAIRS, {("gpt_oss", "snapkv, cut")}))
def test_packed_sdpa_says_what_the_reference_says(family, policy, monkeypatch):
    plain = ops.backend
    monkeypatch.setattr(ops, "backend", lambda name: ops.Cpu() if name == "cpu" else plain(name))
    compare(family, policy)
