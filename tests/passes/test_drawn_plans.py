"""Counting without running, on plans drawn by chance: exact where it says so, never too little anywhere."""

from __future__ import annotations

import random

from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from kvcompile.kernels.plan import PolicyPlan
from kvcompile.passes.residents import forwards
from tests.passes.drawn_plans import plans
from tests.passes.simulated_rows import Model


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(plans(), st.integers(1, 45), st.integers(0, 20), st.integers(0, 1000))
def test_totals_are_exact_or_above(plan: PolicyPlan, prompt: int, steps: int, seed: int) -> None:
    note(str(plan))
    found = Model(plan, random.Random(seed)).run(prompt, steps)
    computed = list(forwards(plan, prompt, steps))
    for place, (forward, total) in enumerate(zip(computed, found, strict=True)):
        assert sum(forward.after) >= total, place
        assert not forward.exact or sum(forward.after) == total, place
