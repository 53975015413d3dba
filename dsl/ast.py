"""The syntax tree of the policy language: one node class per construct; those of expressions are in `ast_expr`.

Built by `parser`, read by `resolve`, `check` and `lower`. Nothing here is resolved: names are strings
as written. Guarantees: nodes are immutable and hashable, hold tuples only, and carry a `span` that
takes no part in equality.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from kvcompile.dsl.ast_expr import Axis as Axis
from kvcompile.dsl.ast_expr import Binary as Binary
from kvcompile.dsl.ast_expr import Call as Call
from kvcompile.dsl.ast_expr import Declaration as Declaration
from kvcompile.dsl.ast_expr import Expr as Expr
from kvcompile.dsl.ast_expr import Field as Field
from kvcompile.dsl.ast_expr import Name as Name
from kvcompile.dsl.ast_expr import Named as Named
from kvcompile.dsl.ast_expr import Node as Node
from kvcompile.dsl.ast_expr import Number as Number
from kvcompile.dsl.ast_expr import Portion as Portion
from kvcompile.dsl.ast_expr import Reduce as Reduce
from kvcompile.dsl.ast_expr import Text as Text
from kvcompile.dsl.ast_expr import Unary as Unary
from kvcompile.dsl.source import NOWHERE, Source, Span

# ---------------------------------------------------------------- sets


@dataclass(frozen=True, slots=True)
class Scope(Node):
    """`per head`, `per lot`, `shared heads`, `shared layers(8)`, `across heads floor 20%`."""

    kind: Literal["per", "shared", "across"]
    what: str
    size: Expr | None = None  # shared layers(8)
    floor: Expr | None = None  # across heads floor 20%


@dataclass(frozen=True, slots=True)
class Region(Node):
    """Entries named by position or history: `all rest prompt generated frozen sink(n) recent(n) stride(n)
    random(n, seed) span("name") newest UNIT own UNIT pow2 UNIT`. A call of an unknown name is one too."""

    kind: str
    args: tuple[Expr, ...] = ()
    named: tuple[Named, ...] = ()
    unit: str | None = None  # of newest, own, pow2


@dataclass(frozen=True, slots=True)
class Ref(Node):
    """A bare word in a set that is no region: the name of a `pick`."""

    name: str


@dataclass(frozen=True, slots=True)
class Selection(Node):
    """`top(n) [units] by score scope*`, also `bottom` and `cover`; `unit` is written in the singular or plural."""

    rank: Literal["top", "bottom", "cover"]
    amount: Expr
    by: Expr
    unit: str | None = None
    scopes: tuple[Scope, ...] = ()

    def scope(self, kind: str) -> Scope | None:
        """The first scope of a kind, or None."""
        return next((scope for scope in self.scopes if scope.kind == kind), None)


@dataclass(frozen=True, slots=True)
class Where(Node):
    """`where COND` as a term of a set."""

    cond: Expr


Term = Region | Ref | Selection | Where


@dataclass(frozen=True, slots=True)
class SetUnion(Node):
    """Terms joined by `|`, in the order written."""

    terms: tuple[Term, ...]


# ---------------------------------------------------------------- formats and losers


@dataclass(frozen=True, slots=True)
class FormatWord(Node):
    """`fp16`, `int(2)`, `lowrank(160)`, `prerope`, `outliers(2%)`."""

    name: str
    args: tuple[Expr, ...] = ()
    named: tuple[Named, ...] = ()


@dataclass(frozen=True, slots=True)
class Grain(Node):
    """`per channel(32)`, `per token`."""

    what: str
    size: Expr | None = None


@dataclass(frozen=True, slots=True)
class Move(Node):
    """`move cpu`, `move disk`: a format word, or what becomes of losers."""

    tier: str


@dataclass(frozen=True, slots=True)
class Format(Node):
    """One format; `part` limits it to keys or values."""

    words: tuple[FormatWord | Grain | Move, ...]
    part: Literal["k", "v"] | None = None


@dataclass(frozen=True, slots=True)
class Drop(Node):
    """`else drop`."""


@dataclass(frozen=True, slots=True)
class Merge(Node):
    """`else merge into nearest by cos(k) when sim >= 0.5 weight sim`."""

    into: str
    by: Call
    when: Expr | None = None
    weight: Expr | None = None


@dataclass(frozen=True, slots=True)
class Fold(Node):
    """`else fold mean weight count`, `else fold dct(50%)`."""

    fn: str
    args: tuple[Expr, ...] = ()
    named: tuple[Named, ...] = ()
    weight: Expr | None = None


@dataclass(frozen=True, slots=True)
class Requant(Node):
    """`else store as int(2)`."""

    formats: tuple[Format, ...]


Loser = Drop | Merge | Fold | Requant | Move


# ---------------------------------------------------------------- clauses


@dataclass(frozen=True, slots=True)
class Keep(Node):
    """Which entries stay; losers are treated by the first action that applies, drop being the default."""

    set: SetUnion
    losers: tuple[Loser, ...] = ()


@dataclass(frozen=True, slots=True)
class Attend(Node):
    """Which resident entries a query reads."""

    set: SetUnion


@dataclass(frozen=True, slots=True)
class Store(Node):
    """In what form entries live."""

    set: SetUnion
    formats: tuple[Format, ...]


@dataclass(frozen=True, slots=True)
class Trigger(Node):
    """`prefill.end`, `chunk(8192)`, `every(175) if len > 4096`, `filled(lot, 2)`; `when COND` has the name `when`."""

    name: str
    args: tuple[Expr, ...] = ()
    named: tuple[Named, ...] = ()
    cond: Expr | None = None


@dataclass(frozen=True, slots=True)
class At(Node):
    """When the set clauses above, back to the previous `at`, are computed anew."""

    triggers: tuple[Trigger, ...]


@dataclass(frozen=True, slots=True)
class Assign(Declaration):
    """`name = expr` of a state or landmark."""

    value: Expr


@dataclass(frozen=True, slots=True)
class Update(Declaration):
    """`name = expr` or `name += expr` of an `on` clause."""

    op: Literal["=", "+="]
    value: Expr


@dataclass(frozen=True, slots=True)
class Score(Declaration):
    """`score s = EXPR`."""

    value: Expr


@dataclass(frozen=True, slots=True)
class Unit(Declaration):
    """`unit page(16) from 4 with lo = min[i] k`."""

    args: tuple[Expr, ...]
    named: tuple[Named, ...] = ()
    offset: Expr | None = None
    landmarks: tuple[Assign, ...] = ()


@dataclass(frozen=True, slots=True)
class Share(Declaration):
    """`share b = budget by pyramid(20)`."""

    total: Expr
    by: Call


@dataclass(frozen=True, slots=True)
class Pick(Declaration):
    """`pick t = SET`: a set that later layers read."""

    set: SetUnion


@dataclass(frozen=True, slots=True)
class State(Node):
    """`state seen = now, gap = 1`."""

    assigns: tuple[Assign, ...]


@dataclass(frozen=True, slots=True)
class On(Node):
    """`on attend where COND: acc += ..., other = ...`."""

    event: str
    updates: tuple[Update, ...]
    where: Expr | None = None


@dataclass(frozen=True, slots=True)
class Positions(Node):
    """`positions original|compact`."""

    mode: str


@dataclass(frozen=True, slots=True)
class Off(Node):
    """`layers 21..27: off`."""


@dataclass(frozen=True, slots=True)
class LayerIndex(Node):
    """`5`, `last` or `last-2`: `number` counts from the first layer, or back from the last one."""

    number: int
    from_last: bool = False


@dataclass(frozen=True, slots=True)
class LayerRange(Node):
    """`2..last`, both ends included; a single layer has both ends equal."""

    first: LayerIndex
    last: LayerIndex


@dataclass(frozen=True, slots=True)
class LayerRest(Node):
    """`layers rest`: those that no other layer prefix names."""


@dataclass(frozen=True, slots=True)
class LayersPrefix(Node):
    """`layers 0, 1, last:`."""

    items: tuple[LayerRange | LayerRest, ...]


@dataclass(frozen=True, slots=True)
class HeadsPrefix(Node):
    """`local:`; `rest:` are the heads that other prefixes leave."""

    name: str


Prefix = LayersPrefix | HeadsPrefix


@dataclass(frozen=True, slots=True)
class Prefixed(Node):
    """Clauses for some layers or a head class; blocks may nest one kind in the other."""

    prefix: Prefix
    clauses: tuple[Clause, ...]


Clause = Keep | Attend | Store | At | Score | Unit | Share | Pick | State | On | Positions | Off | Prefixed


# ---------------------------------------------------------------- learning


@dataclass(frozen=True, slots=True)
class Gate(Declaration):
    """`gate z = hard_concrete(init=4.0) per head`."""

    by: Call
    scopes: tuple[Scope, ...] = ()


@dataclass(frozen=True, slots=True)
class Mix(Node):
    """`mix z * retrieval + (1 - z) * local`."""

    value: Expr


@dataclass(frozen=True, slots=True)
class Loss(Node):
    """`loss next_token + lagrange(mean(z), target=30%, ramp=80%)`."""

    value: Expr


@dataclass(frozen=True, slots=True)
class Freeze(Node):
    """`freeze weights`."""

    names: tuple[str, ...]


LearnClause = Gate | Mix | Loss | Freeze


# ---------------------------------------------------------------- items of a file


@dataclass(frozen=True, slots=True)
class Param(Declaration):
    """A parameter with its default."""

    default: Expr


@dataclass(frozen=True, slots=True)
class Policy(Declaration):
    """`policy NAME(params) extends PARENT: clauses`; `header` is the span of `policy NAME`."""

    params: tuple[Param, ...] = ()
    parent: Name | None = None
    clauses: tuple[Clause, ...] = ()
    header: Span = field(default=NOWHERE, compare=False, repr=False, kw_only=True)


@dataclass(frozen=True, slots=True)
class HeadsRest(Node):
    """`rest` as the source of a head class: every head that no other class takes."""


@dataclass(frozen=True, slots=True)
class HeadsSame(Node):
    """Another head class by name."""

    name: str


HeadSource = Call | HeadsRest | HeadsSame  # Call: table("f.tsv", top=30%), probe("induction", top=14%)


@dataclass(frozen=True, slots=True)
class HeadsDecl(Declaration):
    """`heads far = probe("induction", top=14%) | probe("echo", top=1%)`."""

    sources: tuple[HeadSource, ...]


@dataclass(frozen=True, slots=True)
class Learn(Node):
    """`learn HEADS for POLICY:` with its clauses."""

    heads: Name
    policy: Name
    clauses: tuple[LearnClause, ...]


@dataclass(frozen=True, slots=True)
class File(Node):
    """One parsed text."""

    source: Source = field(compare=False, repr=False)
    policies: tuple[Policy, ...] = ()
    heads: tuple[HeadsDecl, ...] = ()
    learns: tuple[Learn, ...] = ()

    def policy(self, name: str) -> Policy | None:
        """The policy of that name, or None."""
        return next((policy for policy in self.policies if policy.name == name), None)
