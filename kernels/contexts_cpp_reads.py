"""What the C++ templates of reads are filled with: landmarks, scores of units, regions. Beside `contexts_cpp`.

Takes a `KernelSpec` of `choose_reads`, gives the names that its template reads; `Unprintable` for what has no C++ form.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from kvcompile.kernels.contexts import LOG2E, Context, attention, expressions
from kvcompile.kernels.holes import Hole, init_hole, print_hole, spell
from kvcompile.kernels.plan import Expr, words_of
from kvcompile.kernels.printers import Axis
from kvcompile.kernels.printers_cpp import CPP
from kvcompile.kernels.spec import KernelSpec
from kvcompile.kernels.stages import Unprintable
from kvcompile.kernels.unit_scores import cut_units, leaves_heads

_START = {"sum": "0.0f", "mean": "0.0f", "max": "-INFINITY", "min": "INFINITY"}
_STEP = {"sum": "{0} + {1}", "mean": "{0} + {1}", "max": "max_of({0}, {1})", "min": "min_of({0}, {1})"}
_ENTRY = {("field", "k"): "key", ("field", "v"): "value"}
_GROUP = {"g": Axis("GROUP")}


@dataclass(frozen=True)
class _Over:
    """A reduction over the entries of a unit: statements for one entry, and how they are joined."""

    index: int
    lines: tuple[str, ...]
    start: str
    step: str
    mean: bool
    uses: frozenset[str]


def marks(spec: KernelSpec) -> Context:
    """templates/marks.cpp.jinja."""
    formulas = expressions(spec)
    kinds: list[dict[str, Any]] = []
    for told in str(spec.fact("kinds")).split():
        name, *numbers = told.split(":")
        size, stride, offset, each, first, edge, channels = map(int, numbers)
        order = [told.split(":")[0].split(".") for told in str(spec.fact("marks")).split()]
        own = [(label, formulas[f"{unit} {label}"]) for unit, label in order if unit == name]
        if channels != len(own) * spec.number("head_dim"):
            raise Unprintable(f"landmarks of {name} that have no channels have no C++ form")
        made = [_landmark(label, expr, i, spec.number("head_dim")) for i, (label, expr) in enumerate(own)]
        kinds.append(
            {"name": name, "size": size, "stride": stride, "offset": offset, "each": each, "first": first, "edge": edge,
             "channels": channels, "marks": made}
        )  # fmt: skip
    says = tuple((f"{kind['name']}.{mark['name']}", mark["says"]) for kind in kinds for mark in kind["marks"])
    return {"formulas": says, "kinds": kinds}


def _landmark(name: str, formula: Expr, index: int, head_dim: int) -> dict[str, Any]:
    reductions = [n for n in formula.walk() if n.op == "reduce" and words_of(n)[1] == "i"]
    rest, parts = formula, []
    for i, node in enumerate(reductions):
        fn = words_of(node)[0]
        if fn not in _STEP or any(n.op in ("reduce", "pair") or n.value == "norm" for n in node.args[0].walk()):
            raise Unprintable(f"the landmark {spell(formula)} has no C++ form")
        hole = print_hole(f"of{i}", node.args[0], _ENTRY, layout="i", dialect=CPP)
        step = _STEP[fn].format(f"over{i}", hole.result)
        parts.append(_Over(i, hole.lines, _START[fn], step, fn == "mean", hole.uses))
        rest = _swapped(rest, node, Expr("tile", (), i))
    leaves = {("tile", str(i)): f"over{i}" for i in range(len(parts))}
    hole = print_hole("mark", rest, leaves, layout="i", dialect=CPP)
    uses = frozenset[str]().union(*(part.uses for part in parts))
    return {
        "name": name, "says": spell(formula), "parts": parts, "lines": hole.lines, "result": f"F{{}} + {hole.result}",
        "uses": uses, "at": index * head_dim,
    }  # fmt: skip


def _swapped(expr: Expr, old: Expr, new: Expr) -> Expr:
    if expr == old:
        return new
    return Expr(expr.op, tuple(_swapped(arg, old, new) for arg in expr.args), expr.value, expr.axes)


def units(spec: KernelSpec) -> Context:
    """templates/units.cpp.jinja."""
    regions = str(dict(spec.holes)["regions"])
    counts = [line.split(" ", 1) for line in str(dict(spec.holes)["counts"]).split("\n") if line]
    score = expressions(spec).get("score")
    made: Context = {
        "formulas": (("read", regions), *((f"n{index}", says) for index, says in counts)),
        "regions": regions,
        "region": re.sub(r"at % (n\d+) == 0", r"multiples(at, \1)", regions),
        "counts": [(int(index), says) for index, says in counts],
        "picked": [int(slot) for slot in str(spec.fact("picked")).split()],
        "chooses": score is not None,
    }
    if score is None:
        return made
    made["formulas"] += (("score", spell(score)),)
    own = f"in_own(at, at_now, {spec.fact('size')}, {spec.fact('offset')})"
    made["untaken"] = set(regions.split(" | ")) <= {own, "(at < 0)"}  # regions that reach into no full unit
    made["fraction"] = [int(x) for x in str(spec.fact("fraction")).split("/")]
    return made | _score(spec, score)


def _score(spec: KernelSpec, score: Expr) -> Context:
    cut = cut_units(score)
    known = [told.split(":") for told in str(spec.fact("landmarks")).split()]
    wanted = list(dict.fromkeys(node for part in cut.parts for node in _asked(part)))
    asked = []
    for i, node in enumerate(wanted):  # once for a query, not once for a unit
        hole = print_hole(
            f"a{i}", _leafed(node, []), {("tile", "q_c"): "q_c"}, layout="ig", axes=_GROUP, leaf_axes={"q_c": "ig"},
            dialect=CPP,
        )  # fmt: skip
        asked.append(_told(hole, True) | {"says": spell(node)})
    names = [f"asked{i}" for i in range(len(wanted))]
    leaves = {("tile", name): name for name in [*names, *(f"m_{name}" for name, _ in known)]}
    parts: list[dict[str, Any]] = []
    for i, part in enumerate(cut.parts):
        terms = [_printed(f"p{i}_{j}", _leafed(term, wanted), leaves, names) for j, term in enumerate(_terms(part))]
        own = [leaves_heads(term) for term in _terms(part)]
        parts.append({
            "index": i, "grouped": any(own), "lines": [line for hole in terms for line in hole.lines],
            "terms": [f"{hole.result}[g]" if g else hole.result for hole, g in zip(terms, own, strict=True)],
            "uses": frozenset[str]().union(*(hole.uses for hole in terms)),
        })  # fmt: skip
    tiles = {("tile", str(i)): f"tile{i}" for i in range(len(parts))}
    axes = {f"tile{i}": "ig" if part["grouped"] else "i" for i, part in enumerate(parts)}
    grouped = _grouped(cut.first, [part["grouped"] for part in parts])
    hole = print_hole("first", cut.first, tiles, layout="ig", axes=_GROUP, leaf_axes=axes, dialect=CPP)
    first, stages = _told(hole, grouped), []
    for i, step in enumerate(cut.passes):
        stage: dict[str, Any] = {"kind": step.kind, "grouped": grouped}
        if step.formula is not None:
            reads = {("tile", "row"): "row"}
            hole = print_hole(
                f"then{i}", step.formula, reads, layout="ig", axes=_GROUP, leaf_axes={"row": "ig" if grouped else "i"},
                dialect=CPP,
            )  # fmt: skip
            closed = any(n.op == "reduce" and words_of(n)[1] == "g" for n in step.formula.walk())
            stage |= _told(hole, grouped and not closed) | {"reads_groups": grouped}
            grouped = grouped and not closed
        stages.append(stage)
    uses = frozenset[str]().union(*(part["uses"] for part in parts))
    return {"asked": asked, "parts": parts, "first": first, "stages": stages, "uses": uses, "says": spell(score),
            "marks": [(name, int(at)) for name, at in known]}  # fmt: skip


def _printed(name: str, formula: Expr, leaves: dict[tuple[str, str], str], grouped: list[str]) -> Hole:
    return print_hole(
        name, formula, leaves, layout="ig", axes=_GROUP, leaf_axes=dict.fromkeys(grouped, "ig"), dialect=CPP
    )


def _terms(expr: Expr) -> list[Expr]:
    """The terms of a sum: each is added by itself, which for a product is one instruction."""
    if expr.op == "binary" and expr.value == "+":
        return [term for arg in expr.args for term in _terms(arg)]
    return [expr]


def _asked(expr: Expr) -> list[Expr]:
    """The largest parts of a formula that are of the query alone."""
    if not any(node.op == "landmark" for node in expr.walk()):
        return [expr] if any(node.op == "queries" for node in expr.walk()) else []
    return [node for arg in expr.args for node in _asked(arg)]


def _leafed(expr: Expr, asked: list[Expr]) -> Expr:
    """Queries and landmarks as names of the template: one vector of channels of each."""
    if expr in asked:
        return Expr("tile", (), f"asked{asked.index(expr)}")
    if expr.op == "queries":
        return Expr("tile", (), "q_c")
    if expr.op == "landmark":
        return Expr("tile", (), f"m_{words_of(expr)[1]}")
    return Expr(expr.op, tuple(_leafed(arg, asked) for arg in expr.args), expr.value, expr.axes)


def _grouped(formula: Expr, tiles: list[bool]) -> bool:
    """Whether a formula over tiles leaves the axis g open."""
    if formula.op == "tile":
        assert isinstance(formula.value, int)
        return tiles[formula.value]
    if formula.op == "reduce" and words_of(formula)[1] == "g":
        return False
    return any(_grouped(arg, tiles) for arg in formula.args)


def _told(hole: Hole, grouped: bool) -> dict[str, Any]:
    result = f"{hole.result}[g]" if grouped else hole.result
    return {"lines": hole.lines, "result": result, "uses": hole.uses, "grouped": grouped}


def entries(spec: KernelSpec) -> Context:
    """templates/entries.cpp.jinja."""
    counts = tuple(tuple(line.split(" ", 1)) for line in str(dict(spec.holes)["counts"]).split("\n") if line)
    part = [int(x) for x in str(spec.fact("fraction")).split("/")]
    wanted = counts[0][1] if counts else f"{part[0]}/{part[1]} of the candidates"
    return {"formulas": ((str(spec.fact("rank")), f"{wanted} by logit"),), "fraction": part}


def spans(spec: KernelSpec) -> Context:
    """templates/spans.cpp.jinja."""
    formulas = expressions(spec)
    states = str(spec.fact("state_names")).split()
    inits = [init_hole(name, formulas[f"init {name}"], CPP) for name in states]
    return {"log2e": LOG2E, "inits": inits, **attention(spec)}


def blocks(spec: KernelSpec) -> Context:
    """templates/blocks.cpp.jinja."""
    return {"log2e": LOG2E, **attention(spec)}
