"""Turning by place: against complex numbers, and against the models whose rotary embedding the table stands for."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kvcompile.dsl.diagnostics import PolicyError
from kvcompile.kernels.rotary import places, places_among, rotate
from kvcompile.passes.sites import find_sites
from kvcompile.rotary import RopeTable
from tests.kernels.rows import rope_table, turned
from tests.models import random_model

quick = settings(max_examples=60, deadline=None, derandomize=True)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width", [2, 8, 64])
def test_rotate_turns_pairs_of_channels(width):
    x, rope = noise(3, 5, width), rope_table(40, width)
    place = torch.tensor([[0, 1, 2, 3, 4], [39, 7, 7, 0, 20], [5, 4, 3, 2, 1]])
    found = rotate(x, place, rope)
    for r in range(3):
        for i in range(5):
            truth = turned(x[r, i], int(place[r, i]))
            torch.testing.assert_close(found[r, i].double(), truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rotate(found, place, rope, back=True), x, rtol=1e-5, atol=1e-5)
    assert torch.equal(rotate(x, torch.zeros_like(place), rope), x)


def test_places_broadcast_over_heads_and_sixteen_bits_are_rounded_once():
    x, rope, place = noise(2, 3, 5, 8).bfloat16(), rope_table(9, 8), torch.tensor([8, 0, 3, 3, 1])
    found = rotate(x, place, rope)
    assert found.dtype == torch.bfloat16 and found.shape == x.shape
    assert torch.equal(found, rotate(x.float(), place, rope).bfloat16())


def test_only_the_distance_of_places_matters():
    q, k, rope = noise(8), noise(8, seed=1), rope_table(60, 8)

    def dot(a: int, b: int) -> torch.Tensor:
        return rotate(q[None], torch.tensor([a]), rope) @ rotate(k[None], torch.tensor([b]), rope).T

    torch.testing.assert_close(dot(50, 43), dot(7, 0), rtol=1e-4, atol=1e-4)


@quick
@given(st.data())
def test_a_place_counts_the_entries_before(data):
    positions = data.draw(st.lists(st.integers(-1, 30), min_size=0, max_size=12), "positions")
    seen: set[int] = set()
    row = [p for p in positions if p < 0 or not (p in seen or seen.add(p))]
    there = [data.draw(st.booleans()) for _ in row]
    asked = data.draw(st.lists(st.integers(0, 35), min_size=1, max_size=4), "asked")
    pos, mask = torch.tensor([row]).reshape(1, -1).long(), torch.tensor([there]).reshape(1, -1).bool()

    def before(p: int) -> int:
        return sum(t and 0 <= other < p for other, t in zip(row, there, strict=True))

    expected = [before(p) for p, t in zip(row, there, strict=True) if t]
    for dtype in (torch.int64, torch.int32):
        found = places(pos.to(dtype), mask)[0].tolist()
        assert [f for f, t in zip(found, there, strict=True) if t] == expected
        assert all(0 <= f < max(1, len(row)) for f, t in zip(found, there, strict=True) if t)
        among = places_among(torch.tensor([asked]).to(dtype), pos.to(dtype), mask)[0].tolist()
        assert among == [before(p) for p in asked]


# -- models ------------------------------------------------------------------------------------------------------------

SCALED = {
    "linear": {"factor": 2.0},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 1024},
}  # fmt: skip


def table_of(model) -> RopeTable:
    return RopeTable(model, find_sites(model))


@pytest.mark.parametrize("family", ["llama64", "llama128", "qwen64", "qwen128"])
@pytest.mark.parametrize("kind", ["default", *SCALED])
def test_the_table_is_the_models_own_rope(family, kind):
    rope = {"rope_type": kind, "rope_theta": 10000.0, **SCALED.get(kind, {})}
    model = random_model(family, rope_parameters=rope)
    table = table_of(model).upto(700)
    assert table.dtype == torch.float32 and table.shape[1] >= 700
    q, place = noise(1, 3, 6, table.shape[2]), torch.tensor([0, 1, 17, 255, 256, 699])
    own = model.model.rotary_emb
    at, still = (own(q, p[None]) for p in (place, torch.zeros_like(place)))
    truth, start = (apply_rotary_pos_emb(q, q, *angles)[0] for angles in (at, still))
    torch.testing.assert_close(rotate(start, place, table), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_models_are_accepted(dtype):
    table = table_of(random_model("llama64").to(dtype))
    assert table.upto(1).dtype == torch.float32


def test_a_table_grows_by_doubling_and_keeps_its_angles():
    table = table_of(random_model("llama64"))
    first = table.upto(10).clone()
    assert table.upto(257).shape[1] == 512 and table.upto(3).shape[1] == 512
    assert torch.equal(table.upto(512)[:, : first.shape[1]], first)


def other_model(name: str, **options: object):
    sizes = {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**{**sizes, **options})
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Phi", "turns 8 of 16 channels"),
        ("Cohere", "does not turn its queries as Llama does"),
        ("SmolLM3", r"layers\.3 does not turn"),
    ],
)
def test_models_that_turn_otherwise_are_refused(name, reason):
    with pytest.raises(PolicyError, match=reason) as caught:
        table_of(other_model(name))
    assert [d.code for d in caught.value.diagnostics] == ["K706"] and caught.value.diagnostics[0].hint


def test_angles_that_follow_the_length_are_refused():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(PolicyError, match="change with the length"):
        table_of(random_model("llama64", rope_parameters=rope))


def test_no_rotary_embedding_and_several_are_refused():
    model = random_model("llama64")
    sites, own = find_sites(model), model.model.rotary_emb
    model.model.rotary_emb = torch.nn.Identity()
    with pytest.raises(PolicyError, match="has no rotary embedding"):
        RopeTable(model, sites)
    model.model.rotary_emb, model.model.another = own, type(own)(model.config)
    with pytest.raises(PolicyError, match="several rotary embeddings"):
        RopeTable(model, sites)


def test_the_trial_leaves_the_model_as_it_was():
    model = random_model("qwen64")
    before = [(m, m.config) for m in model.modules() if hasattr(m, "config")]
    table_of(model)
    assert all(m.config is config for m, config in before)
    assert model.config._attn_implementation == "sdpa"
