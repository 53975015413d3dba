"""What a GPU's kernels for narrowed reads need beside the specs of `choose_reads`: sizes of lists, launch constants.

Takes a `PolicyPlan`, gives `KernelSpec`s of templates that have a Triton form. Guarantees: what has none raises
`Unprintable` and is listed by `unlisted` with its place and reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from kvcompile.kernels import defaults, reach
from kvcompile.kernels.choose_reads import marks_spec, spans_spec, units_spec
from kvcompile.kernels.contexts import context
from kvcompile.kernels.marks import layout_of, size_of
from kvcompile.kernels.plan import PolicyPlan, ReadRule
from kvcompile.kernels.spec import Fact, Hole, KernelSpec, power_of_two
from kvcompile.kernels.stages import Unprintable

BLOCK = 64  # entries of a span where a step chooses nothing
Make = Callable[[], KernelSpec]


def listed_marks(plan: PolicyPlan) -> KernelSpec:
    """Landmarks of all kinds of units."""
    reach.pools(plan)
    spec, width = marks_spec(plan), plan.facts.head_dim
    order = [
        f"{kind.unit.name}.{name}:{size_of(expr, width)}" for kind in layout_of(plan).kinds for name, expr in kind.landmarks
    ]
    return _with(spec, marks=" ".join(order), **defaults.marks(plan.facts))


def listed_units(plan: PolicyPlan, read: int) -> KernelSpec:
    """What a read's queries choose in a step, as lists of spans."""
    spec = units_spec(plan, read, _in_steps(plan, read))
    if spec.fact("picked"):
        raise Unprintable("entries that were picked before have no Triton form yet")
    facts: dict[str, Fact] = {"span": span_of(plan), "drops": _drops(plan, read)}
    return _with(spec, **facts, **defaults.units(plan.facts))


def listed_decode(plan: PolicyPlan) -> KernelSpec:
    """Decode attention whose heads read lists of spans, or all of their rows."""
    holes: dict[str, Hole] = {}
    for read in range(len(plan.reads)):
        own = dict(listed_units(plan, read).holes)
        holes[f"regions {read}"] = str(own["regions"])
        holes["counts"] = "\n".join(sorted({*str(holes.get("counts", "")).split("\n"), *str(own["counts"]).split("\n")} - {""}))
    spec, group = spans_spec(plan), plan.facts.group
    if group > 31:
        raise Unprintable("more than 31 query heads on one KV head have no list of their own on Triton")
    facts = {"span": span_of(plan), "group_pad": max(16, power_of_two(group)), "logits": "none"} | defaults.spans(plan.facts)
    return _with(replace(spec, holes=tuple(sorted({**dict(spec.holes), **holes}.items()))), **facts)


def span_of(plan: PolicyPlan) -> int:
    """Entries of a span: a unit that is chosen, one size for all reads of a step; a block where none is."""
    rules = [read.rules[_in_steps(plan, i)] for i, read in enumerate(plan.reads)]
    sizes = {plan.unit(t.whole).size for rule in rules for t in rule.selections if t.whole is not None}
    if len(sizes) > 1:
        raise Unprintable(f"units of {' and '.join(map(str, sorted(sizes)))} tokens in one step have no Triton form yet")
    return sizes.pop() if sizes else BLOCK


def places(plan: PolicyPlan) -> Iterator[tuple[str, Make]]:
    """(what it is for, how to make it) of every Triton kernel that a plan's reads ask for."""
    if not plan.reads:
        return
    if layout_of(plan).count:
        yield "landmarks", lambda: listed_marks(plan)
    for index, read in enumerate(plan.reads):
        yield f"{read.name}, attend in a step", lambda i=index: listed_units(plan, i)  # type: ignore[misc]
    yield "narrowed decode", lambda: listed_decode(plan)


def listed_specs(plan: PolicyPlan) -> tuple[KernelSpec, ...]:
    """Every kernel that a plan's reads need and that has a Triton form, each once."""
    found: dict[KernelSpec, None] = {}
    for _, make in places(plan):
        try:
            found[make()] = None
        except Unprintable:
            continue  # told by `unlisted`
    return tuple(found)


def unlisted(plan: PolicyPlan) -> tuple[str, ...]:
    """What of a plan's reads has no Triton form, with its place and reason."""
    reasons: dict[str, None] = {}
    for place, make in places(plan):
        try:
            make()
        except Unprintable as error:
            reasons[f"{place}: {error}"] = None
    return tuple(reasons)


def _in_steps(plan: PolicyPlan, read: int) -> int:
    """Which rule of a read says what its queries read in every step."""

    def fires(rule: ReadRule) -> bool:
        always = not rule.triggers or any(t.kind == "step" and t.cond is None for t in rule.triggers)
        return rule.pick is None and always

    found = [i for i, rule in enumerate(plan.reads[read].rules) if fires(rule)]
    if not found:
        raise Unprintable("a set that later steps go on with has no Triton form yet")
    return found[0]


def _drops(plan: PolicyPlan, read: int) -> bool:
    """Whether rows that go by a read may have lost entries, so that positions have to be looked up."""
    for layer in plan.live:
        for head, of in enumerate(plan.reading(layer)):
            own = plan.class_of[layer][head]
            rules = [cls for i, cls in enumerate(plan.classes) if own in (i, cls.rows_of)]
            if of == read and not all(cls.keeps_all for cls in rules):
                return True
    return False


def _with(spec: KernelSpec, **facts: Fact) -> KernelSpec:
    """A spec with more facts, once its formulas are known to print."""
    made = replace(spec, facts=tuple(sorted({**dict(spec.facts), **facts}.items())))
    context(made)
    return made
