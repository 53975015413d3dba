"""What the run time reserves before a prefill holds every row of it, whatever the rows held before."""

from __future__ import annotations

import random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvcompile.kernels.extent import extent
from kvcompile.kernels.plan import PolicyPlan
from kvcompile.passes.groups import groups
from kvcompile.reserve import most_entries
from kvcompile.sequences import Piece, Progress
from tests.passes.drawn_plans import plans
from tests.passes.simulated_rows import Model


def lengths(model: Model) -> list[list[int]]:
    facts = model.plan.facts
    return [[model.held((layer, h)) for h in range(facts.kv_heads)] for layer in range(facts.layers)]


class Watched(Model):
    """Notes how long the rows are after every forward, and before it decides, where pieces are judged in place."""

    def __init__(self, plan: PolicyPlan, dice: random.Random) -> None:
        super().__init__(plan, dice)
        self.seen_lengths: list[list[list[int]]] = []

    def inserted(self) -> None:
        judged_in_place = {
            owner
            for owner in range(len(self.plan.classes))
            for rules in [[r for r, cls in enumerate(self.plan.classes) if owner in (r, cls.rows_of)]]
            if len(rules) > 1 or any(self.plan.classes[r].moves or self.plan.spans(r) for r in rules)
        }
        self.seen_lengths.append(
            [
                [n * (self.plan.class_of[layer][h] in judged_in_place) for h, n in enumerate(row)]
                for layer, row in enumerate(lengths(self))
            ]
        )

    def forward(self, tokens: int, phase: str, step: int) -> None:
        super().forward(tokens, phase, step)
        self.seen_lengths.append(lengths(self))


def progress(model: Model, new: int) -> Progress:
    return Progress(
        seen=model.seen, prompt=model.seen + new, since=dict(model.arrived), judged=dict(model.judged), prefilled=False
    )


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(plans(), st.integers(0, 30), st.integers(0, 9), st.integers(1, 40), st.integers(0, 1000))
def test_pools_hold_a_prefill(plan: PolicyPlan, before: int, steps: int, new: int, seed: int) -> None:
    model = Watched(plan, random.Random(seed))
    if before:
        model.run(before, steps)
    size = plan.chunk or new
    pieces = [Piece(min(size, new - at), ends=at + size >= new) for at in range(0, new, size)]
    bounds = most_entries(plan, progress(model, new), lengths(model), pieces)
    model.seen_lengths.clear()
    model.run(new, 0)
    alone = not any(group.competes for group in groups(plan, new))
    for found in model.seen_lengths:
        for layer, rows in enumerate(found):
            # A pool of extents holds a layer's rows together, in whichever way they come out.
            assert sum(extent(n) for n in rows) <= sum(extent(n) for n in bounds[layer])
            assert not alone or all(n <= most for n, most in zip(rows, bounds[layer], strict=True))
