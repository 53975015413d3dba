"""Explain: the contract's figures, from a configuration alone."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvcompile.kernels.errors import KvCompileError
from kvcompile.passes.explain import explain
from kvcompile.passes.facts import model_facts


def config(**changes: object) -> SimpleNamespace:
    base = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096,
            "model_type": "llama", "dtype": "bfloat16"}  # fmt: skip
    return SimpleNamespace(**(base | changes))


@pytest.fixture
def half(tmp_path: Path) -> Path:
    """A table that makes every second of 32 x 8 heads a retrieval head."""
    path = tmp_path / "heads.tsv"
    path.write_text("1 0 1 0 1 0 1 0\n" * 32)
    return path


def test_the_published_setting(half: Path) -> None:
    found = explain("prulong", config(), prompt=131072, generate=100, tables={"retrieval": half}).to_dict()
    assert found["footprint"] == pytest.approx(0.6314007, abs=1e-6)
    assert found["peak"] == pytest.approx(0.6289147, abs=1e-6)
    assert found["exact"] is True
    assert found["layers"] == 32
    assert {name: c["heads"] for name, c in found["classes"].items()} == {"retrieval": 128, "local": 128}
    assert found["classes"]["local"]["keep"] == "keep sink(128) | recent(1024) at chunk(32k), step"
    assert found["classes"]["retrieval"]["keep"] == "keep all"
    assert "free" in found["classes"]["local"]["cost"]
    assert found["bytes_full"] == 131172 * 256 * 2 * 128 * 2
    assert json.loads(json.dumps(found)) == found


def test_bytes_count_positions_marks_states_and_page_waste() -> None:
    small = config(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    found = explain("h2o", small, prompt=100, heavy=10, local=11)
    slot = 2 * 64 * 2 + 4 + 1 + 4  # key and value, position, frozen mark, one state
    assert found.bytes == 2 * 2 * 32 * slot  # 21 entries are two pages of 16
    fresh = 100 * 2 * 2 * 64 * 2
    assert found.bytes_peak == found.bytes + fresh
    assert [layer.entries for layer in found.layers] == [42, 42]
    twice = explain("h2o", small, prompt=100, heavy=10, local=11, batch=2)
    assert (twice.bytes, twice.bytes_full, twice.footprint) == (2 * found.bytes, 2 * found.bytes_full, found.footprint)


def test_ceiling_is_traffic_over_traffic() -> None:
    pytest.importorskip("transformers")
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny = LlamaConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=64,
                       intermediate_size=96, vocab_size=50, head_dim=16, tie_word_embeddings=False)  # fmt: skip
    facts = model_facts(tiny)
    attention = 64 * 64 + 2 * 64 * 32 + 64 * 64
    weights = 4 * (2 * 50 * 64 + 2 * (attention + 3 * 64 * 96 + 2 * 64) + 64)
    assert (facts.weight_bytes, facts.dtype, facts.family, facts.group) == (weights, "float32", "llama", 2)
    assert model_facts(LlamaForCausalLM(tiny)) == facts
    found = explain("knorm", tiny, prompt=1000, budget=100)
    entry = 2 * 16 * 4
    assert found.ceiling == pytest.approx((weights + 1000 * 4 * entry) / (weights + 100 * 4 * entry))
    assert explain("keep_all", tiny, prompt=1000).ceiling == 1.0


def test_the_text_shows_every_figure() -> None:
    text = str(explain("pyramidkv", config(), prompt=4096, budget=512, gpu="h100"))
    for part in (
        "pyramidkv on llama",
        "class       all: 256 KV heads",
        "footprint",
        "peak",
        "ceiling",
        "h100",
        "entries",
    ):
        assert part in text
    assert "upper bound" not in text


def test_the_dearest_source_is_the_cost() -> None:
    costs = {
        name: explain(name, config(), prompt=64).classes[0].cost
        for name in ("streaming", "knorm", "snapkv", "h2o", "tova", "lagkv")
    }
    assert "free" in costs["streaming"]
    assert "O(n d)" in costs["knorm"] and "O(n d)" in costs["lagkv"]
    assert "small extra product" in costs["snapkv"] and "small extra product" in costs["tova"]
    assert "second pass" in costs["h2o"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"prompt": 0}, "prompt=0"),
        ({"generate": -1}, "generate=-1"),
        ({"batch": 0}, "batch=0"),
        ({"prompt": 1.5}, "whole number"),
        ({"gpu": "abacus"}, "abacus"),
    ],
)
def test_lengths_and_gpus_that_make_no_sense(options: dict[str, object], reason: str) -> None:
    with pytest.raises(KvCompileError, match=reason):
        explain("keep_all", config(), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (SimpleNamespace(), "num_hidden_layers"),
        (config(num_attention_heads=0), "num_attention_heads"),
        (config(num_key_value_heads=5), "cannot share"),
        (config(dtype="int8"), "int8"),
        ("a string", "num_hidden_layers"),
    ],
)
def test_models_that_cannot_be_read(source: object, reason: str) -> None:
    with pytest.raises(KvCompileError, match=reason):
        model_facts(source)
