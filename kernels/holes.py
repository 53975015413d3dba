"""Fills the holes of the step kernels: formulas as statements in the names that the template uses.

Takes formulas and regions of a plan, gives `Hole`s for the Triton text and the torch text beside it.
A leaf that the kernel cannot reach raises `Unprintable`.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvcompile.kernels.plan import Expr, PolicyPlan, Region
from kvcompile.kernels.printers import TRITON, Axis, Dialect, Printer, Value
from kvcompile.kernels.printers_cpp import CPP, CppPrinter
from kvcompile.kernels.stages import Unprintable, reduction


@dataclass(frozen=True, slots=True)
class Hole:
    """Statements, the text of the result, and which names of the template they use."""

    name: str
    lines: tuple[str, ...]
    result: str
    uses: frozenset[str]
    index: int = 0
    says: str = ""


def print_hole(
    name: str,
    formula: Expr,
    leaves: dict[tuple[str, str], str],
    *,
    layout: str,
    axes: dict[str, Axis] | None = None,
    leaf_axes: dict[str, str] | None = None,
    dialect: Dialect = TRITON,
    index: int = 0,
    negate: bool = False,
) -> Hole:
    """Print one formula.

    leaves: (op, value) of a leaf -> its name in the template; `state` stands for all states, as `state_NAME`.
    leaf_axes: axes of a name where they are not just "i".
    """
    uses: set[str] = set()

    def leaf(expr: Expr) -> Value:
        value = expr.value[0] if expr.op == "evidence" and isinstance(expr.value, tuple) else expr.value
        key = (expr.op, str(value))
        if expr.op == "state" and ("state", "*") in leaves:
            text = f"state_{value}"
        elif key in leaves:
            text = leaves[key]
        else:
            raise Unprintable(f"{expr.op} {value} is not within reach of this kernel")
        uses.add(text)
        return Value(text, (leaf_axes or {}).get(text, "i"))

    kind = CppPrinter if dialect is CPP else Printer
    printer = kind(layout, leaf, axes or {}, dialect, prefix=f"{name}_" if name[:1].isalpha() else "t")
    result = printer.number(formula).text
    return Hole(name, tuple(printer.lines), f"-{result}" if negate else result, frozenset(uses), index, spell(formula))


def spell(expr: Expr) -> str:
    """A formula as a person would write it: `mean[g] sum[q] attn`."""
    args = [spell(arg) for arg in expr.args]
    match expr.op:
        case "const":
            return f"{float(expr.value):g}"  # type: ignore[arg-type]
        case "evidence":
            assert isinstance(expr.value, tuple)
            source = expr.value[1]
            where = "" if source.kind == "forward" else f" of q in {source.kind}({source.width})"
            return f"{expr.value[0]}{where}"
        case "reduce":
            fn, axis = reduction(expr)
            return f"{fn}[{axis}] {args[0]}" if _simple(expr.args[0]) else f"{fn}[{axis}] ({args[0]})"
        case "pool":
            assert isinstance(expr.value, tuple)
            kind, width = expr.value
            return f"{kind}pool({args[0]}, {width})"
        case "unary" if expr.value == "neg":
            return f"-{args[0]}" if _simple(expr.args[0]) else f"-({args[0]})"
        case "unary" | "pair":
            return f"{expr.value}({', '.join(args)})"
        case "binary" if expr.value in ("min", "max"):
            return f"{expr.value}({args[0]}, {args[1]})"
        case "binary":
            sides = [text if _simple(arg) else f"({text})" for arg, text in zip(expr.args, args, strict=True)]
            return f"{sides[0]} {expr.value} {sides[1]}"
        case "queries":
            return "q"
        case "regroup":
            return (
                f"the largest overlapping {args[0]}"
                if _simple(expr.args[0])
                else f"the largest overlapping ({args[0]})"
            )
        case "landmark":
            assert isinstance(expr.value, tuple)
            return str(expr.value[1])
        case _:
            return str(expr.value)


def _simple(expr: Expr) -> bool:
    return expr.op != "binary" or expr.value in ("min", "max")


def region_text(plan: PolicyPlan, region: Region) -> str:
    """A region as a condition on `at`, the positions; the same text is right in Triton and in torch."""
    count = f"n{region.count}"
    match region.kind:
        case "all":  # judged at all only because a sliding window moves on
            return "(at >= 0)"
        case "sink":
            return f"(at < {count})"
        case "recent":
            return f"(at > at_now - {count})"
        case "prompt":
            return "(at < at_prompt)"
        case "generated":
            return "(at >= at_prompt)"
        case "frozen":
            return "was_frozen"
        case "stride":
            return f"(at % {count} == 0)"
        case "newest":
            unit = plan.unit(region.unit or "")
            if unit.offset:
                raise Unprintable("the region newest with units that start at an offset has no kernel yet")
            return f"(at >= at_now // {unit.size} * {unit.size})"
        case other:
            raise Unprintable(f"the region {other} has no kernel yet")


STEP_LEAVES = {
    ("evidence", "attn"): "p",
    ("evidence", "logit"): "logit",
    ("field", "pos"): "pos_i",
    ("field", "age"): "age",
    ("scalar", "now"): "now_b_value",
    ("scalar", "len"): "n_len",
    ("state", "*"): "state_*",
}
STEP_AXES = {"p": "ig", "logit": "ig", "now_b_value": "", "n_len": ""}
ROW_LEAVES = {
    ("tile", "0"): "score_i",
    ("field", "pos"): "pos_i",
    ("field", "age"): "age",
    ("scalar", "now"): "now_b_value",
    ("scalar", "len"): "n_len",
    ("state", "*"): "state_*",
}


def step_hole(name: str, formula: Expr, index: int = 0, dialect: Dialect = TRITON) -> Hole:
    """A formula of one decode step, over tiles of entries by query heads."""
    mask = Axis("GROUP", "g_real") if dialect is TRITON else Axis("GROUP")
    return print_hole(
        name, formula, STEP_LEAVES, layout="ig", axes={"g": mask}, leaf_axes=STEP_AXES, dialect=dialect, index=index
    )


def row_hole(formula: Expr, dialect: Dialect = TRITON, negate: bool = False) -> Hole:
    """What is left of a score once its tile is known: one number per entry."""
    axes = {"now_b_value": "", "n_len": ""}
    return print_hole("r", formula, ROW_LEAVES, layout="i", leaf_axes=axes, dialect=dialect, negate=negate)


def init_hole(name: str, formula: Expr, dialect: Dialect = TRITON) -> Hole:
    """A new entry's state: it may read its own position, which is `now`."""
    own = "float(at_now)" if dialect is CPP else "at_now.to(tl.float32)" if dialect is TRITON else "now[b].float()"
    leaves = {("scalar", "now"): own, ("field", "pos"): own}
    return print_hole(f"init_{name}", formula, leaves, layout="", leaf_axes={own: ""}, dialect=dialect)
