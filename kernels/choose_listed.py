"""What a GPU's kernels for narrowed reads need beside the specs of `choose_reads`: sizes of lists, launch constants.

Takes a `PolicyPlan`, gives `KernelSpec`s of templates that have a Triton form. Guarantees: what has none raises
`Unprintable` and is listed by `unlisted` with its place and reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from kvcompile.kernels import defaults
from kvcompile.kernels.choose import decode_spec, unprintable
from kvcompile.kernels.choose_reads import blocks_spec, chooses_entries, marks_spec, spans_spec, units_spec
from kvcompile.kernels.contexts import context
from kvcompile.kernels.formulas import sources_of
from kvcompile.kernels.marks import layout_of, size_of
from kvcompile.kernels.plan import STEP_TRIGGERS, Expr, PolicyPlan, ReadRule, Region, formulas_of
from kvcompile.kernels.spec import Fact, Hole, KernelSpec, power_of_two
from kvcompile.kernels.stages import Unprintable

BLOCK = 64  # entries of a span where a step chooses nothing
TILE = 64  # entries that the queries of a tile read together
Make = Callable[[], KernelSpec]


def listed_marks(plan: PolicyPlan) -> KernelSpec:
    """Landmarks of all kinds of units."""
    spec, width = marks_spec(plan), plan.facts.head_dim
    order = [
        f"{kind.unit.name}.{name}:{size_of(expr, width)}"
        for kind in layout_of(plan).kinds
        for name, expr in kind.landmarks
    ]
    return _with(spec, marks=" ".join(order), **defaults.marks(plan.facts))


def listed_units(plan: PolicyPlan, read: int) -> KernelSpec:
    """What a read's queries choose in a step, as lists of spans."""
    for rule in plan.reads[read].rules:
        _refuse(rule)
    spec = units_spec(plan, read, _in_steps(plan, read))
    if spec.fact("picked"):
        raise Unprintable("entries that were picked before have no Triton form yet")
    facts: dict[str, Fact] = {"span": span_of(plan), "drops": _drops(plan, read)}
    return _with(spec, **facts, **defaults.units(plan.facts))


def _refuse(rule: ReadRule) -> None:
    """What generated C++ computes and Triton does not."""
    if rule.pick is not None:
        raise Unprintable("a choice for later layers has no Triton form yet")
    if chooses_entries(rule):
        raise Unprintable("a selection of single entries has no Triton form yet")


def listed_decode(plan: PolicyPlan) -> KernelSpec:
    """Decode attention whose heads read lists of spans, or all of their rows."""
    holes: dict[str, Hole] = {}
    for read in range(len(plan.reads)):
        own = listed_units(plan, read)
        holes[f"regions {read}"] = _entry_by_entry(own)
        holes["counts"] = _lines(str(holes.get("counts", "")), str(dict(own.holes)["counts"]))
    spec, group = spans_spec(plan), plan.facts.group
    if scores_steps(plan):
        raise Unprintable("scores of narrowed reads have no Triton form yet")
    if group > 31:
        raise Unprintable("more than 31 query heads on one KV head have no list of their own on Triton")
    facts: dict[str, Fact] = {"span": span_of(plan), "group_pad": max(16, power_of_two(group)), "logits": "none"}
    spec = replace(spec, holes=tuple(sorted({**dict(spec.holes), **holes}.items())))
    return _with(spec, **facts, **defaults.spans(plan.facts))


def _entry_by_entry(spec: KernelSpec) -> str:
    """The regions that attention itself has to look at; beside a choice the query's own unit is read as it is."""
    text = str(dict(spec.holes)["regions"])
    if "score" in dict(spec.holes) and text == f"in_own(at, at_now, {spec.fact('size')}, {spec.fact('offset')})":
        return "(at < 0)"
    return text


def listed_piece(plan: PolicyPlan, read: int) -> KernelSpec:
    """What the queries of a prompt's piece choose by a read, and which tiles of entries they read."""
    rule = in_pieces(plan, read)
    _refuse(plan.reads[read].rules[rule])
    spec = units_spec(plan, read, rule)
    if spec.fact("picked"):
        raise Unprintable("entries that were picked before have no Triton form yet")
    terms = plan.reads[read].rules[rule].terms
    regions = [term for term in terms if isinstance(term, Region)]
    holes: dict[str, Hole] = {**dict(spec.holes), "may": " | ".join(reached(plan, r) for r in regions) or "(lo < 0)"}
    facts: dict[str, Fact] = {"tile": TILE, "drops": _drops(plan, read), "powers": False}
    if dict(spec.holes).get("score") is not None:
        holes |= dict(zip(("before", "behind"), bounds(plan, regions, spec.number("size")), strict=True))
        facts["powers"] = any(r.kind == "pow2" for r in regions)
    made = KernelSpec.of("chosen", holes, spec.tag, **{**dict(spec.facts), **facts, **defaults.chosen(plan.facts)})
    context(made)
    return made


def listed_blocks(plan: PolicyPlan) -> KernelSpec:
    """Attention of a piece whose queries read lists of tiles, each what it has chosen of them."""
    holes: dict[str, Hole] = {}
    chooses, kinds = [], set()
    for read in reads_in_pieces(plan):
        own = listed_piece(plan, read)
        holes[f"regions {read}"] = _entry_by_entry(own)
        holes["counts"] = _lines(str(holes.get("counts", "")), str(dict(own.holes)["counts"]))
        if "score" in dict(own.holes):
            chooses.append(read)
            kinds.add((own.number("size"), own.number("sets")))
    if len(kinds) > 1:
        raise Unprintable(
            "units of several sizes, or choices of heads and of query heads, in one piece have no Triton form yet"
        )
    size, sets = kinds.pop() if kinds else (1, 1)
    spec = blocks_spec(plan)
    facts: dict[str, Fact] = {"tile": TILE, "size": size, "sets": sets, "chooses": " ".join(map(str, chooses))}
    spec = replace(spec, holes=tuple(sorted({**dict(spec.holes), **holes}.items())))
    return _with(spec, **facts, **defaults.blocks(plan.facts))


def reads_in_pieces(plan: PolicyPlan) -> tuple[int, ...]:
    """Reads that narrow what a piece of a prompt reads."""
    return tuple(i for i, read in enumerate(plan.reads) if any(map(_fires_in_pieces, read.rules)))


def _fires_in_pieces(rule: ReadRule) -> bool:
    return not rule.triggers or any(t.kind in ("chunk", "prefill.end", "when") for t in rule.triggers)


def narrows_pieces(plan: PolicyPlan) -> bool:
    """Whether some rule may fire in a prompt's piece: if none does, its queries read all."""
    return any(_fires_in_pieces(rule) for read in plan.reads for rule in read.rules)


def narrows_steps(plan: PolicyPlan) -> bool:
    """Whether some step may read less than all."""
    return any(read.narrows_steps for read in plan.reads)


def in_pieces(plan: PolicyPlan, read: int) -> int:
    """Which rule of a read says what the queries of a prompt's piece read."""
    found = [i for i, rule in enumerate(plan.reads[read].rules) if _fires_in_pieces(rule)]
    if len(found) != 1:
        raise Unprintable("several sets of one read in prompts have no Triton form yet")
    return found[0]


def reached(plan: PolicyPlan, region: Region) -> str:
    """Whether queries at q0 to q1 may read, by a region, an entry at lo to hi: never false where one does."""
    n = f"n{region.count}"
    match region.kind:
        case "all":
            return "(lo >= 0)"
        case "sink":
            return f"(lo < {n})"
        case "recent":
            return f"(hi > q0 - {n})"
        case "prompt":
            return "(lo < at_prompt)"
        case "generated":
            return "(hi >= at_prompt)"
        case "stride":
            return f"(({n} > 0) & (hi // tl.maximum({n}, 1) * {n} >= lo))"
        case "own" | "newest" | "pow2":
            unit = plan.unit(region.unit or "")
            first, last, old, new = (f"unit_of({x}, {unit.size}, {unit.offset})" for x in ("q0", "q1", "lo", "hi"))
            if region.kind != "pow2":
                return f"(({new} >= {first}) & ({old} <= {last}))"
            return f"power_within({first} - {new}, {last} - {old})"
        case other:
            raise Unprintable(f"the region {other} in a piece has no Triton form yet")


def bounds(plan: PolicyPlan, regions: list[Region], size: int) -> tuple[str, str]:
    """Where the oldest entries that regions take end, and where the newest begin, for the query at `at_now`.

    So that a unit has an entry to choose by wherever some of its positions lies between; what regions of other kinds
    take has to be whole units of `size`.
    """
    before, behind = ["0"], []
    for region in regions:
        match region.kind:
            case "sink":
                before.append(f"n{region.count}")
            case "prompt":
                before.append("at_prompt")
            case "recent":
                behind.append(f"(at_now - n{region.count} + 1)")
            case "generated":
                behind.append("at_prompt")
            case "own" | "newest":
                unit = plan.unit(region.unit or "")
                if (unit.size, unit.offset) != (size, 0):
                    behind.append(f"(unit_of(at_now, {unit.size}, {unit.offset}) * {unit.size} + {unit.offset})")
            case "pow2" if (plan.unit(region.unit or "").size, plan.unit(region.unit or "").offset) == (size, 0):
                pass
            case other:
                raise Unprintable(f"a choice beside the region {other} in a piece has no Triton form yet")
    joined = before[0]
    for text in before[1:]:
        joined = text if joined == "0" else f"tl.maximum({joined}, {text})"
    return joined, _least(behind)


def _least(texts: list[str]) -> str:
    joined = texts[0] if texts else ""
    for text in texts[1:]:
        joined = f"tl.minimum({joined}, {text})"
    return joined


def _lines(*texts: str) -> str:
    """The lines of several texts, each once, sorted."""
    return "\n".join(sorted({line for text in texts for line in text.split("\n")} - {""}))


def span_of(plan: PolicyPlan) -> int:
    """Entries of a span: a unit that is chosen, one size for all reads of a step; a block where none is."""
    rules = [read.rules[_in_steps(plan, i)] for i, read in enumerate(plan.reads)]
    sizes = {plan.unit(t.whole).size for rule in rules for t in rule.selections if t.whole is not None}
    if len(sizes) > 1:
        raise Unprintable(
            f"units of {' and '.join(map(str, sorted(sizes)))} tokens in one step have no Triton form yet"
        )
    return sizes.pop() if sizes else BLOCK


def places(plan: PolicyPlan) -> Iterator[tuple[str, Make]]:
    """(what it is for, how to make it) of every Triton kernel that a plan's reads ask for."""
    if not plan.reads:
        return
    if layout_of(plan).count:
        yield "landmarks", lambda: listed_marks(plan)
    for index, read in enumerate(plan.reads if narrows_steps(plan) else ()):
        yield f"{read.name}, decode", lambda i=index: listed_units(plan, i)  # type: ignore[misc]
    if narrows_steps(plan):
        yield "decode", lambda: listed_decode(plan)
    for index, read in enumerate(plan.reads):
        if any(_fires_in_pieces(rule) for rule in read.rules):
            yield f"{read.name}, prefill attention", lambda i=index: listed_piece(plan, i)  # type: ignore[misc]
    if narrows_pieces(plan):
        yield "prefill attention", lambda: listed_blocks(plan)


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
    """What of a plan's reads has no Triton form, with its place and reason.

    Attention of all reads stands in the list only where it is no read of its own that is the reason.
    """
    reasons: dict[str, None] = {}
    told: set[tuple[str, str]] = set()
    for place, make in places(plan):
        try:
            make()
        except Unprintable as error:
            read, _, kernel = place.rpartition(", ")
            if read:
                told.add((kernel, str(error)))
            elif (kernel, str(error)) in told:
                continue
            reasons[f"{place}: {error}"] = None
    for cls in plan.classes:
        if any(asks_narrowed(plan, formula) for formula in formulas_of(cls)):
            reasons[f"class {cls.name}, prefill: scores of narrowed reads have no Triton form yet"] = None
    for state in plan.states if narrows_pieces(plan) else ():
        if state.add is not None:
            reasons[f"state {state.name}, prefill: sums over narrowed reads have no Triton form yet"] = None
    for cls in plan.classes if narrows_steps(plan) and scores_steps(plan) else ():
        if any(cls.fires_on(kind) for kind in STEP_TRIGGERS):
            reasons[f"class {cls.name}, after a step: scores of narrowed reads have no Triton form yet"] = None
    return tuple(reasons)


def asks_narrowed(plan: PolicyPlan, score: Expr) -> bool:
    """Whether a score of a prompt's piece asks for attention of queries that do not read all."""
    return narrows_pieces(plan) and any(source.kind in ("forward", "sample") for source in sources_of([score]))


def without_triton(plan: PolicyPlan) -> tuple[str, ...]:
    """All of a plan that has no Triton form, reads among it, each with its place and reason."""
    return tuple(dict.fromkeys((*unprintable(plan), *unlisted(plan))))


def scores_steps(plan: PolicyPlan) -> bool:
    """Whether a class judges by what a step's own query says, which a read of spans does not leave."""
    try:
        return "score" in dict(decode_spec(plan).holes)
    except Unprintable:
        return False


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
