"""A step by generated C++ against the reference, on equal rows: outputs, states, the ring, and who stays.

Few plans, each built once; lengths, seeds and who is idle are drawn.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompile.kernels import evict, reference
from kvcompile.kernels.cpp_backend.build import says_why_not
from kvcompile.kernels.cpp_backend.step import Steps
from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.layout import Clock, Site
from kvcompile.kernels.plan import PolicyPlan, Region, Selection, StatePlan
from tests.kernels.cpp_rows import cloned, layer_of, rows_of, same_rows, tokens
from tests.kernels.triton_interpreted.plans import ACC, H2O, attn, binary, const, named, plan, reduce

pytestmark = pytest.mark.skipif(says_why_not() is not None, reason="no C++ compiler")
quick = settings(max_examples=12, deadline=None, derandomize=True)
SCALE = 0.2
BORN = StatePlan("born", named("scalar", "now"), None)
OWN = named("state", "born")
NEWEST = reduce("mean", "g", reduce("mean", "q", attn("last", 1)))
# One formula of a state, which this very step has changed, and of evidence.
BOTH = reduce("mean", "g", binary("-", ACC, binary("*", named("scalar", "len"), reduce("mean", "q", attn("last", 1)))))
AGED = binary("-", ACC, binary("*", const(Fraction(1, 64)), named("field", "age")))
RECENT, SINK = Region("recent", 0), Region("sink", 0)
PLANS = {
    "h2o": plan((RECENT, Selection("top", ACC, 1)), (H2O,)),
    "tova": replace(plan((Selection("top", NEWEST, 1),), dtype="bfloat16", group=4), query_window=1),
    "both": replace(plan((RECENT, Selection("top", BOTH, 1)), (H2O,)), query_window=1),
    "streaming": replace(plan((SINK, Region("recent", 1)), dtype="float16", head_dim=80), query_window=3),
    "born last": plan((Region("frozen"), Selection("bottom", OWN, 1)), (H2O, BORN), by_position=True),
    "across": plan(
        (RECENT, Selection("top", ACC, 1, scope="across", floor=Fraction(1, 4))), (H2O,), kv_heads=3, head_dim=24,
        class_of=((0, 0, 0), (0, 1, 0)),
    ),
    "shared": plan((Region("prompt"), Selection("top", reduce("max", "h", AGED), 1, scope="shared")), (H2O,)),
    "a part": plan((Region("stride", 0), Selection("top", ACC, fraction=Fraction(2, 3), scope="across")), (H2O,)),
}  # fmt: skip


def steps(p: PolicyPlan, sites: list[Site], seed: int, kernels: Steps | None) -> list[torch.Tensor]:
    """One step of all layers, by the reference where there are no kernels; changes the sites."""
    outs = []
    for site in sites:
        q, k, v = tokens(p, site.batch, seed + int(site.layer))
        if kernels is None:
            outs.append(reference.attend_step(p, site, q, k, v, SCALE, {}))
        else:
            out = kernels.attend(p, site, q, k, v, SCALE)
            assert out is not None, "there is no kernel"
            outs.append(out)
    if kernels is None:
        evict.evict_step(p, sites, SCALE)
    else:
        kernels.evict(p, sites, SCALE)
    return outs


@pytest.mark.parametrize("name", PLANS)
@quick
@given(data=st.data())
def test_a_step_is_what_the_reference_says(name, data):
    p = PLANS[name]
    batch, now = data.draw(st.integers(1, 2), "batch"), data.draw(st.integers(1, 90), "now")
    aligned = name == "shared"
    idle = (0,) if data.draw(st.booleans(), "one is idle") else ()
    counts = (data.draw(st.integers(0, 20), "local"), data.draw(st.integers(0, 70), "heavy"))
    seed, sites = data.draw(st.integers(0, 999), "seed"), []
    for layer in range(p.facts.layers):
        count = batch * p.facts.kv_heads
        lengths = data.draw(st.lists(st.integers(0, now), min_size=count, max_size=count), "lengths")
        if aligned:
            lengths = [lengths[r // p.facts.kv_heads] for r in range(count)]
        sites.append(
            layer_of(p, lengths, now, layer=layer, seed=seed, aligned=aligned, counts=counts, idle=idle, ties=False)
        )
    truth = [cloned(site) for site in sites]
    kernels = Steps()
    found, wanted = steps(p, sites, seed, kernels), steps(p, truth, seed, None)
    assert kernels._kernels(p).evictions, "there is no kernel"
    error = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}[p.facts.dtype]
    for mine, theirs, out, want in zip(sites, truth, found, wanted, strict=True):
        torch.testing.assert_close(out.float(), want.float(), rtol=error, atol=error)
        same_rows(mine, theirs, marks=name == "born last")
        assert torch.equal(mine.ring, theirs.ring)
        if p.classes[0].by_position:
            assert [list(row) for row in rows_of(mine)] == [list(row) for row in rows_of(theirs)]


@quick
@given(seed=st.integers(0, 999), heavy=st.integers(0, 40), broken=st.integers(0, 3), ends=st.booleans())
def test_ties_go_to_the_older_then_the_lower_head(seed, heavy, broken, ends):
    """States that repeat, with NaN and infinities among them: no step before, so that nothing is rounded."""
    for name in ("across", "shared", "born last"):
        p, aligned = PLANS[name], name == "shared"
        lengths = [40] * p.facts.kv_heads if aligned else [30 + seed % 7, 44, 17][: p.facts.kv_heads]
        site = layer_of(p, lengths, 50, seed=seed, ties=True, aligned=aligned, counts=(4, heavy))
        for i in range(broken):
            site.state[0, int(site.table[i % p.facts.kv_heads, 0]) + i] = float("nan")
        if ends:
            site.state[0, 5], site.state[0, 9] = float("inf"), -float("inf")
        truth, kernels = cloned(site), Steps()
        kernels.evict(p, [site], SCALE)
        evict.evict_step(p, [truth], SCALE)
        assert kernels._kernels(p).evictions, "there is no kernel"
        same_rows(site, truth, marks=name == "born last")


@pytest.mark.parametrize("name", ["h2o", "tova", "streaming"])
def test_threads_change_nothing(name):
    """Rows of several work units: one thread and three leave the same bits, run after run."""
    p, threads, results = PLANS[name], torch.get_num_threads(), []
    try:
        for count in (1, 3, 3):
            torch.set_num_threads(count)
            sites = [layer_of(p, [2600, 700, 1, 1300], 3000, layer=layer, counts=(20, 500)) for layer in range(2)]
            out = steps(p, sites, 0, Steps())
            results.append((out, [(s.length, [sorted(row) for row in rows_of(s)]) for s in sites]))
    finally:
        torch.set_num_threads(threads)
    for out, rows in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(out, results[0][0], strict=True))
        assert all(torch.equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(rows, results[0][1], strict=True))


def test_a_row_without_room_is_an_error_and_changes_nothing():
    p = PLANS["h2o"]
    site = layer_of(p, [12, 5], 30, room=0)
    before = cloned(site)
    with pytest.raises(KvCompileError, match=r"row 0 of layer 0 has no room.*reserve_step"):
        Steps().attend(p, site, *tokens(p, 1), SCALE)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(site, before, strict=True))


def test_two_threads_on_one_model_do_not_see_each_others_scores():
    p, kernels = PLANS["both"], Steps()
    mine, other = ([layer_of(p, [60, 44], 90, layer=n, seed=seed, counts=(3, 9)) for n in range(2)] for seed in (1, 2))
    truth = [cloned(site) for site in mine]
    for n in range(2):
        kernels.attend(p, mine[n], *tokens(p, 1, n), SCALE)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(steps, p, other, 7, kernels).result()
    kernels.evict(p, mine, SCALE)
    steps(p, truth, 0, None)
    for a, b in zip(mine, truth, strict=True):
        same_rows(a, b, marks=False)


def test_a_stretch_of_keys_that_nobody_can_read():
    """Logits of -infinity over more entries than one work unit has."""
    p = PLANS["h2o"]
    site = layer_of(p, [1200, 700], 2000)
    q, k, v = tokens(p, 1)
    q = q.abs()
    site.k[:600, 0] = -float("inf")
    truth = cloned(site)
    out = Steps().attend(p, site, q, k, v, SCALE)
    torch.testing.assert_close(out, reference.attend_step(p, truth, q, k, v, SCALE, {}), rtol=1e-5, atol=1e-5)
    assert out is not None and out.isfinite().all()
    same_rows(site, truth)


def test_what_has_no_kernel_goes_by_the_definition():
    """A condition on the trigger: the step's read has a kernel, the decision after it none."""
    p = PLANS["h2o"]
    some = replace(p.classes[0], triggers=(replace(p.classes[0].triggers[0], cond=named("scalar", "len")),))
    p = replace(p, classes=(some, *p.classes[1:]))
    site = layer_of(p, [40, 33], 50, counts=(4, 12))
    site.fires[0] = 2  # by the first trigger that has a condition
    truth, kernels = cloned(site), Steps()
    steps(p, [site], 1, kernels)
    steps(p, [truth], 1, None)
    assert not kernels._kernels(p).evictions
    same_rows(site, truth, marks=False)
    assert site.length.max() == 16


def test_another_dtype_than_the_plans_has_no_kernel():
    p = PLANS["h2o"]
    site = layer_of(replace(p, facts=replace(p.facts, dtype="bfloat16")), [5, 5], 9)
    site.clock[:, Clock.NEW] = 1
    assert Steps().attend(p, site, *(t.bfloat16() for t in tokens(p, 1)), SCALE) is None
