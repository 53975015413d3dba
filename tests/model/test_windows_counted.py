"""P4 and P6 on models with sliding windows: explained is measured, and the baseline is what transformers holds."""

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import kvcompile
from kvcompile.benching import cache_bytes
from kvcompile.passes.slide import SLACK
from tests.models import tokens

WINDOW = 40  # entries may wait for five steps after they have left it
MODELS = {
    "mistral": (MistralConfig, MistralForCausalLM, {}),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, {"query_pre_attn_scalar": 16}),
    "gpt_oss": (GptOssConfig, GptOssForCausalLM, {"num_local_experts": 2, "num_experts_per_tok": 1}),
}
POLICIES = {
    "keep_all": ("keep_all", {}),
    "streaming": ("streaming", {"n_sink": 4, "window": 20}),
    "snapkv": ("snapkv", {"budget": 30, "observe": 8}),
    "classes": ("prulong", {"n_sink": 4, "window": 24, "c": 32}),
    "h2o": ("h2o", {"heavy": 10, "local": 10}),
}
PLACED_EXACTLY = (
    "keep_all",
    "streaming",
    "classes",
)  # positions of entries follow from lengths, so what slides out does
BOOKKEEPING = 4096


def sliding_model(family):
    config, kind, more = MODELS[family]
    torch.manual_seed(0)
    model = kind(
        config(
            vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, max_position_embeddings=1024, initializer_range=0.12, bos_token_id=1,
            eos_token_id=None, pad_token_id=0, sliding_window=WINDOW, **more,
        )
    )  # fmt: skip
    return model.eval()


def options_of(policy, folder):
    name, params = POLICIES[policy]
    if policy != "classes":
        return name, params
    mask = folder / "mask.tsv"
    mask.write_text("1\t0\n" * 4)
    return name, {**params, "tables": {"retrieval": str(mask)}}


def ran(model, prompt, steps):
    """The cache after a prompt and so many steps."""
    with torch.no_grad():
        out = model(torch.tensor([tokens(prompt, seed=1)]), use_cache=True, logits_to_keep=1)
        for token in tokens(steps, seed=2):
            out = model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
    return out.past_key_values


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", MODELS)
def test_measured_is_what_was_explained(family, policy, tmp_path):
    model = sliding_model(family)
    name, options = options_of(policy, tmp_path)
    for prompt, steps in ((20, 33), (90, 12)):
        plan = kvcompile.explain(name, model, prompt=prompt, generate=steps, **options).to_dict()
        kvcompile.optimize(model, name, backend="reference", compile="off", **options)
        cache = ran(model, prompt, steps)
        report = kvcompile.report(model).to_dict()
        kvcompile.restore(model)
        entries, planned = sum(map(sum, report["lengths"])), sum(layer["entries"] for layer in plan["by_layer"])
        assert (plan["exact"] and plan["exact_entries"]) or policy not in PLACED_EXACTLY
        for key in ("footprint", "peak"):
            assert plan[key] >= report[key] - 1e-9
            assert not plan["exact"] or plan[key] == pytest.approx(report[key], abs=1e-9)
        assert planned >= entries and (planned == entries or not plan["exact_entries"])
        assert report["bytes_full"] == plan["bytes_full"]
        assert report["bytes_resident"] <= plan["bytes"] + BOOKKEEPING
        assert report["bytes_allocated"] <= report["bytes_peak"] <= plan["bytes_peak"] + BOOKKEEPING
        windows = [WINDOW if kind == "sliding_attention" else 0 for kind in _kinds(model)]
        for layer, window in enumerate(windows):
            most = window - 1 + min(SLACK, window // 8) if window else prompt + steps
            assert all(len(head) <= most for head in cache.positions(layer))
        heads = {key: c["heads"] for key, c in plan["classes"].items()}
        assert heads == ({"retrieval": 4, "local": 4} if policy == "classes" else {"all": 8})


def _kinds(model):
    return getattr(model.config, "layer_types", None) or ["sliding_attention"] * 4


@pytest.mark.parametrize("family", MODELS)
def test_the_baseline_is_what_an_untouched_model_holds(family):
    """transformers drops what a window has left as well, at once: a saving that is no policy's."""
    model = sliding_model(family)
    for prompt, steps in ((20, 4), (70, 7)):
        plan = kvcompile.explain("keep_all", model, prompt=prompt, generate=steps).to_dict()
        assert plan["bytes_full"] == cache_bytes(ran(model, prompt, steps))


def test_explain_names_the_windows():
    plan = kvcompile.explain("streaming", sliding_model("gemma2"), prompt=100, n_sink=4, window=20)
    assert "of which 4 in layers with a sliding window of 40: what has left it is dropped" in str(plan)
    assert plan.to_dict()["classes"]["all"]["windows"] == {"40": 4}
    assert "of which all in layers" in str(kvcompile.explain("keep_all", sliding_model("mistral"), prompt=100))


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_a_limit_counts_windows(family):
    model = sliding_model(family)
    plan = kvcompile.explain("keep_all", model, prompt=90, generate=30)
    longer = kvcompile.explain("keep_all", model, prompt=90, generate=60)
    assert (longer.bytes_peak == plan.bytes_peak) == (family == "mistral")
    kvcompile.optimize(model, "keep_all", backend="reference", compile="off", max_bytes=plan.bytes_peak)
    ran(model, 90, 30)
    assert kvcompile.report(model).to_dict()["bytes_peak"] <= plan.bytes_peak


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_what_slides_out_of_a_window_is_no_eviction_where_all_is_kept(family):
    model = sliding_model(family)
    kvcompile.optimize(model, "keep_all", backend="cpu", compile="off")
    cache = ran(model, 90, 12)
    assert len(cache.positions(0)[0]) < 102
    report = kvcompile.report(model)
    assert report.evictions == 0
    assert "0 evicted" in str(report) and "lossy" not in str(report)
    kvcompile.optimize(model, "streaming", backend="cpu", compile="off", n_sink=4, window=20)
    ran(model, 90, 12)
    sinks = 0 if family == "mistral" else 4 * 4  # of the four rows without a window, which keep them
    assert kvcompile.report(model).evictions == 8 * (102 - 20) - sinks
