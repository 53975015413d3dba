"""Models whose attention is more than a softmax: soft-cap, sinks, windows of their own in some layers, in any mix.

Generated C++ and packed SDPA against the reference, on equal rows: reads, states, scores, and who stays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcompile.kernels import cpu, evict, reference, states
from kvcompile.kernels.cpp_backend import piece
from kvcompile.kernels.cpp_backend.backend import Cpp
from kvcompile.kernels.cpp_backend.build import says_why_not
from kvcompile.kernels.cpp_backend.step import Steps
from kvcompile.kernels.judge import SLIDES, UNCONDITIONED
from kvcompile.kernels.layout import Clock, Site
from kvcompile.kernels.plan import PolicyPlan, Region, Selection, StatePlan
from kvcompile.passes.slide import slide
from tests.kernels.cpp_rows import cloned, layer_of, noise, rows_of, same_rows, tokens
from tests.kernels.triton_interpreted.plans import (
    ACC,
    H2O,
    PREFILL_END,
    STEP,
    attn,
    binary,
    const,
    named,
    plan,
    reduce,
    varied,
)

quick = settings(
    max_examples=8, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
compiled = pytest.mark.skipif(says_why_not() is not None, reason="no C++ compiler")
SCALE = 0.4
WINDOWS = (9, 0, 30)
VARIANTS: dict[str, tuple[float, bool, tuple[int, ...]]] = {
    "softcap": (1.5, False, ()),
    "sinks": (0.0, True, ()),
    "windows": (0.0, False, WINDOWS),
    "all": (1.5, True, WINDOWS),
}
RECENT, SINK = Region("recent", 0), Region("sink", 0)
SNAP = reduce("mean", "g", reduce("sum", "q", attn("last", 6)))
# Which end wins depends on whether eight entries or more can be read: all that a window of nine leaves the next query.
FEW = binary("-", named("scalar", "len"), const(Fraction(17, 2)))
BY_LENGTH = binary("*", named("state", "born"), FEW)
ATTN_BY_LENGTH = reduce("mean", "g", binary("*", FEW, reduce("mean", "q", attn("last", 1))))
BORN = StatePlan("born", named("scalar", "now"), None)
SHAPE: dict[str, Any] = {"layers": len(WINDOWS), "head_dim": 24}
PLANS = {
    "h2o": plan((RECENT, Selection("top", ACC, 1)), (H2O,), triggers=(PREFILL_END, STEP), **SHAPE),
    "snapkv": plan((RECENT, Selection("top", SNAP, 1)), triggers=(PREFILL_END,), **SHAPE),
    "streaming": plan((SINK, RECENT), dtype="float16", layers=len(WINDOWS)),
    "keep all": plan((Region("all"),), triggers=(), **SHAPE),
    "lengths": plan((Selection("top", BY_LENGTH, 1),), (BORN,), **SHAPE),
    "lengths, attn": plan((Selection("top", ATTN_BY_LENGTH, 1),), **SHAPE),
    "frozen, in order": plan((Region("frozen"), Selection("bottom", ACC, 1)), (H2O,), by_position=True, **SHAPE),
    "shared": plan((Region("prompt"), Selection("top", ACC, 1, scope="shared")), (H2O,), **SHAPE),
    "across": plan((RECENT, Selection("top", ACC, 1, scope="across", floor=Fraction(1, 4))), (H2O,), **SHAPE),
    "lengths, shared": plan((Selection("top", BY_LENGTH, 1, scope="shared"),), (BORN,), **SHAPE),
}  # fmt: skip
STEPS = [("h2o", variant) for variant in VARIANTS] + [(name, "all") for name in PLANS if name != "h2o"]
CLOSE = {"float32": 1e-5, "float16": 2e-3}


@cache
def bound(name: str, variant: str) -> PolicyPlan:
    """The policy on a model of three layers; where windows are asked for, one of them has none."""
    return slide(varied(replace(PLANS[name], query_window=6), *VARIANTS[variant]))


def drawn(data: st.DataObject, p: PolicyPlan, when: str, aligned: bool = False, room: int = 2) -> list[Site]:
    """Ragged rows in all layers, some with entries that their window has left long ago; who decides is drawn, too."""
    batch, now = data.draw(st.integers(1, 2), "batch"), data.draw(st.integers(1, 90), "now")
    idle = (0,) if data.draw(st.booleans(), "one is idle") else ()
    counts = (data.draw(st.integers(0, 20), "local"), data.draw(st.integers(0, 30), "heavy"))
    seed, count, sites = data.draw(st.integers(0, 999), "seed"), batch * p.facts.kv_heads, []
    for layer in range(p.facts.layers):
        lengths = data.draw(st.lists(st.integers(0, now), min_size=count, max_size=count), "lengths")
        if aligned:
            lengths = [lengths[r // p.facts.kv_heads] for r in range(count)]
        site = layer_of(p, lengths, now, layer=layer, seed=seed, aligned=aligned, counts=counts, idle=idle, room=room)
        for cls, part in enumerate(p.classes):
            for b in set(range(batch)) - set(idle):
                decides = [0] + [UNCONDITIONED] * part.fires_on(when)
                slides = [0] + [SLIDES] * part.slides
                site.fires[cls, b] = data.draw(st.sampled_from(decides)) | data.draw(st.sampled_from(slides))
        sites.append(site)
    for site in sites:
        site.fires.copy_(sites[0].fires)  # one tensor for all layers
    return sites


def compared(p: PolicyPlan, mine: list[Site], theirs: list[Site], outs: list[Tensor], wanted: list[Tensor]) -> None:
    error = CLOSE[p.facts.dtype]
    for a, b, out, want in zip(mine, theirs, outs, wanted, strict=True):
        torch.testing.assert_close(out.float(), want.float(), rtol=error, atol=error)
        same_rows(a, b, marks=any(t.kind == "frozen" for c in p.classes for t in c.keep if isinstance(t, Region)))
        assert torch.equal(a.ring, b.ring)
        if any(cls.by_position for cls in p.classes):
            assert [list(row) for row in rows_of(a)] == [list(row) for row in rows_of(b)]


@compiled
@pytest.mark.parametrize(("name", "variant"), STEPS)
@quick
@given(data=st.data())
def test_a_step_and_what_it_drops_are_what_the_reference_says(name, variant, data):
    p, kernels = bound(name, variant), Steps()
    sites = drawn(data, p, "step", "shared" in name)
    truth, outs, wanted = [cloned(site) for site in sites], [], []
    for site, other in zip(sites, truth, strict=True):
        asked = tokens(p, site.batch, int(site.layer))
        outs.append(kernels.attend(p, site, *asked, SCALE))
        wanted.append(reference.attend_step(p, other, *asked, SCALE, {}))
    assert all(out is not None for out in outs), "there is no kernel"
    kernels.evict(p, sites, SCALE)
    evict.evict_step(p, truth, SCALE)
    falling = [i for i, part in enumerate(p.classes) if part.fires_on("step") or part.fires_on("slide")]
    assert falling == list(kernels._kernels(p).evictions), "there is no kernel for a class"
    compared(p, sites, truth, outs, wanted)


@compiled
@pytest.mark.parametrize("name", ["lengths", "lengths, attn", "lengths, shared"])
def test_a_length_is_of_what_the_next_query_can_read(name):
    """Rows that hold all tokens: a window of nine leaves the next one eight, its own entry not counted."""
    p, kernels = bound(name, "windows"), Steps()
    for layer in range(p.facts.layers):
        site = layer_of(p, [40] * 4, 40, layer=layer, counts=(0, 3), aligned=True)
        truth, asked = cloned(site), tokens(p, 2, layer)
        assert kernels.attend(p, site, *asked, SCALE) is not None, "there is no kernel"
        reference.attend_step(p, truth, *asked, SCALE, {})
        kernels.evict(p, [site], SCALE)
        evict.evict_step(p, [truth], SCALE)
        assert site.length.tolist() == [3] * 4
        same_rows(site, truth, marks=False)


@pytest.mark.parametrize("name", ["h2o", "snapkv", "streaming"])
@pytest.mark.parametrize("variant", VARIANTS)
@quick
@given(data=st.data())
def test_a_step_by_packed_sdpa_is_what_the_reference_says(name, variant, data):
    p = bound(name, variant)
    sites = drawn(data, p, "step")
    truth = [cloned(site) for site in sites]
    asked = [tokens(p, site.batch, int(site.layer)) for site in sites]
    outs = [cpu.attend_step(p, s, *qkv, SCALE, {}) for s, qkv in zip(sites, asked, strict=True)]
    wanted = [reference.attend_step(p, s, *qkv, SCALE, {}) for s, qkv in zip(truth, asked, strict=True)]
    compared(p, sites, truth, outs, wanted)


def a_piece(data: st.DataObject, p: PolicyPlan) -> tuple[list[Site], list[tuple[Tensor, ...]]]:
    """Layers that take a piece, of each sequence another number of tokens; peeked ones come after them."""
    sites = drawn(data, p, "prefill.end", room=400)
    batch, facts = sites[0].batch, p.facts
    new = [data.draw(st.integers(0, 40) | st.just(300), "tokens") for _ in range(batch)]
    peek = data.draw(st.sampled_from([0, 3]), "peek")
    columns = max(n + peek for n in new)
    asked = []
    for site in sites:
        for b, n in enumerate(new):
            site.clock[b, Clock.NEW], site.clock[b, Clock.PEEK] = n, peek if n else 0
            site.clock[b, Clock.ENDS] = int(not peek)
        heads, dtype = (facts.q_heads, facts.kv_heads, facts.kv_heads), getattr(torch, facts.dtype)
        shapes = [(batch, columns, h, facts.head_dim) for h in heads]
        asked.append(tuple(noise(i, *shape).to(dtype).transpose(1, 2) for i, shape in enumerate(shapes)))
    return sites, asked


WAYS: dict[str, Callable[..., Tensor | None]] = {"kernel": piece.attend_prefill, "packed SDPA": cpu.attend_prefill}


@pytest.mark.parametrize("way", [pytest.param("kernel", marks=compiled), "packed SDPA"])
@pytest.mark.parametrize("variant", VARIANTS)
@quick
@given(data=st.data())
def test_a_piece_reads_what_its_layer_lets_it(variant, way, data):
    p = bound(data.draw(st.sampled_from(["snapkv", "streaming"]), "policy"), variant)
    sites, asked = a_piece(data, p)
    for site, qkv in zip(sites, asked, strict=True):
        truth = cloned(site)
        out, want = WAYS[way](p, site, *qkv, SCALE), reference.attend_prefill(p, truth, *qkv, SCALE)
        assert out is not None, "there is no kernel"
        torch.testing.assert_close(out.float(), want.float(), rtol=CLOSE[p.facts.dtype], atol=CLOSE[p.facts.dtype])
        assert torch.equal(site.ring, truth.ring)


@compiled
@pytest.mark.parametrize("variant", VARIANTS)
@quick
@given(data=st.data())
def test_what_a_piece_says_of_entries_and_what_it_leaves_are_what_the_reference_says(variant, data):
    """States that grow, scores of the newest queries, and the winners within each window."""
    p = bound(data.draw(st.sampled_from(["h2o", "snapkv"]), "policy"), variant)
    sites, asked = a_piece(data, p)
    for site, (q, k, v) in zip(sites, asked, strict=True):
        reference.attend_prefill(p, site, q, k, v, SCALE)  # which leaves the newest queries in their ring
        truth, found = cloned(site), Cpp()
        layer = int(site.layer)
        state = found.observe(p, site, q, k, v, SCALE, {}) if p.states else None
        grown = states.observe(p, truth, q, k, v, SCALE, {}) if p.states else None
        torch.testing.assert_close(state, grown, rtol=1e-5, atol=1e-5)
        for cls in p.site_classes(layer):
            found.evict_prefill(p, cls, site, q, k, v, state, SCALE)
            evict.evict_prefill(p, cls, truth, q, k, v, grown, SCALE)
        same_rows(site, truth, marks=False)
