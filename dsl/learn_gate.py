"""Learn blocks of trained gates: `learn SCORE for POLICY:`, where the score reads `learned("FILE", q, LANDMARKS)`.

Takes a block whose parameters are put in, and the policy that it is for; gives `GateBlock`, or None after saying what
is wrong. Guarantees: each mistake is said at its place, with the way out; what the gate reads is numbers and words.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from kvcompile.dsl import ast, words
from kvcompile.dsl.context import Context, constant
from kvcompile.dsl.diagnostics import did_you_mean
from kvcompile.dsl.learn_block import PARTS, Say, frozen, named
from kvcompile.dsl.resolve import Resolved

WIDTH, WIDEST = 128, 4096  # of gate space: as published, and where a mistake is likelier than a meaning
POOLED = ("min", "max", "mean")
_SHAPE = 'such as `softmax[u] learned("gates.safetensors", q, c)` with `unit block(64) with c = mean[i] raw.k`'


@dataclass(frozen=True, slots=True)
class GateBlock:
    """A learn block that is right, and what its score reads.

    pooled: the gate sees the mean of a unit's queries, else each query alone. joined: the query heads of a KV head give
    one logit together, else each its own. width: of gate space. size, offset: of the unit. landmarks: how keys are
    pooled, in order; raw: keys and queries are without rotation.
    """

    score: str
    pooled: bool
    joined: bool
    width: int
    size: int
    offset: int
    landmarks: tuple[str, ...]
    raw: bool


def trained_scores(resolved: Resolved) -> dict[str, ast.Score]:
    """The scores of a policy that read a trained gate."""
    found: dict[str, ast.Score] = {}
    for placed in resolved.of(ast.Score):
        if isinstance(placed.clause, ast.Score) and _calls(placed.clause):
            found.setdefault(placed.clause.name, placed.clause)
    return found


def _calls(score: ast.Score) -> list[ast.Call]:
    return [node for node in score.value.walk() if isinstance(node, ast.Call) and node.fn == "learned"]


def check_gate_block(context: Context, learn: ast.Learn) -> GateBlock | None:
    """One learn block of a trained score: its values, or None where something is wrong with it."""
    before = len(context.findings)
    params = [param for param, _ in context.resolved.params]
    parts = _parts(learn, context.say)
    frozen(learn, parts.get("freeze"), context.say)
    gate, loss = parts.get("gate"), parts.get("loss")
    if "mix" in parts:
        context.say("K806", "a gate of units mixes no head classes", parts["mix"], "leave the clause out")
    if isinstance(loss, ast.Loss) and loss.value != ast.Name("attention_kl"):
        context.say("K807", "gates of units learn from the model's own attention alone", loss,
                    "write `loss attention_kl`")  # fmt: skip
    shape = _shape(context, trained_scores(context.resolved)[learn.heads.id])
    if not isinstance(gate, ast.Gate) or not named(gate, (), params, context.say):
        return None
    width = _width(gate, context.say)
    joined = _joined(gate, context.say)
    if len(context.findings) > before or shape is None:
        return None
    return GateBlock(learn.heads.id, gate.by.fn == "block_gate", joined, width, *shape)


def _parts(learn: ast.Learn, say: Say) -> dict[str, ast.LearnClause]:
    parts: dict[str, ast.LearnClause] = {}
    for clause in learn.clauses:
        part = PARTS[type(clause)]
        if part in parts:
            say("K802", f"the learn block has a second `{part}`", clause, "leave one of them")
        parts.setdefault(part, clause)
    shapes = {"gate": f"gate z = {words.BLOCK_GATE_SHAPES['block_gate']} per query_head", "loss": "loss attention_kl"}
    for part, shape in shapes.items():
        if part not in parts:
            say("K801", f"the learn block has no `{part}`", learn, f"add `{shape}`")
    return parts


def _width(gate: ast.Gate, say: Say) -> int:
    fn, value = gate.by.fn, Fraction(WIDTH)
    if fn not in words.BLOCK_GATES:
        say("K803", f"`{fn}` is no gate of units", gate.by,
            did_you_mean(fn, words.BLOCK_GATES, "gates of units"))  # fmt: skip
        return WIDTH
    example = f"such as `{words.BLOCK_GATE_SHAPES[fn]}`"
    for arg in gate.by.args:
        say("K804", f"options of `{fn}` have names: {', '.join(words.BLOCK_GATES[fn])}", arg, example)
    for option in gate.by.named:
        if option.name not in words.BLOCK_GATES[fn]:
            hint = did_you_mean(option.name, words.BLOCK_GATES[fn], f"options of `{fn}`")
            say("K804", f"`{fn}` has no option `{option.name}=`", option, hint)
            continue
        given = constant(option.value)
        if given is None or given.denominator != 1 or given % 2 or not 2 <= given <= WIDEST:
            say("K804", f"the width of a gate is an even number from 2 to {WIDEST}", option, example)
        else:
            value = given
    return int(value)


def _joined(gate: ast.Gate, say: Say) -> bool:
    joined = True
    for scope in gate.scopes:
        if scope.kind != "per" or scope.what not in ("head", "query_head"):
            say("K805", f"gates of units are one per KV head or one per query head, not `{scope.span.text}`", scope,
                "write `per head` or `per query_head`")  # fmt: skip
        joined = scope.what != "query_head"
    return joined


# ---------------------------------------------------------------- the score


def _shape(context: Context, score: ast.Score) -> tuple[int, int, tuple[str, ...], bool] | None:
    """Size and offset of the unit, how its keys are pooled, whether without rotation."""
    calls = _calls(score)
    if len(calls) > 1:
        context.say("K817", f"`{score.name}` reads more than one trained gate", calls[1],
                    "give each a score of its own, and name both in a third")  # fmt: skip
        return None
    _, *fields = calls[0].args
    marks = [arg for arg in fields if not (isinstance(arg, ast.Name) and arg.id == "q")]
    if len(marks) != len(fields) - 1 or not marks:
        context.say("K817", "a trained gate reads `q` and landmarks of one unit", calls[0], _SHAPE)
        return None
    found = [_landmark(context, mark) for mark in marks]
    if any(one is None for one in found):
        return None
    units = {one[0].name: one[0] for one in found if one is not None}
    fields_read = {one[2] for one in found if one is not None}
    if len(units) > 1 or len(fields_read) > 1:
        what = "units" if len(units) > 1 else "fields"
        context.say("K817", f"the landmarks of a trained gate are of several {what}", calls[0], _SHAPE)
        return None
    bounds = _bounds(context, next(iter(units.values())))
    if bounds is None:
        return None
    return (*bounds, tuple(one[1] for one in found if one is not None), fields_read == {"raw.k"})


def _landmark(context: Context, arg: ast.Expr) -> tuple[ast.Unit, str, str] | None:
    """The unit of a landmark, how it pools, and what."""
    owner = [
        (unit, mark.value)
        for unit in context.units.values()
        for mark in unit.landmarks
        if isinstance(arg, ast.Name) and mark.name == arg.id
    ]
    if owner:
        match owner[0][1]:
            case ast.Reduce(fn=fn, axes=(ast.Axis(name="i", source=None),), body=body) if fn in POOLED:
                field = {ast.Name("k"): "k", ast.Field("raw", "k"): "raw.k"}.get(body)
                if field is not None:
                    return owner[0][0], fn, field
    context.say(
        "K817", f"`{arg.span.text}` is no min, max or mean of k or raw.k over the tokens of a unit", arg, _SHAPE
    )
    return None


def _bounds(context: Context, unit: ast.Unit) -> tuple[int, int] | None:
    size = constant(unit.args[0]) if len(unit.args) == 1 and not unit.named else None
    offset = Fraction(0) if unit.offset is None else constant(unit.offset)
    if size is None or offset is None or size.denominator != 1 or offset.denominator != 1 or size < 1 or offset < 0:
        context.say("K817", "trained gates are of units of a fixed size that do not overlap", unit, "such as block(64)")
        return None
    return int(size), int(offset)
