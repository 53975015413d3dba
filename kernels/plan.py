"""Frozen plans: all that ops, the cache and the kernels ever see of a policy.

Takes nothing from the language: `passes.freeze` writes these, everything at run time reads them.
Every object here is immutable, hashable and free of torch, so that a plan can be a cache key,
a constant of a compiled graph (by its digest) and a row of a table that a person reads.

Axes of an expression, always written in the order of `AXES`:
`h` KV heads of the layer, `g` query heads of one KV head, `q` queries, `u` units,
`i` entries of a row (or of a unit, where `u` is open too), `d` channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

AXES = "hgquid"


@dataclass(frozen=True, slots=True)
class QuerySource:
    """Whose queries a `q` axis ranges over.

    `forward`: the queries of this forward; `last`: the row's `width` newest; `peek`: the prompt's
    last `width`, run along with each piece.
    """

    kind: Literal["forward", "last", "peek"]
    width: int = 0


@dataclass(frozen=True, slots=True)
class Expr:
    """One node of a formula over entries; evaluated in float32 (counts: in exact rationals).

    op        value                          args   meaning
    const     Fraction                       0      a number
    scalar    name                           0      a number of the sequence: prompt now chunk step; of the row: len
    field     "k" "v" "q" "pos" "age" "raw.k" "next.k" "next.v"   0  a tensor that an entry (or query) has
    evidence  ("attn" | "logit", QuerySource)  0    axes g, q, i: attention of each query to each entry
    state     name                           0      the entry's own state
    landmark  (unit, name)                   0      a unit's landmark
    reduce    (fn, axis)                     1      sum mean max min var std softmax over one axis (softmax keeps it)
    pool      ("max" | "avg", width)         1      centred pooling over the candidates in position order
    unary     neg exp log sqrt abs sigmoid norm   1  elementwise; norm reduces d
    binary    + - * / max min < <= > >= == != and or   2   elementwise, x / 0 is 0
    pair      dot cos                        2      reduces d
    """

    op: str
    args: tuple[Expr, ...] = ()
    value: object = None
    axes: str = ""

    def walk(self) -> list[Expr]:
        """This node and all below it, operands first, repeated nodes once."""
        seen: dict[Expr, None] = {}

        def visit(node: Expr) -> None:
            if node in seen:
                return
            for arg in node.args:
                visit(arg)
            seen[node] = None

        visit(self)
        return list(seen)


def words_of(expr: Expr) -> tuple[str, str]:
    """(function, axis) of a reduce, (unit, name) of a landmark."""
    assert isinstance(expr.value, tuple)
    first, second = expr.value
    return str(first), str(second)


def evidence_of(expr: Expr) -> tuple[str, QuerySource]:
    """("attn" or "logit", whose queries) of an evidence."""
    assert isinstance(expr.value, tuple)
    kind, source = expr.value
    assert isinstance(source, QuerySource)
    return str(kind), source


@dataclass(frozen=True, slots=True)
class Count:
    """A number of entries: an exact expression over run-time scalars, truncated once.

    With `share` it is a mean per layer, divided over the layers: `("pyramid", beta)`. `reserve`
    lists the counts that the same union sets aside first; what is left of the prompt bounds a layer.
    """

    name: str
    expr: Expr
    share: tuple[str, Fraction] | None = None
    reserve: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Region:
    """Entries named by position or history: all sink recent prompt generated frozen newest stride random."""

    kind: str
    count: int | None = None  # index into PolicyPlan.counts
    unit: str | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Selection:
    """The best candidates by a score. `count` indexes PolicyPlan.counts; with `fraction` the number
    is that part of each competing group's candidates instead. `scope` says who competes:
    `head` each KV head alone, `shared` heads decide once by their mean score, `across` heads compete
    for n times the heads, each with its `floor` first. `unit`: each unit is a group of its own.
    `observed`: with `q in peek(w)`, in the last piece the w newest entries are kept and count within n.
    """

    rank: Literal["top", "bottom"]
    score: Expr
    count: int | None = None
    fraction: Fraction | None = None
    scope: Literal["head", "shared", "across"] = "head"
    floor: Fraction = Fraction(0)
    unit: str | None = None
    observed: int = 0


Term = Region | Selection


@dataclass(frozen=True, slots=True)
class Trigger:
    """When a set is computed anew. `n`: piece size, period, or number of units or entries."""

    kind: Literal["prefill.end", "chunk", "step", "every", "filled", "full"]
    n: int | None = None
    unit: str | None = None


@dataclass(frozen=True, slots=True)
class StatePlan:
    """One float32 per entry that moves with it; starts at `init`, grows by `add` on each read.

    `add` has the axis i left open; None where nothing updates the state.
    """

    name: str
    init: Expr
    add: Expr | None


@dataclass(frozen=True, slots=True)
class UnitPlan:
    """Unit u holds the positions offset + u*size to offset + (u+1)*size - 1."""

    name: str
    size: int
    offset: int
    landmarks: tuple[tuple[str, Expr], ...] = ()


@dataclass(frozen=True, slots=True)
class ClassPlan:
    """One head class of a layer range: what its rows keep, and when that is decided."""

    name: str
    keep: tuple[Term, ...]
    triggers: tuple[Trigger, ...]  # empty: nothing is ever dropped
    states: tuple[str, ...] = ()
    by_position: bool = False  # scores need entries in position order (pooling, units)

    @property
    def keeps_all(self) -> bool:
        return not self.triggers or any(isinstance(t, Region) and t.kind == "all" for t in self.keep)

    @property
    def selections(self) -> tuple[Selection, ...]:
        return tuple(t for t in self.keep if isinstance(t, Selection))

    def fires_on(self, kind: str) -> bool:
        return not self.keeps_all and any(t.kind == kind for t in self.triggers)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a policy is bound to. Sizes in elements; `weight_bytes` is all parameters."""

    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    dtype: str = "float32"  # of keys and values
    hidden: int = 0
    weight_bytes: int = 0
    family: str = ""

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.q_heads // self.kv_heads

    @property
    def entry_bytes(self) -> int:
        """Key and value of one entry."""
        return 2 * self.head_dim * {"float32": 4, "bfloat16": 2, "float16": 2}[self.dtype]


@dataclass(frozen=True, slots=True)
class PolicyPlan:
    """A policy bound to a model: the only input of ops, cache and kernels."""

    name: str
    digest: str
    facts: ModelFacts
    classes: tuple[ClassPlan, ...]
    class_of: tuple[tuple[int, ...], ...]  # [layer][kv head] -> index into classes
    counts: tuple[Count, ...] = ()
    states: tuple[StatePlan, ...] = ()
    units: tuple[UnitPlan, ...] = ()
    chunk: int | None = None  # prompts are cut into pieces of this many tokens
    peek: int = 0  # prompt tokens that run along with each piece but the last
    query_window: int = 0  # newest queries that a score may ask for: `q in last(w)`
    page: int = 16  # tokens per page, a power of two
    params: tuple[tuple[str, str], ...] = ()

    def unit(self, name: str) -> UnitPlan:
        return next(u for u in self.units if u.name == name)

    def site_classes(self, layer: int) -> tuple[int, ...]:
        """Indices of the classes that have heads in this layer, in order."""
        return tuple(sorted(set(self.class_of[layer])))

    def heads(self, layer: int, cls: int) -> tuple[int, ...]:
        """KV heads of one class in one layer."""
        return tuple(h for h, c in enumerate(self.class_of[layer]) if c == cls)

    def class_size(self, cls: int) -> int:
        """KV heads of one class over all layers."""
        return sum(row.count(cls) for row in self.class_of)

    @property
    def evicts_in_step(self) -> bool:
        return any(c.fires_on(k) for c in self.classes for k in ("step", "every", "filled", "full"))

    @property
    def ring(self) -> int:
        """How many of the newest queries must be kept, because a later piece, step or turn may ask for them."""
        asked = [
            evidence_of(n)[1] for c in self.classes for s in c.selections for n in s.score.walk() if n.op == "evidence"
        ]
        return max(self.query_window, self.peek, int(any(source.kind == "forward" for source in asked)))

    def state(self, name: str) -> StatePlan:
        return next(s for s in self.states if s.name == name)
