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


def test_whole_pieces_stand_in_all_layers_where_losers_move() -> None:
    """Room for what is judged in place: the prompt in every row, beside the piece's own keys and values."""
    small = config(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    text = "policy mine():\n    keep recent(21){}\n    at prefill.end\n"
    dropped = explain(text.format(""), small, prompt=100)
    folded = explain(text.format(" else fold mean weight count"), small, prompt=100)
    slot = 2 * 64 * 2 + 4 + 1 + 4  # the count of each entry is a state
    fresh = 100 * 2 * 2 * 64 * 2
    assert dropped.bytes_peak == 2 * 2 * 32 * (slot - 4) + fresh
    assert folded.bytes_peak == 2 * 2 * 112 * slot + fresh  # 100 entries are seven pages of 16
    assert [layer.entries for layer in folded.layers] == [44, 44]


def test_choices_for_later_layers_and_tables_of_angles_are_counted() -> None:
    small = config(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    plain = explain("streaming", small, prompt=300, n_sink=4, window=60)
    compact = explain("streaming_compact", small, prompt=300, n_sink=4, window=60)
    assert compact.bytes == plain.bytes + 2 * 4 * 64 * 512  # cosine and sine of 512 places
    twice = explain("streaming_compact", small, prompt=300, n_sink=4, window=60, batch=2)
    assert twice.bytes == 2 * plain.bytes + 2 * 4 * 64 * 512  # once for all sequences
    lines = ("layers 0:", "    pick t = top(9) by norm(k)", "    keep all", "keep t", "at prefill.end")
    text = "policy mine():\n" + "".join(f"    {line}\n" for line in lines)
    picks = explain(text, small, prompt=300)
    entries = 2 * (304 + 16) * (2 * 64 * 2 + 5)
    assert picks.bytes == entries + 2 * 4 * 512


def test_rows_with_several_rules_are_one_class() -> None:
    text = (
        "policy mine():\n    keep recent(64) | top(448) by norm(k)\n    at prefill.end\n"
        "    keep recent(32) | top(96) by mean[g] sum[q in last(4)] attn\n    at every(16) if len > 512\n"
    )
    found = explain(text, config(), prompt=4096, generate=40).to_dict()["classes"]
    assert list(found) == ["all"]
    assert found["all"]["heads"] == 256
    assert found["all"]["keep"].splitlines() == [
        "keep recent(64) | top(448) by norm(k) at prefill.end",
        "keep recent(32) | top(96) by mean[g] sum[q in last(4)] attn at every(16) if len > 512",
    ]
    assert found["all"]["triggers"] == {"prefill.end": 4096, "every(16) if len > 512": 16}
    assert found["all"]["overshoot"] == 4096 - 512
    assert "small extra product" in found["all"]["cost"]


@pytest.mark.parametrize(
    ("lines", "triggers", "overshoot"),
    [
        (["keep recent(16)", "at chunk(32), step"], {"chunk(32)": 32, "step": 1}, 32),
        (["keep recent(16)", "at every(8)"], {"every(8)": 8}, 100 + 8 - 16),
        (["unit lot(8)", "keep newest lot", "at filled(lot, 2)"], {"filled(lot, 2)": 16}, 100 - 4),
        (["keep recent(16)", "at full(40)"], {"full(40)": None}, 100 - 16),
        (["keep recent(16)", "at when now > 110"], {"when now > 110": None}, 112 - 16),
    ],
)
def test_overshoot_is_what_piles_up(lines: list[str], triggers: dict[str, int], overshoot: int) -> None:
    text = "policy mine():\n" + "".join(f"    {line}\n" for line in lines)
    (part,) = explain(text, config(), prompt=100, generate=20).classes
    assert part.triggers == triggers
    assert part.overshoot == overshoot


def test_each_score_has_its_cost_and_a_cheaper_neighbour() -> None:
    found = explain("criticalkv", config(), prompt=4096).to_dict()["classes"]["all"]["scores"]
    assert [score["score"] for score in found] == [
        "score s = maxpool(mean[g] sum[q in last(64)] attn, 7)",
        "(s + 0.0001) * norm(v)",
    ]
    assert all("small extra product" in score["cost"] and "knorm" in score["cheaper"] for score in found)
    dear = explain("h2o", config(), prompt=4096)
    assert "sum[q in last(64)] attn" in dear.classes[0].scores[0].cheaper
    assert dear.classes[0].scores[0].cheaper in str(dear)
    assert not explain("streaming", config(), prompt=4096).classes[0].scores


def test_losers_are_named() -> None:
    (part,) = (c for c in explain("d2o", config(), prompt=4096).classes if c.losers)
    assert part.losers.startswith("merge into nearest by cos(k)") and part.losers.endswith("else drop")
    assert explain("snapkv", config(), prompt=4096).classes[0].losers == "drop"


def test_entries_by_class_and_layer(half: Path) -> None:
    found = explain("prulong", config(), prompt=4096, generate=1, tables={"retrieval": half}).to_dict()
    assert (
        found["by_layer"][3].items()
        >= {
            "entries": 4 * 4097 + 4 * 1152,
            "heads": {"retrieval": 4, "local": 4},
            "held": {"retrieval": 4 * 4097, "local": 4 * 1152},
        }.items()
    )


def test_footprint_by_class_layer_and_head(half: Path) -> None:
    found = explain("prulong", config(), prompt=131072, generate=100, tables={"retrieval": half}).to_dict()
    local = (found["footprint"] - 0.5) * 2  # half of the heads are full
    assert found["classes"]["retrieval"]["footprint"] == found["classes"]["retrieval"]["peak"] == 1.0
    assert found["classes"]["local"]["footprint"] == pytest.approx(local, abs=1e-12)
    for layer in found["by_layer"]:
        assert layer["footprint"] == pytest.approx(found["footprint"], abs=1e-12)
        assert layer["footprint_by_head"] == pytest.approx([1.0, local] * 4, abs=1e-12)
        assert layer["exact"] and layer["exact_by_head"]


def test_parts_that_only_a_sum_is_known_of_are_bounds_and_say_so() -> None:
    small = config(num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4, head_dim=16)
    heads = explain("adakv", small, prompt=400, generate=100, budget=64, observe=8)
    assert heads.exact and all(layer.spent.exact for layer in heads.layers)
    assert not any(head.exact for layer in heads.layers for head in layer.by_head)
    # One KV head may have what the heads of its layer have together, and never more than the prompt.
    area = 400 * 401 / 2 + sum(1 + min(4 * (64 + step), 400 + step) for step in range(100))
    assert heads.layers[0].by_head[0].footprint == pytest.approx(area / (500 * 501 / 2))
    assert all(head.exact for layer in explain("adakv", small, prompt=50, budget=64).layers for head in layer.by_head)
    text = "policy mine():\n    keep top(64) by norm(k) across heads across layers\n    at prefill.end\n"
    both = explain(text, small, prompt=400, generate=100)
    assert both.exact and not any(layer.spent.exact for layer in both.layers)
    assert both.layers[0].spent.footprint > both.footprint


def test_heads_that_a_probe_has_yet_to_choose_are_not_told_apart() -> None:
    text = (
        'heads far = probe("induction", top=25%)\nheads near = rest\n'
        "policy mine():\n    far: keep all\n    near: keep sink(4) | recent(60)\n    at prefill.end, step\n"
    )
    found = explain(text, config(), prompt=1000, generate=50).to_dict()
    assert found["exact"] and found["classes"]["near"]["footprint"] < found["classes"]["far"]["footprint"] == 1.0
    for layer in found["by_layer"]:
        assert (layer["exact"], layer["exact_by_head"]) == (False, False)
        assert layer["footprint_by_head"] == [1.0] * 8


def test_a_class_that_is_known_is_exact_beside_one_that_is_not() -> None:
    text = "policy mine():\n    layers 0..3: keep all\n    keep cover(90%) by norm(k)\n    at prefill.end, step\n"
    found = explain(text, config(), prompt=100, generate=5).to_dict()
    first, second = found["classes"].values()
    assert not found["exact"]
    assert (first["exact"], first["footprint"]) == (True, 1.0)
    assert not second["exact"]
    assert [layer["exact"] for layer in found["by_layer"]] == [True] * 4 + [False] * 28


def test_bounds_say_that_they_are_bounds() -> None:
    text = "policy mine():\n    keep cover(90%) by norm(k)\n    at {}\n"
    once = explain(text.format("prefill.end"), config(), prompt=100)
    assert once.exact and not once.exact_entries  # all that was read was known
    assert "at most" in str(once) and "upper bound" not in str(once)
    twice = explain(text.format("prefill.end, step"), config(), prompt=100, generate=3)
    assert not twice.exact and "upper bound" in str(twice)
    assert [layer.entries for layer in once.layers] == [8 * 91] * 32  # equal scores, and the one that crosses


def test_a_gpu_adds_the_time_of_a_step_by_bytes_over_bandwidth() -> None:
    found = explain("knorm", config(), prompt=131072, budget=1024, gpu="nvidia h200").to_dict()
    entry = 2 * 128 * 2
    assert found["gpu"] == "H200"
    assert found["step_seconds"] == pytest.approx(1024 * 256 * entry / 4.8e12)
    assert found["step_seconds_full"] == pytest.approx(131072 * 256 * entry / 4.8e12)
    assert found["step_seconds_full"] / found["step_seconds"] == pytest.approx(found["ceiling"])
    with pytest.raises(KvCompileError, match=r"abacus.*known: .*H200"):
        explain("knorm", config(), gpu="abacus")


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
        "H100",
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


def test_warnings_stand_below_the_figures() -> None:
    lines = str(explain("razor", config(), prompt=8192)).splitlines()
    told = [line.split("[")[-1] for line in lines if line.startswith("warning")]
    assert told == ["K401]", "K617]", "K617]"]
    assert "warning" not in str(explain("streaming", config(), prompt=8192))
