"""KV footprint and peak in closed form, before running.

Takes a plan, a prompt length and a number of decode forwards; gives `Footprint`. A forward of n tokens on P
resident entries adds n(n+1)/2 + nP, over T(T+1)/2, mean over KV heads; peak is the largest mean of P + n, over T
(PruLong, arXiv 2506.17121). Peeked tokens count in n, not in T. Guarantees: exact integers up to one division.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvcompile.kernels.plan import PolicyPlan
from kvcompile.passes.residents import forwards


@dataclass(frozen=True, slots=True)
class Footprint:
    """`footprint` and `peak` as parts of an untouched cache (1.0); `exact` is False for an upper bound."""

    footprint: float
    peak: float
    exact: bool


def footprint(plan: PolicyPlan, prompt: int, generate: int = 0) -> Footprint:
    """The footprint of a prompt of `prompt` tokens and `generate` decode forwards. ValueError for an empty prompt."""
    if prompt < 1 or generate < 0:
        raise ValueError(f"a prompt of {prompt} tokens with {generate} steps has no footprint")
    everywhere = plan.facts.layers * plan.facts.kv_heads
    area = peak = 0
    exact = known = True
    for forward in forwards(plan, prompt, generate):
        n, resident = forward.tokens + forward.peeked, sum(forward.before)
        area += everywhere * (n * (n + 1) // 2) + n * resident
        peak = max(peak, resident + everywhere * n)
        exact, known = known, forward.exact  # what the latest forward leaves is not read any more
    total = prompt + generate
    return Footprint(area / (everywhere * (total * (total + 1) // 2)), peak / (everywhere * total), exact)
