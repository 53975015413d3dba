"""Plain PyTorch models: which masks are taken, and what is refused by name."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import kvcompile
from tests import plain_models as plain
from tests.driving import same
from tests.models import tokens
from tests.plain_models import fed, places

POSITIONS = {"positions": "positions"}


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


# -- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [plain.lower_triangle, plain.added_infinities, plain.by_positions])
def test_a_mask_that_is_the_causal_one_is_taken_and_no_longer_made(mask):
    model = plain.llama(layers=1, mask=mask)
    ids = torch.tensor([tokens(24)])
    truth = model(ids, places(ids))
    kvcompile.optimize(model, "keep_all", backend="reference", **POSITIONS)
    same(fed(model, ids, 15), truth[:, 14:], "a prompt and steps")
    records = model.forward.engine.layers.records
    assert {r.phase for r in records} == {"prefill.end", "step"}
    for record in records:
        before, after = (
            "\n".join(line for line in text.splitlines() if not line.strip().startswith("#"))
            for text in (record.before, record.after)
        )
        made = {"tril", "masked_fill_", "logical_not", " >= "}
        assert any(word in before for word in made)
        assert not any(word in after for word in made)


def stored(self, q, k, v):
    n = q.shape[2]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=self.triangle[:, :, :n, :n].bool())


def test_a_stored_mask_is_looked_at_as_a_whole():
    kvcompile.optimize(plain.small(attend=stored), "keep_all", backend="reference")
    model = plain.small(attend=stored)
    model.triangle[0, 0, 100, 3] = 0  # one entry that no trial of a short prompt would reach
    with pytest.raises(kvcompile.KvCompileError, match="not the causal mask for 128 tokens"):
        kvcompile.optimize(model, "keep_all", backend="reference")


def changed(self, q, k, v):
    mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
    mask.view(-1)[-1:].fill_(False)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def by_ids(self, q, k, v):
    mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril() & (q[:, :1, :, 0] != 0)[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def stored_window(self, q, k, v):
    place = torch.arange(q.shape[2])
    near = place[:, None] - place < self.window
    return F.scaled_dot_product_attention(q, k, v, attn_mask=near & (place[:, None] >= place))


def windowed() -> nn.Module:
    model = plain.small(attend=stored_window)
    model.register_buffer("window", torch.tensor(300))
    return model


def blocks(self, q, k, v):
    place = torch.arange(q.shape[2])
    near = place[:, None] // 20 - place // 20 < 15
    return F.scaled_dot_product_attention(q, k, v, attn_mask=near & (place[:, None] >= place))


# -- what is refused --------------------------------------------------------------------------------------------------


def written_out(self, q, k, v):
    return (q @ k.transpose(-1, -2)).softmax(-1) @ v


def shorter_keys(self, q, k, v):
    return F.scaled_dot_product_attention(q, k[:, :, :3], v[:, :, :3], is_causal=True)


def with_a_prefix(self, q, k, v):
    q, k, v = (torch.cat([t[:, :, :2], t], 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, :, 2:]


def checkpointed(self, q, k, v):
    return checkpoint(Small.attend, self, q, k, v, use_reentrant=False)


def breaking(self, q, k, v):
    print(float(q.sum()))
    return Small.attend(self, q, k, v)


def two_scales(self, q, k, v):
    return F.scaled_dot_product_attention(Small.attend(self, q, k, v), k, v, is_causal=True, scale=0.5)


def by_length(self, ids):
    return self.embed(ids) * math.log(ids.shape[1] + 1)


Small = plain.Small
REFUSED = {
    "encoder": (lambda: plain.llama(layers=1, mask=plain.no_mask), "is not causal"),
    "a window of 300": (lambda: plain.llama(layers=1, mask=plain.wide_window), "not the causal mask for 602 tokens"),
    "a stored window of 300": (windowed, "not the causal mask for 602 tokens"),
    "a window of 15 blocks of 20": (lambda: plain.small(attend=blocks), "not the causal mask for 802 tokens"),
    "dropout": (lambda: plain.gpt(layers=1, dropout=0.1).train(), r"drops out 0.1.*model.eval\(\)"),
    "a mask written to": (lambda: plain.small(attend=changed), "its mask is not the causal mask"),
    "a mask of the tokens": (lambda: plain.small(attend=by_ids), "depends on the token ids"),
    "written out": (lambda: plain.small(attend=written_out), "never calls .* a softmax"),
    "other keys": (lambda: plain.small(attend=shorter_keys), "queries and keys are n, 3"),
    "more tokens": (lambda: plain.small(attend=with_a_prefix), "queries and keys are n \\+ 2"),
    "checkpointed": (lambda: plain.small(attend=checkpointed), "inside a part of the graph"),
    "a graph break": (lambda: plain.small(attend=breaking), "cannot be traced as one graph"),
    "two scales": (lambda: plain.small(attend=two_scales), "attention 1 .*scale: 0.5"),
    "a graph for each length": (lambda: plain.small(enter=by_length), r"fixes how many tokens it is given \(8 here\)"),
    "no weights": (nn.Identity, "has no weights"),
    "no attention": (lambda: nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8)), "no attention was found"),
    "two inputs": (lambda: nn.Bilinear(8, 8, 8), "needs 'input2'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_replaced_is_refused_by_name_and_left_alone(case):
    build, reason = REFUSED[case]
    model = build()
    before = set(vars(model))
    named = POSITIONS if isinstance(model, plain.Llama) else {}
    with pytest.raises(kvcompile.KvCompileError, match=reason):
        kvcompile.optimize(model, "keep_all", backend="reference", **named)
    assert set(vars(model)) == before
