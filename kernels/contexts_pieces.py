"""What the templates of reads in a prompt's piece are filled with: scores of units as products of tiles, regions.

Takes a `KernelSpec` of `chosen` or `blocks`, gives the names that its template reads. A tile of scores has axes q, g
and u: queries, query heads of one KV head, units.
"""

from __future__ import annotations

from kvcompile.kernels.contexts_reads import Context, counts_of, in_torch, print_stage, safe, stages_of, units
from kvcompile.kernels.holes import Hole, spell
from kvcompile.kernels.plan import Expr, words_of
from kvcompile.kernels.printers import Axis, Value
from kvcompile.kernels.signatures import padded
from kvcompile.kernels.spec import KernelSpec
from kvcompile.kernels.stages import Unprintable
from kvcompile.kernels.unit_scores import cut_units


def chosen(spec: KernelSpec) -> Context:
    """Names of the template `chosen`: those of `units`, with scores as products of tiles."""
    made, texts = units(spec), {name: str(hole) for name, hole in spec.holes if isinstance(hole, str)}
    pad = made["group_pad"]
    made |= {"may": safe(texts["may"]), "before": "0", "behind": "", "powers": False, "heads": 1, "dots": []}
    score = dict(spec.holes).get("score")
    if score is None:
        return made
    assert isinstance(score, Expr)
    if spec.fact("drops"):
        raise Unprintable("a choice among units of rows that drop entries has no Triton form in a piece yet")
    cut = cut_units(score)
    places = [told.split(":") for told in str(spec.fact("landmarks")).split()]
    asked = {words_of(n)[1] for part in cut.parts for n in part.walk() if n.op == "landmark"}
    queries = max(1, spec.number("block_m") // pad)
    first, sums = (cut.first, cut.parts) if spec.fact("own") else _joined(cut.first, cut.parts)
    dots, parts = _products(spec, sums)
    axes = {"g": Axis("GROUP", "g_real" if pad > spec.number("group") else None)}
    each, each_axes = print_stage("s", first, lambda e: Value(f"part{e.value}", "qgu"), "qgu", axes)
    grouped = "g" in each_axes

    def of_row(name: str, formula: Expr, over: str) -> tuple[Hole, str]:
        return print_stage(name[0], formula, lambda _: Value(name, over), "qgu", axes)

    _, soft, whole_of, outer_of = stages_of(score)
    whole, final = of_row("unit_value", whole_of, each_axes)
    whole_axes, outer = final, None
    if outer_of is not None:
        outer, final = of_row("other_value", outer_of, whole_axes)
    return made | {
        "each": each,
        "grouped": grouped,
        "marks_own": bool(spec.fact("own")),
        "marks": [(name, int(at), spec.number("head_dim")) for name, at in places if name in asked],
        "dots": dots,
        "n_split": sum(dot["split"] is not None for dot in dots),
        "parted": [name for dot in dots if dot["split"] is not None for name in dot["names"]],
        "loaded": [name for dot in dots if dot["split"] is None for name in dot["names"]],
        "direct": not soft and outer is None,
        "parts": parts,
        "each_heads": pad if grouped else 1,
        "whole_heads": pad if whole_axes == "qgu" else 1,
        "whole_grouped": whole_axes == "qgu",
        "heads": pad if final == "qgu" else 1,
        "block_q": queries,
        "block_s": max(1, 1024 // pad),
        "whole_text": _piece_lines(whole, grouped, soft),
        "formula_text": _formula_lines(whole, grouped),
        # 64 of a thread; where they are summed, too, half as many, or it spills.
        "kept": (1024 if spec.fact("rank") == "cover" else 2048) * spec.number("warps"),
        "whole_value": whole.result,
        "outer": outer,
        "outer_value": outer and outer.result,
        "before": safe(texts["before"]),
        "behind": safe(texts["behind"]),
        "powers": bool(spec.fact("powers")),
        # Units that a tile of entries meets, at most.
        "meets": -(-spec.number("tile") // spec.number("size")) + 1,
    }


def _piece_lines(whole: Hole, grouped: bool, soft: bool) -> str:
    rest = "float('-inf')" if soft else "0.0"
    lines = ["raw_at = score_at + each[:, None] * score_units + u[None, :]"]
    lines.append(f"unit_value = tl.load(raw_at, mask=u[None, :] < m_full[:, None], other={rest})")
    if soft:
        lines.append("unit_value = tl.exp(unit_value - peak[:, None]) / mass[:, None]")
    if grouped:
        lines.append("unit_value = tl.reshape(unit_value, [BLOCK_Q, GROUP_PAD, BLOCK])")
    return "\n".join([*lines, *whole.lines])


def _formula_lines(whole: Hole, grouped: bool) -> str:
    """The same of scores that stand in registers."""
    value = "tl.reshape(raw, [BLOCK_Q, GROUP_PAD, BLOCK_U])" if grouped else "raw"
    return "\n".join([f"unit_value = {value}", *whole.lines])


def _joined(first: Expr, parts: tuple[Expr, ...]) -> tuple[Expr, tuple[Expr, ...]]:
    """Sums of products with one thing of the queries as one product: dot(q, a) + dot(q, b) as dot(q, a + b)."""
    made = list(parts)

    def visit(expr: Expr) -> Expr:
        args = tuple(visit(arg) for arg in expr.args)
        if expr.op == "binary" and expr.value in ("+", "-") and all(arg.op == "tile" for arg in args):
            factors = [_factors(made[int(str(arg.value))]) for arg in args]
            left, right = factors
            if left is not None and right is not None and left[0] == right[0]:
                made.append(Expr("binary", (left[0], Expr("binary", (left[1], right[1]), expr.value)), "*"))
                return Expr("tile", (), len(made) - 1)
        return Expr(expr.op, args, expr.value, expr.axes)

    joined = visit(first)
    asked = sorted({int(str(node.value)) for node in joined.walk() if node.op == "tile"})
    return _renumbered(joined, asked), tuple(made[i] for i in asked)


def _renumbered(expr: Expr, asked: list[int]) -> Expr:
    if expr.op == "tile":
        return Expr("tile", (), asked.index(int(str(expr.value))))
    return Expr(expr.op, tuple(_renumbered(arg, asked) for arg in expr.args), expr.value, expr.axes)


def _factors(part: Expr) -> tuple[Expr, Expr] | None:
    """A product as (of the queries, of the landmarks)."""
    if part.op == "binary" and part.value == "*":
        for a, b in (part.args, part.args[::-1]):
            if not _reads(a, "landmark") and not _reads(b, "queries") and _reads(b, "landmark"):
                return a, b
    return None


def _products(spec: KernelSpec, parts: tuple[Expr, ...]) -> tuple[list[Context], list[str]]:
    """Sums over channels as products of tiles: of something of the queries with something of the landmarks each."""
    dots: list[Context] = []
    known: dict[Expr, str] = {}
    own, single = bool(spec.fact("own")), spec.fact("dtype") == "float32"
    size = spec.number("head_dim")
    axes = {"d": Axis("D", "real" if padded(size) > size else None)}

    def leaf(expr: Expr) -> Value:
        return Value("qt", "ld") if expr.op == "queries" else Value(f"mark_{words_of(expr)[1]}", "ud")

    def product(a: Expr, b: Expr) -> str:
        pair = Expr("binary", (a, b), "*")
        if pair not in known:
            name = f"dot{len(dots)}"
            q, _ = print_stage(f"{name}q", a, leaf, "ld", axes)
            mark, _ = print_stage(f"{name}m", b, leaf, "ud", axes)
            as_kept = own and b.op == "landmark" and _keeps_bits(a)
            cast = ".to(q.dtype.element_ty)" if as_kept and not single else ""
            if own and not as_kept and not single:
                raise Unprintable(f"the product of {spell(a)} and {spell(b)} has no Triton form in a piece yet")
            precision = "ieee" if single or as_kept else "tf32x3"
            split = None
            if not own and not single and _keeps_bits(a):
                cast, split = ".to(q.dtype.element_ty)", sum(dot["split"] is not None for dot in dots)
            names = sorted({words_of(node)[1] for node in b.walk() if node.op == "landmark"})
            made = {"name": name, "q": q, "mark": mark, "names": names, "cast": cast, "precision": precision}
            dots.append(made | {"split": split})
            known[pair] = name
        return known[pair]

    def text(part: Expr) -> str:
        if part.op == "binary" and part.value in ("+", "-"):
            return f"({text(part.args[0])} {part.value} {text(part.args[1])})"
        if part.op == "unary" and part.value == "neg":
            return f"(-{text(part.args[0])})"
        factors = _factors(part)
        if factors is not None:
            return product(*factors)
        raise Unprintable(f"sum[d] {spell(part)} has no Triton form in a piece yet")

    return dots, [text(part) for part in parts]


def _reads(expr: Expr, op: str) -> bool:
    return any(node.op == op for node in expr.walk())


def _keeps_bits(expr: Expr) -> bool:
    """Whether the formula has, for a number of the model's dtype, one of that dtype."""
    if expr.op == "queries" or (expr.op == "const" and expr.value == 0):
        return True
    extremes = (expr.op == "binary" and expr.value in ("min", "max")) or (expr.op == "unary" and expr.value == "neg")
    return extremes and all(_keeps_bits(arg) for arg in expr.args)


def blocks(spec: KernelSpec) -> Context:
    """What the template `prefill` takes beside where heads read lists of tiles."""
    texts = {name: str(hole) for name, hole in spec.holes if name.startswith("regions ")}
    found = {int(name.split(" ")[1]): safe(text) for name, text in texts.items()}
    regions = [{"read": read, "text": text, "torch": in_torch(text)} for read, text in sorted(found.items())]
    made = counts_of(str(dict(spec.holes).get("counts", "")))
    named = [region for region in regions if region["text"] != "(at < 0)"]
    prompts = ["at_prompt"] if any("at_prompt" in str(region["text"]) for region in named) else []
    return made | {
        "regions": regions,
        "named": named,
        "names": prompts + [f"n{index}" for index, _ in made["counts"]],
        "tile": spec.number("tile"),
        "size": spec.number("size"),
        "sets": spec.number("sets"),
        "chooses": [int(read) for read in str(spec.fact("chooses")).split()],
    }
