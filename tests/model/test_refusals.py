"""What is not supported is refused by name; a user's mistake is one screen: place, reason, way out, no traceback."""

import copy
import io
import pickle

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

import kvcompile
from tests.driving import call
from tests.models import random_model, tokens

SCREEN = 25  # lines


@pytest.fixture
def model():
    made = random_model("llama64")
    return kvcompile.optimize(made, "streaming", compile="off", n_sink=2, window=8)


@pytest.fixture
def ids():
    return torch.tensor([tokens(20, seed=1)])


def refused(found: pytest.ExceptionInfo, *words: str) -> None:
    """One screen that names the thing."""
    said = str(found.value)
    assert len(said.splitlines()) <= SCREEN
    for word in words:
        assert word in said.lower(), f"{word!r} is not in: {said}"


# -- ways of generating and of copying --------------------------------------------------------------------------------


def test_assisted_decoding(model, ids):
    with pytest.raises(kvcompile.KvCompileError) as found:
        model.generate(ids, assistant_model=random_model("llama64"), max_new_tokens=3)
    refused(found, "assist")


def test_prompt_lookup_decoding(model, ids):
    with pytest.raises(kvcompile.KvCompileError) as found:
        model.generate(ids, prompt_lookup_num_tokens=2, max_new_tokens=3)
    refused(found, "assist")


def test_prefill_chunks_of_transformers(model, ids):
    with pytest.raises(kvcompile.KvCompileError) as found:
        model.generate(ids, prefill_chunk_size=8, max_new_tokens=3)
    refused(found, "chunk")


@pytest.mark.parametrize("name", ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"])
def test_continuous_batching_of_transformers(model, ids, name):
    with pytest.raises(kvcompile.KvCompileError) as found:
        getattr(model, name)(ids.tolist())
    refused(found, "continuous batching", "join")
    kvcompile.restore(model)
    assert getattr(model, name).__func__ is getattr(type(model), name)


def test_crop(model, ids):
    _, cache = call(model, ids)
    with pytest.raises(kvcompile.KvCompileError) as found:
        cache.crop(5)
    refused(found, "crop")


def test_a_copy_of_the_model(model):
    with pytest.raises(kvcompile.KvCompileError) as found:
        copy.deepcopy(model)
    refused(found, "cop", "restore")


@pytest.mark.parametrize("way", ["pickle", "torch"])
def test_a_pickle_of_the_model(model, way):
    with pytest.raises(kvcompile.KvCompileError) as found:
        pickle.dumps(model) if way == "pickle" else torch.save(model, io.BytesIO())
    refused(found, "pickle", "restore")


def test_copies_are_allowed_again_after_restore(model, ids):
    kvcompile.restore(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(twin(ids).logits, model(ids).logits)
        assert torch.equal(pickle.loads(pickle.dumps(model))(ids).logits, model(ids).logits)


def test_weights_of_an_optimised_model_can_be_saved(model, ids, tmp_path):
    """save_pretrained keeps weights and config only; what comes back is the untouched model."""
    model.save_pretrained(tmp_path)
    back = type(model).from_pretrained(tmp_path)
    kvcompile.restore(model)
    with torch.no_grad():
        torch.testing.assert_close(back(ids).logits, model(ids).logits)


def test_the_cache_of_another_model_is_not_taken(model, ids):
    from transformers import DynamicCache

    filled = DynamicCache(config=model.config)
    with torch.no_grad():
        random_model("llama64")(ids, past_key_values=filled)
        with pytest.raises(kvcompile.KvCompileError):
            model(ids[:, :1], past_key_values=filled)


def test_a_cache_of_an_earlier_policy_is_not_taken(model, ids):
    _, cache = call(model, ids)
    kvcompile.optimize(model, "knorm", compile="off", budget=8)
    with pytest.raises(kvcompile.KvCompileError):
        call(model, ids[:, :1], cache)


# -- models and options -----------------------------------------------------------------------------------------------


def test_a_model_whose_attention_cannot_be_replaced():
    config = BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2)
    with pytest.raises(kvcompile.KvCompileError) as found:
        kvcompile.optimize(BloomForCausalLM(config), "keep_all")
    refused(found, "bloom", "attention")


def test_not_a_model():
    with pytest.raises(kvcompile.KvCompileError):
        kvcompile.optimize(torch.nn.Linear(2, 2), "keep_all")


def test_triton_without_a_gpu_is_refused_before_anything_runs(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model = random_model("llama64")
    with pytest.raises(kvcompile.KvCompileError) as found:
        kvcompile.optimize(model, "knorm", backend="triton")
    refused(found, "triton", "cpu", "triton_interpret=1")
    assert not hasattr(model, "_kvcompile")


@pytest.mark.parametrize("option", [{"backend": "abacus"}, {"compile": "sometimes"}])
def test_an_unknown_option_value_names_the_known_ones(option):
    with pytest.raises(kvcompile.KvCompileError) as found:
        kvcompile.optimize(random_model("llama64"), "keep_all", **option)
    refused(found, *option.values(), {"backend": "cpu", "compile": "eager"}[next(iter(option))])


def test_a_refused_policy_leaves_the_model_untouched():
    model = random_model("llama64")
    before = (set(model.__dict__), model.config._attn_implementation)
    with pytest.raises(kvcompile.PolicyError):
        kvcompile.optimize(model, "snapkv", budget=8, observe=64)
    assert (set(model.__dict__), model.config._attn_implementation) == before


# -- policies ---------------------------------------------------------------------------------------------------------

BAD_POLICIES = {
    "unknown name": (
        "policy p(budget=8):\n    keep top(budgte) by norm(k) per head\n    at prefill.end\n",
        {},
        "budget",
        2,
    ),
    "missing score": ("policy p(budget=8):\n    keep top(budget)\n    at prefill.end\n", {}, "by", 2),
    "impossible budget": (
        "policy p():\n    score s = norm(k)\n    keep recent(64) | top(8 - 64) by s per head\n    at prefill.end\n",
        {},
        "count",
        3,
    ),
    "not lowered yet": ("policy p():\n    keep recent(8) else move cpu\n    at step\n", {}, "move", 2),
}


@pytest.mark.parametrize("case", BAD_POLICIES)
def test_a_bad_policy_is_shown_at_its_place(case):
    text, params, word, line = BAD_POLICIES[case]
    with pytest.raises(kvcompile.PolicyError) as found:
        kvcompile.optimize(random_model("llama64"), text, **params)
    refused(found, word)
    finding = found.value.diagnostics[0]
    assert finding.code.startswith("K")
    assert finding.line == line
    assert finding.column > 1
    assert finding.message
    assert finding.hint
    shown = str(found.value)
    assert "^" in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize(
    ("policy", "word"),
    [("snapvk", "snapkv"), ("does/not/exist.kvp", "exist.kvp")],
    ids=["library name", "missing file"],
)
def test_a_policy_that_is_not_there(policy, word):
    with pytest.raises(kvcompile.PolicyError) as found:
        kvcompile.optimize(random_model("llama64"), policy)
    refused(found, word)


def test_a_policy_path_that_is_a_folder(tmp_path):
    folder = tmp_path / "here.kvp"
    folder.mkdir()
    with pytest.raises(kvcompile.PolicyError) as found:
        kvcompile.optimize(random_model("llama64"), str(folder))
    refused(found, "here.kvp")
    assert any(word in str(found.value) for word in ("directory", "folder"))


def test_an_unknown_parameter_names_the_nearest():
    with pytest.raises(kvcompile.PolicyError) as found:
        kvcompile.optimize(random_model("llama64"), "snapkv", buget=8)
    refused(found, "buget", "budget")


BAD_TABLES = {
    "wrong number of layers": "1\t0\n0\t1\n",
    "wrong number of heads": "1\t0\t1\n0\t1\t0\n0\t0\t0\n",
    "ragged": "1\t0\n0\n0\t0\n",
    "not a number": "1\t0\n0\tx\n0\t0\n",
    "NaN": "1\t0\n0\tnan\n0\t0\n",
    "infinite": "1\t0\n0\tinf\n0\t0\n",
    "empty": "",
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_a_bad_mask_file_is_refused_with_its_name(case, tmp_path):
    path = tmp_path / "mask.tsv"
    path.write_text(BAD_TABLES[case])
    with pytest.raises(kvcompile.PolicyError) as found:
        kvcompile.optimize(random_model("llama64"), "prulong", tables={"retrieval": str(path)})
    refused(found, "mask.tsv")
    assert found.value.diagnostics[0].hint


def test_a_mask_path_that_is_a_folder(tmp_path):
    with pytest.raises(kvcompile.PolicyError) as found:
        kvcompile.optimize(random_model("llama64"), "prulong", tables={"retrieval": str(tmp_path)})
    refused(found, tmp_path.name.lower())
