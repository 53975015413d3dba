"""Decode attention in C++ at the edges of its shapes, with soft-cap, sinks and windows, against plain float64."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompile.kernels.cpp_backend.build import says_why_not
from kvcompile.kernels.cpp_backend.step import Steps
from kvcompile.kernels.plan import PolicyPlan, Selection
from tests.kernels.cpp_rows import layer_of, rows_of, tokens
from tests.kernels.triton_interpreted.plans import attn, plan, reduce, varied

pytestmark = pytest.mark.skipif(says_why_not() is not None, reason="no C++ compiler")
SCALE = 0.3
LOGITS = (Selection("top", reduce("max", "g", reduce("mean", "q", attn(what="logit"))), 1),)
WINDOWS = (0, 1, 8, 40)  # of the layers, where there are any
CASES = {
    "40 channels, groups of 3, half": (40, 3, "float16", ("softcap", "sinks", "sliding")),
    "256 channels, groups of 16, bfloat16": (256, 16, "bfloat16", ("sinks",)),
    "64 channels, no groups": (64, 1, "float32", ("sliding",)),
    "16 channels, groups of 5": (16, 5, "float32", ("softcap",)),
}


@cache
def plan_of(case: str, cap: float) -> PolicyPlan:
    size, group, dtype, variants = CASES[case]
    windows = WINDOWS if "sliding" in variants else ()
    p = plan(LOGITS, layers=len(WINDOWS), group=group, head_dim=size, dtype=dtype)
    return varied(p, cap if "softcap" in variants else 0.0, "sinks" in variants, windows)


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(data=st.data())
def test_every_head_reads_what_its_row_holds(case, data):
    cap = data.draw(st.sampled_from([0.5, 5.0]), "cap")
    p, layer = plan_of(case, cap), data.draw(st.sampled_from(range(len(WINDOWS))), "layer")
    kv_heads, group = p.facts.kv_heads, p.facts.group
    now = data.draw(st.sampled_from([1, 17, 60, 1100]), "now")
    lengths = data.draw(st.lists(st.integers(0, now), min_size=4, max_size=4), "lengths")
    idle = (1,) if data.draw(st.booleans(), "one is idle") else ()
    site, asked = layer_of(p, lengths, now, layer=layer, seed=now, idle=idle), tokens(p, 2, now)
    reach, kernels = p.facts.reach(layer), Steps()
    out = kernels.attend(p, site, *asked, SCALE)
    assert out is not None, "there is no kernel"
    score = kernels._kernels(p).left.score[layer]
    assert site.length.tolist() == [n + (r // 2 not in idle) for r, n in enumerate(lengths)]
    error = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}[p.facts.dtype]
    assert not out[list(idle)].any()
    for row, entries in enumerate(rows_of(site)):
        b, h = divmod(row, kv_heads)
        if b in idle:
            continue
        heads = slice(h * group, (h + 1) * group)
        keys, values = (torch.stack([e[i] for e in entries.values()]).double() for i in (0, 1))
        assert torch.equal(keys[-1].to(site.k.dtype), asked[1][b, h, 0]), "the new entry is the last"
        logit = asked[0][b, heads, 0].double() @ keys.T * SCALE
        if p.facts.softcap:
            logit = cap * torch.tanh(logit / cap)
        if reach:
            logit = logit.masked_fill(torch.tensor([list(entries)]) <= now - reach, -torch.inf)
        start = int(site.table[row, 0])
        torch.testing.assert_close(score[start : start + len(entries)].double(), logit.amax(0), rtol=1e-5, atol=1e-5)
        sunk = site.sink[layer, heads, None].double() if p.facts.sinks else logit[:, :0]
        weights = torch.cat([logit, sunk], 1).softmax(1)[:, : len(entries)]
        torch.testing.assert_close(out[b, 0, heads].double(), weights @ values, rtol=error, atol=error)
