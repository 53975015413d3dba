"""Which kernels a policy needs: from a `PolicyPlan` to specs, one function per place where a kernel stands.

Takes a plan, gives `KernelSpec`s. Guarantees: what has no Triton form raises `Unprintable` here and is
listed by `unprintable`, with the class it concerns; nothing is left out silently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction

from kvcompile.kernels import defaults, reach
from kvcompile.kernels.choose_reads import blocks_spec as blocks_spec
from kvcompile.kernels.choose_reads import marks_spec as marks_spec
from kvcompile.kernels.choose_reads import spans_spec as spans_spec
from kvcompile.kernels.choose_reads import units_spec as units_spec
from kvcompile.kernels.formulas import ties_heads
from kvcompile.kernels.holes import region_text, spell
from kvcompile.kernels.plan import STEP_TRIGGERS, ClassPlan, Expr, PolicyPlan, Region, Selection, StatePlan
from kvcompile.kernels.spec import Hole, KernelSpec, power_of_two
from kvcompile.kernels.spec_facts import made, pool_facts, shape, variants
from kvcompile.kernels.stages import Cut, Tile, Unprintable, cut, joined_heads, open_axes, reduction

_PREFILL = ("prefill.end", "chunk", "filled", "full", "when", "slide")


def _steps(plan: PolicyPlan, cls: ClassPlan) -> bool:
    return any(cls.fires_on(kind) for kind in STEP_TRIGGERS)


def _judges(cls: ClassPlan) -> bool:
    """Whether a class decides after a step; else it drops at most what a sliding window has left."""
    return any(cls.fires_on(kind) for kind in STEP_TRIGGERS if kind != "slide")


def _prefills(plan: PolicyPlan, cls: ClassPlan) -> bool:
    return any(cls.fires_on(kind) for kind in _PREFILL)


def _one_tile(parts: Cut) -> Tile | None:
    if len(parts.tiles) > 1:
        raise Unprintable("a score of several evidences has no Triton form yet")
    return parts.tiles[0] if parts.tiles else None


def _step_tile(parts: Cut) -> Tile | None:
    """The evidence of a score that is judged after a step: that step's own query is all there is."""
    tile = _one_tile(parts)
    if tile is not None and tile.kind == "key":
        raise Unprintable("scores from keys after a step have no Triton form yet")
    if tile is not None and tile.source is not None and tile.source.kind == "last" and tile.source.width != 1:
        raise Unprintable(f"q in last({tile.source.width}) after a step has no Triton form yet")
    if tile is not None and tile.source is not None and tile.source.kind == "peek":
        raise Unprintable("q in peek after a step has no meaning")
    return tile


def decode_spec(plan: PolicyPlan, logits: str = "") -> KernelSpec:
    """Decode attention with what the policy's states and step scores take from it.

    logits: how base-2 logits are kept between the launches, fp32 or fp16; by default fp16 where keys are of half
    precision. That is half the bytes (1.6 % of K and V less at a group of 4 and head_dim 128), and moves a probability
    by up to 0.5 % where logits exceed 16, no more than rounding the keys themselves to 8 or 11 bits does.
    """
    reach.after_reads(plan)
    holes: dict[str, Hole] = {f"init {state.name}": reach.formula(state.init) for state in plan.states}
    for state in plan.states:
        if state.add is not None:
            holes[f"add {state.name}"] = _state_tile(state, state.add).formula
    tiles = {tile.formula for tile in _score_tiles(plan)}
    if len(tiles) > 1:
        raise Unprintable("head classes with different scores after a step have no Triton form yet")
    if tiles:
        (holes["score"],) = tiles
    group, given = plan.facts.group, variants(plan)
    facts = (
        pool_facts(plan)
        | defaults.decode(plan.facts)
        | given
        | {
            "group": group,
            "group_pad": max(16, power_of_two(group)),
            "logits": (logits or _kept_as(plan)) if any(not name.startswith("init") for name in holes) else "none",
        }
    )
    tag = "_".join([*(s.name for s in plan.states if s.add is not None), *(["score"] if tiles else []), *sorted(given)])
    return made(KernelSpec.of("decode", holes, tag, **facts))


def prefill_spec(plan: PolicyPlan, listed: int = 0) -> KernelSpec:
    """Attention of a piece over what its rows hold and over itself.

    listed: tokens of a side of the blocks that lists of blocks name, a multiple of 128; 0: no lists.
    """
    reach.reads(plan)
    given = variants(plan)
    facts = shape(plan) | defaults.prefill(plan.facts) | given | {"group": plan.facts.group, "page": plan.page}
    facts |= {"listed": listed} if listed else {}
    return made(KernelSpec.of("prefill", None, "_".join(sorted(given) + ["listed"] * bool(listed)), **facts))


def _kept_as(plan: PolicyPlan) -> str:
    return "fp32" if plan.facts.dtype == "float32" else "fp16"


def project_spec(plan: PolicyPlan) -> KernelSpec:
    """Linear layers of a step on the CPU; on a GPU they are the library's."""
    return KernelSpec.of("project", dtype=plan.facts.dtype)


def _state_tile(state: StatePlan, add: Expr) -> Tile:
    reach.formula(add)
    if "q" in open_axes(add):  # states grow query by query, so a forward adds the sum
        closed = Expr("reduce", (add,), ("mean", "g")) if "g" in open_axes(add) else add
        add = Expr("reduce", (closed,), ("sum", "q"))
    parts = cut(add)
    if not parts.is_tile or parts.heads or parts.tiles[0].kind == "key":
        raise Unprintable(f"state {state.name} += {spell(add)} is not one sum over attention")
    tile = parts.tiles[0]
    if tile.source is not None and tile.source.kind != "forward":
        raise Unprintable(f"state {state.name} reads q in {tile.source.kind}({tile.source.width})")
    return tile


def _score_tiles(plan: PolicyPlan) -> Iterator[Tile]:
    for cls in plan.classes:
        if _judges(cls):
            try:
                reach.step_class(plan, cls)
                tiles = [_step_tile(cut(reach.formula(selection.score))) for selection in cls.selections]
            except Unprintable:
                continue  # evict_spec says so; the other classes still want their scores
            yield from (tile for tile in tiles if tile is not None)


def _selection_facts(plan: PolicyPlan, index: int, term: Selection) -> dict[str, int | str]:
    reach.choice(term)
    reach.alone(plan, term)
    heads = joined_heads(reach.formula(term.score))
    if heads and term.scope != "shared":
        raise Unprintable(f"{heads}[h] where heads do not share the answer has no Triton form yet")
    cls = plan.classes[index]
    sizes = {len(plan.heads(layer, index)) for layer in range(plan.facts.layers)} - {0}
    if heads and sizes - {plan.facts.kv_heads}:
        raise Unprintable(f"{heads}[h] in class {cls.name}, which is part of a layer's heads, has no Triton form yet")
    fraction = term.fraction or Fraction(0)
    return {
        "scope": term.scope,
        "heads": 1 if term.scope == "head" else max(sizes, default=1),
        "rank": term.rank,
        "join": heads or "mean",
        "count": -1 if term.count is None else term.count,
        "fraction": f"{fraction.numerator}/{fraction.denominator if term.fraction is not None else 0}",
        "floor": f"{term.floor.numerator}/{term.floor.denominator}",
    }


_NO_SELECTION: dict[str, int | str] = {
    "scope": "none",
    "heads": 1,
    "rank": "top",
    "join": "mean",
    "count": -1,
    "fraction": "0/0",
    "floor": "0/1",
}


def evict_spec(plan: PolicyPlan, index: int) -> KernelSpec:
    """What class `index` drops after a step: judge, choose, compact, for all its rows at once."""
    cls = plan.classes[index]
    cls = cls if _judges(cls) else replace(cls, keep=(Region("all"),))
    reach.step_class(plan, cls)
    decode_spec(plan)  # it makes the scores, so without it there is nothing to judge by
    if len(cls.selections) > 1:
        raise Unprintable(f"class {cls.name} has several selections after a step")
    regions = [term for term in cls.keep if isinstance(term, Region)]
    holes: dict[str, Hole] = {
        "regions": " | ".join(region_text(plan, region) for region in regions) or "(at < 0)",
        "counts": "\n".join(f"{i} {plan.counts[i].name}" for i in reach.counts_of(cls)),
    }
    facts = pool_facts(plan) | defaults.EVICT
    facts |= {"ordered": cls.by_position, "freezes": _freezes(plan, index)}
    facts |= {"sliding": True} if cls.slides else {}
    tag = "regions"
    if cls.selections:
        (term,) = cls.selections
        parts = cut(reach.formula(term.score))
        _step_tile(parts)
        if any(node.op == "pool" for node in parts.row.walk()):
            raise Unprintable("pooling after a step has no Triton form yet")
        facts |= _selection_facts(plan, index, term)
        holes["row"] = parts.row
        tag = "_".join(sorted({str(n.value) for n in parts.row.walk() if n.op == "state"})) or "score"
    else:
        facts |= _NO_SELECTION
    return made(KernelSpec.of("evict", holes, tag + "_sliding" * cls.slides, **facts))


def _freezes(plan: PolicyPlan, index: int) -> bool:
    """Whether some rule for the rows of a class keeps what has won before, by whichever rule."""
    rules = [cls for i, cls in enumerate(plan.classes) if index in (i, cls.rows_of)]
    return any(isinstance(term, Region) and term.kind == "frozen" for cls in rules for term in cls.keep)


def select_spec(plan: PolicyPlan, index: int, term: Selection) -> KernelSpec:
    """Winners of one selection over a prefill's rows."""
    reach.piece_choice(plan, term)
    facts = _selection_facts(plan, index, term) | defaults.SELECT
    return made(KernelSpec.of("select", None, str(term.rank), **facts))


def pack_spec(plan: PolicyPlan) -> KernelSpec:
    """Survivors of a prefill into the rows' pages."""
    return made(KernelSpec.of("pack", None, "", **pool_facts(plan), **defaults.PACK))


def state_spec(plan: PolicyPlan, state: StatePlan) -> KernelSpec | None:
    """What a whole prefill adds to a state; None where nothing updates it."""
    if state.add is None:
        return None
    reach.reads(plan)
    return _columns(plan, _state_tile(state, state.add), state.name)


def score_specs(plan: PolicyPlan, term: Selection) -> tuple[KernelSpec, ...]:
    """The stages of a prefill's score, in order: a tile stage (columns or keys), then a row stage (pool).

    Empty where the score is a state alone, which is its own score.
    """
    reach.contestants(term)
    if ties_heads(term.score):
        reach.alone(plan, term)
    parts = cut(reach.formula(term.score))
    tile = _one_tile(parts)
    if tile is None:
        if parts.row.op == "state":
            return ()
        raise Unprintable(f"the score {spell(parts.row)} at the end of a prefill has no Triton form yet")
    first = _keys(plan, tile) if tile.kind == "key" else _columns(plan, tile, "")
    return (first,) if parts.is_tile else (first, _row_stage(parts.row))


def _keys(plan: PolicyPlan, tile: Tile) -> KernelSpec:
    facts = shape(plan) | defaults.KEYS
    return made(KernelSpec.of("keys", {"formula": tile.formula}, _words(tile.formula), **facts))


def _words(formula: Expr) -> str:
    words = [str(n.value) for n in formula.walk() if n.op in ("unary", "pair")]
    return "_".join(words) or "plain"


def _columns(plan: PolicyPlan, tile: Tile, tag: str) -> KernelSpec:
    assert tile.source is not None
    pre, over_q, mid, over_g, post = _chain(tile.formula)
    window = tile.source.width if tile.source.kind != "forward" else 0
    holes: dict[str, Hole] = {"pre": pre, "mid": mid, "post": post, "whole": tile.formula}
    given = variants(plan)
    facts = (
        shape(plan)
        | defaults.columns(plan.facts, window)
        | given
        | {
            "group": plan.facts.group,
            "window": window,
            "over_q": over_q,
            "over_g": over_g,
        }
    )
    return made(KernelSpec.of("columns", holes, "_".join([tag or tile.source.kind, *sorted(given)]), **facts))


def _chain(formula: Expr) -> tuple[Expr, str, Expr, str, Expr]:
    """A tile formula as: pre, reduce over q, mid, reduce over g, post. Leaves `tile` q and g stand for the reduced."""
    queries = [n for n in formula.walk() if n.op == "reduce" and reduction(n)[1] == "q"]
    groups = [n for n in formula.walk() if n.op == "reduce" and reduction(n)[1] == "g"]
    if len(queries) != 1 or len(groups) != 1:
        raise Unprintable(f"{spell(formula)} needs exactly one reduction over queries and one over query heads")
    (over_q,), (over_g,) = queries, groups
    q_leaf, g_leaf = Expr("tile", (), "q"), Expr("tile", (), "g")
    q_fn, g_fn = reduction(over_q)[0], reduction(over_g)[0]
    if {q_fn, g_fn} - {"sum", "mean", "max", "min"}:
        raise Unprintable(f"{q_fn}[q] with {g_fn}[g] has no Triton form yet")
    if over_q in over_g.walk():
        return over_q.args[0], q_fn, _swap(over_g.args[0], over_q, q_leaf), g_fn, _swap(formula, over_g, g_leaf)
    same = q_fn == g_fn and q_fn in ("max", "min")
    if over_q.args[0] == over_g and (same or {q_fn, g_fn} <= {"sum", "mean"}):
        return over_g.args[0], q_fn, q_leaf, g_fn, _swap(formula, over_q, g_leaf)
    raise Unprintable(f"{q_fn}[q] of {g_fn}[g] does not commute and has no Triton form yet")


def _swap(expr: Expr, old: Expr, new: Expr) -> Expr:
    if expr == old:
        return new
    return Expr(expr.op, tuple(_swap(arg, old, new) for arg in expr.args), expr.value, expr.axes)


def _row_stage(row: Expr) -> KernelSpec:
    pools = [n for n in row.walk() if n.op == "pool"]
    if len(pools) > 1:
        raise Unprintable("two poolings in one score have no Triton form yet")
    holes: dict[str, Hole] = {"whole": row, "outer": row}
    kind, width = "none", 1
    if pools:
        assert isinstance(pools[0].value, tuple)
        kind, width = str(pools[0].value[0]), int(pools[0].value[1])
        holes |= {"inner": pools[0].args[0], "outer": _swap(row, pools[0], Expr("tile", (), "pooled"))}
    return made(KernelSpec.of("pool", holes, f"{kind}{width}", kind=kind, width=width, warps=4))


Make = Callable[[], tuple[KernelSpec, ...]]


def _places(plan: PolicyPlan, logits: str) -> Iterator[tuple[str, Make]]:
    """(what it is for, how to make it) of every kernel that the plan asks for."""
    yield "decode", lambda: (decode_spec(plan, logits),)
    yield "prefill attention", lambda: (prefill_spec(plan),)
    yield "pack", lambda: (pack_spec(plan),)
    for index, cls in enumerate(plan.classes):
        if _steps(plan, cls):
            yield f"class {cls.name}, after a step", lambda i=index: (evict_spec(plan, i),)  # type: ignore[misc]
        if _prefills(plan, cls):
            for make in _after_a_piece(plan, index):
                yield f"class {cls.name}, prefill", make
    for state in plan.states:
        if state.add is not None:
            yield f"state {state.name}, prefill", lambda s=state: (state_spec(plan, s),)  # type: ignore[misc]


def _after_a_piece(plan: PolicyPlan, index: int) -> Iterator[Make]:
    """Scores and winners of a class, unless its rows are judged by the reference alone."""

    def all_of_it() -> tuple[KernelSpec, ...]:
        reach.piece_class(plan, index)
        return ()

    yield all_of_it
    try:
        all_of_it()
    except Unprintable:
        return
    for term in plan.classes[index].selections:
        yield lambda t=term: score_specs(plan, t)  # type: ignore[misc]
        yield lambda t=term: (select_spec(plan, index, t),)  # type: ignore[misc]


def specs_for(plan: PolicyPlan, logits: str = "") -> tuple[KernelSpec, ...]:
    """Every kernel that the policy needs and that has a Triton form, each once, names unique."""
    found: dict[KernelSpec, None] = {}
    for _, make in _places(plan, logits):
        try:
            found |= dict.fromkeys(make())
        except Unprintable:
            continue  # listed by `unprintable`
    names = [spec.name for spec in found]
    return tuple(spec if names.count(spec.name) == 1 else _renamed(spec) for spec in found)


def _renamed(spec: KernelSpec) -> KernelSpec:
    """Two formulas under one name: the digest sets them apart."""
    return replace(spec, tag="_".join(part for part in (spec.tag, spec.digest()[:6]) if part))


def unprintable(plan: PolicyPlan, logits: str = "") -> tuple[str, ...]:
    """What `specs_for` had to leave out, each with its place and reason; empty: all of the policy runs on Triton."""
    reasons: dict[str, None] = {}
    for place, make in _places(plan, logits):
        try:
            make()
        except Unprintable as error:
            reasons[f"{place}: {error}"] = None
    return tuple(reasons)
