"""What model families are refused, and why; models whose attention is not what their configuration says; angles that
follow from a prompt's length.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM

import kvcompile
from kvcompile.passes.sites import find_sites
from tests.families import FAMILIES, REFUSED, config_of, family_model, prompt, rope

COMPACT = "policy p():\n    keep sink(2) | recent(8)\n    positions compact\n    at step\n"


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_cannot_be_supported_is_refused_with_its_reason(name):
    _, kind, options, reason = REFUSED[name]
    model = AutoModelForCausalLM.from_config(config_of(kind, **options))
    with pytest.raises(kvcompile.KvCompileError) as found:
        kvcompile.optimize(model, "keep_all")
    assert type(model).__name__ in str(found.value)
    assert reason in str(found.value)
    assert "docs/models.md" in str(found.value)
    with pytest.raises(kvcompile.KvCompileError, match=reason):
        kvcompile.explain("keep_all", config_of(kind, **options))


@pytest.mark.parametrize("name", [n for n, family in FAMILIES.items() if family.compact])
def test_positions_by_place_are_refused_where_keys_cannot_be_turned_back(name):
    with pytest.raises(kvcompile.PolicyError) as found:
        kvcompile.optimize(family_model(name), COMPACT)
    assert found.value.diagnostics[0].code == "K706"
    assert FAMILIES[name].compact in found.value.diagnostics[0].message


@pytest.mark.parametrize("name", ["llama3", "qwen3", "granite", "gemma", "gpt_oss"])
def test_positions_by_place_work_where_all_channels_turn(name):
    model = kvcompile.optimize(family_model(name), COMPACT, backend="reference", compile="off")
    assert model.generate(torch.tensor([prompt(20)]), max_new_tokens=4).shape == (1, 24)


def test_gpt2_with_a_scale_by_layer_is_refused():
    model = AutoModelForCausalLM.from_config(config_of("gpt2", scale_attn_by_inverse_layer_idx=True))
    with pytest.raises(kvcompile.KvCompileError, match="different scales"):
        kvcompile.optimize(model, "keep_all")


@pytest.mark.parametrize(("options", "scale"), [({}, 0.25), ({"scale_attn_weights": False}, 1.0)])
def test_the_scale_of_gpt2_is_what_its_configuration_says(options, scale):
    sites = find_sites(AutoModelForCausalLM.from_config(config_of("gpt2", **options)))
    assert [site.scale for site in sites] == [scale] * 2


def test_a_decoder_with_cross_attention_is_refused():
    model = AutoModelForCausalLM.from_config(config_of("gpt2", add_cross_attention=True, is_decoder=True))
    with pytest.raises(kvcompile.KvCompileError, match="two attentions"):
        kvcompile.optimize(model, "keep_all")


@pytest.mark.parametrize("compile", ["off", "eager"])
@pytest.mark.parametrize(
    ("name", "attribute", "value", "word"),
    [
        ("gemma2", "sliding_window", 5, "window 5 instead of 9"),
        ("gemma2", "attn_logit_softcapping", None, "softcap 0.0 instead of 2.0"),
        ("gemma2", "scaling", 0.5, "scale 0.5 instead of"),
        ("gpt_oss", "sinks", None, "sinks False instead of True"),
    ],
)
def test_a_layer_that_asks_for_other_attention_than_its_plan_is_refused_by_name(name, attribute, value, word, compile):
    model = kvcompile.optimize(family_model(name), "h2o", backend="reference", compile=compile)
    setattr(model.model.layers[0].self_attn, attribute, value)
    with pytest.raises(kvcompile.KvCompileError, match="layer 0") as found:
        model(torch.tensor([prompt(12)]))
    assert word in str(found.value)


LONGROPE = rope(
    "longrope", original_max_position_embeddings=32, short_factor=[2.0] * 8, long_factor=[8.0] * 8, factor=1.0
)
CHUNKS = "policy p(c=8):\n    keep all\n    at chunk(c)\n"


@pytest.mark.parametrize("policy", ["keep_all", CHUNKS], ids=["whole", "pieces"])
@pytest.mark.parametrize("length", [20, 40])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama_dynamic", {}),
        ("llama", LONGROPE),
        ("phi3_long", {**LONGROPE, "original_max_position_embeddings": 32}),
    ],
    ids=["dynamic", "longrope", "Phi-3, which computes its prompt anew"],
)
def test_angles_that_follow_from_the_length_change_no_token_across_the_switch(name, changes, length, policy):
    """From 20 tokens the switch falls into decode; from 40 it lies before the prompt's end, inside of its pieces."""
    if name == "phi3_long" and length == 20 and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("this version computes only the newest token anew, at position 0 of nothing")
    ids = torch.tensor([prompt(length)])
    untouched = family_model(name, **changes).generate(ids, max_new_tokens=16, do_sample=False)
    model = kvcompile.optimize(family_model(name, **changes), policy, backend="reference", compile="off")
    assert model.generate(ids, max_new_tokens=16, do_sample=False).tolist() == untouched.tolist()
    assert not any("forward" in vars(m) for n, m in model.named_modules() if n.endswith("rotary_emb"))
