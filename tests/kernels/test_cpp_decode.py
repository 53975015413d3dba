"""Decode attention in C++ at the edges of its shapes, with soft-cap, sinks and windows, against plain float64.

Called as the launcher calls it, but for the variants, which no policy binds yet: each file is built once.
"""

from __future__ import annotations

import ctypes
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcompile.kernels.choose import decode_spec
from kvcompile.kernels.cpp_backend.build import load, says_why_not
from kvcompile.kernels.cpp_backend.library import built
from kvcompile.kernels.cpp_backend.site import c_site
from kvcompile.kernels.headers import header_for
from kvcompile.kernels.layout import Site
from kvcompile.kernels.plan import PolicyPlan, Selection
from kvcompile.kernels.render import render
from tests.kernels.cpp_rows import layer_of, noise, rows_of, tokens
from tests.kernels.triton_interpreted.plans import attn, plan, reduce

pytestmark = pytest.mark.skipif(says_why_not() is not None, reason="no C++ compiler")
SCALE = 0.3
LOGITS = (Selection("top", reduce("max", "g", reduce("mean", "q", attn(what="logit"))), 1),)
CASES = {
    "40 channels, groups of 3, half": (40, 3, "float16", ("softcap", "sinks", "sliding")),
    "256 channels, groups of 16, bfloat16": (256, 16, "bfloat16", ("sinks",)),
    "64 channels, no groups": (64, 1, "float32", ("sliding",)),
    "16 channels, groups of 5": (16, 5, "float32", ("softcap",)),
}


def plan_of(case: str) -> PolicyPlan:
    size, group, dtype, _ = CASES[case]
    return plan(LOGITS, layers=1, group=group, head_dim=size, dtype=dtype)


@cache
def kernel(case: str) -> ctypes.CDLL:
    p = plan_of(case)
    spec = decode_spec(p, **dict.fromkeys(CASES[case][3], True))
    return load(render(spec, header_for(p, spec), "cpp"), built())


def launch(
    case: str, site: Site, asked: tuple[Tensor, ...], cap: float, sink: Tensor, reach: int
) -> tuple[Tensor, ...]:
    """The launcher's call with what the case's variants take; out [B, 1, q_heads, D], score [slots]."""
    p, (q, k, v) = plan_of(case), asked
    out, score = torch.full((q.shape[0], 1, *q.shape[1::2]), 7.0, dtype=q.dtype), torch.zeros(len(site.pos))
    strides = (ctypes.c_int64 * 6)(*(t.stride(i) for t in asked for i in (0, 1)))
    address = [ctypes.c_void_p(t.data_ptr()) for t in (q, k, v, out)]
    more = {
        "softcap": ctypes.c_float(cap), "sinks": ctypes.c_void_p(sink.data_ptr()), "sliding": ctypes.c_int64(reach)
    }  # fmt: skip
    kernel(case).decode.restype = ctypes.c_int64
    failed = kernel(case).decode(
        ctypes.byref(c_site(site, p.facts.kv_heads)), *address, strides, ctypes.c_float(SCALE), 2,
        ctypes.c_void_p(score.data_ptr()), *(more[name] for name in CASES[case][3]),
    )  # fmt: skip
    assert failed == 0
    return out, score


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(data=st.data())
def test_every_head_reads_what_its_row_holds(case, data):
    p, variants = plan_of(case), CASES[case][3]
    kv_heads, group = p.facts.kv_heads, p.facts.group
    now = data.draw(st.sampled_from([1, 17, 60, 1100]), "now")
    lengths = data.draw(st.lists(st.integers(0, now), min_size=4, max_size=4), "lengths")
    idle = (1,) if data.draw(st.booleans(), "one is idle") else ()
    reach = data.draw(st.sampled_from([0, 1, 8, 40]), "reach") if "sliding" in variants else 0
    cap = data.draw(st.sampled_from([0.5, 5.0]), "cap")
    site, asked = layer_of(p, lengths, now, seed=now, idle=idle), tokens(p, 2, now)
    sink = noise(now, kv_heads * group) * 3
    out, score = launch(case, site, asked, cap, sink, reach)
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
        if "softcap" in variants:
            logit = cap * torch.tanh(logit / cap)
        if reach:
            logit = logit.masked_fill(torch.tensor([list(entries)]) <= now - reach, -torch.inf)
        start = int(site.table[row, 0])
        torch.testing.assert_close(score[start : start + len(entries)].double(), logit.amax(0), rtol=1e-5, atol=1e-5)
        sunk = sink[heads, None].double() if "sinks" in variants else logit[:, :0]
        weights = torch.cat([logit, sunk], 1).softmax(1)[:, : len(entries)]
        torch.testing.assert_close(out[b, 0, heads].double(), weights @ values, rtol=error, atol=error)
