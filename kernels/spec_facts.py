"""Facts that specs of every kind begin with: shapes, pools, variants of attention.

Takes a plan, gives facts by name; what no kernel takes raises `Unprintable`.
"""

from __future__ import annotations

from kvcompile.kernels import reach
from kvcompile.kernels.contexts import context
from kvcompile.kernels.plan import PolicyPlan
from kvcompile.kernels.spec import KernelSpec
from kvcompile.kernels.stages import Unprintable


def shape(plan: PolicyPlan) -> dict[str, int | str]:
    size = plan.facts.head_dim
    if size % 8:
        raise Unprintable(f"head_dim {size} is not a multiple of 8, so rows of half precision would not be aligned")
    if size > 256:
        raise Unprintable(f"head_dim {size} is above 256: a tile of it would not fit the registers")
    return {"head_dim": size, "dtype": plan.facts.dtype}


def pool_facts(plan: PolicyPlan, carried: tuple[str, ...] = ()) -> dict[str, int | str]:
    """Of kernels that see a pool's entries; carried: hidden states that this kernel keeps itself."""
    reach.pools(plan, carried)
    names = " ".join(state.name for state in plan.states)
    return shape(plan) | {"page": plan.page, "states": len(plan.states), "state_names": names}


def variants(plan: PolicyPlan) -> dict[str, bool]:
    """What the model's attention has beyond plain softmax, as facts; what it does not have is absent."""
    facts = plan.facts
    asked = {"softcap": bool(facts.softcap), "sinks": facts.sinks, "sliding": any(facts.windows)}
    return {name: True for name, wanted in asked.items() if wanted}


def made(spec: KernelSpec) -> KernelSpec:
    """The spec itself, once its formulas are known to print."""
    context(spec)
    return spec
