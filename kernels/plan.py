"""Frozen plans: all that ops, the cache and the kernels ever see of a policy.

Takes nothing from the language: `passes.freeze` writes these, everything at run time reads them.
Every object here is immutable, hashable and free of torch, so that a plan can be a cache key,
a constant of a compiled graph (by its digest) and a row of a table that a person reads. Formulas are those of `expr`.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from kvcompile.kernels.expr import AXES as AXES
from kvcompile.kernels.expr import Expr as Expr
from kvcompile.kernels.expr import QuerySource as QuerySource
from kvcompile.kernels.expr import evidence_of as evidence_of
from kvcompile.kernels.expr import source_of as source_of
from kvcompile.kernels.expr import words_of as words_of

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
    `picked`: what the latest layer before that fills slot `pick` has left there.
    """

    kind: str
    count: int | None = None  # index into PolicyPlan.counts
    unit: str | None = None
    seed: int = 0
    pick: int | None = None


@dataclass(frozen=True, slots=True)
class Selection:
    """The best candidates by a score. `count` indexes PolicyPlan.counts; with `fraction` the number
    is that part of each competing group's candidates instead.

    rank    `top` and `bottom`: n of them; `cover`: the fewest that reach the part `fraction` of the group's sum of
            scores, negative ones as 0; `where`: all whose score, a condition, is not 0
    scope   who competes: `head` each KV head alone; `query_head` each query head, the KV head keeps all their winners
            (the score leaves g open); `shared` heads decide once by their mean score; `across` heads compete for n
            times the heads, each with its `floor` first
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
    """Unit u holds the positions offset + u*size to offset + (u+1)*size - 1."""

    name: str
    size: int
    offset: int
    landmarks: tuple[tuple[str, Expr], ...] = ()


@dataclass(frozen=True, slots=True)
class ClassPlan:
    """One head class of a layer range: what its rows keep, and when that is decided.

    A class with several `keep` clauses, each at its own triggers, is several of these; `rows_of` names the first.
    Those that fire together judge one after the other. Layers of different sliding windows have classes of their
    own, of one name; where there is a window, the first of a row's classes has the trigger `slide`.
    """

    name: str
    keep: tuple[Term, ...]
    triggers: tuple[Trigger, ...]  # empty: nothing is ever dropped
    states: tuple[str, ...] = ()
    by_position: bool = False  # scores need entries in position order (pooling, units)
    losers: tuple[Loser, ...] = ()  # empty: drop
    rows_of: int | None = None  # index of the class whose rows these are
    only_picks: bool = False  # the winners of its selections go to their slots, nothing is dropped

    @property
    def slides(self) -> bool:
        """Whether its layers have a sliding window: what has left it is dropped, whatever the policy keeps."""
        return any(t.kind == "slide" for t in self.triggers)

    @property
    def keeps_all(self) -> bool:
        everything = any(isinstance(t, Region) and t.kind == "all" for t in self.keep)
        return not self.triggers or (everything and not self.only_picks and not self.slides)

    @property
    def selections(self) -> tuple[Selection, ...]:
        return tuple(t for t in self.keep if isinstance(t, Selection))

    @property
    def moves(self) -> bool:
        """Whether losers leave something behind."""
        return any(loser.kind != "drop" for loser in self.losers)

    def fires_on(self, kind: str) -> bool:
        return not self.keeps_all and any(t.kind == kind for t in self.triggers)


def formulas_of(cls: ClassPlan) -> list[Expr]:
    """The scores of a class's selections and the conditions of its triggers."""
    return [t.score for t in cls.selections] + [t.cond for t in cls.triggers if t.cond is not None]


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a policy is bound to. Sizes in elements; `weight_bytes` is all parameters.

    windows: of each layer, how many of the newest tokens a query can read, its own included, 0: all; empty: all
    layers read all. softcap: logits are softcap * tanh(logits / softcap) before the mask, 0: as they are. sinks: each
    query head has one more logit in its softmax's denominator, without a value.
    """

    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    dtype: str = "float32"  # of keys and values
    hidden: int = 0
    weight_bytes: int = 0
    family: str = ""
    windows: tuple[int, ...] = ()
    softcap: float = 0.0
    sinks: bool = False

    def reach(self, layer: int) -> int:
        """The sliding window of a layer in tokens; 0: its queries read all that came before."""
        return self.windows[layer] if self.windows else 0

    def untouched(self, tokens: int) -> int:
        """Entries of all layers and KV heads that transformers' own cache holds after so many tokens of a sequence.

        Of a layer with a sliding window it keeps the window's newest but one, those that the next query can read.
        """
        each = (min(tokens, self.reach(i) - 1) if self.reach(i) else tokens for i in range(self.layers))
        return self.kv_heads * sum(each)

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.q_heads // self.kv_heads

    @property
    def entry_bytes(self) -> int:
        """Key and value of one entry."""
        return 2 * self.head_dim * {"float32": 4, "bfloat16": 2, "float16": 2}[self.dtype]


@dataclass(frozen=True, slots=True)
class Shard:
    """Which part of a model's heads a process holds: the `rank`-th of `world` runs of equally many KV heads.

    whole: the plan of the whole model; key: by which `kernels.ranks` knows the processes that hold the other parts.
    """

    rank: int
    world: int
    whole: PolicyPlan
    key: str


@dataclass(frozen=True, slots=True)
class PolicyPlan:
    """A policy bound to a model, or to the part of its heads that a process holds (`shard`): the only input of ops,
    cache and kernels."""

    name: str
    digest: str
    facts: ModelFacts
    classes: tuple[ClassPlan, ...]
    class_of: tuple[tuple[int, ...], ...]  # [layer][kv head] -> index into classes
    counts: tuple[Count, ...] = ()
    shares: tuple[Share, ...] = ()
    states: tuple[StatePlan, ...] = ()
    updates: tuple[Update, ...] = ()
    units: tuple[UnitPlan, ...] = ()
    chunk: int | None = None  # prompts are cut into pieces of this many tokens
    peek: int = 0  # prompt tokens that run along with each piece but the last
    query_window: int = 0  # newest queries that a score may ask for: `q in last(w)`
    page: int = 16  # tokens per page, a power of two
    params: tuple[tuple[str, str], ...] = ()
    picks: int = 0  # slots through which a layer's choice reaches later layers
    scalars: int = 0  # numbers that a row keeps between decisions (`ema`)
    compact: bool = False  # keys lie unrotated and are rotated by their place in the row at each read
    rotates: bool = False  # some formula needs RoPE tables: `positions compact`, `raw.k`
    shard: Shard | None = None  # None: all heads are here

    @property
    def whole(self) -> PolicyPlan:
        """The plan of the whole model."""
        return self if self.shard is None else self.shard.whole

    @property
    def first_head(self) -> int:
        """The model's index of the first KV head that is here."""
        return 0 if self.shard is None else self.shard.rank * self.facts.kv_heads

    def unit(self, name: str) -> UnitPlan:
        return next(u for u in self.units if u.name == name)

    def site_classes(self, layer: int) -> tuple[int, ...]:
        """Indices of the classes that have heads in this layer, in order; classes of the same rows all of them."""
        here = set(self.class_of[layer])
        return tuple(i for i, cls in enumerate(self.classes) if i in here or cls.rows_of in here)

    def heads(self, layer: int, cls: int) -> tuple[int, ...]:
        """KV heads of one class in one layer."""
        rows = self._rows(cls)
        return tuple(h for h, c in enumerate(self.class_of[layer]) if c == rows)

    def class_size(self, cls: int) -> int:
        """KV heads of one class over all layers."""
        rows = self._rows(cls)
        return sum(row.count(rows) for row in self.class_of)

    def class_layers(self, cls: int) -> tuple[int, ...]:
        """Layers in which a class has heads, in any process, in order."""
        rows = self._rows(cls)
        return tuple(layer for layer, owners in enumerate(self.whole.class_of) if rows in owners)

    def class_reach(self, cls: int) -> int:
        """The sliding window of the layers in which a class has heads, one for all of them; 0: none."""
        return next((self.facts.reach(layer) for layer in self.class_layers(cls)), 0)

    def named_like(self, cls: int) -> int:
        """The first class of the same name: one head class of the policy may be several, one for each window."""
        return next(i for i, other in enumerate(self.classes) if other.name == self.classes[cls].name)

    def _rows(self, cls: int) -> int:
        first = self.classes[cls].rows_of
        return cls if first is None else first

    @property
    def evicts_in_step(self) -> bool:
        return any(c.fires_on(k) for c in self.classes for k in STEP_TRIGGERS)

    def spans(self, cls: int) -> bool:
        """Whether a class can be decided only once all layers have read: layers compete, or divide a measured share."""
        part = self.classes[cls]
        return any(t.layers == "across" for t in part.selections) or any(
            self.shares[share].measured for share in self.shares_of(cls)
        )

    def shares_of(self, cls: int) -> tuple[int, ...]:
        """Indices of the shares that a class's counts read."""
        counts = {t.count for t in self.classes[cls].keep if t.count is not None}
        nodes = [n for c in sorted(counts) for n in self.counts[c].expr.walk() if n.op == "share"]
        return tuple(sorted({n.value for n in nodes if isinstance(n.value, int)}))

    @property
    def folds(self) -> bool:
        """Whether rows may hold an entry without position, whose count weighs in the softmax."""
        return any(x.kind == "fold" and x.fn == "mean" for c in self.classes for x in c.losers)

    @property
    def ring(self) -> int:
        """How many of the newest queries must be kept, because a later piece, step or turn may ask for them."""
        formulas = [e for c in self.classes for e in formulas_of(c)]
        formulas += [share.score for share in self.shares if share.score is not None]
        asked = [source for e in formulas for n in e.walk() if (source := source_of(n)) is not None]
        newest = any(source.kind in ("forward", "sample") for source in asked)
        previous = any(source.kind == "previous" for source in asked)
        return max(self.query_window, self.peek, int(newest), 2 * int(previous))

    def state(self, name: str) -> StatePlan:
        return next(s for s in self.states if s.name == name)
