"""Cuts a score into the stages that a kernel can hold: tile (axes q, g, d), row (axis i), heads (axis h).

Takes a `plan.Expr`, gives the tile formulas and what is left with a leaf `tile` in place of each. The cut
is mechanical: it follows the open axes. What does not fit any stage raises `Unprintable` with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvcompile.kernels.plan import Expr, QuerySource


class Unprintable(Exception):
    """This formula has no Triton form yet; the reference and the cpu backend still run it."""


@dataclass(frozen=True, slots=True)
class Tile:
    """One number per entry, made inside a tile of queries and channels: evidence of a source, or keys alone."""

    kind: str  # "attn" | "logit" | "key"
    source: QuerySource | None
    formula: Expr


@dataclass(frozen=True, slots=True)
class Cut:
    """`row` is over leaves `tile` (value: index into tiles), states and positions; `heads` joins the sharers."""

    tiles: tuple[Tile, ...]
    row: Expr
    heads: str | None  # None | mean | sum | max | min, over all heads of the layer

    @property
    def is_tile(self) -> bool:
        """Nothing is left to do once the one tile is known."""
        return self.row.op == "tile"


_ACROSS = {"i": "over the entries of a row", "u": "over units", "h": "over heads inside a formula"}
_LEAF_AXES = {"const": "", "scalar": "", "state": "i", "tile": "i", "evidence": "gqi"}
_FIELD_AXES = {"pos": "i", "age": "i", "k": "id", "v": "id"}


def open_axes(expr: Expr) -> frozenset[str]:
    """Axes over which the formula still varies, heads aside (every formula is per KV head until `[h]`)."""
    if expr.op in _LEAF_AXES:
        return frozenset(_LEAF_AXES[expr.op])
    if expr.op == "field":
        if str(expr.value) not in _FIELD_AXES:
            raise Unprintable(f"the field {expr.value} has no Triton form yet")
        return frozenset(_FIELD_AXES[str(expr.value)])
    if expr.op == "landmark":
        raise Unprintable("landmarks of units have no Triton form yet")
    below = frozenset[str]().union(*(open_axes(arg) for arg in expr.args))
    if expr.op == "reduce":
        fn, axis = reduction(expr)
        return below if fn == "softmax" else below - frozenset("hg" if axis == "h" else axis)
    if expr.op == "pair" or (expr.op == "unary" and expr.value == "norm"):
        return below - {"d"}
    return below


def reduction(expr: Expr) -> tuple[str, str]:
    """(function, axis) of a `reduce` node."""
    assert isinstance(expr.value, tuple)
    return str(expr.value[0]), str(expr.value[1])


def joined_heads(expr: Expr) -> str | None:
    """How an outermost `[h]` joins the heads of the layer; None where there is none."""
    if expr.op != "reduce" or reduction(expr)[1] != "h":
        return None
    if reduction(expr)[0] not in ("mean", "sum", "max", "min"):
        raise Unprintable(f"{reduction(expr)[0]}[h] has no Triton form yet")
    return reduction(expr)[0]


def cut(expr: Expr) -> Cut:
    """Split a score into its stages.

    Raises:
        Unprintable: reductions over entries or units, values, keys beside attention, heads inside a pooling.
    """
    heads = joined_heads(expr)
    expr = expr.args[0] if heads else expr
    for node in expr.walk():
        if node.op == "reduce" and reduction(node)[1] in _ACROSS:
            fn, axis = reduction(node)
            raise Unprintable(f"{fn}[{axis}] {_ACROSS[axis]} has no Triton form yet")
    tiles: list[Tile] = []
    return Cut(row=_split(expr, heads or "mean", tiles), tiles=tuple(tiles), heads=heads)


def _split(expr: Expr, left_over: str, tiles: list[Tile]) -> Expr:
    """`expr` with its tiles replaced by leaves; an axis g that is left over is closed with `left_over`."""
    if not _reads_tensors(expr):
        open_axes(expr)  # refuses what has no form
        return expr
    axes = open_axes(expr)
    if _fits_a_tile(expr) and axes <= {"i", "g"}:
        formula = Expr("reduce", (expr,), (left_over, "g")) if "g" in axes else expr
        tile = _classify(formula)
        if tile not in tiles:
            tiles.append(tile)
        return Expr("tile", (), tiles.index(tile))
    if expr.op in ("evidence", "field", "reduce"):
        raise Unprintable(f"{expr.op} {expr.value} leaves axes {', '.join(sorted(axes))} open")
    return Expr(expr.op, tuple(_split(arg, left_over, tiles) for arg in expr.args), expr.value)


def _reads_tensors(expr: Expr) -> bool:
    fields = {str(n.value) for n in expr.walk() if n.op == "field"}
    return bool(fields - {"pos", "age"}) or any(n.op in ("evidence", "landmark") for n in expr.walk())


def _fits_a_tile(expr: Expr) -> bool:
    return not any(n.op == "pool" or (n.op == "reduce" and reduction(n)[1] in "hiu") for n in expr.walk())


def _classify(formula: Expr) -> Tile:
    nodes = formula.walk()
    sources = {n.value for n in nodes if n.op == "evidence"}
    fields = {str(n.value) for n in nodes if n.op == "field"} - {"pos", "age"}
    if len(sources) > 1:
        raise Unprintable("two kinds of attention in one formula have no Triton form yet")
    if sources and fields:
        raise Unprintable(f"attention and {', '.join(sorted(fields))} in one formula have no Triton form yet")
    if "v" in fields:
        raise Unprintable("scores from values have no Triton form yet")
    if not sources:
        return Tile("key", None, formula)
    (source,) = sources
    assert isinstance(source, tuple)
    return Tile(str(source[0]), source[1], formula)
