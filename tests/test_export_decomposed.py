"""The decomposed layer, run by torch as it is, against the reference on whole models; and what it refuses, by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from kvcompile.kernels.decomposed import DecomposedLayer
from kvcompile.kernels.functional import NotFunctional
from kvcompile.passes import compile_policy
from kvcompile.passes.facts import model_facts
from tests.driving import LIBRARY, Sizes
from tests.export_cases import LAYER, differences, inputs_of, watched
from tests.models import random_model

PROMPT, STEPS, SIZES = 40, 4, Sizes(chunk=64)
# What drops nothing in a phase drops nothing here either: the last number is how many entries went.
DROPS = {
    ("streaming", "prefill"), ("streaming", "step"), ("h2o", "prefill"), ("h2o", "step"), ("snapkv", "prefill"),
    ("snapkv_chunked", "prefill"), ("tova", "prefill"), ("tova", "step"), ("pyramidkv", "prefill"),
    ("adakv", "prefill"), ("knorm", "prefill"), ("keydiff", "prefill"), ("expected_attention", "prefill"),
    ("criticalkv", "prefill"), ("prulong", "prefill"), ("prulong", "step"),
}  # fmt: skip
SAME = sorted(DROPS | {("keep_all", "prefill"), ("keep_all", "step"), ("snapkv", "step")})
REFUSED = {
    ("lagkv", "prefill"): "units",
    ("keyformer", "prefill"): "noise",
    ("lazy", "step"): "`on attend`",
    ("r_kv", "step"): "a trigger with a condition",
    ("streaming_compact", "step"): "positions compact",
    ("chunkkv", "prefill"): "later layers",
    ("prefixkv", "prefill"): "waits for all layers",
    ("elastic", "prefill"): "losers",
}


def check(policy: str, phase: str, folder: Path, seed: int = 0) -> dict[str, object]:
    sample = LIBRARY[policy](SIZES)
    step = watched(sample.policy, phase, PROMPT, STEPS, **sample.options(folder))
    entries = PROMPT + (8 if phase == "step" else 0)
    layer = DecomposedLayer(step.plan, LAYER, phase, entries, step.scale)
    inputs = inputs_of(step, layer, entries, seed)
    with torch.no_grad():
        return differences(step, layer, inputs, list(layer(*inputs)))


@pytest.mark.parametrize(("policy", "phase"), SAME)
def test_it_keeps_reads_and_counts_as_the_reference_does(policy, phase, tmp_path):
    found = check(policy, phase, tmp_path)
    assert found["kept"] and found["out"] < 1e-5 and found["states"] < 1e-5
    assert bool(found["dropped"]) == ((policy, phase) in DROPS)


TEXTS = {
    "cover": "keep recent(3) | cover(80%) by mean[g] sum[q in last(4)] attn per head\n    at prefill.end",
    "where": "keep recent(3) | where(norm(k) < 2.5)\n    at prefill.end",
    "per query head": "keep recent(3) | top(8) by sum[q in last(4)] attn per query_head\n    at prefill.end",
    "floor": "keep recent(3) | top(8) by mean[g] sum[q in last(4)] attn across heads floor 50%\n    at prefill.end",
    "average": "keep top(9) by avgpool(mean[g] sum[q in last(4)] attn, 5) per head\n    at prefill.end",
    "spread": "keep top(9) by std[d] v + max[i] pos / 100 per head\n    at prefill.end",
    "ties": "keep recent(3) | top(8) by 0 * pos per head\n    at prefill.end",
    "ties across heads": "keep recent(3) | bottom(8) by 0 * pos across heads\n    at prefill.end",
    "stride": "keep stride(3) | prompt | recent(2)\n    at step",
    "newest queries": "keep recent(2) | top(12) by max[g] mean[q in last(3)] logit per head\n    at step",
}


@pytest.mark.parametrize("text", TEXTS)
def test_forms_of_the_language_mean_the_same(text):
    policy = f"policy mine():\n    {TEXTS[text]}\n"
    phase = "step" if TEXTS[text].endswith("step") else "prefill"
    step = watched(policy, phase, PROMPT, STEPS)
    layer = DecomposedLayer(step.plan, LAYER, phase, PROMPT + STEPS, step.scale)
    inputs = inputs_of(step, layer, PROMPT + STEPS)
    found = differences(step, layer, inputs, list(layer(*inputs)))
    assert found["kept"] and found["out"] < 1e-5
    assert found["dropped"] or text == "stride"


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return random_model()


@pytest.mark.parametrize(("policy", "phase"), REFUSED)
def test_what_has_no_such_form_is_refused_by_name(policy, phase, model, tmp_path):
    sample = LIBRARY[policy](SIZES)
    options = sample.options(tmp_path)
    plan = compile_policy(sample.policy, model_facts(model), **options).plan
    with pytest.raises(NotFunctional, match=REFUSED[policy, phase]):
        layer = DecomposedLayer(plan, LAYER, phase, PROMPT, 1.0)
        layer(*(torch.zeros(port.shape, dtype=port.dtype) for port in layer.inputs))


@pytest.mark.parametrize(
    ("more", "says"),
    [({"sinks": True}, "sinks"), ({"windows": (0, 9, 0)}, "window of 9 tokens")],
)
def test_attention_that_is_more_than_a_softmax_over_all_is_refused_by_name(more, says, model):
    facts = replace(model_facts(model), **more)
    plan = compile_policy("snapkv", facts, budget=64, observe=32).plan
    with pytest.raises(NotFunctional, match=says):
        DecomposedLayer(plan, LAYER, "step", PROMPT, 1.0)
    if facts.windows:  # a layer without a window has its form
        DecomposedLayer(plan, 0, "step", PROMPT, 1.0)


def test_a_soft_cap_bounds_logits_before_the_softmax(model):
    facts, n, cap, scale = replace(model_facts(model), softcap=0.7), 12, 0.7, 0.9
    layer = DecomposedLayer(compile_policy("tova", facts, budget=5).plan, LAYER, "step", n, scale)
    dice = torch.Generator().manual_seed(1)
    given = {port.name: torch.randn(port.shape, generator=dice) for port in layer.inputs}
    given |= {"pos": torch.arange(n).expand(facts.kv_heads, -1), "at": torch.tensor([n - 1])}
    given |= {"resident": torch.ones(facts.kv_heads, n, dtype=torch.bool), "counts": torch.tensor([5])}
    inputs = [given[port.name].to(port.dtype) for port in layer.inputs]
    out, keep = layer(*inputs)
    q = given["q"].view(facts.kv_heads, facts.group, 1, -1)
    attn = (cap * torch.tanh(q @ given["k"][:, None].mT * scale / cap)).softmax(-1)
    torch.testing.assert_close(out, (attn @ given["v"][:, None]).flatten(0, 1).transpose(0, 1), rtol=1e-5, atol=1e-5)
    best = attn.mean((0, 1, 2)).topk(5).indices
    assert torch.equal(keep, torch.zeros_like(keep).index_fill(1, best, True))


def test_a_prompt_shorter_than_the_queries_that_a_score_asks_for_is_refused(model):
    plan = compile_policy("snapkv", model_facts(model), budget=64, observe=32).plan
    with pytest.raises(NotFunctional, match="its last 32 queries"):
        DecomposedLayer(plan, LAYER, "prefill", 31, 1.0)


def test_columns_that_hold_nothing_and_their_order_mean_nothing(tmp_path):
    assert check("h2o", "step", tmp_path, seed=1) == pytest.approx(check("h2o", "step", tmp_path, seed=2), abs=1e-5)
