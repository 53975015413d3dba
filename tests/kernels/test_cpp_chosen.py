"""Properties: single entries that a step chooses, choices for later layers, sets that steps go on with, in C++."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompile.kernels import ops
from kvcompile.kernels.choose_reads import slow_reads
from kvcompile.kernels.cpp_backend.backend import Cpp
from kvcompile.kernels.cpp_backend.build import says_why_not
from kvcompile.kernels.plan import ModelFacts, PolicyPlan
from kvcompile.passes import compile_policy
from tests.kernels.cpp_reading import same
from tests.kernels.layer_run import Run, drawn, forwards

pytestmark = pytest.mark.skipif(says_why_not() is not None, reason="no C++ compiler")
FACTS = ModelFacts(1, 4, 2, 32, "float32")
UNIT = "unit page(4) with c = mean[i] k"

CHOSEN = {
    "entries": "attend sink(2) | recent(5) | top(6) by logit per query_head\n    at step",
    "lowest": "attend sink(2) | bottom(30%) by logit per query_head\n    at step",
    "picks": "pick t = top(5) by logit per query_head\n    attend sink(1) | t\n    at step",
    "picked pages": f"{UNIT}\n    pick t = top(2) pages by dot(q, c) per query_head\n    attend t\n    at step",
    "held": f"{UNIT}\n    attend own page | top(2) pages by dot(q, c) per query_head\n    at every(3)",
    "held regions": "attend sink(2) | recent(7)\n    at every(4)",
    "held entries": "attend recent(3) | top(4) by logit per query_head\n    at every(2)",
    "all for a while": "attend all\n    at every(4)\n    attend sink(1) | recent(2)\n    at prefill.end",
}


def plan_of(name: str, facts: ModelFacts = FACTS) -> PolicyPlan:
    return compile_policy(f"policy chosen():\n    {CHOSEN[name]}\n", facts).plan


@pytest.mark.parametrize("name", CHOSEN)
def test_steps_choose_and_hold_what_the_definition_says(name: str) -> None:
    assert slow_reads(plan_of(name)) == ()
    # A piece that ends one prompt only fires for one sequence only, so the definition says it.
    same(plan_of(name), (37, 22), 16, 9, 1, slow=int("prefill.end" in CHOSEN[name]))


@pytest.mark.parametrize("dtype", ("bfloat16", pytest.param("float16", marks=pytest.mark.slow)))
def test_halves_are_chosen_among_as_numbers_of_their_own_dtype(dtype: str) -> None:
    same(plan_of("entries", replace(FACTS, dtype=dtype)), (41,), 41, 5, 3)


def test_a_held_set_does_not_reach_beyond_a_sliding_window() -> None:
    same(plan_of("held regions", replace(FACTS, windows=(11,))), (40, 13), 16, 9, 7)


def test_sequences_of_which_only_some_choose_anew_run_by_the_definition() -> None:
    """Which of them fire is not the same for all, and a call of the kernel has one rule for a head."""
    plan = plan_of("held")
    ours, truth = Run(plan, Cpp(), 2), Run(plan, ops.backend("reference"), 2)
    for run in (ours, truth):
        run.begin((9, 30))
        run.sequences.each[1].steps = 1
    for i, forward in enumerate(forwards((9, 30), 30, 7)):
        for run in (ours, truth):
            run.sequences.each[1].steps += i == 1
        tensors = drawn(plan, forward, i)
        torch.testing.assert_close(
            ours.forward(forward, tensors), truth.forward(forward, tensors), rtol=2e-5, atol=2e-5
        )


@settings(deadline=None, max_examples=14, derandomize=True)
@given(st.sampled_from(sorted(CHOSEN)), st.tuples(st.integers(1, 300), st.integers(1, 50)), st.integers(4, 60),
       st.integers(0, 1 << 20))  # fmt: skip
def test_rows_of_any_length_choose_alike(name: str, lengths: tuple[int, int], cuts: int, seed: int) -> None:
    n = max(lengths) if "prefill.end" in CHOSEN[name] else cuts  # both end in one piece
    same(plan_of(name), lengths, n, 3, seed)
