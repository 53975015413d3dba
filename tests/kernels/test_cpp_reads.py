"""Properties: narrowed reads by generated C++ give what the definition gives, forward for forward, and really ran."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcompile.kernels import landmarks, ops
from kvcompile.kernels.choose_reads import slow_reads
from kvcompile.kernels.cpp_backend.backend import Cpp
from kvcompile.kernels.cpp_backend.build import says_why_not
from kvcompile.kernels.layout import Site
from kvcompile.kernels.marks import layout_of
from kvcompile.kernels.plan import ModelFacts, PolicyPlan
from kvcompile.passes import compile_policy
from tests.kernels.cpp_reading import same
from tests.kernels.layer_run import Run, drawn, forwards

pytestmark = pytest.mark.skipif(says_why_not() is not None, reason="no C++ compiler")
FACTS = ModelFacts(1, 4, 2, 32, "float32")

POLICIES = {
    "quest": """policy quest(page=4, budget=12):
    unit page(page) with lo = min[i] k, hi = max[i] k
    score s = sum[d] max(q * lo, q * hi)
    attend newest page | top(budget / page) pages by s per query_head
    at chunk, step
""",
    "moba": """policy moba(size=8, n=3):
    unit block(size) with c = mean[i] k
    attend own block | top(n - 1) blocks by dot(q, c) per query_head
    at chunk, step
""",
    "cover": """policy covering():
    unit block(5) from 3 with c = mean[i] k, w = max[i] v
    attend sink(2) | recent(6) | cover(60%) blocks by max[g] softmax[u] (dot(q, c) + sum[d] w / 8) per head
    at chunk, step
""",
    "overlap": """policy overlap():
    unit kernel(6, stride=3) with c = mean[i] k
    unit block(6)
    score s = sum[g] softmax[u] dot(q, c)
    attend sink(4) | recent(7) | top(2) blocks by s per head
    at chunk, step
""",
    "where": """policy above():
    unit block(7) with c = mean[i] k
    attend own block | where max[g] cos(q, c) > 0.1
    at chunk, step
""",
    "worst": """policy worst():
    unit block(4) with c = mean[i] k
    attend prompt | recent(3) | bottom(25%) blocks by norm(c) * dot(q, c) per query_head
    at chunk, step
""",
    "static": """policy static():
    unit b(6) from 2
    attend sink(3) | recent(5) | pow2 b | stride(9) | own b
""",
}


def plan_of(name: str, facts: ModelFacts = FACTS) -> PolicyPlan:
    return compile_policy(POLICIES[name], facts).plan


@pytest.mark.parametrize("name", POLICIES)
def test_a_step_and_a_piece_read_what_the_definition_says(name: str) -> None:
    assert slow_reads(plan_of(name)) == ()
    same(plan_of(name), (37, 22), 16, 9, 1)


@pytest.mark.parametrize("dtype", ("bfloat16", pytest.param("float16", marks=pytest.mark.slow)))
@pytest.mark.parametrize("name", ("quest", "static"))
def test_halves_are_read_as_numbers_of_their_own_dtype(name: str, dtype: str) -> None:
    plan = plan_of(name, replace(FACTS, dtype=dtype))
    assert layout_of(plan).dtype == (dtype if name == "quest" else "float32") or not layout_of(plan).count
    same(plan, (41,), 41, 5, 3)


@pytest.mark.parametrize("name", (pytest.param("moba", marks=pytest.mark.slow), "static"))
def test_soft_caps_and_sinks_stand_in_narrowed_reads_too(name: str) -> None:
    same(plan_of(name, replace(FACTS, softcap=4.0, sinks=True)), (33, 9), 16, 4, 5)


def test_a_sliding_window_narrows_regions_further() -> None:
    plan = plan_of("static", replace(FACTS, windows=(11,)))
    same(plan, (40, 13), 16, 6, 7)


@pytest.mark.slow
def test_groups_of_one_and_channels_that_fill_no_vector_are_read_alike() -> None:
    for facts in (replace(FACTS, q_heads=2, head_dim=24), replace(FACTS, q_heads=14, head_dim=40)):
        same(plan_of("quest", facts), (30,), 30, 4, 11)
        same(plan_of("cover", facts), (30,), 30, 4, 12)


@settings(deadline=None, max_examples=12, derandomize=True)
@given(st.sampled_from(sorted(POLICIES)), st.tuples(st.integers(1, 50), st.integers(1, 50)), st.integers(4, 60),
       st.integers(0, 1 << 20))  # fmt: skip
def test_reads_do_not_depend_on_how_prompts_are_cut(name: str, lengths: tuple[int, int], cuts: int, seed: int) -> None:
    same(plan_of(name), lengths, cuts, 3, seed)


EVICTED = """policy evicted():
    unit page(4) with lo = min[i] k, hi = max[i] k
    unit block(8) with c = mean[i] v
    keep sink(2) | recent(20) | bottom(6) by norm(k) per head
    attend own page | sink(2) | top(2) pages by sum[d] max(q * lo, q * hi) per query_head
    at chunk, step
"""
MIXED = """heads far = table("far.tsv", top=50%)
heads near = rest

policy mixed():
    unit page(4) with lo = min[i] k, hi = max[i] k
    far: keep all
    near: keep sink(2) | recent(9)
    far: attend own page | top(3) pages by sum[d] max(q * lo, q * hi) per query_head
    at chunk, step
"""


def test_landmarks_follow_what_rows_have_dropped() -> None:
    plan = compile_policy(EVICTED, FACTS).plan
    assert layout_of(plan).edges and all(layout_of(plan).evicts)
    same(plan, (45, 31), 12, 12, 13)


def test_heads_that_read_all_and_heads_that_choose_are_one_call(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "far.tsv").write_text("0.9 0.1\n")
    plan = compile_policy(MIXED, FACTS, tables={"far": tmp_path / "far.tsv"}).plan
    assert plan.reading(0) == (0, -1) and layout_of(plan).readers == ((0, -1),)
    same(plan, (37, 20), 16, 8, 17)


@pytest.mark.parametrize("alike", (True, False))
def test_query_heads_that_choose_alike_are_read_together_and_others_apart(alike: bool) -> None:
    plan = plan_of("quest")
    ours, truth = (Run(plan, b, 1) for b in (Cpp(), ops.backend("reference")))
    for run in (ours, truth):
        run.begin((400,))
    for i, forward in enumerate(forwards((400,), 400, 3)):
        q, k, v = drawn(plan, forward, 7 + i)
        if alike:  # query heads of a KV head follow each other
            q = q[:, ::2].repeat_interleave(2, 1) + 0.01 * q
        got, want = (run.forward(forward, (q, k, v)) for run in (ours, truth))
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


def test_a_choice_of_all_there_is_reads_like_every_head() -> None:
    text = POLICIES["quest"].replace("budget=12", "budget=4000")
    plan, dense = compile_policy(text, FACTS).plan, compile_policy("keep_all", FACTS).plan
    ours, truth = (Run(p, Cpp(), 1) for p in (plan, dense))
    for run in (ours, truth):
        run.begin((50,))
    for i, forward in enumerate(forwards((50,), 20, 5)):
        tensors = drawn(plan, forward, i)
        torch.testing.assert_close(
            ours.forward(forward, tensors), truth.forward(forward, tensors), rtol=1e-5, atol=1e-5
        )


def marked(site: Site) -> tuple[Tensor, Tensor, Tensor]:
    """What a layer's landmarks say, as far as they are current."""
    layers = torch.arange(site.marks.shape[2])
    assert int(site.marked.max()) <= len(layers) * 64
    return site.marks.clone(), site.edges.clone(), site.marked.clone()


@pytest.mark.parametrize("text", (POLICIES["cover"], POLICIES["overlap"], EVICTED))
def test_landmarks_are_those_of_the_definition(text: str) -> None:
    plan = compile_policy(text, FACTS).plan
    run = Run(plan, Cpp(), 2)
    run.begin((40, 23))
    for i, forward in enumerate(forwards((40, 23), 15, 9)):
        tensors = drawn(plan, forward, i)
        fires = run.prepare(forward), run.store.fires.clone()
        piece = (None, None) if fires[0] == "step" else tensors[1:]
        site = run.site
        truth = site._replace(**{name: getattr(site, name).clone() for name in ("marks", "edges", "marked")})
        landmarks.refresh(plan, truth, *piece)
        torch.ops.kvc.anchor_v1(*tensors, list(run.site), plan.facts.head_dim**-0.5, fires[0], run.key)
        run.sequences.advance(forward, fires[1].tolist())
        assert torch.equal(run.site.marked, truth.marked)
        for kind_index, kind in enumerate(layout_of(plan).kinds):
            for reader in range(len(truth.marked)):
                for b in range(2):
                    compared(kind, run.site, truth, reader, b, int(truth.marked[reader, b, kind_index]))


def compared(kind, mine: Site, truth: Site, reader: int, b: int, full: int) -> None:  # type: ignore[no-untyped-def]
    """The landmarks of full units that hold entries."""
    for u in range(full):
        block, place = divmod(u, kind.each)
        if truth.edges.shape[3]:
            edge = truth.edges[reader, b, block, kind.edge + place]
            assert torch.equal(mine.edges[reader, b, block, kind.edge + place], edge)
            if edge[0] == edge[1]:
                continue
        own = slice(kind.first + place * kind.channels, kind.first + (place + 1) * kind.channels)
        torch.testing.assert_close(mine.marks[reader, b, block, own], truth.marks[reader, b, block, own])


REFUSED = {
    "attend recent(4) | top(3) by sum[q in last(2)] attn per query_head\n    at step": "own logit",
    "attend recent(4) | top(3) by logit / (1 + age) per query_head\n    at step": "own logit",
    "attend random(9, 1)": "random",
}


@pytest.mark.parametrize(("clause", "reason"), REFUSED.items())
def test_what_has_no_kernel_is_named_and_runs_by_the_definition(clause: str, reason: str) -> None:
    plan = compile_policy(f"policy other():\n    {clause}\n", FACTS).plan
    assert any(reason in said for said in slow_reads(plan)), slow_reads(plan)
    backend = Cpp()
    ours, truth = Run(plan, backend, 1), Run(plan, ops.backend("reference"), 1)
    for run in (ours, truth):
        run.begin((20,))
    for i, forward in enumerate(forwards((20,), 20, 4)):
        tensors = drawn(plan, forward, i)
        torch.testing.assert_close(
            ours.forward(forward, tensors), truth.forward(forward, tensors), rtol=1e-5, atol=1e-5
        )
