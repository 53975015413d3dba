"""Frozen plans: all that ops, the cache and the kernels ever see of a policy.

Takes nothing from the language: `passes.freeze` writes these, everything at run time reads them.
Every object here is immutable, hashable and free of torch, so that a plan can be a cache key,
a constant of a compiled graph (by its digest) and a row of a table that a person reads. Formulas are those of `expr`.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvcompile.kernels.expr import AXES as AXES
from kvcompile.kernels.expr import Expr as Expr
from kvcompile.kernels.expr import QuerySource as QuerySource
from kvcompile.kernels.expr import evidence_of as evidence_of
from kvcompile.kernels.expr import source_of as source_of
from kvcompile.kernels.expr import words_of as words_of
from kvcompile.kernels.terms import STEP_TRIGGERS as STEP_TRIGGERS
from kvcompile.kernels.terms import Count as Count
from kvcompile.kernels.terms import Loser as Loser
from kvcompile.kernels.terms import Region as Region
from kvcompile.kernels.terms import Selection as Selection
from kvcompile.kernels.terms import Share as Share
from kvcompile.kernels.terms import StatePlan as StatePlan
from kvcompile.kernels.terms import Term as Term
from kvcompile.kernels.terms import Trigger as Trigger
from kvcompile.kernels.terms import UnitPlan as UnitPlan
from kvcompile.kernels.terms import Update as Update


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


@dataclass(frozen=True, slots=True)
class ReadRule:
    """A set that queries read, or a choice for later layers, from a forward at which one of its triggers fires.

    terms: regions, tested at the query's own position, and selections: each query selects for itself where the score
    asks for it (`QuerySource("own")`), else once in a forward for all of its queries. triggers: prefill.end, chunk,
    step, every or when; none: every forward (regions alone). pick: the slot that the winners go to, in place of
    narrowing anything.
    """

    terms: tuple[Term, ...]
    triggers: tuple[Trigger, ...] = ()
    pick: int | None = None

    @property
    def selections(self) -> tuple[Selection, ...]:
        return tuple(t for t in self.terms if isinstance(t, Selection))

    @property
    def narrows(self) -> bool:
        """Whether it leaves something out, or says what later layers read."""
        return self.pick is not None or not any(isinstance(t, Region) and t.kind == "all" for t in self.terms)

    @property
    def fires_in_steps(self) -> bool:
        return not self.triggers or any(t.kind in ("step", "every", "when") for t in self.triggers)

    @property
    def always(self) -> bool:
        """Whether it is computed anew in every forward."""
        sure = {t.kind for t in self.triggers if t.cond is None}
        return not self.triggers or {"chunk", "step"} <= sure


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """What the queries of some rows read of what is resident: the latest rule that fired says it.

    In a forward of which no rule fires, a step goes on with the set of the newest query before it, and all later
    entries; a prefill reads all. Rules never fire together, but for picks, which come before the sets of their layer.
    """

    name: str
    rules: tuple[ReadRule, ...]

    @property
    def holds(self) -> bool:
        """Whether some step may go on with the set of an earlier forward (in the hidden state `@read`)."""
        sets = [rule for rule in self.rules if rule.pick is None]
        sure = any(not r.triggers or any(t.kind == "step" and t.cond is None for t in r.triggers) for r in sets)
        return bool(sets) and not sure

    @property
    def narrows_steps(self) -> bool:
        """Whether some step may read less than all."""
        return self.holds or any(rule.narrows and rule.fires_in_steps for rule in self.rules)


def formulas_of(cls: ClassPlan | ReadRule) -> list[Expr]:
    """The scores of its selections and the conditions of its triggers."""
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
    reads: tuple[ReadPlan, ...] = ()
    read_of: tuple[tuple[int, ...], ...] = ()  # [layer][kv head] -> index into reads, -1: all is read; (): of all rows
    off: tuple[int, ...] = ()  # layers whose attention does not run and that hold nothing

    @property
    def live(self) -> tuple[int, ...]:
        """The layers whose attention runs, in order; the others have no heads of any class."""
        return tuple(layer for layer in range(self.facts.layers) if layer not in self.off)

    def reading(self, layer: int) -> tuple[int, ...]:
        """The index into `reads` of each KV head of a layer, -1 where a head reads all."""
        return self.read_of[layer] if self.read_of else (-1,) * self.facts.kv_heads

    @property
    def rules(self) -> int:
        """How many rules `reads` has in all."""
        return sum(len(read.rules) for read in self.reads)

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
        here = set() if layer in self.off else set(self.class_of[layer])
        return tuple(i for i, cls in enumerate(self.classes) if i in here or cls.rows_of in here)

    def heads(self, layer: int, cls: int) -> tuple[int, ...]:
        """KV heads of one class in one layer."""
        if layer in self.off:
            return ()
        rows = self._rows(cls)
        return tuple(h for h, c in enumerate(self.class_of[layer]) if c == rows)

    def class_size(self, cls: int) -> int:
        """KV heads of one class over all layers."""
        return sum(len(self.heads(layer, cls)) for layer in self.live)

    def class_layers(self, cls: int) -> tuple[int, ...]:
        """Layers in which a class has heads, in any process, in order."""
        rows = self._rows(cls)
        return tuple(layer for layer in self.live if rows in self.whole.class_of[layer])

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
        formulas += [e for read in self.reads for rule in read.rules for e in formulas_of(rule)]
        formulas += [share.score for share in self.shares if share.score is not None]
        asked = [source for e in formulas for n in e.walk() if (source := source_of(n)) is not None]
        newest = any(source.kind in ("forward", "sample") for source in asked)
        previous = any(source.kind == "previous" for source in asked)
        return max(self.query_window, self.peek, int(newest), 2 * int(previous))

    def state(self, name: str) -> StatePlan:
        return next(s for s in self.states if s.name == name)
