"""`positions compact` on whole models, against StreamingLLM as published and against the model itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kvcompile
from kvcompile.dsl.diagnostics import PolicyError
from tests.driving import BACKENDS, call, drive, one_by_one, padded, same
from tests.models import random_model, tokens

quick = settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

KEEP_ALL = """
policy all_compact(c={c}):
    positions compact
    keep all
    at chunk(c)
"""
SNAPKV = """
policy snap_compact(budget=12, observe=3):
    positions compact
    score s = mean[g] sum[q in last(observe)] attn
    keep recent(observe) | top(budget - observe) by s per head
    at prefill.end
"""
H2O = """
policy h2o_compact(c={c}):
    positions compact
    state acc = 0
    on attend: acc += mean[g] sum[q] attn
    keep recent(3) | top(7) by acc per head
    at prefill.end, step
"""


class Streaming:
    """StreamingLLM (arXiv:2309.17453, section 3.2): the cache holds keys before RoPE and turns them by their place in
    it at every read; first tokens and the newest stay. A Llama's layers written out."""

    def __init__(self, model, sink: int, window: int) -> None:
        self.model, self.sink, self.window, self.seen = model, sink, window, 0
        self.cache = [([], torch.zeros(0), torch.zeros(0)) for _ in model.model.layers]  # positions, keys, values

    def rope(self, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """x [n, heads, D], place by place."""
        angle = places[:, None].float() * self.model.model.rotary_emb.inv_freq
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def feed(self, ids: list[int]) -> torch.Tensor:
        """Logits [n, V] of tokens that follow what was fed before."""
        with torch.no_grad():
            hidden = self.model.model.embed_tokens(torch.tensor(ids))
            for i, layer in enumerate(self.model.model.layers):
                hidden = hidden + self.attention(i, layer.self_attn, layer.input_layernorm(hidden))
                hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
            self.seen += len(ids)
            for i, (pos, k, v) in enumerate(self.cache):
                keep = [j for j, p in enumerate(pos) if p < self.sink or p >= self.seen - self.window]
                self.cache[i] = ([pos[j] for j in keep], k[keep], v[keep])
            return self.model.lm_head(self.model.model.norm(hidden))

    def attention(self, i: int, attn, x: torch.Tensor) -> torch.Tensor:
        n, width = len(x), attn.head_dim
        q, k, v = (p(x).view(n, -1, width) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
        pos, old_k, old_v = self.cache[i]
        if pos:
            k, v = torch.cat([old_k, k]), torch.cat([old_v, v])
        self.cache[i] = (pos + list(range(self.seen, self.seen + n)), k, v)
        total = len(k)
        turned_q, turned_k = self.rope(q, torch.arange(total - n, total)), self.rope(k, torch.arange(total))
        out = []
        for j in range(n):
            heads = []
            for h in range(q.shape[1]):
                of = h // (q.shape[1] // k.shape[1])
                readable = total - n + j + 1
                weights = torch.softmax(turned_k[:readable, of] @ turned_q[j, h] * width**-0.5, 0)
                heads.append(weights @ v[:readable, of])
            out.append(torch.cat(heads))
        return attn.o_proj(torch.stack(out))


def optimised(policy: str, backend: str, family: str = "llama64", **options: object):
    model = random_model(family)
    kvcompile.optimize(model, policy, backend=backend, compile="off", **options)
    return model


@pytest.mark.parametrize("backend", BACKENDS)
@quick
@given(st.data())
def test_streaming_is_what_was_published(backend, data):
    """A prompt, steps far beyond the window, a second prompt, steps again."""
    sink, window = data.draw(st.integers(0, 4), "sink"), data.draw(st.integers(1, 9), "window")
    turns = [
        tokens(data.draw(st.integers(1, 25), "prompt"), seed=1), *one_by_one(tokens(12, seed=2)),
        tokens(data.draw(st.integers(2, 8), "second"), seed=3), *one_by_one(tokens(3, seed=4)),
    ]  # fmt: skip
    family = data.draw(st.sampled_from(["llama64", "llama128"]), "family")
    truth = Streaming(random_model(family), sink, window)
    expected = []
    for turn in turns:
        logits = truth.feed(turn)
        expected.append((logits, tuple(tuple(pos) for pos, _, _ in truth.cache)))
    seen = drive(optimised("streaming_compact", backend, family, n_sink=sink, window=window), *turns)
    for i, (found, (logits, positions)) in enumerate(zip(seen, expected, strict=True)):
        assert [set(layer) for layer in found.kept[0]] == [{p} for p in positions]
        same(found.logits[0], logits, f"call {i}")


@pytest.mark.parametrize("family", ["llama64", "qwen64", "scaled"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk", [5, 64])
def test_nothing_dropped_is_the_model_itself(backend, family, chunk):
    """Places are positions then; the prompt may be cut, and attention may be scaled by the RoPE."""
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 1024}
    changes = {"rope_parameters": yarn} if family == "scaled" else {}
    name = "llama64" if family == "scaled" else family
    turns = [tokens(23, seed=1), *one_by_one(tokens(3, seed=2)), tokens(6, seed=3)]
    plain = random_model(name, **changes)
    with torch.no_grad():
        truth = plain(torch.tensor([[token for turn in turns for token in turn]])).logits[0]
    model = random_model(name, **changes)
    kvcompile.optimize(model, KEEP_ALL.format(c=chunk), backend=backend, compile="off")
    found = torch.cat([seen.logits[0] for seen in drive(model, *turns)])
    same(found, truth, "all turns")


@pytest.mark.parametrize("policy", [SNAPKV, H2O.format(c=64), "streaming_compact"], ids=["snapkv", "h2o", "streaming"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_p2_a_row_does_not_see_its_neighbours_nor_padding(backend, side, policy):
    options = {"n_sink": 2, "window": 7} if policy == "streaming_compact" else {}
    model = optimised(policy, backend, **options)
    prompts = [tokens(19, seed=1), tokens(11, seed=2), tokens(1, seed=3)]
    ids, mask = padded(prompts, side)
    seen, cache = call(model, ids, None, mask)
    steps = torch.tensor([tokens(3, seed=9)]).T
    after = []
    for _ in range(3):
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
        found, cache = call(model, steps, cache, mask)
        after.append(found)
    for b, prompt in enumerate(prompts):
        alone = drive(optimised(policy, backend, **options), prompt, *[[int(steps[b])]] * 3)
        columns = mask[b, : ids.shape[1]].bool()
        same(seen.logits[b][columns], alone[0].logits[0], f"prompt {b}")
        for found, truth in zip(after, alone[1:], strict=True):
            assert found.kept[b] == truth.kept[0]
            same(found.logits[b], truth.logits[0], f"a step of {b}")


@pytest.mark.parametrize("policy", [SNAPKV, H2O.format(c=64)], ids=["snapkv", "h2o"])
def test_both_backends_score_the_keys_that_are_read(policy):
    turns = [tokens(30, seed=1), *one_by_one(tokens(5, seed=2)), tokens(9, seed=3)]
    a, b = (drive(optimised(policy, backend), *turns) for backend in BACKENDS)
    for x, y in zip(a, b, strict=True):
        assert x.kept == y.kept
        same(x.logits, y.logits, "backends")


@pytest.mark.parametrize("backend", BACKENDS)
def test_p7_positions_stay_original_and_unique(backend):
    model = optimised("streaming_compact", backend, n_sink=3, window=9)
    seen = drive(model, tokens(40, seed=1), *one_by_one(tokens(20, seed=2)))
    for step, found in enumerate(seen):
        now = 39 + step
        for layer in found.kept[0]:
            for positions in layer:
                assert positions == tuple(sorted({0, 1, 2} | set(range(now - 8, now + 1))))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_long_decode_grows_the_table_once(backend):
    """Places follow what the rows hold, not how many tokens were seen."""
    model = optimised("streaming_compact", backend, n_sink=2, window=30)
    drive(model, tokens(200, seed=1), *one_by_one(tokens(150, seed=2)))
    assert vars(model)["_kvcompile"].forward.engine.rope.table.shape[1] == 256


def test_a_model_that_turns_otherwise_is_refused_and_left_alone():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = random_model("llama64", rope_parameters=rope)
    with pytest.raises(PolicyError, match="K706"):
        kvcompile.optimize(model, "streaming_compact", backend="cpu")
    assert "_kvcompile" not in vars(model) and model.config._attn_implementation == "sdpa"
    kvcompile.optimize(model, "streaming", backend="cpu")
