"""Golden selections of SnapKV and PyramidKV's published clusters, through a model whose queries and keys are given.

The model's tokens are one-hot, its projections hold the wanted queries and keys, turned back by RoPE, and nothing is
added to the hidden states: so all its layers read the same, and every kept position comes from a real run.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import kvcompile
from tests.driving import BACKENDS, Positions, call

N, WIDTH, KV_HEADS, GROUP = 64, 8, 2, 2
# Window 4, average pooling 5, capacity 16, group of 2: what the published cluster keeps in KV head 0.
GOLDEN = (26, 27, 28, 29, 30, 31, 34, 52, 53, 55, 56, 57, 60, 61, 62, 63)
# As published: sums over the window, average pooling over all but the window, the window always kept. Averages of a
# group may be taken before or after average pooling, which is linear.
PUBLISHED = """policy published(budget=16, observe=4):
    score s = avgpool(mean[g] sum[q in last(observe)] attn, 5)
    keep recent(observe) | top(budget - observe) by s per head
    at prefill.end
"""
PYRAMID = """policy published(budget=16, observe=4):
    score s = avgpool(mean[g] sum[q in last(observe)] attn, 5)
    share b = budget - observe by pyramid(20)
    keep recent(observe) | top(b) by s per head
    at prefill.end
"""


def turned_back(x: Tensor, base: float) -> Tensor:
    """x [heads, N, WIDTH] so that RoPE at positions 0..N-1 gives x."""
    half = WIDTH // 2
    angle = torch.outer(torch.arange(N).double(), base ** (-2 * torch.arange(half).double() / WIDTH))
    real, imaginary = x.double().chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([real * cos + imaginary * sin, imaginary * cos - real * sin], -1)


def given(queries: Tensor, keys: Tensor, layers: int) -> PreTrainedModel:
    """A model whose token i has query queries[:, i] and key keys[:, i] in every layer, at position i."""
    config = LlamaConfig(
        vocab_size=N, hidden_size=N, intermediate_size=8, num_hidden_layers=layers, head_dim=WIDTH,
        num_attention_heads=KV_HEADS * GROUP, num_key_value_heads=KV_HEADS, max_position_embeddings=128,
        rms_norm_eps=1e-12, bos_token_id=None, eos_token_id=None, pad_token_id=None, attn_implementation="sdpa",
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    base = config.rope_parameters["rope_theta"]
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(N))
        for layer in model.model.layers:
            for projection, wanted in ((layer.self_attn.q_proj, queries), (layer.self_attn.k_proj, keys)):
                # The norm makes a one-hot token sqrt(N) long.
                projection.weight.copy_(turned_back(wanted, base).transpose(1, 2).reshape(-1, N) / N**0.5)
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return model


@pytest.fixture(scope="module")
def drawn() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    queries, keys = torch.randn(1, 4, N, WIDTH), torch.randn(1, 2, N, WIDTH)
    return queries[0], keys[0]


def run(model: PreTrainedModel, policy: str, **options: object) -> Positions:
    with kvcompile.use(model, policy, **options):
        (seen, _) = call(model, torch.arange(N)[None])
    return seen.kept[0]


@pytest.mark.parametrize("compile", ["off", "eager"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_snapkv_keeps_the_published_positions(drawn, backend, compile):
    kept = run(given(*drawn, layers=1), PUBLISHED, backend=backend, compile=compile)
    assert kept[0][0] == GOLDEN
    assert len(kept[0][1]) == 16


def test_the_library_differs_from_the_published_set_by_its_pooling(drawn):
    """Maximum over 7 after the group mean: another set of the same size, and the same window."""
    kept = run(given(*drawn, layers=1), "snapkv", budget=16, observe=4, backend="cpu", compile="off")
    assert len(kept[0][0]) == 16
    assert kept[0][0][-4:] == GOLDEN[-4:]
    assert kept[0][0] != GOLDEN
    mean = run(given(*drawn, layers=1), PUBLISHED.replace("sum[q", "mean[q"), backend="cpu", compile="off")
    assert mean[0][0] == GOLDEN


@pytest.mark.parametrize("compile", ["off", "eager"])
def test_pyramidkv_keeps_the_published_numbers(drawn, compile):
    model = given(*drawn, layers=4)
    snap = {n: run(model, PUBLISHED, budget=n, backend="cpu", compile=compile) for n in (28, 20, 12, 40)}
    kept = run(model, PYRAMID, backend="cpu", compile=compile)
    assert [[len(row) for row in layer] for layer in kept] == [[28] * 2, [20] * 2, [12] * 2, [4] * 2]
    assert kept[:3] == (snap[28][0], snap[20][1], snap[12][2])  # the same scores in every layer
    assert kept[3] == ((60, 61, 62, 63),) * 2
    assert run(model, PYRAMID, budget=40, backend="cpu", compile=compile) == snap[40]


def test_pyramidkv_keeps_its_mean_where_the_published_one_drifts(drawn):
    """At 24 the published layers hold 43, 31, 19 and 7: 25 on average."""
    kept = run(given(*drawn, layers=4), PYRAMID, budget=24, backend="cpu", compile="off")
    lengths = [len(layer[0]) for layer in kept]
    assert sum(lengths) == 24 * 4
    assert lengths[0] == 43
    assert lengths == sorted(lengths, reverse=True)
