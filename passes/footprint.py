"""KV footprint and peak in closed form, before running.

Takes a plan, a prompt length and a number of decode forwards; gives `Footprint`. A forward of n tokens on P
resident entries adds n(n+1)/2 + nP, over T(T+1)/2, mean over KV heads; peak is the largest mean of P + n, over T
(PruLong, arXiv 2506.17121). Peeked tokens count in n, not in T. Guarantees: whole numbers up to one division; never
too small, and exact where it says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvcompile.kernels.plan import PolicyPlan
from kvcompile.passes.groups import Group, groups
from kvcompile.passes.residents import Forward, forwards


@dataclass(frozen=True, slots=True)
class Spent:
    """Of some KV heads together, as parts of an untouched cache (1.0); `exact` is False for upper bounds."""

    footprint: float
    peak: float
    exact: bool


@dataclass(frozen=True, slots=True)
class Footprint:
    """`footprint` and `peak` are means over all KV heads; `exact` is False for upper bounds.

    by_class: by the index of each class that has KV heads, the first of its name; by_layer: one for each layer;
    by_head: [layer][KV head]. Heads of layers that are off count, and hold nothing. Where heads compete only the sum of
    a layer is known, where layers do only that of all: their parts are bounds. A peak is the largest of its own heads'
    means, so those of parts need not meet in one forward.
    """

    footprint: float
    peak: float
    exact: bool
    by_class: dict[int, Spent]
    by_layer: tuple[Spent, ...]
    by_head: tuple[tuple[Spent, ...], ...]

    def wherever(self) -> Footprint:
        """The same while a probe has yet to say which KV heads are which: each may be the one that spends most."""
        heads = [head for row in self.by_head for head in row]
        most = Spent(max(head.footprint for head in heads), max(head.peak for head in heads), False)
        by_head = tuple((most,) * len(row) for row in self.by_head)
        return replace(self, by_layer=(most,) * len(self.by_layer), by_head=by_head)


def footprint(plan: PolicyPlan, prompt: int, generate: int = 0) -> Footprint:
    """The footprint of a prompt of `prompt` tokens and `generate` decode forwards. ValueError for an empty prompt."""
    if prompt < 1 or generate < 0:
        raise ValueError(f"a prompt of {prompt} tokens with {generate} steps has no footprint")
    parts = groups(plan, prompt)
    owners = [_owner(plan, group) for group in parts]
    everywhere = tuple(_all_of(index, group) for index, group in enumerate(parts))
    classes = {
        owner: tuple(part for part, of in zip(everywhere, owners, strict=True) if plan.named_like(of) == owner)
        for owner in dict.fromkeys(map(plan.named_like, owners))
    }
    layers = [_layer(plan, parts, owners, layer) for layer in range(plan.facts.layers)]
    heads = [_heads(plan, parts, owners, layer) for layer in range(plan.facts.layers)]
    wanted = [everywhere, *classes.values(), *filter(None, layers), *(pieces for row in heads for pieces in row)]
    # Most layers and heads are alike: each sum is done once.
    tallies = {pieces: _Tally(pieces) for pieces in wanted}
    seen = 0
    for forward in forwards(plan, prompt, generate):
        for tally in tallies.values():
            tally.add(forward, seen)
        seen += forward.tokens
    spent = {pieces: tally.spent(prompt + generate) for pieces, tally in tallies.items()}
    spent[()] = nothing = Spent(0.0, 0.0, True)  # of layers that are off, whose heads count as holding nothing
    whole = tallies[everywhere].spent(prompt + generate, len(plan.off) * plan.facts.kv_heads)
    return Footprint(
        whole.footprint,
        whole.peak,
        whole.exact,
        {owner: spent[pieces] for owner, pieces in sorted(classes.items())},
        tuple(spent[pieces] for pieces in layers),
        tuple(tuple(spent[pieces] for pieces in row) or (nothing,) * plan.facts.kv_heads for row in heads),
    )


# ---------------------------------------------------------------- which part of which group


@dataclass(frozen=True, slots=True)
class _Piece:
    """`rows` of the `of` KV heads that hold one of `parts` equal parts of a group's sum together.

    No head holds more than all that was seen; where only some of those heads are meant, that is all that is known.
    """

    group: int
    parts: int
    rows: int
    of: int


def _all_of(index: int, group: Group) -> _Piece:
    rows = group.rows * group.times
    return _Piece(index, 1, rows, rows)


def _layer(plan: PolicyPlan, parts: Sequence[Group], owners: Sequence[int], layer: int) -> tuple[_Piece, ...]:
    """All KV heads of a layer, in pieces of the groups that have heads there."""
    out = []
    for index, (group, owner) in enumerate(zip(parts, owners, strict=True)):
        if layer not in group.layers:
            continue
        rows = len(plan.heads(layer, owner))
        pooled = group.pooled
        out.append(_Piece(index, 1 if pooled else len(group.layers), rows, group.rows if pooled else rows))
    return tuple(out)


def _heads(
    plan: PolicyPlan, parts: Sequence[Group], owners: Sequence[int], layer: int
) -> tuple[tuple[_Piece, ...], ...]:
    """Each KV head of a layer by itself."""
    out: dict[int, tuple[_Piece, ...]] = {}
    for index, (group, owner) in enumerate(zip(parts, owners, strict=True)):
        if layer in group.layers:
            out |= {head: (_Piece(index, group.times, 1, group.rows),) for head in plan.heads(layer, owner)}
    return tuple(out[head] for head in sorted(out))


def _owner(plan: PolicyPlan, group: Group) -> int:
    """The first class of a group's rows."""
    return next(rule for rule in group.rules if plan.classes[rule].rows_of is None)


# ---------------------------------------------------------------- sums


class _Tally:
    """The area and the peak of some pieces, forward by forward."""

    def __init__(self, pieces: tuple[_Piece, ...]) -> None:
        self.pieces = pieces
        self.rows = sum(piece.rows for piece in pieces)
        self.area = self.peak = 0
        self.exact = self.known = True

    def add(self, forward: Forward, seen: int) -> None:
        """A forward after `seen` tokens."""
        n = forward.tokens + forward.peeked
        resident = 0
        exact = self.known
        for piece in self.pieces:
            total = forward.before[piece.group] // piece.parts
            resident += min(total, piece.rows * seen)
            exact = exact and (piece.rows == piece.of or total == piece.of * seen)
        self.area += self.rows * (n * (n + 1) // 2) + n * resident
        self.peak = max(self.peak, resident + self.rows * n)
        self.exact = self.exact and exact
        # What the latest forward leaves is not read any more.
        self.known = all(forward.known[piece.group] for piece in self.pieces)

    def spent(self, total: int, idle: int = 0) -> Spent:
        """Means over these rows, and over others that hold nothing."""
        rows = self.rows + idle
        return Spent(self.area / (rows * (total * (total + 1) // 2)), self.peak / (rows * total), self.exact)
