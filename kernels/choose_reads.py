"""Which kernels a policy's reads need: landmarks, choices of units and of entries, lists in a step, blocks in a piece.

Takes a `PolicyPlan`, gives `KernelSpec`s, the same for every target. Guarantees: what has no form raises `Unprintable`
and is listed by `slow_reads` with its place and reason; nothing is left out silently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from kvcompile.kernels import reach
from kvcompile.kernels.counts import scalars_of
from kvcompile.kernels.holes import region_text
from kvcompile.kernels.marks import Kind, MarksLayout, layout_of, size_of
from kvcompile.kernels.plan import Expr, PolicyPlan, QuerySource, ReadRule, Region, Selection
from kvcompile.kernels.reads import HELD
from kvcompile.kernels.spec import Fact, Hole, KernelSpec
from kvcompile.kernels.spec_facts import pool_facts, shape, variants
from kvcompile.kernels.stages import Unprintable
from kvcompile.kernels.unit_scores import bounded, cut_units, leaves_heads

GRAIN = (32, 256)  # least and most entries that a piece's read takes together
Make = Callable[[], KernelSpec]


def marks_spec(plan: PolicyPlan) -> KernelSpec:
    """Landmarks of units that have become full, of all rows of a layer that are read by them."""
    layout = layout_of(plan)
    if not layout.count:
        raise Unprintable("there are no landmarks")
    holes: dict[str, Hole] = {}
    for kind in layout.kinds:
        holes |= {f"{kind.unit.name} {name}": expr for name, expr in kind.landmarks}
    kinds = " ".join(
        f"{k.unit.name}:{k.unit.size}:{k.unit.stride}:{k.unit.offset}:{k.each}:{k.first}:{k.edge}:{k.channels}"
        for k in layout.kinds
    )
    facts = shape(plan) | {"page": plan.page, "kinds": kinds, "width": layout.width, "edges": layout.edges}
    facts["own"] = _in_own_dtype(plan, layout)
    sizes = (f"{k.unit.name}.{n}:{size_of(e, plan.facts.head_dim)}" for k in layout.kinds for n, e in k.landmarks)
    facts["marks"] = " ".join(sizes)  # in the order in which they lie
    return KernelSpec.of("marks", holes, "_".join(k.unit.name for k in layout.kinds), **facts)


def units_spec(plan: PolicyPlan, read: int, rule: int) -> KernelSpec:
    """What one rule of a read says of each query: which units it chooses, and which entries it reads."""
    of = plan.reads[read].rules[rule]
    _refuse(plan, read, of)
    regions = [term for term in of.terms if isinstance(term, Region) and term.kind != "picked"]
    picked = sorted({t.pick for t in of.terms if isinstance(t, Region) and t.pick is not None and t.kind == "picked"})
    counts = sorted({t.count for t in of.terms if t.count is not None})
    holes: dict[str, Hole] = {
        "regions": " | ".join(_region(plan, region) for region in regions) or "(at < 0)",
        "counts": "\n".join(f"{i} {plan.counts[i].name}" for i in counts),
    }
    facts: dict[str, Fact] = {**shape(plan), "group": plan.facts.group, "page": plan.page}
    apart = bool(picked) or chooses_entries(of)
    facts |= {"picked": " ".join(map(str, picked)), "sets": plan.facts.group if apart else 1, "rank": "none"}
    tag = f"read{read}_{rule}"
    if of.selections and not chooses_entries(of):
        (term,) = of.selections
        facts |= _choice(plan, term)
        units = {unit.name: dict(unit.landmarks) for unit in plan.units}
        holes["score"] = bounded(term.score, units[cut_units(term.score).unit])
    return KernelSpec.of("units", holes, tag, **facts)


def entries_spec(plan: PolicyPlan, read: int, rule: int) -> KernelSpec:
    """Which single entries one rule of a read chooses in a step, of those that its regions leave."""
    of = plan.reads[read].rules[rule]
    _refuse(plan, read, of)
    (term,) = of.selections
    if term.rank not in ("top", "bottom") or term.scope != "query_head" or not _by_logit(term.score):
        raise Unprintable("a selection of single entries but by each query head's own logit has no kernel yet")
    if term.layers != "each" or term.pick is not None or term.observed or term.unit is not None:
        raise Unprintable("a choice that is not each head's own has no kernel yet")
    counts = "" if term.count is None else f"{term.count} {plan.counts[term.count].name}"
    facts: dict[str, Fact] = {**shape(plan), "group": plan.facts.group, "page": plan.page, "rank": term.rank}
    facts |= {"count": -1 if term.count is None else term.count, "fraction": _part(term)}
    return KernelSpec.of("entries", {"counts": counts}, f"read{read}_{rule}", **facts)


def chooses_entries(rule: ReadRule) -> bool:
    """Whether a rule's one selection is of single entries, not of units."""
    return len(rule.selections) == 1 and rule.selections[0].whole is None


def _by_logit(score: Expr) -> bool:
    """Whether a score is the logit of the query at hand."""
    match score:
        case Expr("reduce", (Expr("evidence", _, ("logit", QuerySource("own"))),), ("sum", "q")):
            return True
    return False


def spans_spec(plan: PolicyPlan) -> KernelSpec:
    """A step whose heads read lists of their rows' entries, or all of them: append and attend."""
    _plain_reads(plan)
    reach.after_reads(plan)
    if plan.facts.group > 24 and any(read.holds for read in plan.reads):
        raise Unprintable("sets that steps go on with are bits of a float32: more than 24 query heads do not fit")
    if any(state.add is not None for state in plan.states):
        raise Unprintable("states that grow by what a narrowed step reads have no kernel yet")
    holes: dict[str, Hole] = {f"init {state.name}": reach.formula(state.init) for state in plan.states}
    facts = pool_facts(plan, (HELD,)) | variants(plan) | {"group": plan.facts.group}
    return KernelSpec.of("spans", holes, "_".join(sorted(variants(plan))), **facts)


def blocks_spec(plan: PolicyPlan) -> KernelSpec:
    """A prompt's piece whose heads read what each query's rule says."""
    _plain_reads(plan)
    if plan.peek:
        raise Unprintable("queries that are asked ahead of a piece have no kernel for narrowed reads yet")
    facts = shape(plan) | variants(plan) | {"group": plan.facts.group, "page": plan.page}
    return KernelSpec.of("blocks", None, "_".join(sorted(variants(plan))), **facts)


def grain_of(plan: PolicyPlan, rule: ReadRule) -> int:
    """How many entries of a piece a rule's queries read together: a unit of it, within what a kernel takes."""
    sizes = [plan.unit(t.whole).size for t in rule.selections if t.whole is not None]
    sizes += [plan.unit(t.unit).size for t in rule.terms if isinstance(t, Region) and t.unit is not None]
    least, most = GRAIN
    whole = min(sizes, default=64) // least * least
    return max(least, min(most, whole))


def read_places(plan: PolicyPlan) -> Iterator[tuple[str, Make]]:
    """(what it is for, how to make it) of every kernel that a plan's reads ask for."""
    if not plan.reads:
        return
    if layout_of(plan).count:
        yield "landmarks", lambda: marks_spec(plan)
    for index, read in enumerate(plan.reads):
        for i, rule in enumerate(read.rules):
            what = f"{read.name}, {'pick' if rule.pick is not None else 'attend'}"
            if rule.narrows:
                yield what, _maker(units_spec, plan, index, i)
            if rule.narrows and chooses_entries(rule):
                yield what, _maker(entries_spec, plan, index, i)
    if any(read.narrows_steps for read in plan.reads):
        yield "narrowed decode", lambda: spans_spec(plan)
    yield "narrowed prefill", lambda: blocks_spec(plan)


def _maker(make: Callable[[PolicyPlan, int, int], KernelSpec], plan: PolicyPlan, read: int, rule: int) -> Make:
    return lambda: make(plan, read, rule)


def read_specs(plan: PolicyPlan) -> tuple[KernelSpec, ...]:
    """Every kernel that a plan's reads need and that has a form, each once."""
    found: dict[KernelSpec, None] = {}
    for _, make in read_places(plan):
        try:
            found[make()] = None
        except Unprintable:
            continue  # listed by `slow_reads`
    return tuple(found)


def slow_reads(plan: PolicyPlan) -> tuple[str, ...]:
    """What of a plan's reads runs by the definition, each with its place and reason."""
    reasons: dict[str, None] = {}
    for place, make in read_places(plan):
        try:
            make()
        except Unprintable as error:
            reasons[f"{place}: {error}"] = None
    return tuple(reasons)


# -- what lies beyond ------------------------------------------------------------------------------------------------


def _plain_reads(plan: PolicyPlan) -> None:
    if not plan.reads:
        raise Unprintable("every head reads all")
    if plan.compact or plan.folds:
        raise Unprintable("narrowed reads of entries that are more than they lie have no kernel yet")


def _refuse(plan: PolicyPlan, read: int, rule: ReadRule) -> None:
    """Rules that no kernel computes."""
    _plain_reads(plan)
    if rule.pick is not None and len([r for r in plan.reads[read].rules if r.pick is not None]) > 1:
        raise Unprintable("several choices for later layers in one layer have no kernel yet")
    if any(trigger.cond is not None for trigger in rule.triggers):
        raise Unprintable("triggers with a condition have no kernel yet")
    for term in rule.terms:
        if term.count is not None and "len" in scalars_of(plan.counts[term.count]):
            raise Unprintable("counts that read len have no kernel yet")
    if not rule.selections:
        return
    if len(rule.selections) > 1:
        raise Unprintable("several selections for one query have no kernel yet")
    if any(isinstance(term, Region) and term.kind == "picked" for term in rule.terms):
        raise Unprintable("a selection beside what was picked before has no kernel yet")
    for layer, heads in enumerate(plan.read_of):
        for head, of in enumerate(heads):
            if of == read and layer not in plan.off:
                _refuse_rows(plan, layer, head)


def _refuse_rows(plan: PolicyPlan, layer: int, head: int) -> None:
    if plan.facts.reach(layer):
        raise Unprintable("selections in layers with a sliding window have no kernel yet")
    own = plan.class_of[layer][head]
    for index, cls in enumerate(plan.classes):
        if own in (index, cls.rows_of) and not cls.keeps_all:
            if cls.moves:
                raise Unprintable("selections in rows whose losers leave something behind have no kernel yet")
            if not cls.by_position:
                raise Unprintable("selections in rows that are in no order have no kernel yet")


def _choice(plan: PolicyPlan, term: Selection) -> dict[str, Fact]:
    """Facts of the selection of a rule."""
    assert term.whole is not None
    if term.scope not in ("head", "query_head") or term.layers != "each" or term.pick is not None or term.observed:
        raise Unprintable("a choice that is not each head's own has no kernel yet")
    unit = plan.unit(term.whole)
    if unit.stride != unit.size:
        raise Unprintable("a choice of units that overlap has no kernel yet")
    score, layout = cut_units(term.score), layout_of(plan)
    if not layout.count or not any(kind.unit == unit for kind in layout.kinds):
        raise Unprintable("units without landmarks have no kernel yet")
    inner, outer = layout.kind(score.unit), layout.kind(term.whole)
    if any(p.kind == "regroup" for p in score.passes) == (inner == outer):
        raise Unprintable("a score of units by landmarks of others has no kernel yet")
    apart = term.scope == "query_head" and leaves_heads(term.score)
    if term.scope == "head" and leaves_heads(term.score):
        raise Unprintable("a score that leaves query heads open has no kernel yet")
    return {
        "rank": term.rank,
        "scope": term.scope,
        "sets": plan.facts.group if apart else 1,
        "count": -1 if term.count is None else term.count,
        "fraction": _part(term),
        "size": unit.size,
        "offset": unit.offset,
        "each": outer.each,
        "edge": outer.edge,
        "width": layout.width,
        "edges": layout.edges,
        "own": _in_own_dtype(plan, layout),
        "landmarks": " ".join(_offsets(plan, inner)),
        **{f"inner_{name}": value for name, value in _inner(inner).items()},
    }


def _part(term: Selection) -> str:
    """A selection's part of its candidates; 0/0 where it names a count."""
    return "0/0" if term.fraction is None else f"{term.fraction.numerator}/{term.fraction.denominator}"


def _inner(kind: Kind) -> dict[str, int]:
    unit = kind.unit
    sizes = {"size": unit.size, "stride": unit.stride, "offset": unit.offset}
    return sizes | {"each": kind.each, "first": kind.first, "edge": kind.edge, "channels": kind.channels}


def _offsets(plan: PolicyPlan, kind: Kind) -> Iterator[str]:
    """NAME:WHERE of each landmark of a kind; each has as many numbers as there are channels."""
    if kind.channels != len(kind.landmarks) * plan.facts.head_dim:
        raise Unprintable("landmarks of one number have no kernel yet")
    for i, (name, _) in enumerate(kind.landmarks):
        yield f"{name}:{i * plan.facts.head_dim}"


def _in_own_dtype(plan: PolicyPlan, layout: MarksLayout) -> bool:
    return layout.dtype == plan.facts.dtype


def _region(plan: PolicyPlan, region: Region) -> str:
    """A region as a condition on `at`, the positions, for the query at `at_now`; functions are the template's."""
    if region.kind in ("own", "newest", "pow2"):
        unit = plan.unit(region.unit or "")
        if unit.stride != unit.size:
            raise Unprintable(f"the region {region.kind} of units that overlap has no kernel yet")
        return f"{'at_power' if region.kind == 'pow2' else 'in_own'}(at, at_now, {unit.size}, {unit.offset})"
    if region.kind == "frozen":
        raise Unprintable("the region frozen in reads has no kernel yet")
    return region_text(plan, region)
