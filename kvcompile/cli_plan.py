"""A frozen plan as lines that a person reads.

Takes a `PolicyPlan`; gives text: model, head classes with what they keep and when, counts, states, units.
Guarantees: everything that the run time decides by is shown; formulas are written as in the language.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from kvcompile.kernels.plan import ClassPlan, Count, Expr, PolicyPlan, QuerySource, Region, Selection, Trigger


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
    for index, cls in enumerate(plan.classes):
        yield f"class {cls.name}: {plan.class_size(index)} KV heads, {_layers(plan, index)}"
        yield from (f"  {line}" for line in _class_lines(plan, cls))
    for state in plan.states:
        grows = f", on attend += {formula(state.add)}" if state.add else ""
        yield f"state {state.name}: starts at {formula(state.init)}{grows}"
    for share in plan.shares:
        yield f"share {share.name}: {formula(share.total)} a layer on average, by {share.by}"
    for unit in plan.units:
        marks = "".join(f"; {name} = {formula(expr)}" for name, expr in unit.landmarks)
        yield f"unit {unit.name}: {unit.size} tokens from {unit.offset}{marks}"


def formula(expr: Expr) -> str:
    """An expression as text of the language; inner operations always stand in brackets."""
    args = [formula(arg) for arg in expr.args]
    if expr.op == "const":
        return _number(expr.value)
    if expr.op in ("scalar", "field", "state"):
        return str(expr.value)
    if expr.op == "landmark":
        return ".".join(map(str, expr.value)) if isinstance(expr.value, tuple) else str(expr.value)
    if expr.op == "evidence" and isinstance(expr.value, tuple):
        name, source = expr.value
        return f"{name}{_source(source)}"
    if expr.op == "reduce" and isinstance(expr.value, tuple):
        return f"{expr.value[0]}[{expr.value[1]}] {_bracketed(expr.args[0])}"
    if expr.op == "pool" and isinstance(expr.value, tuple):
        return f"{expr.value[0]}pool({args[0]}, {expr.value[1]})"
    if expr.op == "binary" and str(expr.value) not in ("min", "max"):
        return f"{_bracketed(expr.args[0])} {expr.value} {_bracketed(expr.args[1])}"
    if expr.op == "unary" and expr.value == "neg":
        return f"-{_bracketed(expr.args[0])}"
    return f"{expr.value}({', '.join(args)})"


def _bracketed(expr: Expr) -> str:
    text = formula(expr)
    return f"({text})" if expr.op == "binary" else text


def _source(source: QuerySource) -> str:
    return "" if source.kind == "forward" else f"[q in {source.kind}({source.width})]"


def _number(value: object) -> str:
    if isinstance(value, Fraction) and value.denominator > 1:
        exact = Fraction(str(float(value))) == value
        return str(float(value)) if exact else f"{value.numerator}/{value.denominator}"
    return str(value)


def _layers(plan: PolicyPlan, index: int) -> str:
    """In which layers a class has heads, as ranges."""
    found = [layer for layer in range(plan.facts.layers) if index in plan.class_of[layer]]
    ranges: list[list[int]] = []
    for layer in found:
        if ranges and ranges[-1][1] == layer - 1:
            ranges[-1][1] = layer
        else:
            ranges.append([layer, layer])
    return "layers " + ", ".join(f"{a}..{b}" if a < b else str(a) for a, b in ranges) if ranges else "no layer"


def _class_lines(plan: PolicyPlan, cls: ClassPlan) -> Iterator[str]:
    if not cls.triggers:
        yield "keeps everything"
        return
    for term in cls.keep:
        yield f"keep {_region(plan, term) if isinstance(term, Region) else _selection(plan, term)}"
    yield "at " + ", ".join(_trigger(trigger) for trigger in cls.triggers)
    if cls.states:
        yield "states " + ", ".join(cls.states)
    if cls.by_position:
        yield "entries stay in position order"


def _region(plan: PolicyPlan, region: Region) -> str:
    inner = "" if region.count is None else f"({_count(plan.counts[region.count])})"
    seed = f", seed {region.seed}" if region.kind == "random" else ""
    return f"{region.kind}{inner}" + (f" {region.unit}" if region.unit else "") + seed


def _selection(plan: PolicyPlan, choice: Selection) -> str:
    amount = _number(choice.fraction) if choice.count is None else _count(plan.counts[choice.count])
    scope = {"head": "per head", "shared": "shared heads", "across": "across heads"}[choice.scope]
    scope += f" floor {_number(choice.floor)}" if choice.floor else ""
    scope += f" per {choice.unit}" if choice.unit else ""
    scope += f", the {choice.observed} newest of the last piece among them" if choice.observed else ""
    return f"{choice.rank}({amount}) by {formula(choice.score)} {scope}"


def _count(count: Count) -> str:
    return formula(count.expr)


def _trigger(trigger: Trigger) -> str:
    inner = ", ".join(str(value) for value in (trigger.unit, trigger.n) if value is not None)
    return f"{trigger.kind}({inner})" if inner else trigger.kind
