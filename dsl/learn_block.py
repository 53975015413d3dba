"""The clauses of a learn block as plain values.

Takes a block whose parameters are put in, and the head classes that its mix may name; gives `Block`, or None after
saying what is wrong. Guarantees: each mistake is said at its place, with the way out; numbers are exact and in range.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from fractions import Fraction

from kvcompile.dsl import ast, words
from kvcompile.dsl.context import constant
from kvcompile.dsl.diagnostics import did_you_mean

Say = Callable[[str, str, ast.Node, str], None]
Values = tuple[tuple[str, Fraction], ...]

_LARGEST = 10**18
PARTS = {ast.Gate: "gate", ast.Mix: "mix", ast.Loss: "loss", ast.Freeze: "freeze"}
# What options of gates are when unsaid. Those of hard_concrete are of arXiv:1712.01312, its start is PruLong's.
_DEFAULTS: dict[str, dict[str, Fraction]] = {
    "hard_concrete": {
        "init": Fraction(4), "low": Fraction(-1, 10), "high": Fraction(11, 10), "temperature": Fraction(2, 3),
    },
    "clamp01": {"init": Fraction(1)},
    "sparsemax": {"init": Fraction(0), "temperature": Fraction(1), "ramp": Fraction(1)},
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Term:
    """One term of the loss; `target` and `ramp` are of `lagrange` alone."""

    kind: str
    weight: Fraction
    target: Fraction | None = None
    ramp: Fraction | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """A learn block that is right. `others` is the class mixed with the learned one, `options` has `init` and all other
    options of the gate but `keep`, `keep` is the part of the heads that the class shall get, None where nothing says.
    """

    others: str
    gate: str
    options: Values
    terms: tuple[Term, ...]
    keep: Fraction | None


def read_block(learn: ast.Learn, classes: Collection[str], params: Collection[str], say: Say) -> Block | None:
    """The block's values, or None after saying why not. classes: those with a `keep`; params: the policy's."""
    parts: dict[str, ast.LearnClause] = {}
    for clause in learn.clauses:
        part = PARTS[type(clause)]
        if part in parts:
            say("K802", f"the learn block has a second `{part}`", clause, "leave one of them")
        parts.setdefault(part, clause)
    wrong: list[str] = []

    def report(code: str, message: str, node: ast.Node, hint: str) -> None:
        wrong.append(code)
        say(code, message, node, hint)

    gate, mix, loss, freeze = (parts.get(part) for part in PARTS.values())
    _missing(learn, classes, parts, report)
    frozen(learn, freeze, report)
    if not isinstance(gate, ast.Gate) or not named(gate, classes, params, report):
        return None
    options = _gate(gate, report)
    others = _mix(mix, gate.name, learn.heads.id, classes, report) if isinstance(mix, ast.Mix) else None
    terms = _loss(loss, gate.name, report) if isinstance(loss, ast.Loss) else ()
    if isinstance(loss, ast.Loss) and not wrong:
        _pressure(gate, loss, terms, report, say)
    if wrong or others is None:
        return None
    kept = {name: value for name, value in options if name == "keep"}
    targets = [term.target for term, _ in terms if term.target is not None]
    keep = kept.get("keep") or next(iter(targets), None)
    plain = tuple((name, value) for name, value in options if name != "keep")
    return Block(others, gate.by.fn, plain, tuple(term for term, _ in terms), keep)


def _missing(learn: ast.Learn, classes: Collection[str], parts: Collection[str], say: Say) -> None:
    missing = [part for part in ("gate", "mix", "loss") if part not in parts]
    if not missing:
        return
    other = next((name for name in classes if name != learn.heads.id), "OTHER")
    shapes = {
        "gate": "gate z = hard_concrete(init=4.0) per head",
        "mix": _mixed("z", learn.heads.id, other),
        "loss": "loss next_token + lagrange(mean(z), target=30%, ramp=80%)",
    }
    listed = " and no ".join(f"`{part}`" for part in missing)
    say("K801", f"the learn block has no {listed}", learn, f"add `{shapes[missing[0]]}`")


def frozen(learn: ast.Learn, freeze: ast.Node | None, say: Say) -> None:
    """Say what is wrong with `freeze weights`, or that it is missing."""
    if not isinstance(freeze, ast.Freeze):
        say("K812", "weights are learned too: not supported yet", learn, "write `freeze weights`")
        return
    other = next((name for name in freeze.names if name != "weights"), None)
    if other is not None:
        say("K811", f"`{other}` cannot be frozen", freeze, did_you_mean(other, ["weights"]) or "write `freeze weights`")


def named(gate: ast.Gate, classes: Collection[str], params: Collection[str], say: Say) -> bool:
    """Whether the gate's name can be told from other words of the block."""
    if gate.name in words.RESERVED or gate.name in (*words.LOSSES, "answer_tokens"):
        say("K105", f"`{gate.name}` is a word of the language", gate, f"call the gate `{gate.name}_`, or `z`")
    elif gate.name in classes or gate.name in params:
        what = "head class" if gate.name in classes else "parameter"
        say("K106", f"`{gate.name}` is a {what} already", gate, "call the gate `z`")
    else:
        return True
    return False


# ---------------------------------------------------------------- gate


def _gate(gate: ast.Gate, say: Say) -> Values:
    """All options of the gate, the unsaid ones too."""
    for scope in gate.scopes:
        if (scope.kind, scope.what) != ("per", "head"):
            say("K805", f"gates are one per KV head, not `{scope.span.text}`", scope, "write `per head`")
    fn = gate.by.fn
    if fn not in words.GATES:
        say("K803", f"there is no gate `{fn}`", gate.by, did_you_mean(fn, words.GATES, "gates"))
        return ()
    example = f"such as `{words.GATE_SHAPES[fn]}`"
    if gate.by.args:
        say("K804", f"options of `{fn}` have names: {', '.join(words.GATES[fn])}", gate.by.args[0], example)
    found = dict(_DEFAULTS[fn])
    for named in gate.by.named:
        if named.name not in words.GATES[fn]:
            hint = did_you_mean(named.name, words.GATES[fn], f"options of `{fn}`")
            say("K804", f"`{fn}` has no option `{named.name}=`", named, hint)
            continue
        value = part_of(named.value) if named.name in ("keep", "ramp") else constant(named.value)
        if value is None:
            say("K804", f"`{named.name}=` needs a number", named, example)
        elif (wanted := _out_of_range(fn, named.name, value)) is not None:
            say("K804", f"`{named.name}` of `{fn}` is {wanted}, not {float(value):g}", named, example)
        else:
            found[named.name] = value
    if fn == "sparsemax" and gate.by.get("keep") is None:
        say("K804", "`sparsemax` does not say which part of the heads it keeps", gate.by, example)
    return tuple(found.items())


def _out_of_range(fn: str, name: str, value: Fraction) -> str | None:
    """The range in words, where a value lies outside."""
    match name:
        case "low" if value >= 0:
            return "below 0, or no gate would close"
        case "high" if value <= 1:
            return "above 1, or no gate would open"
        case "temperature" if value <= 0:
            return "above 0"
        case "keep" if not 0 < value < 1:
            return "between 0% and 100%, both excluded"
        case "ramp" if not 0 < value <= 1:
            return "a part of the steps, above 0"
        case "init" if fn == "clamp01" and not 0 <= value <= 1:
            return "from 0 to 1"
    return None


def part_of(expr: ast.Expr) -> Fraction | None:
    """A part as `30%` or 0.3, or None for what is no number."""
    return expr.value if isinstance(expr, ast.Number) and expr.kind in ("percent", "float", "int") else None


# ---------------------------------------------------------------- mix


def _mixed(z: str, learned: str, other: str) -> str:
    return f"mix {z} * {learned} + (1 - {z}) * {other}"


def _mix(mix: ast.Mix, z: str, learned: str, classes: Collection[str], say: Say) -> str | None:
    """The class that is mixed with the learned one."""
    shape = f"write `{_mixed(z, learned, next((name for name in classes if name != learned), 'OTHER'))}`"
    value = mix.value
    sides = [value.left, value.right] if isinstance(value, ast.Binary) and value.op == "+" else []
    pairs = [_weighted(side, z) for side in sides]
    found = dict(pair for pair in pairs if pair is not None)
    if len(found) != 2:
        say("K806", f"a mix weighs two head classes by `{z}` and by `1 - {z}`", mix, shape)
        return None
    opened, closed = found[True], found[False]
    for name in (opened, closed):
        if name.id not in classes:
            say(
                "K806",
                f"no class `{name.id}` has a `keep` in this policy",
                name,
                did_you_mean(name.id, classes) or shape,
            )
            return None
    if opened.id == closed.id:
        say("K806", f"`{opened.id}` is mixed with itself", closed, shape)
    elif opened.id != learned:
        say("K806", f"an open gate must mean `{learned}`, the class that is learned, not `{opened.id}`", opened, shape)
    else:
        return closed.id
    return None


def _weighted(side: ast.Expr, z: str) -> tuple[bool, ast.Name] | None:
    """Of `z * CLASS` or `(1 - z) * CLASS`: whether the weight is z itself, and the class."""
    if not isinstance(side, ast.Binary) or side.op != "*":
        return None
    for weight, name in ((side.left, side.right), (side.right, side.left)):
        if isinstance(name, ast.Name) and name.id != z and (is_open := _opens(weight, z)) is not None:
            return is_open, name
    return None


def _opens(weight: ast.Expr, z: str) -> bool | None:
    """True for z, False for 1 - z, else None."""
    match weight:
        case ast.Name(id=name) if name == z:
            return True
        case ast.Binary(op="-", left=ast.Number(value=one), right=ast.Name(id=name)) if one == 1 and name == z:
            return False
    return None


# ---------------------------------------------------------------- loss


def _loss(loss: ast.Loss, z: str, say: Say) -> tuple[tuple[Term, ast.Node], ...]:
    """The terms with their places."""
    found: list[tuple[Term, ast.Node]] = []
    for part in _summands(loss.value, say):
        term = _term(part, z, say)
        if term is not None and any(term.kind == other.kind for other, _ in found):
            say("K807", f"the loss has a second term `{words.LOSSES[term.kind]}`", part, "join them by their factors")
        elif term is not None:
            found.append((term, part))
    return tuple(found)


def _summands(value: ast.Expr, say: Say) -> Iterator[ast.Expr]:
    """The parts between `+`, in the order written."""
    pending = [value]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Binary) and node.op == "+":
            pending += [node.right, node.left]
        elif isinstance(node, ast.Binary) and node.op == "-":
            say("K807", "terms of a loss are added, each is to become small", node, "write `+`")
        else:
            yield node


def _term(part: ast.Expr, z: str, say: Say) -> Term | None:
    weight, core = _factors(part) or (Fraction(1), None)
    if core is None:
        say("K807", "a term of a loss is a word of the loss with a number before it", part, _listed(z))
        return None
    if not 0 < weight <= _LARGEST:
        say("K807", f"a factor of a loss is above 0, not {float(weight):g}", part, "every term is to become small")
        return None
    match core:
        case ast.Name(id="next_token"):
            return Term("next_token", weight)
        case ast.Call(fn="hidden_mse" | "mean" as kind):
            argument = z if kind == "mean" else "answer_tokens"
            if core == ast.Call(kind, (ast.Name(argument),)):
                return Term(kind, weight)
            say("K807", f"`{kind}` is taken of `{argument}` alone", core, f"write `{kind}({argument})`")
            return None
        case ast.Call(fn="lagrange"):
            return _lagrange(core, weight, z, say)
    word = core.id if isinstance(core, ast.Name) else core.fn if isinstance(core, ast.Call) else core.span.text
    hint = "" if word in words.LOSSES else did_you_mean(word, words.LOSSES)
    say("K807", f"`{word}` is no term of a loss", core, hint or _listed(z))
    return None


def _factors(expr: ast.Expr) -> tuple[Fraction, ast.Expr | None] | None:
    """A product as its number and what is not one; None where there are two such things, or a division by one."""
    value = constant(expr)
    if value is not None:
        return value, None
    match expr:
        case ast.Unary(op="-", operand=operand):
            inner = _factors(operand)
            return None if inner is None else (-inner[0], inner[1])
        case ast.Binary(op="*" | "/" as op, left=left, right=right):
            first, second = _factors(left), _factors(right)
            if first is None or second is None or (first[1] is not None and second[1] is not None):
                return None
            if op == "/":
                return None if second[1] is not None or not second[0] else (first[0] / second[0], first[1])
            return first[0] * second[0], first[1] if first[1] is not None else second[1]
    return Fraction(1), expr


def _lagrange(call: ast.Call, weight: Fraction, z: str, say: Say) -> Term | None:
    example = f"such as `{_shape('lagrange', z)}`"
    if call.args != (ast.Call("mean", (ast.Name(z),)),):
        say("K807", f"`lagrange` holds `mean({z})` at its target, and nothing else", call, example)
        return None
    odd = next((named for named in call.named if named.name not in ("target", "ramp")), None)
    if odd is not None:
        hint = did_you_mean(odd.name, ("target", "ramp")) or example
        say("K807", f"`lagrange` has no argument `{odd.name}=`", odd, hint)
        return None
    values: dict[str, Fraction] = {"ramp": Fraction(0)}
    for named in call.named:
        value = part_of(named.value)
        if value is None:
            say("K808", f"`{named.name}=` needs a part, such as `30%`", named, example)
        elif named.name == "target" and not 0 < value < 1:
            say("K808", f"the target is the part of the heads that is kept, between 0% and 100%, not {_percent(value)}",
                named, example)  # fmt: skip
        elif named.name == "ramp" and not 0 <= value <= 1:
            say("K808", f"the ramp is a part of the steps, from 0% to 100%, not {_percent(value)}", named, example)
        else:
            values[named.name] = value
    if call.get("target") is None:
        say("K808", "`lagrange` does not say which part of the heads is kept", call, example)
    return Term("lagrange", weight, values["target"], values["ramp"]) if "target" in values else None


def _pressure(gate: ast.Gate, loss: ast.Loss, terms: tuple[tuple[Term, ast.Node], ...], wrong: Say, say: Say) -> None:
    """What a loss must press on, and what it cannot."""
    kinds = {term.kind for term, _ in terms}
    if not kinds & {"next_token", "hidden_mse"}:
        wrong("K807", "no term of this loss reads what the model says", loss,
              "add `next_token` or `hidden_mse(answer_tokens)`")  # fmt: skip
    pressing = [(term, node) for term, node in terms if term.kind in ("lagrange", "mean")]
    if gate.by.fn == "sparsemax":
        for term, node in pressing:
            wrong("K810", f"the count of `sparsemax` is exact already, so `{term.kind}` has nothing to press on", node,
                  f"leave it out: {words.GATE_SHAPES['sparsemax']} says how many")  # fmt: skip
    elif not pressing:
        say("K809", f"nothing in the loss closes the gates of `{gate.by.fn}`, so every head stays open", loss,
            f"add `{_shape('lagrange', gate.name)}`, or `{_shape('mean', gate.name)}`")  # fmt: skip


def _shape(kind: str, z: str) -> str:
    return words.LOSSES[kind].replace("(z)", f"({z})")


def _listed(z: str) -> str:
    return "terms: " + ", ".join(_shape(kind, z) for kind in words.LOSSES)


def _percent(value: Fraction) -> str:
    return f"{float(value * 100):g}%"
