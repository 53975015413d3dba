"""Quick scores equal what a plain forward with one local head shows; the model is left as it was; bad input is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

import kvcompile
from kvcompile.kernels.errors import KvCompileError
from kvcompile.learning import quick
from kvcompile.learning.masks import load_scores
from kvcompile.learning.quick import probe_scores, quick_scores
from kvcompile.passes.sites import find_sites
from kvcompile.probe import run_probes
from tests.learning.learn_plans import learn_plan, rows
from tests.models import FAMILIES, random_model

SINK, RECENT = 2, 5  # of learn_plans.STREAMING


# What a query reads where every token is a step: its own entry, and what was kept after the step before it.
def streaming(query: int, key: int) -> bool:
    return key == query or (key < query and (key < SINK or key > query - 1 - RECENT))


def strided(query: int, key: int) -> bool:
    return key == query or (key < query and (key % 3 == 0 or key > query - 1 - 2))


def one_head_masked(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, *,
    told: tuple[int, int, Callable[[int, int], bool]], **_: object,
) -> tuple[Tensor, None]:  # fmt: skip
    """Plain attention, where one KV head of one layer reads what a predicate says."""
    layer, head, reads = told
    n, group = query.shape[2], query.shape[1] // key.shape[1]
    masks = torch.tensor([[s <= t for s in range(n)] for t in range(n)]).repeat(query.shape[1], 1, 1)
    if module.layer_idx == layer:
        masks[head * group : (head + 1) * group] = torch.tensor([[reads(t, s) for s in range(n)] for t in range(n)])
    out = F.scaled_dot_product_attention(query, key, value, masks, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("one_head_masked", one_head_masked)


@torch.no_grad()
def by_ablation(model: Any, ids: Tensor, reads: Callable[[int, int], bool]) -> list[list[float]]:
    """The change of each layer's attention output by one head alone, through hooks: root mean square over queries."""
    model.set_attn_implementation("one_head_masked")
    sites, heads, n = find_sites(model), model.config.num_key_value_heads, ids.shape[1]

    def output(layer: int, masked: int, head: int) -> Tensor:
        seen: list[Tensor] = []
        handle = sites[layer].attention.register_forward_hook(lambda _module, _args, out: seen.append(out[0]))
        model(ids, use_cache=False, told=(masked, head, reads))
        handle.remove()
        return seen[0]

    differ = [any(not reads(t, s) for s in range(t)) for t in range(n)]
    found: list[list[float]] = []
    for layer in range(len(sites)):
        plain = output(layer, -1, 0)
        changes = [output(layer, layer, head) - plain for head in range(heads)]
        found.append([float(change.norm(dim=-1)[:, differ].square().mean().sqrt()) for change in changes])
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_score_is_what_the_layers_output_loses_with_one_head_local(family: str) -> None:
    ids, model = rows(2, 40), random_model(family)
    scores = quick_scores(model, learn_plan(model), ids)
    truth = by_ablation(random_model(family), ids, streaming)
    assert torch.allclose(torch.tensor(scores.values), torch.tensor(truth), rtol=1e-4, atol=1e-5)
    assert min(value for row in truth for value in row) > 0.01


def test_other_sets_and_a_bias_of_the_projection() -> None:
    def biased() -> Any:
        model = random_model(attention_bias=True)
        for site in find_sites(model):
            torch.nn.init.normal_(site.attention.o_proj.bias)  # type: ignore[union-attr,arg-type]
        return model

    ids, model = rows(1, 24), biased()
    scores = quick_scores(model, learn_plan(model, local="stride(3) | recent(2)"), ids)
    truth = by_ablation(biased(), ids, strided)
    assert torch.allclose(torch.tensor(scores.values), torch.tensor(truth), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("local", ["sink(2) | recent(5)", "random(6, 7) | recent(2)"])
def test_blocks_of_queries_change_nothing(local: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    plan, ids = learn_plan(model, local=local), rows(1, 32)
    whole = quick_scores(model, plan, ids)
    for wide in (1, 1000):
        monkeypatch.setattr(quick, "WIDE", wide)
        found = quick_scores(model, plan, ids)
        assert torch.allclose(torch.tensor(found.values), torch.tensor(whole.values), rtol=1e-5)


def test_the_two_classes_of_the_block_are_compared() -> None:
    model = random_model()
    plan = learn_plan(model, full="sink(1) | recent(9)", local="sink(1) | recent(4)")
    wide = quick_scores(model, learn_plan(model, local="sink(1) | recent(4)"), rows(1, 30))
    narrow = quick_scores(model, plan, rows(1, 30))
    assert all(value > 0 for row in narrow.values for value in row)
    assert narrow.values != wide.values  # compared with what the learned class keeps, not with everything
    with pytest.raises(KvCompileError, match=r"text of 10 tokens a head of `near` reads the same as one of `far`"):
        quick_scores(model, learn_plan(model, local="sink(4) | recent(6)"), rows(1, 10))


def test_random_texts_are_told_twice_and_follow_from_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(max_position_embeddings=50)
    drawn = quick._drawn(model, None, 3, 0)
    assert drawn.shape == (3, 50) and torch.equal(drawn[:, :25], drawn[:, 25:])
    assert len(set(drawn[0, :25].tolist())) == 25 and not {0, 1} & set(drawn.flatten().tolist())
    assert not torch.equal(drawn[0], drawn[1])
    assert quick._drawn(model, 31, 1, 0).shape == (1, 31)
    assert quick._drawn(model, 31, 1, 10**30).shape == (1, 31)  # a seed that no generator takes as it is
    plan = learn_plan(model)
    first, again, other = (quick_scores(model, plan, tokens=30, forwards=2, seed=seed) for seed in (0, 0, 1))
    assert first == again and first.values != other.values
    assert first.provenance["method"] == "quick" and first.provenance["seed"] == 0
    assert first.provenance["digest"] == plan.digest and "2 texts of random tokens" in first.provenance["data"]


def test_the_model_is_left_as_it_was_and_an_optimised_one_is_measured_without_its_policy() -> None:
    model = random_model()
    plan, ids, config = learn_plan(model), rows(1, 30), model.config
    before = model(ids).logits
    plain = quick_scores(model, plan, ids)
    assert model.config is config and config._attn_implementation == "sdpa"
    assert torch.equal(model(ids).logits, before)
    kvcompile.optimize(model, "streaming", n_sink=1, window=2, compile="off")
    assert quick_scores(model, plan, ids).values == plain.values
    assert [p.tolist() for p in model(ids).past_key_values.positions(0)] == [[0, 28, 29]] * 2


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"ids": torch.zeros(5, dtype=torch.int64)}, r"ids of shape \[5\]"),
        ({"ids": torch.zeros(1, 5)}, "give token ids"),
        ({"ids": torch.zeros(1, 0, dtype=torch.int64)}, "give token ids"),
        ({"ids": torch.full((1, 30), 256)}, "id 256 is outside"),
        ({"ids": torch.full((1, 30), -1)}, "id -1 is outside"),
        ({"ids": torch.zeros(1, 99, dtype=torch.int64)}, "99 tokens for a model with 64 positions"),
        ({"forwards": 0}, "say nothing"),
        ({"tokens": 1}, "say nothing"),
        ({"tokens": -3}, "say nothing"),
        ({"tokens": 0}, "say nothing"),
    ],
)
def test_input_that_says_nothing_is_refused(given: dict[str, Any], reason: str) -> None:
    model = random_model(max_position_embeddings=64)
    with pytest.raises(KvCompileError, match=reason):
        quick_scores(model, learn_plan(model), **given)


def test_attention_without_a_known_projection_is_refused() -> None:
    model = random_model()
    plan = learn_plan(model)
    attention = find_sites(model)[1].attention
    attention.other, attention.o_proj = attention.o_proj, None
    with pytest.raises(KvCompileError, match=r"layers\.1: .*`o_proj`"):
        quick_scores(model, plan, rows(1, 30))


def test_a_plan_of_another_model_is_refused() -> None:
    with pytest.raises(KvCompileError, match=r"3 layers of 2 KV heads, the policy was bound to 2 of 2"):
        quick_scores(random_model(), learn_plan(random_model("llama128")), rows(1, 30))


def test_a_probe_is_saved_as_a_table_like_any_other(tmp_path: Path) -> None:
    model = random_model()
    for kind in ("induction", "echo"):
        scores = probe_scores(model, kind, tokens=9)
        found = run_probes(model, find_sites(model), {"x": (kind, 9)})["x"]
        assert scores.values == tuple(map(tuple, found)) and scores.provenance["method"] == f"probe {kind}"
        path = scores.save(tmp_path / f"{kind}.safetensors")
        assert load_scores(path).chosen(0.5) == scores.chosen(0.5)
    with pytest.raises(KvCompileError, match=r"unknown probe 'copy': one of echo, induction"):
        probe_scores(model, "copy")
    plan = kvcompile.explain("prulong", model, prompt=64, tables={"retrieval": path})
    assert plan.to_dict()["classes"]["retrieval"]["heads"] == 1  # 30 % of 6
