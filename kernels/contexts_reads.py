"""What the templates of reads by units are filled with: landmarks, scores of units, regions of entries.

Takes a `KernelSpec` of `marks` or `units`, gives the names that its template reads. The formulas are those of
`unit_scores`, each stage printed over the axes of its tile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvcompile.kernels.holes import Hole, spell
from kvcompile.kernels.plan import Expr, words_of
from kvcompile.kernels.printers import TORCH, TRITON, Axis, Dialect, Printer, Value
from kvcompile.kernels.signatures import padded
from kvcompile.kernels.spec import KernelSpec, power_of_two
from kvcompile.kernels.stages import Unprintable, reduction

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


def layout_of_marks(spec: KernelSpec) -> list[tuple[str, int, int]]:
    """(landmark, where it begins, numbers) of a unit."""
    found, at = [], 0
    for part in str(spec.fact("marks")).split():
        name, width = part.split(":")
        found.append((name, at, int(width)))
        at += int(width)
    return found


def _facts(spec: KernelSpec, prefix: str) -> Context:
    return {prefix + name: value for name, value in spec.facts}


def _dtype(spec: KernelSpec) -> str:
    return f"torch.{spec.fact('marks_dtype')}"


# -- landmarks -----------------------------------------------------------------------------------------------------

_FOLDS = {
    "sum": ("0.0", "total_{0} + {1}", "total_{0}"),
    "mean": ("0.0", "total_{0} + {1}", "tl.where(count > 0, total_{0} / count, 0.0)"),
    "min": ("float('inf')", "tl.minimum(total_{0}, {1}, tl.PropagateNan.ALL)", "tl.where(count > 0, total_{0}, 0.0)"),
    "max": ("float('-inf')", "tl.maximum(total_{0}, {1}, tl.PropagateNan.ALL)", "tl.where(count > 0, total_{0}, 0.0)"),
}


def marks(spec: KernelSpec) -> Context:
    """Names of the template `marks`."""
    size = spec.number("head_dim")
    real = Axis("D", "real" if padded(size) > size else None)
    formulas = {name.removeprefix("landmark "): hole for name, hole in spec.holes if isinstance(hole, Expr)}
    widths = {name: width for name, _, width in layout_of_marks(spec)}
    known: dict[str, int] = {}  # landmark -> its stage
    stages: list[list[Context]] = []
    used: set[str] = set()

    def leaf(expr: Expr) -> Value:
        if expr.op == "field" and expr.value in ("k", "pos"):
            text, axes = ("kt", "id") if expr.value == "k" else ("pos_i", "i")
            return Value(text, axes)
        if expr.op == "landmark" and words_of(expr)[1] in known:
            name = words_of(expr)[1]
            return Value(f"mark_{name}", "d" if widths[name] > 1 else "")
        what = words_of(expr)[1] if expr.op == "landmark" else f"{expr.op} {expr.value}"
        raise Unprintable(f"{what} in a landmark has no Triton form yet")

    for name, at, width in layout_of_marks(spec):
        formula = formulas[name]
        fn, axis = reduction(formula) if formula.op == "reduce" else ("", "")
        if axis != "i" or fn not in _FOLDS:
            raise Unprintable(f"the landmark {name} = {spell(formula)}, which is not one sum, mean or extreme, has none")
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
    return _facts(spec, "m_") | {
        "formulas": tuple((m["name"], m["says"]) for stage in stages for m in stage),
        "layout": ", ".join(f"{name} {width}" for name, _, width in layout_of_marks(spec)) or "none",
        "stages": stages,
        "pos_used": "pos_i" in used,
        "marks_dtype": _dtype(spec),
    }


# -- what a query reads of a row in a step ---------------------------------------------------------------------------


def counts_and_region(spec: KernelSpec) -> Context:
    """The counts that a rule reads and its regions as a condition on `at`."""
    texts = {name: hole for name, hole in spec.holes if isinstance(hole, str)}
    used = [line.split(" ", 1) for line in texts["counts"].split("\n") if line]
    region = texts["regions"]
    return {
        "counts": [(int(index), says) for index, says in used],
        "n_counts": max([int(index) for index, _ in used], default=-1) + 1 or 1,
        "region": region,
        "most": MOST,
    }


def units(spec: KernelSpec) -> Context:
    """Names of the template `units`."""
    made = _facts(spec, "u_") | counts_and_region(spec)
    group = spec.number("group")
    num, den = (int(x) for x in str(spec.fact("fraction")).split("/"))
    formulas = {name: hole for name, hole in spec.holes if isinstance(hole, Expr)}
    score = "each" in formulas
    trivial = made["region"] == "(at < 0)"
    made |= {
        "formulas": (() if trivial else (("read", made["region"].replace("at_now", "now")),)),
        "group_pad": power_of_two(group),
        "score": score,
        "select": {"fraction": (num, den)},
        "flagged": not score or not trivial or bool(spec.fact("drops")),
        "marks_dtype": _dtype(spec),
        "soft": False, "outer": None, "lines": 1, "each_heads": 1, "whole_lines": 1, "marks": [], "skips": False,
    }  # fmt: skip
    return made | _scored(spec, formulas, made) if score else made


def _scored(spec: KernelSpec, formulas: dict[str, Expr], made: Context) -> Context:
    size, group, pad = spec.number("head_dim"), spec.number("group"), made["group_pad"]
    soft, drops = bool(spec.fact("soft")), bool(spec.fact("drops"))
    widths = {name: (at, width) for name, at, width in layout_of_marks(spec)}
    asked = [words_of(n)[1] for n in formulas["each"].walk() if n.op == "landmark"]
    real = "real" if padded(size) > size else None

    def leaf(expr: Expr) -> Value:
        if expr.op == "queries":
            return Value("qt", "gd")
        name = words_of(expr)[1]
        return Value(f"mark_{name}", "ud" if widths[name][1] > 1 else "u")

    axes = {"g": Axis("GROUP", "g_real" if pad > group else None), "d": Axis("D", real)}
    torch_axes = {"g": Axis("GROUP"), "d": Axis("HEAD_DIM")}
    each, each_axes = print_stage("s", formulas["each"], leaf, "ugd", axes)
    torch_each, _ = print_stage("s", formulas["each"], leaf, "ugd", torch_axes, TORCH)
    if "u" not in each_axes:
        raise Unprintable("a score of units that is the same for all of them has no Triton form yet")
    grouped = "g" in each_axes

    def ready(name: str, of: str) -> Leaf:
        return lambda expr: Value(name, of)

    unit, other = ("gu" if grouped else "u"), ""
    whole, whole_axes = print_stage("w", formulas["whole"], ready("unit_value", unit), "gu", axes)
    torch_whole, _ = print_stage("w", formulas["whole"], ready("unit_value", unit), "gu", torch_axes, TORCH)
    final, outer, torch_outer = whole_axes, None, None
    if "outer" in formulas:
        other = whole_axes
        outer, final = print_stage("o", formulas["outer"], ready("other_value", other), "gu", axes)
        torch_outer, _ = print_stage("o", formulas["outer"], ready("other_value", other), "gu", torch_axes, TORCH)
    tall = lambda text, over: text if over == "gu" else f"{text}[None, :]"  # noqa: E731
    mark_size, stride, chosen = (spec.number(name) for name in ("mark_size", "mark_stride", "size"))
    if outer is not None and chosen % stride:
        raise Unprintable("units that begin where no unit with landmarks does have no Triton form yet")
    rank = str(spec.fact("rank"))
    return {
        "formulas": (("score", spell(_whole_of(formulas, soft))), *made["formulas"]),
        "each": each,
        "torch_each": torch_each,
        "each_heads": group if grouped else 1,
        "marks": [(name, *widths[name]) for name in widths if name in asked],
        "soft": soft,
        "raw": lambda bound: _raw(grouped, pad, group, bound, soft, drops),
        "whole_lines_of": lambda bound: _whole_lines(whole, grouped, pad, group, bound, soft, drops),
        "whole_value": tall(whole.result, whole_axes),
        "whole_lines": pad if whole_axes == "gu" else 1,
        "torch_whole": torch_whole,
        "outer": outer,
        "torch_outer": torch_outer,
        "outer_value": outer and tall(outer.result, final),
        "lines": pad if final == "gu" else 1,
        # Units a stride apart overlap with the one of `chosen` positions that begins with unit 0 from here to there.
        "overlaps": (-((mark_size - 1) // stride), (chosen - 1) // stride + 1),
        "skips": rank in ("top", "bottom") and not made["select"]["fraction"][1],
    }


def _whole_of(formulas: dict[str, Expr], soft: bool) -> Expr:
    """The score as it was before it was cut, for a reader."""

    def put(expr: Expr, name: str, inner: Expr) -> Expr:
        if expr.op == "tile" and expr.value == name:
            return inner
        return Expr(expr.op, tuple(put(arg, name, inner) for arg in expr.args), expr.value, expr.axes)

    each = Expr("reduce", (formulas["each"],), ("softmax", "u")) if soft else formulas["each"]
    whole = put(formulas["whole"], "unit", each)
    return put(formulas["outer"], "other", Expr("regroup", (whole,), "regroup")) if "outer" in formulas else whole


def _raw(grouped: bool, pad: int, group: int, bound: str, soft: bool, drops: bool) -> str:
    """Load the scores of units as the first launch left them."""
    lines = [f"there = u < {bound}"]
    if soft and drops:
        at = "((own.to(tl.int64) * blocks + u // MARK_EACH) * EDGES + MARK_EDGE + u % MARK_EACH) * 2"
        lines += [f"edge = edges + {at}", "held_by = tl.load(edge + 1, mask=there, other=0) - tl.load(edge, mask=there, other=0)"]
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


def _whole_lines(whole: Hole, grouped: bool, pad: int, group: int, bound: str, soft: bool, drops: bool) -> str:
    lines = [_raw(grouped, pad, group, bound, soft, drops)]
    over = "[:, None]" if grouped else ""
    lines.append(f"unit_value = tl.exp(raw - peak{over}) / mass{over}" if soft else "unit_value = raw")
    return "\n".join([*lines, *whole.lines])
