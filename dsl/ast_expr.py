"""The syntax tree, expressions, and what every node of it is.

Nothing here is resolved: names are strings as written. Guarantees: nodes are immutable and hashable, hold tuples only,
and carry a `span` that takes no part in equality.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from fractions import Fraction
from typing import Literal

from kvcompile.dsl.source import NOWHERE, Span


@dataclass(frozen=True, slots=True)
class Node:
    """Anything with a place in a policy text."""

    span: Span = field(default=NOWHERE, compare=False, repr=False, kw_only=True)

    def children(self) -> Iterator[Node]:
        """The nodes directly below, in the order of the text."""
        for spec in fields(self):
            value = getattr(self, spec.name)
            if isinstance(value, Node):
                yield value
            elif isinstance(value, tuple):
                yield from (item for item in value if isinstance(item, Node))

    def walk(self) -> Iterator[Node]:
        """This node and all below it, parents first."""
        yield self
        for child in self.children():
            yield from child.walk()


@dataclass(frozen=True, slots=True)
class Declaration(Node):
    """A node that gives something a name; `name_span` is the place of that name alone."""

    name: str
    name_span: Span = field(default=NOWHERE, compare=False, repr=False, kw_only=True)


NumberKind = Literal["int", "float", "size", "percent", "bytes"]
BinaryOp = Literal["+", "-", "*", "/", "<", "<=", ">", ">=", "==", "!=", "and", "or"]


@dataclass(frozen=True, slots=True)
class Number(Node):
    """An exact number: `30%` is 3/10 of kind percent, `32k` is 32768 of kind size, `2GiB` of kind bytes."""

    value: Fraction
    kind: NumberKind = "int"


@dataclass(frozen=True, slots=True)
class Text(Node):
    """A string in double quotes, here without them."""

    value: str


@dataclass(frozen=True, slots=True)
class Name(Node):
    """A bare word: a parameter, score, state, landmark, share, field, or run-time number."""

    id: str


@dataclass(frozen=True, slots=True)
class Field(Node):
    """`raw.k`, `next.v`, `prev.q`."""

    owner: str
    name: str


@dataclass(frozen=True, slots=True)
class Named(Node):
    """An argument with its name, `top=30%`."""

    name: str
    value: Expr


@dataclass(frozen=True, slots=True)
class Call(Node):
    """`maxpool(x, 7)`, `probe("echo", top=1%)`; positional arguments come before named ones."""

    fn: str
    args: tuple[Expr, ...] = ()
    named: tuple[Named, ...] = ()

    def get(self, name: str) -> Expr | None:
        """The value of a named argument, or None."""
        return next((arg.value for arg in self.named if arg.name == name), None)


@dataclass(frozen=True, slots=True)
class Axis(Node):
    """An axis of a reduction; `source` is what stands after `in` (`last(64)`, `peek(64)`, `sample(5%)`)."""

    name: str
    source: Expr | None = None


@dataclass(frozen=True, slots=True)
class Reduce(Node):
    """`sum[q in last(64)] attn`."""

    fn: str
    axes: tuple[Axis, ...]
    body: Expr


@dataclass(frozen=True, slots=True)
class Unary(Node):
    """`-x` or `not x`."""

    op: Literal["-", "not"]
    operand: Expr


@dataclass(frozen=True, slots=True)
class Binary(Node):
    """Arithmetic, a comparison, `and` or `or`."""

    op: BinaryOp
    left: Expr
    right: Expr


@dataclass(frozen=True, slots=True)
class Portion(Node):
    """`10% of prompt`: `fraction` (a percentage, or a name that stands for one) of prompt, len or chunk."""

    fraction: Expr
    of: str


Expr = Number | Text | Name | Field | Call | Reduce | Unary | Binary | Portion
