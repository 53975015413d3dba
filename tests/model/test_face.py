"""What else a Hugging Face user does with an optimised model: wrappers, shared configurations, labels, blocks."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import LlamaForCausalLM

import kvcompile
from tests import plain_models as plain
from tests.models import random_model, tokens

TAIL = "policy tail():\n    keep recent(4) | top(50%) by norm(k) per head\n    at step\n"
IDS = torch.tensor([tokens(40, seed=1)])


def step(model, cache, token=7):
    return model(torch.tensor([[token]]), past_key_values=cache, logits_to_keep=1)


def test_models_that_share_a_configuration_keep_their_own_attention():
    one = random_model("llama64")
    other = LlamaForCausalLM(one.config).eval()
    expected = other(IDS).logits
    kvcompile.optimize(one, "streaming", compile="off")
    assert torch.equal(other(IDS).logits, expected)
    kvcompile.optimize(other, "keep_all", compile="off")
    kvcompile.restore(one)
    assert torch.allclose(other(IDS).logits, expected, atol=1e-5)


def test_a_wrapper_that_outlives_restore_calls_the_untouched_model():
    model = random_model("llama64")
    expected = model(IDS).logits
    kvcompile.optimize(model, "streaming", compile="off", window=8)
    ours = model.forward
    model.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    kvcompile.restore(model)
    assert torch.equal(model(IDS).logits, expected)


def test_changing_the_attention_after_optimize_is_refused():
    model = random_model("llama64")
    kvcompile.optimize(model, "keep_all", compile="off")
    model.set_attn_implementation("sdpa")
    with pytest.raises(kvcompile.KvCompileError, match="after optimize"):
        model(IDS)


def test_someone_elses_layer_forward_still_runs():
    model = random_model("llama64")
    layer, calls = model.model.layers[0], []
    plain = layer.forward
    layer.forward = lambda *args, **kwargs: calls.append(1) or plain(*args, **kwargs)
    kvcompile.optimize(model, "keep_all", compile="eager")
    model(IDS)
    assert calls
    kvcompile.restore(model)
    assert layer.forward is not plain


def test_a_broken_graph_does_not_evict_twice():
    model = random_model("llama64")
    kvcompile.optimize(model, TAIL, compile="eager")
    layers = model._kvcompile.forward.engine.layers
    lengths = {}
    for broken in (False, True):
        cache = model(IDS).past_key_values
        step(model, cache)
        if broken:
            layers.breaks.append("said by the test")
        step(model, cache)
        lengths[broken] = [len(p) for p in cache.positions(0)]
    assert lengths[True] == lengths[False]


def test_labels_give_the_models_own_loss_first():
    model = random_model("llama64")
    expected = model(IDS, labels=IDS, return_dict=False)
    kvcompile.optimize(model, "keep_all", compile="off")
    found = model(IDS, labels=IDS, return_dict=False)
    assert found[0].ndim == 0
    assert torch.allclose(found[0], expected[0], atol=1e-5)
    assert torch.allclose(found[1], expected[1], atol=1e-4)


def test_no_cache_is_returned_where_none_is_wanted_and_generate_says_so():
    model = random_model("llama64")
    kvcompile.optimize(model, "keep_all", compile="off")
    assert model(IDS, use_cache=False).past_key_values is None
    with pytest.raises(kvcompile.KvCompileError, match="use_cache"):
        model.generate(IDS, use_cache=False, max_new_tokens=2)


def test_a_cache_made_in_inference_mode_goes_on_outside_of_it():
    model = random_model("llama64")
    kvcompile.optimize(model, "streaming", compile="off", window=8)
    with torch.inference_mode():
        cache = model(IDS).past_key_values
    with torch.no_grad():
        step(model, cache)
    assert cache.get_seq_length() == 41


def test_report_is_about_the_cache_that_ran_last():
    model = random_model("llama64")
    kvcompile.optimize(model, "streaming", compile="off", window=8)
    old = model(IDS).past_key_values
    new = model(IDS[:, :20]).past_key_values
    step(model, old)
    assert kvcompile.report(model).evictions == old.stats()["evictions"]
    assert kvcompile.report(model).evictions != new.stats()["evictions"]


def test_a_refused_call_leaves_the_cache_as_it_was():
    model = random_model("llama64")
    kvcompile.optimize(model, TAIL, compile="off")
    cache = model(IDS).past_key_values
    mask = torch.ones(1, 46, dtype=torch.long)
    mask[:, -1] = 0
    with pytest.raises(kvcompile.KvCompileError, match="output_hidden_states"):
        model(torch.tensor([tokens(6)]), attention_mask=mask, past_key_values=cache, output_hidden_states=True)
    assert cache.get_seq_length() == 40
    step(model, cache)
    assert cache.get_seq_length() == 41


def test_blocks_nest_and_a_bad_policy_leaves_what_was_there():
    model = random_model("llama64")
    with kvcompile.use(model, "streaming", compile="off"):
        with kvcompile.use(model, "keep_all", compile="off"):
            assert kvcompile.inspect(model).plan.name == "keep_all"
        assert kvcompile.inspect(model).plan.name == "streaming"
        with pytest.raises(kvcompile.PolicyError), kvcompile.use(model, "no_such_policy"):
            pass
        assert kvcompile.inspect(model).plan.name == "streaming"
    with pytest.raises(kvcompile.KvCompileError):
        kvcompile.inspect(model)


def test_a_model_without_a_head_is_refused_untouched():
    model = random_model("llama64").model
    before = dict(vars(model))
    with pytest.raises(kvcompile.KvCompileError, match="head"):
        kvcompile.optimize(model, "keep_all")
    assert vars(model) == before


def test_positions_of_ones_own_are_refused():
    model = random_model("llama64")
    kvcompile.optimize(model, "keep_all", compile="off")
    wrong = torch.arange(40)[None].clone()
    wrong[0, 3] = 17
    with pytest.raises(kvcompile.KvCompileError, match="position_ids"):
        model(IDS, position_ids=wrong)


@pytest.mark.parametrize("trigger", ["step", "every(4)"])
def test_decode_gives_memory_back(trigger):
    model = random_model("llama64")
    kvcompile.optimize(model, f"policy p():\n    keep sink(2) | recent(5)\n    at {trigger}\n", compile="off")
    cache = model(torch.tensor([tokens(600)])).past_key_values
    for _ in range(8):
        step(model, cache)
    stats = cache.stats()
    assert stats["bytes_resident"] <= 0.15 * stats["bytes_full"]
    assert stats["bytes_allocated"] == stats["bytes_resident"]


@pytest.mark.parametrize(
    "keep",
    [
        "recent(4) | top(10%) by norm(k) per head",
        "recent(4) | stride(16)",
        "recent(4) | top(10%) by norm(k) across heads",
    ],
)
def test_pools_of_a_prefill_are_sized_by_what_stays(keep):
    model = random_model("llama64", num_hidden_layers=6)
    kvcompile.optimize(model, f"policy p():\n    keep {keep}\n    at prefill.end\n", compile="off")
    stats = model(torch.tensor([tokens(600)])).past_key_values.stats()
    assert stats["bytes_peak"] <= 0.40 * stats["bytes_full"]


def test_several_selections_per_unit_have_room():
    text = """
policy p():
    unit lot(8)
    keep recent(4) | top(50%) by norm(k) per head per lot | top(50%) by norm(v) per head per lot
    at prefill.end
"""
    model = random_model("llama64")
    kvcompile.optimize(model, text, compile="off")
    assert model(IDS).past_key_values.nbytes() > 0


def test_a_step_in_which_no_sequence_brings_a_token_changes_nothing():
    model = random_model("llama64")
    kvcompile.optimize(model, TAIL, compile="off")
    cache = model(IDS).past_key_values
    before = cache.positions(0)[0].tolist()
    mask = torch.ones(1, 41, dtype=torch.long)
    mask[0, -1] = 0
    model(torch.tensor([[7]]), attention_mask=mask, past_key_values=cache)
    assert cache.positions(0)[0].tolist() == before


def test_a_policys_warnings_are_told_once_at_the_line_that_brought_it(tmp_path):
    path = tmp_path / "odd.kvp"
    path.write_text("policy odd():\n    keep all | recent(4)\n    at step\n")
    model = random_model("llama64")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with kvcompile.use(model, "streaming", compile="off"), kvcompile.use(model, path, compile="off"):
            pass
        kvcompile.optimize(model, path, compile="off")
    (warning,) = (w for w in told if issubclass(w.category, kvcompile.PolicyWarning))
    assert warning.filename == __file__
    assert str(warning.message).startswith(f"{path}:2:10: `all` takes every entry")
    assert "[K212]; leave out `all`" in str(warning.message)


@pytest.mark.parametrize(
    ("build", "options"), [(lambda: random_model("llama64"), {"compile": "off"}), (plain.gpt, {"positions": "pos"})]
)
def test_a_warning_that_is_made_an_error_leaves_the_model_untouched(build, options):
    model = build()
    before = dict(vars(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error", kvcompile.PolicyWarning)
        for _ in range(2):
            with pytest.raises(kvcompile.PolicyWarning, match="K212"):
                kvcompile.optimize(model, "policy p():\n    keep recent(9) | all\n    at step\n", **options)
    assert vars(model) == before
