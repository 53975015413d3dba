"""What the sets of a plan are made of: counts, shares, regions, selections, triggers, losers, states, units.

Takes nothing of torch and nothing of the language. Every object is immutable and hashable, see `plan`.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from kvcompile.kernels.expr import Expr

STEP_TRIGGERS = ("step", "every", "filled", "full", "when", "slide")


@dataclass(frozen=True, slots=True)
class Count:
    """A number of entries: an exact expression over run-time scalars and shares, truncated once."""

    name: str
    expr: Expr


@dataclass(frozen=True, slots=True)
class Share:
    """A total, meant per layer, divided over the layers that use it; their sum is kept.

    by `pyramid`: falls with depth, `beta`; `table`: by `weights`, one per layer of the model; `softmax`: by the
    softmax over the layers of `score`, one number per row, its mean over heads; `cover`: every layer gets what holds
    the same part of its own mass of `score`, one number per entry, its mean over heads. The last two follow from the
    prompt's entries, when `prefill.end` first fires after it, and then stay. `reserve`: counts that the same union
    sets aside first (pyramid); `sharing`: layers that share one decision get one part.
    """

    name: str
    total: Expr
    by: Literal["pyramid", "softmax", "cover", "table"]
    beta: Fraction = Fraction(1)
    score: Expr | None = None
    weights: tuple[Fraction, ...] = ()
    reserve: tuple[int, ...] = ()
    sharing: int = 1

    @property
    def measured(self) -> bool:
        """Whether it follows from the entries and not from lengths alone."""
        return self.by in ("softmax", "cover")


@dataclass(frozen=True, slots=True)
class Region:
    """Entries named by position or history: all sink recent prompt generated frozen newest stride random picked.

    `random`: the `count` positions up to `now` whose hash of (seed, layer, head, pos) is smallest;
    `picked`: what the latest layer before that fills slot `pick` has left there. In `attend` alone: `own`, the unit of
    the query; `pow2`, units whose distance from it is a power of two; `span`, tokens of a stretch `name` of the text.
    """

    kind: str
    count: int | None = None  # index into PolicyPlan.counts
    unit: str | None = None
    seed: int = 0
    pick: int | None = None
    name: str = ""


@dataclass(frozen=True, slots=True)
class Selection:
    """The best candidates by a score. `count` indexes PolicyPlan.counts; with `fraction` the number
    is that part of each competing group's candidates instead.

    rank    `top` and `bottom`: n of them; `cover`: the fewest that reach the part `fraction` of the group's sum of
            scores, negative ones as 0; `where`: all whose score, a condition, is not 0
    scope   who competes: `head` each KV head alone; `query_head` each query head (the score leaves g open): of its KV
            head all their winners stay, in `attend` each reads its own; `shared` heads decide once by their mean
            score; `across` heads compete for n times the heads, each with its `floor` first
    layers  `shared`: of every `sharing` layers of the class, the first decides for all, through the slot `pick`;
            `across`: layers compete for n times the layers, too (with scope `head`: the same head of every layer)
    unit    each unit is a group of its own        whole: units compete and are taken whole, n counts units
    observed  with `q in peek(w)`, in the last piece the w newest entries are kept and count within n
    """

    rank: Literal["top", "bottom", "cover", "where"]
    score: Expr
    count: int | None = None
    fraction: Fraction | None = None
    scope: Literal["head", "query_head", "shared", "across"] = "head"
    floor: Fraction = Fraction(0)
    unit: str | None = None
    observed: int = 0
    layers: Literal["each", "shared", "across"] = "each"
    sharing: int = 1
    pick: int | None = None
    whole: str | None = None


Term = Region | Selection


@dataclass(frozen=True, slots=True)
class Trigger:
    """When a set is computed anew. `n`: piece size, period, or number of units or entries.

    `when` may fire after every forward. `cond`: a number per row (no open axes); a row where it is 0 decides nothing.
    `slide` is the compiler's own, in layers with a sliding window: entries that no later query can read are dropped,
    all others stay; after every piece, and after every n-th step.
    """

    kind: Literal["prefill.end", "chunk", "step", "every", "filled", "full", "when", "slide"]
    n: int | None = None
    unit: str | None = None
    cond: Expr | None = None


@dataclass(frozen=True, slots=True)
class Loser:
    """What becomes of entries that are not kept; the first one of a rule that applies to an entry decides.

    drop    nothing is left
    merge   into the row's nearest survivor: by cosine or dot product of `of` (`fn` "cos" or "dot"), or by distance of
            positions ("pos"), ties to the older. Its key and value become the mean of its own (weight 1) and the
            losers' (`weight`); position and states stay, counts add. Where `when` is 0, the next loser action decides.
    fold    `mean`: all into one entry of the row without position (pos -1), the count-weighted mean of keys and values,
            log(count) added to its logit, kept for ever, never a candidate. `dct`: the losers, in position order, as
            the lowest `part` of their frequencies (DCT-II per channel, orthonormal, back by a shorter inverse, times
            sqrt(m / n)); `pool`: means of runs of 1 / part of them. Both leave m = floor or ceil entries at positions
            of losers, spread evenly.
    """

    kind: Literal["drop", "merge", "fold"]
    fn: str = ""
    of: Literal["k", "v", ""] = ""
    when: Expr | None = None
    weight: Expr | None = None
    part: Fraction = Fraction(0)


@dataclass(frozen=True, slots=True)
class StatePlan:
    """One float32 per entry that moves with it; starts at `init`.

    `add`, the axis i left open, is a sum over queries that does not depend on states: it may run over all
    queries of a forward at once. Everything else that changes a state is an `Update`. Names that start with
    `@` are the compiler's own: `@count` tokens of an entry, `@score:C:I` a score kept until all layers are done.
    """

    name: str
    init: Expr
    add: Expr | None


@dataclass(frozen=True, slots=True)
class Update:
    """States that change on an event: `attend` once per query in position order, `insert` for new entries, `step`
    after the reads of a step. `assigns`: (state, new value), left to right; entries where `where` is 0 stay.
    """

    event: Literal["attend", "insert", "step"]
    assigns: tuple[tuple[str, Expr], ...]
    where: Expr | None = None


@dataclass(frozen=True, slots=True)
class UnitPlan:
    """Unit u holds the positions from offset + u*stride on, `size` of them; units overlap where stride < size."""

    name: str
    size: int
    offset: int
    landmarks: tuple[tuple[str, Expr], ...] = ()
    stride: int = 0

    def __post_init__(self) -> None:
        if not self.stride:
            object.__setattr__(self, "stride", self.size)

    def full(self, seen: int) -> int:
        """How many units are full once so many tokens have been seen."""
        return max(0, (seen - self.offset - self.size) // self.stride + 1)
