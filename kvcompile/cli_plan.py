"""A frozen plan as lines that a person reads.

Takes a `PolicyPlan`; gives text: model, layers that are off, head classes with what they keep and when, what queries
read and when, counts, states, units.
Guarantees: everything that the run time decides by is shown; formulas are written as in the language.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from kvcompile.kernels.plan import (
    ClassPlan,
    Count,
    Expr,
    Loser,
    PolicyPlan,
    QuerySource,
    ReadPlan,
    ReadRule,
    Region,
    Selection,
    Share,
    Term,
    Trigger,
    UnitPlan,
    Update,
    source_of,
)


def plan_lines(plan: PolicyPlan) -> Iterator[str]:
    """The plan, one fact a line."""
    facts = plan.facts
    yield f"policy {plan.name}, digest {plan.digest[:16]}"
    if plan.params:
        yield "parameters " + ", ".join(f"{name}={value}" for name, value in plan.params)
    yield (
        f"model {facts.family or 'unnamed'}: {facts.layers} layers, {facts.q_heads} query heads, "
        f"{facts.kv_heads} KV heads of {facts.head_dim} channels, {facts.dtype}"
    )
    pieces = f"pieces of {plan.chunk} tokens" if plan.chunk else "one piece"
    yield f"prompt in {pieces}" + (f", the last {plan.peek} tokens run along with each" if plan.peek else "")
    asked = f"; scores ask for the {plan.query_window} newest queries" if plan.query_window else ""
    yield f"pages of {plan.page} tokens{asked}"
    if plan.compact:
        yield "keys are rotated by their place in the row"
    if plan.off:
        yield f"without attention: {_ranges(plan.off)}"
    for index, cls in enumerate(plan.classes):
        reach = plan.class_reach(index)
        window = f", with a sliding window of {reach} tokens" if reach else ""
        rows = f"{plan.class_size(index)} KV heads, {_ranges(plan.class_layers(index))}{window}"
        yield f"class {cls.name}: " + (rows if cls.rows_of is None else f"rows of {plan.classes[cls.rows_of].name}")
        yield from (f"  {line}" for line in _class_lines(plan, cls))
    for index, read in enumerate(plan.reads):
        heads = {layer: plan.reading(layer).count(index) for layer in plan.live}
        here = tuple(layer for layer, count in heads.items() if count)
        yield f"reads of {read.name}: {sum(heads.values())} KV heads, {_ranges(here)}"
        yield from (f"  {line}" for line in _read_lines(plan, read))
    for state in plan.states:
        grows = f", on attend += {formula(state.add, plan)}" if state.add else ""
        yield f"state {state.name}: starts at {formula(state.init, plan)}{grows}"
    for update in plan.updates:
        yield _update(plan, update)
    for share in plan.shares:
        yield _share(plan, share)
    yield from (_unit(plan, unit) for unit in plan.units)


def formula(expr: Expr, plan: PolicyPlan | None = None) -> str:
    """An expression as text of the language; inner operations always stand in brackets. `plan` names shares."""
    args = [formula(arg, plan) for arg in expr.args]
    match expr.op, expr.value:
        case "ema", (_, beta):
            return f"ema({args[0]}, {_number(beta)})"
        case "learned", name:
            return f"learned({name}, {', '.join(_plain(arg) for arg in expr.args)})"
        case "reduce", ("sum", "q") if _own(expr.args[0]):
            return args[0]
        case "regroup", (fine, coarse):
            return f"max over the {fine}s of each {coarse} of {_bracketed(expr.args[0], plan)}"
        case "reduce", (fn, axis):
            return f"{fn}[{axis}] {_bracketed(expr.args[0], plan)}"
        case "pool", (fn, width):
            return f"{fn}pool({args[0]}, {width})"
        case "binary", fn if fn not in ("min", "max"):
            return f"{_bracketed(expr.args[0], plan)} {fn} {_bracketed(expr.args[1], plan)}"
        case "unary", "neg":
            return f"-{_bracketed(expr.args[0], plan)}"
    return f"{expr.value}({', '.join(args)})" if args else _leaf(expr, plan)


def _leaf(expr: Expr, plan: PolicyPlan | None) -> str:
    match expr.op, expr.value:
        case "const", value:
            return _number(value)
        case "landmark", (unit, name):
            return f"{unit}.{name}"
        case "share", int(index):
            return plan.shares[index].name if plan is not None else f"share {index}"
        case "evidence", (name, QuerySource() as source):
            return f"{name}{_source(source)}"
        case "queries", QuerySource() as source:
            return "prev.q" if source.kind == "previous" else f"q{_source(source)}"
        case "noise", (seed, _):
            return f"gumbel({seed})"
        case "sim", _:
            return "sim"
    return str(expr.value)


def _plain(vector: Expr) -> str:
    """A vector of an entry's own token: whose it is goes without saying."""
    return "q" if source_of(vector) is not None else formula(vector)


def _bracketed(expr: Expr, plan: PolicyPlan | None) -> str:
    text = formula(expr, plan)
    return f"({text})" if expr.op == "binary" else text


def _own(expr: Expr) -> bool:
    """Whether a formula asks only for the query that reads: a `q` that the language leaves open."""
    sources = [source for node in expr.walk() if (source := source_of(node)) is not None]
    return bool(sources) and all(source.kind == "own" for source in sources)


def _source(source: QuerySource) -> str:
    if source.kind in ("forward", "own"):
        return ""
    return f"[q in {source.kind}({_number(source.part) if source.kind == 'sample' else source.width})]"


def _update(plan: PolicyPlan, update: Update) -> str:
    where = f" where {formula(update.where, plan)}" if update.where is not None else ""
    changes = ", ".join(f"{name} = {formula(value, plan)}" for name, value in update.assigns)
    return f"on {update.event}{where}: {changes}"


def _share(plan: PolicyPlan, share: Share) -> str:
    how = {
        "pyramid": f"pyramid({_number(share.beta)})",
        "table": "a table",
        "softmax": f"softmax({formula(share.score, plan) if share.score else ''})",
        "cover": f"cover({formula(share.score, plan) if share.score else ''})",
    }[share.by]
    aside = ", ".join(_count(plan, plan.counts[index]) for index in share.reserve)
    aside = f", {aside} set aside first" if aside else ""
    groups = f", {share.sharing} layers share one part" if share.sharing > 1 else ""
    return f"share {share.name}: {formula(share.total, plan)} a layer on average, by {how}{aside}{groups}"


def _number(value: object) -> str:
    if isinstance(value, Fraction) and value.denominator > 1:
        exact = Fraction(str(float(value))) == value
        return str(float(value)) if exact else f"{value.numerator}/{value.denominator}"
    return str(value)


def _ranges(layers: tuple[int, ...]) -> str:
    ranges: list[list[int]] = []
    for layer in layers:
        if ranges and ranges[-1][1] == layer - 1:
            ranges[-1][1] = layer
        else:
            ranges.append([layer, layer])
    return "layers " + ", ".join(f"{a}..{b}" if a < b else str(a) for a, b in ranges) if ranges else "no layer"


def _class_lines(plan: PolicyPlan, cls: ClassPlan) -> Iterator[str]:
    if not cls.triggers:
        yield "keeps everything"
        return
    yield from _terms(plan, "pick" if cls.only_picks else "keep", cls.keep)
    for loser in cls.losers:
        yield f"else {_loser(plan, loser)}"
    yield "at " + ", ".join(_trigger(plan, trigger) for trigger in cls.triggers)
    if cls.states:
        yield "states " + ", ".join(cls.states)
    if cls.by_position:
        yield "entries stay in position order"


def _read_lines(plan: PolicyPlan, read: ReadPlan) -> Iterator[str]:
    for rule in read.rules:
        yield from _terms(plan, "attend" if rule.pick is None else f"pick into slot {rule.pick}:", rule.terms)
        yield _when(plan, rule)
    if read.holds:
        yield "in other steps: what the latest of these chose, and all entries since"


def _when(plan: PolicyPlan, rule: ReadRule) -> str:
    return "at " + ", ".join(_trigger(plan, t) for t in rule.triggers) if rule.triggers else "in every forward"


def _terms(plan: PolicyPlan, verb: str, terms: tuple[Term, ...]) -> Iterator[str]:
    for term in terms:
        yield f"{verb} {_region(plan, term) if isinstance(term, Region) else _selection(plan, term)}"


def _unit(plan: PolicyPlan, unit: UnitPlan) -> str:
    marks = "".join(f"; {name} = {formula(expr, plan)}" for name, expr in unit.landmarks)
    apart = f", one every {unit.stride}" if unit.stride != unit.size else ""
    return f"unit {unit.name}: {unit.size} tokens from {unit.offset}{apart}{marks}"


def _region(plan: PolicyPlan, region: Region) -> str:
    inner = "" if region.count is None else f"({_count(plan, plan.counts[region.count])})"
    inner += f'("{region.name}")' if region.name else ""
    seed = f", seed {region.seed}" if region.kind == "random" else ""
    slot = f" {region.pick}" if region.pick is not None else ""
    return f"{region.kind}{inner}" + (f" {region.unit}" if region.unit else "") + seed + slot


def _selection(plan: PolicyPlan, choice: Selection) -> str:
    words = {"head": "per head", "query_head": "per query_head", "shared": "shared heads", "across": "across heads"}
    scope = words[choice.scope]
    scope += f" floor {_number(choice.floor)}" if choice.floor else ""
    scope += {"each": "", "shared": f" shared layers({choice.sharing})", "across": " across layers"}[choice.layers]
    scope += f" per {choice.unit}" if choice.unit else ""
    scope += f", the {choice.observed} newest of the last piece among them" if choice.observed else ""
    scope += f", into slot {choice.pick}" if choice.pick is not None else ""
    whole = f" {choice.whole}s" if choice.whole else ""
    if choice.rank == "where":
        return f"where {formula(choice.score, plan)}{whole and f', whole{whole}'}{scope.removeprefix('per head')}"
    amount = _number(choice.fraction) if choice.count is None else _count(plan, plan.counts[choice.count])
    return f"{choice.rank}({amount}){whole} by {formula(choice.score, plan)} {scope}"


def _loser(plan: PolicyPlan, loser: Loser) -> str:
    if loser.kind == "drop":
        return "drop"
    if loser.kind == "fold":
        return f"fold {loser.fn}" + (f", {_number(loser.part)} of them" if loser.part else "")
    by = "distance(pos)" if loser.fn == "pos" else f"{loser.fn}({loser.of})"
    when = f" when {formula(loser.when, plan)}" if loser.when is not None else ""
    weight = f" weight {formula(loser.weight, plan)}" if loser.weight is not None else ""
    return f"merge into nearest by {by}{when}{weight}"


def _count(plan: PolicyPlan, count: Count) -> str:
    return formula(count.expr, plan)


def _trigger(plan: PolicyPlan, trigger: Trigger) -> str:
    inner = ", ".join(str(value) for value in (trigger.unit, trigger.n) if value is not None)
    named = f"{trigger.kind}({inner})" if inner else trigger.kind
    if trigger.cond is None:
        return named
    return f"{named} {formula(trigger.cond, plan)}" if named == "when" else f"{named} if {formula(trigger.cond, plan)}"
