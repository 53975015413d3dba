"""What the templates of reads by units are filled with: landmarks, scores of units, regions of entries.

Takes a `KernelSpec` of `marks`, `units` or `spans`, gives the names that its template reads. The formulas are those of
`unit_scores`, each stage printed over the axes of its tile.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from kvcompile.kernels.holes import Hole, spell
from kvcompile.kernels.plan import Expr, words_of
from kvcompile.kernels.printers import TORCH, TRITON, Axis, Dialect, Printer, Value
from kvcompile.kernels.signatures import padded
from kvcompile.kernels.spec import KernelSpec, power_of_two
from kvcompile.kernels.stages import Unprintable, reduction
from kvcompile.kernels.unit_scores import ROW, cut_units

Context = dict[str, Any]
MOST = 1 << 30  # what a count is clipped to, so that it fits 32 bits
Leaf = Callable[[Expr], Value]


def print_stage(
    name: str, formula: Expr, leaf: Leaf, layout: str, axes: dict[str, Axis], dialect: Dialect = TRITON
) -> tuple[Hole, str]:
    """One stage of a formula, and the axes over which its result varies."""
    uses: set[str] = set()

    def noted(expr: Expr) -> Value:
        value = leaf(expr)
        uses.add(value.text)
        return value

    printer = Printer(layout, noted, axes, dialect, f"{name}_")
    value = printer.number(formula)
    text = dialect.scalar.format(value.text) if value.literal else value.text
    return Hole(name, tuple(printer.lines), text, frozenset(uses), 0, spell(formula)), value.axes


def _facts(spec: KernelSpec, prefix: str) -> Context:
    return {prefix + name: value for name, value in spec.facts}


def _dtype(spec: KernelSpec) -> str:
    """Of landmarks in a file's `example`: that of its keys, which the interpreter has in float32, or float32."""
    return "dtype" if spec.fact("own") else "torch.float32"


# -- landmarks -----------------------------------------------------------------------------------------------------

_FOLDS = {
    "sum": ("0.0", "total_{0} + {1}", "total_{0}"),
    "mean": ("0.0", "total_{0} + {1}", "tl.where(count > 0, total_{0} / count, 0.0)"),
    "min": ("float('inf')", "tl.minimum(total_{0}, {1}, tl.PropagateNan.ALL)", "tl.where(count > 0, total_{0}, 0.0)"),
    "max": ("float('-inf')", "tl.maximum(total_{0}, {1}, tl.PropagateNan.ALL)", "tl.where(count > 0, total_{0}, 0.0)"),
}


def marks(spec: KernelSpec) -> Context:
    """Names of the template `marks`."""
    told = [part.split(":") for part in str(spec.fact("marks")).split()]
    kinds: list[Context] = []
    for name, *numbers in (part.split(":") for part in str(spec.fact("kinds")).split()):
        size, stride, offset, each, first, edge, channels = map(int, numbers)
        if offset:
            raise Unprintable(f"landmarks of {name}s, which begin at {offset}, have no Triton form yet")
        own = [(label.split(".", 1)[1], int(width)) for label, width in told if label.split(".", 1)[0] == name]
        kind: Context = {"name": name, "size": size, "stride": stride, "each": each, "first": first, "edge": edge}
        kinds.append(kind | {"channels": channels} | _kind(spec, name, own))
    return _facts(spec, "m_") | {
        "formulas": tuple((f"{k['name']}.{m['name']}", m["says"]) for k in kinds for part in k["stages"] for m in part),
        "kinds": kinds,
        "longest": max(kind["size"] for kind in kinds),
        "m_drops": bool(spec.fact("edges")),
        "marks_dtype": _dtype(spec),
    }


def _kind(spec: KernelSpec, unit: str, own: list[tuple[str, int]]) -> Context:
    """The landmarks of a unit, stage by stage: those of a stage read what the stages before it have made."""
    size, formulas = spec.number("head_dim"), dict(spec.holes)
    real, widths = Axis("D", "real" if padded(size) > size else None), dict(own)
    known: dict[str, int] = {}  # landmark -> its stage
    stages: list[list[Context]] = []
    used: set[str] = set()
    at = 0

    def leaf(expr: Expr) -> Value:
        if expr.op == "field" and expr.value in ("k", "pos"):
            return Value("kt", "id") if expr.value == "k" else Value("pos_i", "i")
        if expr.op == "landmark" and words_of(expr)[1] in known:
            name = words_of(expr)[1]
            return Value(f"mark_{name}", "d" if widths[name] > 1 else "")
        what = words_of(expr)[1] if expr.op == "landmark" else f"{expr.op} {expr.value}"
        raise Unprintable(f"{what} in a landmark has no Triton form yet")

    for name, width in own:
        formula = formulas[f"{unit} {name}"]
        assert isinstance(formula, Expr)
        fn, axis = reduction(formula) if formula.op == "reduce" else ("", "")
        if axis != "i" or fn not in _FOLDS:
            raise Unprintable(
                f"the landmark {spell(formula)}, which is not one sum, mean or extreme, has no Triton form"
            )
        asked = [words_of(n)[1] for n in formula.walk() if n.op == "landmark"]
        stage = max((known[other] + 1 for other in asked if other in known), default=0)
        part = Expr("reduce", formula.args, ("sum" if fn == "mean" else fn, "i"))
        hole, _ = print_stage(name, part, leaf, "id", {"i": Axis("count", "there"), "d": real})
        torch_axes = {"i": Axis("count"), "d": Axis("HEAD_DIM")}
        torch, _ = print_stage(name, formula, leaf, "id", torch_axes, TORCH)
        start, step, close = _FOLDS[fn]
        wide = width > 1
        made = {
            "name": name, "hole": hole, "torch": torch, "says": spell(formula), "wide": wide, "width": width,
            "offset": at, "at": f"{at} + d" if wide else at, "result": f"mark_{name}",
            "start": f"tl.full([{'D_PAD' if wide else ''}], {start}, tl.float32)",
            "step": step.format(name, hole.result), "close": close.format(name),
        }  # fmt: skip
        while len(stages) <= stage:
            stages.append([])
        stages[stage].append(made)
        known[name] = stage
        used |= hole.uses
        at += width
    says = ", ".join(f"{name} {width}" for name, width in own) or "no numbers, but where its entries are"
    names = {"const": unit.upper() + "_UNITS", "function": f"{unit}_kernel", "says": says}
    return names | {"stages": stages, "pos_used": "pos_i" in used}


# -- what a query reads of a row in a step ---------------------------------------------------------------------------


def counts_and_region(spec: KernelSpec) -> Context:
    """The counts that a rule reads and its regions as a condition on `at`, in Triton and in torch."""
    texts = {name: hole for name, hole in spec.holes if isinstance(hole, str)}
    return counts_of(texts.get("counts", "")) | {
        "region": safe(texts["regions"]),
        "torch_region": in_torch(safe(texts["regions"])),
    }


def counts_of(text: str) -> Context:
    """Counts, a line of index and name each."""
    used = [line.split(" ", 1) for line in text.split("\n") if line]
    return {
        "counts": [(int(index), says) for index, says in used],
        "n_counts": max([int(index) for index, _ in used], default=-1) + 1 or 1,
        "most": MOST,
    }


def safe(region: str) -> str:
    """Nothing is a multiple of 0."""
    return re.sub(r"\(at % (n[0-9]+) == 0\)", r"multiples(at, \1)", region)


def in_torch(region: str) -> str:
    """The functions of a region by their names in plain torch."""
    return re.sub(r"\b(in_own|at_power|multiples)\(", r"torch_\1(", region)


def _said(region: str) -> str:
    return region.replace("at_now", "now").replace("at_prompt", "prompt")


def units(spec: KernelSpec) -> Context:
    """Names of the template `units`."""
    made = _facts(spec, "u_") | counts_and_region(spec)
    facts = dict(spec.facts)
    num, den = (int(x) for x in str(facts.get("fraction", "0/0")).split("/"))
    score = dict(spec.holes).get("score")
    trivial = made["region"] in ("(at < 0)", made_of_own(spec))
    made |= {
        "formulas": (() if trivial else (("read", _said(made["region"])),)),
        "group_pad": power_of_two(spec.number("group")),
        "score": score is not None,
        "select": {"fraction": (num, den)},
        "flagged": score is None or not trivial or bool(spec.fact("drops")),
        "marks_dtype": _dtype(spec) if score is not None else "torch.float32",
        "u_size": facts.get("size", facts.get("span", 0)),
        "soft": False, "outer": None, "lines": 1, "each_heads": 1, "whole_lines": 1, "marks": [], "skips": False,
        "grouped": False,
    }  # fmt: skip
    if score is None:
        return made
    assert isinstance(score, Expr)
    if spec.fact("offset") or spec.fact("inner_offset"):
        raise Unprintable("a choice of units that begin at an offset has no Triton form yet")
    return made | _scored(spec, score, made)


def made_of_own(spec: KernelSpec) -> str:
    """The region that is never in a full unit: the query's own one, of the kind that is chosen."""
    facts = dict(spec.facts)
    return f"in_own(at, at_now, {facts.get('size')}, {facts.get('offset')})"


def stages_of(score: Expr) -> tuple[Expr, bool, Expr, Expr | None]:
    """What a unit is by itself, whether its softmax follows, a formula of that, and of what regrouping makes of it."""
    cut = cut_units(score)
    sums = [Expr("reduce", (part,), ("sum", "d")) for part in cut.parts]

    def put(expr: Expr) -> Expr:
        if expr.op == "tile" and isinstance(expr.value, int):
            return sums[expr.value]
        return Expr(expr.op, tuple(put(arg) for arg in expr.args), expr.value, expr.axes)

    kinds = [p.kind for p in cut.passes]
    rest = [p for p in cut.passes if p.kind != "softmax"]
    soft = kinds[:1] == ["softmax"]
    if kinds.count("softmax") > soft or [p.kind for p in rest] not in _ORDERS:
        raise Unprintable(f"a score of units of {', then '.join(kinds)} has no Triton form yet")
    whole, outer = ROW, None
    if rest and rest[0].kind == "map":
        whole = rest.pop(0).formula or ROW
    if rest:
        outer = rest[-1].formula or ROW
    return put(cut.first), soft, whole, outer


_ORDERS: tuple[list[str], ...] = (
    [],
    ["map"],
    ["regroup"],
    ["map", "regroup"],
    ["regroup", "map"],
    ["map", "regroup", "map"],
)


def _scored(spec: KernelSpec, score: Expr, made: Context) -> Context:
    size, group, pad = spec.number("head_dim"), spec.number("group"), made["group_pad"]
    each_of, soft, whole_of, outer_of = stages_of(score)
    drops = bool(spec.fact("drops"))
    places = [told.split(":") for told in str(spec.fact("landmarks")).split()]
    asked = {words_of(n)[1] for n in each_of.walk() if n.op == "landmark"}
    real = "real" if padded(size) > size else None

    def leaf(expr: Expr) -> Value:
        return Value("qt", "gd") if expr.op == "queries" else Value(f"mark_{words_of(expr)[1]}", "ud")

    axes = {"g": Axis("GROUP", "g_real" if pad > group else None), "d": Axis("D", real)}
    torch_axes = {"g": Axis("GROUP"), "d": Axis("HEAD_DIM")}
    each, each_axes = print_stage("s", each_of, leaf, "ugd", axes)
    torch_each, _ = print_stage("s", each_of, leaf, "ugd", torch_axes, TORCH)
    if "u" not in each_axes:
        raise Unprintable("a score of units that is the same for all of them has no Triton form yet")
    grouped = "g" in each_axes

    def of_row(name: str, formula: Expr, over: str, dialect: Dialect = TRITON) -> tuple[Hole, str]:
        known = axes if dialect is TRITON else torch_axes
        return print_stage(name[0], formula, lambda _: Value(name, over), "gu", known, dialect)

    unit = "gu" if grouped else "u"
    whole, final = of_row("unit_value", whole_of, unit)
    whole_axes, outer, torch_outer = final, None, None
    if outer_of is not None:
        outer, final = of_row("other_value", outer_of, whole_axes)
        torch_outer, _ = of_row("other_value", outer_of, whole_axes, TORCH)
        if spec.number("size") % spec.number("inner_stride"):
            raise Unprintable("units that begin where none with landmarks does have no Triton form yet")
    tall = {"gu": "{}", "u": "{}[None, :]"}
    stride, chosen = spec.number("inner_stride"), spec.number("size")
    return {
        "formulas": (("score", spell(score)), *made["formulas"]),
        "each": each,
        "torch_each": torch_each,
        "each_heads": group if grouped else 1,
        "grouped": grouped,
        "marks": [(name, int(at), size) for name, at in places if name in asked],
        "soft": soft,
        "raw": lambda bound: _raw(grouped, bound, soft, drops),
        "whole_lines_of": lambda bound: _whole_lines(whole, grouped, bound, soft, drops),
        "whole_value": tall[whole_axes].format(whole.result),
        "whole_lines": pad if whole_axes == "gu" else 1,
        "whole_grouped": whole_axes == "gu",
        "torch_whole": of_row("unit_value", whole_of, unit, TORCH)[0],
        "outer": outer,
        "torch_outer": torch_outer,
        "outer_value": outer and tall[final].format(outer.result),
        "lines": pad if final == "gu" else 1,
        "kept": 2048 * spec.number("warps") // (pad if final == "gu" else 1),
        # Units a stride apart overlap with the one of `chosen` positions that begins with unit 0 from here to there.
        "overlaps": (-((spec.number("inner_size") - 1) // stride), (chosen - 1) // stride + 1),
        "skips": spec.fact("rank") in ("top", "bottom") and not made["select"]["fraction"][1],
    }


def _raw(grouped: bool, bound: str, soft: bool, drops: bool) -> str:
    """Load the scores of units as the first launch left them."""
    lines = [f"there = u < {bound}"]
    if soft and drops:
        at = "((own.to(tl.int64) * blocks + u // MARK_EACH) * EDGES + MARK_EDGE + u % MARK_EACH) * 2"
        lines += [
            f"edge = edges + {at}",
            "held_by = tl.load(edge + 1, mask=there, other=0) - tl.load(edge, mask=there, other=0)",
        ]
        lines.append("there = there & (held_by > 0)")
    if grouped:
        lines.append("there = there[None, :] & g_real[:, None]")
        lines.append("raw_at = score_at + g[:, None] * score_units + u[None, :]")
    else:
        lines.append("raw_at = score_at + u")
    rest = "float('-inf')" if soft else "0.0"
    lines.append(f"raw = tl.load(raw_at, mask=there, other={rest})")
    if soft:
        lines.append("raw = tl.where(raw == raw, tl.minimum(raw, 3.4028234663852886e38), float('-inf'))")
    return "\n".join(lines)


def _whole_lines(whole: Hole, grouped: bool, bound: str, soft: bool, drops: bool) -> str:
    lines = [_raw(grouped, bound, soft, drops)]
    over = "[:, None]" if grouped else ""
    lines.append(f"unit_value = tl.exp(raw - peak{over}) / mass{over}" if soft else "unit_value = raw")
    return "\n".join([*lines, *whole.lines])


# -- a step that reads lists -----------------------------------------------------------------------------------------


def spans(spec: KernelSpec) -> Context:
    """What the template `decode` takes beside where heads read spans of their rows."""
    texts = {name: str(hole) for name, hole in spec.holes if name.startswith("regions ")}
    found = {int(name.split(" ")[1]): safe(text) for name, text in texts.items()}
    left = [(read, text) for read, text in sorted(found.items()) if text != "(at < 0)"]
    regions = [{"read": read, "text": text, "torch": in_torch(text)} for read, text in left]
    says = tuple((f"read {read}", _said(text)) for read, text in left)
    lists = {"spans": spec.number("span"), "regions": regions, "read_says": says}
    return counts_of(str(dict(spec.holes).get("counts", ""))) | lists
