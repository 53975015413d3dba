"""Landmarks of units as the cache keeps them for reads: which there are, where each one lies, what they cost.

Takes a plan, gives the layout of `Site.marks`, `edges` and `marked` that caches and kernels share. Free of torch;
`landmarks` says what they mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from math import lcm

from kvcompile.kernels.plan import Expr, PolicyPlan, ReadPlan, Region, UnitPlan, words_of

MOST = 1 << 20  # tokens that strides may take to meet again


@dataclass(frozen=True, slots=True)
class Kind:
    """The landmarks of one unit that reads ask for; of unit u they lie in block u // each, channel by channel.

    each: units that begin in a block; first: where those of the block's first unit begin; edge: the same in `edges`.
    """

    unit: UnitPlan
    landmarks: tuple[tuple[str, Expr], ...]
    channels: int
    each: int
    first: int
    edge: int


@dataclass(frozen=True, slots=True)
class MarksLayout:
    """How landmarks lie. A row has blocks of `span` tokens, each of `width` numbers, all kinds one after the other.

    readers: [layer][KV head] -> index into the first dimension of `Site.marks`, -1 where no landmark is kept; edges:
    units of a block where rows drop entries (begin and end of each among the row's entries), 0 where none does; evicts:
    of each reader whether its row does.
    """

    kinds: tuple[Kind, ...]
    span: int
    width: int
    edges: int
    readers: tuple[tuple[int, ...], ...]
    evicts: tuple[bool, ...]
    dtype: str

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return 4 if self.dtype == "float32" else 2

    @property
    def count(self) -> int:
        """Rows of a sequence that keep landmarks, over all layers."""
        return len(self.evicts)

    def blocks(self, tokens: int) -> int:
        """Blocks for so many tokens: a power of two, so that a graph sees a new size rarely, and never one."""
        return max(2, 1 << (-(-tokens // self.span) - 1).bit_length()) if self.count else 0

    def nbytes(self, tokens: int) -> int:
        """Bytes of one sequence, its rows all together."""
        row = self.width * self.itemsize + 8 * self.edges
        return self.count * (self.blocks(tokens) * row + 4 * len(self.kinds))

    def kind(self, name: str) -> Kind:
        return next(kind for kind in self.kinds if kind.unit.name == name)


def asked(plan: PolicyPlan, read: ReadPlan) -> dict[str, set[str]]:
    """Which landmarks of which units the scores of a read ask for; units that are taken whole, too."""
    found: dict[str, set[str]] = {}
    for rule in read.rules:
        for term in rule.selections:
            names = [words_of(n) for n in term.score.walk() if n.op == "landmark"]
            for unit, name in names:
                found.setdefault(unit, set()).add(name)
            if names and term.whole is not None:
                found.setdefault(term.whole, set())
    return found


@cache
def layout_of(plan: PolicyPlan) -> MarksLayout:
    """The landmarks that a plan's caches keep."""
    wanted: dict[str, set[str]] = {}
    by_units = [asked(plan, read) for read in plan.reads]
    for own_units in by_units:
        for name, names in own_units.items():
            wanted.setdefault(name, set()).update(names)
    units = [unit for unit in plan.units if unit.name in wanted]
    span = lcm(*(unit.stride for unit in units)) if units else 1
    if span > MOST:  # strides that hardly ever meet: no kernel, so nothing is kept
        units, by_units = [], [{} for _ in by_units]
    readers: list[tuple[int, ...]] = []
    evicts: list[bool] = []
    for layer in range(plan.facts.layers):
        line = []
        for head, read in enumerate(plan.reading(layer)):
            keeps = layer not in plan.off and read >= 0 and bool(by_units[read])
            line.append(len(evicts) if keeps else -1)
            if keeps:
                evicts.append(drops(plan, layer, head))
        readers.append(tuple(line))
    kinds: list[Kind] = []
    width = edge = 0
    for unit in units if evicts else ():
        marks = tuple((name, expr) for name, expr in unit.landmarks if name in wanted[unit.name])
        channels = sum(size_of(expr, plan.facts.head_dim) for _, expr in marks)
        each = span // unit.stride
        kinds.append(Kind(unit, marks, channels, each, width, edge))
        width, edge = width + each * channels, edge + each
    own = all(_is_a_value(expr) for kind in kinds for _, expr in kind.landmarks)
    dtype = plan.facts.dtype if own else "float32"
    return MarksLayout(tuple(kinds), span, width, edge * any(evicts), tuple(readers), tuple(evicts), dtype)


def drops(plan: PolicyPlan, layer: int, head: int) -> bool:
    """Whether a row ever drops entries; one that does not holds every token in its place."""
    own = plan.class_of[layer][head]
    return any(not cls.keeps_all for i, cls in enumerate(plan.classes) if own in (i, cls.rows_of))


def size_of(expr: Expr, head_dim: int) -> int:
    """Numbers of a landmark: one for each channel, or one in all."""
    return head_dim if leaves_channels(expr) else 1


def leaves_channels(expr: Expr) -> bool:
    """Whether the axis d of a formula of keys and values is open."""
    if expr.op == "field":
        return str(expr.value).removeprefix("next.") in ("k", "v", "raw.k")
    if expr.op == "pair" or (expr.op == "unary" and expr.value == "norm"):
        return False
    if expr.op == "reduce" and words_of(expr)[1] == "d" and words_of(expr)[0] != "softmax":
        return False
    if expr.op == "landmark":  # of the same unit: whichever it is, it may have channels
        return True
    return any(leaves_channels(arg) for arg in expr.args)


def _is_a_value(expr: Expr) -> bool:
    """Whether a landmark is, channel by channel, a number of one of its entries, which the model's dtype holds."""
    fn = words_of(expr)[0] if expr.op == "reduce" else ""
    return fn in ("min", "max") and expr.args[0].op == "field" and str(expr.args[0].value) in ("k", "v")


# -- what it costs -----------------------------------------------------------------------------------------------------


def dense_below(plan: PolicyPlan, read: ReadPlan, taken: int) -> int:
    """From how many entries of a row on a step that reads `taken` of them moves fewer bytes than one that reads all.

    Reading all moves every entry once for a whole group; choosing moves the landmarks and, where query heads choose
    apart, up to `taken` entries for each of them. 0: it never moves more; a read by units of as many landmark bytes as
    entries never moves fewer, which is given as 2^31 - 1.
    """
    layout, entry = layout_of(plan), plan.facts.entry_bytes
    apart = any(t.scope == "query_head" for rule in read.rules for t in rule.selections)
    apart |= any(isinstance(t, Region) and t.kind == "picked" for rule in read.rules for t in rule.terms)
    names = asked(plan, read)
    kinds = [kind for kind in layout.kinds if kind.unit.name in names]
    each = sum((Fraction(k.channels * layout.itemsize, k.unit.stride) for k in kinds), Fraction(0))
    if each >= entry:
        return (1 << 31) - 1
    many = (plan.facts.group if apart else 1) * taken * entry
    return int(many / (entry - each)) if many else 0
