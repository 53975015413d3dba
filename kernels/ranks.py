"""Heads that several processes hold: cutting a plan, and bringing together what heads decide or compute as one.

Takes the plan of a whole model; gives the plan of one process's heads, and what all of them say, lower heads first.
Guarantees: nothing is exchanged for what concerns one process's heads alone; every process that has a part in a
decision sees the same numbers in the same order, so all decide alike, and as one process would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcompile.kernels.arithmetic import reduced
from kvcompile.kernels.compete import Place
from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.formulas import ties_heads
from kvcompile.kernels.plan import ClassPlan, PolicyPlan, Region, Selection, Shard, formulas_of

Members = tuple[int, ...]  # ranks, ascending

# Regions whose entries follow from positions alone, so that they are the same in every row.
_BY_POSITION = ("all", "sink", "recent", "stride", "prompt", "generated", "newest")


class Ranks(Protocol):
    """Processes that hold the heads of one model, told apart by their rank."""

    rank: int
    world: int

    def exchange(self, tensor: Tensor, members: Members) -> list[Tensor]:
        """The tensors of all members, of one shape and dtype, by rank; each of them calls this, in the same order."""


_known: dict[str, Ranks] = {}


def sharded(plan: PolicyPlan, ranks: Ranks, key: str, weight_bytes: int) -> PolicyPlan:
    """The plan of the part of the heads that `ranks.rank` holds; `key` stands for these processes from now on.

    weight_bytes: of the parameters that are here. KvCompileError where the KV heads cannot be divided evenly, or decide
    together what they read.
    """
    facts, world = plan.facts, ranks.world
    if facts.kv_heads % world:
        raise KvCompileError(
            f"{facts.kv_heads} KV heads cannot be divided evenly over {world} processes: use a number of processes "
            f"that divides {facts.kv_heads}"
        )
    for read in plan.reads:
        together = any(t.scope in ("shared", "across") for rule in read.rules for t in rule.selections)
        if together or any(ties_heads(formula) for rule in read.rules for formula in formulas_of(rule)):
            raise KvCompileError(
                f"{plan.name} lets heads decide together what they read (rows {read.name}), and heads lie in {world} "
                "processes: this is not supported yet, so let them choose `per head` or `per query_head`, and let no "
                "score or condition reduce over `[h]`"
            )
    _known[key] = ranks
    heads = facts.kv_heads // world
    here = slice(ranks.rank * heads, (ranks.rank + 1) * heads)
    return replace(
        plan,
        facts=replace(facts, kv_heads=heads, q_heads=facts.q_heads // world, weight_bytes=weight_bytes),
        class_of=tuple(row[here] for row in plan.class_of),
        read_of=tuple(row[here] for row in plan.read_of),
        digest=f"{plan.digest}.{ranks.rank}of{world}",
        shard=Shard(ranks.rank, world, plan, key),
    )


def heads_at(plan: PolicyPlan, rank: int, layer: int, cls: int) -> tuple[int, ...]:
    """The KV heads of a class that a rank holds in a layer, by the model's index."""
    first = rank * plan.facts.kv_heads
    return tuple(h for h in plan.whole.heads(layer, cls) if first <= h < first + plan.facts.kv_heads)


def members_of(plan: PolicyPlan, cls: int, layers: Sequence[int]) -> Members:
    """The ranks that hold heads of a class in some of these layers."""
    return tuple(rank for rank in everyone(plan) if any(heads_at(plan, rank, layer, cls) for layer in layers))


def everyone(plan: PolicyPlan) -> Members:
    """All ranks."""
    return tuple(range(1 if plan.shard is None else plan.shard.world))


def told(plan: PolicyPlan, numbers: Sequence[int], device: torch.device) -> list[list[int]]:
    """A few whole numbers of every process, as many in each, by rank."""
    assert plan.shard is not None
    mine = torch.tensor(numbers, dtype=torch.int64, device=device)
    return [part.tolist() for part in _known[plan.shard.key].exchange(mine, everyone(plan))]


def gathered(plan: PolicyPlan, tensor: Tensor, members: Members) -> list[Tensor]:
    """A tensor of each member, by rank: of one dtype and number of dimensions, each of a shape of its own."""
    assert plan.shard is not None
    ranks = _known[plan.shard.key]
    shapes = [s.tolist() for s in ranks.exchange(torch.tensor(tensor.shape, device=tensor.device), members)]
    found = ranks.exchange(_filled(tensor, _widest(shapes)).contiguous(), members)
    return [part[tuple(slice(size) for size in own)] for part, own in zip(found, shapes, strict=True)]


def _widest(shapes: Sequence[Sequence[int]]) -> list[int]:
    return [max(sizes) for sizes in zip(*shapes, strict=True)]


def _filled(tensor: Tensor, shape: Sequence[int], front: int | None = None) -> Tensor:
    """A tensor with zeros behind what it holds, along the dimension `front` before it."""
    spare = [most - have for have, most in zip(tensor.shape, shape, strict=True)]
    return F.pad(tensor, [n for d in reversed(range(len(spare))) for n in _sides(spare[d], d == front)])


def _sides(n: int, front: bool) -> tuple[int, int]:
    return (n, 0) if front else (0, n)


# -- what heads compute together -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Across:
    """Brings values of some heads together with those of the same layer's other heads, which other processes hold."""

    plan: PolicyPlan
    members: Members

    def joined(self, values: Tensor, dim: int, front: int | None = None) -> Tensor:
        """Values of this process's heads, along `dim`, as values of all; shorter ones are filled up with 0, along the
        dimension `front` before what they hold."""
        parts = gathered(self.plan, values, self.members)
        shape = _widest([part.shape for part in parts])
        wide = [_filled(part, [*shape[:dim], part.shape[dim], *shape[dim + 1 :]], front) for part in parts]
        return torch.cat(wide, dim)

    def over_heads(self, fn: str, values: Tensor, sequences: int) -> Tensor:
        """A reduction over all query heads of a layer, of each sequence its own: [rows, group, q, units, n, d].

        The newest entries of rows without units (units is 1) meet; what longer rows have beyond these is theirs alone.
        """
        heads, units, n = len(values) // sequences, values.shape[3], values.shape[4]
        whole = self.joined(values.unflatten(0, (-1, heads)), 1, front=5)
        found = reduced(fn, whole, (1, 2))[..., :units, -n:, :]
        return found.expand(-1, heads, *found.shape[2:]).flatten(0, 1)

    def own(self, values: Tensor) -> Tensor:
        """Of values of all the model's KV heads, along dimension 0, those of this process."""
        return values[self.plan.first_head : self.plan.first_head + self.plan.facts.kv_heads]


def across(plan: PolicyPlan, cls: int | None, layer: int) -> Across | None:
    """How a layer's rows of a class, None: of all KV heads, meet those of other processes; None: there are none."""
    if plan.shard is None:
        return None
    members = everyone(plan) if cls is None else members_of(plan, cls, [layer])
    return Across(plan, members) if len(members) > 1 else None


# -- what heads decide together --------------------------------------------------------------------------------------


def is_joint(plan: PolicyPlan, term: Selection) -> bool:
    """Whether a selection, or its score, needs heads that other processes hold."""
    landmarks = [e for u in plan.units for _, e in u.landmarks]
    together = term.scope in ("shared", "across") or any(ties_heads(e) for e in (term.score, *landmarks))
    return plan.shard is not None and together


def has_joint(plan: PolicyPlan, part: ClassPlan) -> bool:
    """The same of all that a class decides by."""
    formulas = formulas_of(part) + [e for x in part.losers for e in (x.when, x.weight) if e is not None]
    tied = plan.shard is not None and any(ties_heads(formula) for formula in formulas)
    return tied or any(is_joint(plan, term) for term in part.selections)


@dataclass(frozen=True)
class Table:
    """Rows that decide together, those of all processes: of each its layer, head and sequence; `own` are this one's."""

    plan: PolicyPlan
    members: Members
    layer: tuple[int, ...]
    head: tuple[int, ...]
    sequence: tuple[int, ...]
    own: slice

    def place(self, cls: int) -> Place:
        """Where all the rows stand."""
        return Place(cls, self.layer, self.head, self.sequence)

    def bring(self, *values: Tensor, front: bool = False) -> list[Tensor]:
        """Numbers of own rows as numbers of all rows: [rows, n] or [rows, n, m], of one shape, or [rows].

        Fewer than n are filled up with 0, with `front` before the others. They go as float64, which is exact for
        float32, positions and marks.
        """
        shape = values[0].shape
        full = [x if x.ndim == len(shape) else x.view(-1, *[1] * (len(shape) - 1)).expand(shape) for x in values]
        parts = gathered(self.plan, torch.stack([x.double() for x in full], -1), self.members)
        widest = _widest([part.shape for part in parts])
        found = torch.cat([_filled(part, [len(part), *widest[1:]], 1 if front else None) for part in parts])
        back = [found[..., i].to(x.dtype) for i, x in enumerate(values)]
        return [y if x.ndim == y.ndim else y.flatten(1)[:, -1] for x, y in zip(values, back, strict=True)]

    def mine(self, won: Tensor, like: Tensor, front: bool = False) -> Tensor:
        """Of all rows' winners this process's, in the shape of `like`."""
        own = won[self.own]
        if front:
            return own[:, own.shape[1] - like.shape[1] :]
        return own[tuple(slice(size) for size in like.shape)]


def table(plan: PolicyPlan, term: Selection, cls: int, layers: Sequence[int], sequences: Sequence[int]) -> Table | None:
    """Who decides a selection: the class's heads in these layers (whether or not one is here) of these sequences, in
    this order. None: this process's rows alone."""
    if plan.shard is None or term.scope not in ("shared", "across") or term.rank == "where":
        return None
    members = members_of(plan, cls, layers)
    if len(members) < 2:
        return None
    rows: list[tuple[int, int, int]] = []
    own = slice(0, 0)
    for rank in members:
        start = len(rows)
        rows += [(x, h, b) for x in layers for b in sequences for h in heads_at(plan, rank, x, cls)]
        if rank == plan.shard.rank:
            own = slice(start, len(rows))
    layer, head, sequence = zip(*rows, strict=True)
    return Table(plan, members, layer, head, sequence, own)


def of_all_heads(plan: PolicyPlan, values: Tensor, dim: int) -> Tensor:
    """Values of this process's KV heads, along `dim`, as values of all the model's."""
    return values if plan.shard is None else Across(plan, everyone(plan)).joined(values, dim)


# -- what the host counts --------------------------------------------------------------------------------------------


def longest(plan: PolicyPlan, lengths: Tensor, rows: Sequence[Tensor]) -> list[list[int]]:
    """The most entries of a row of each class in each sequence, wherever it is held, [class][sequence].

    lengths int32 [layers, batch, kv_heads]; rows: of each class its rows, bool [layers, kv_heads]. Exact for classes
    that ask for it (`full(n)`), of the others what is here.
    """
    found = torch.stack([(lengths * mask[:, None].to(lengths.device)).amax((0, 2)) for mask in rows])
    asking = [i for i, part in enumerate(plan.classes) if any(t.kind == "full" for t in part.triggers)]
    if plan.shard is not None and not all(_alike(plan, i) for i in asking):
        found = torch.stack(gathered(plan, found, everyone(plan))).amax(0)
    return [[int(n) for n in line] for line in found.tolist()]


def _alike(plan: PolicyPlan, cls: int) -> bool:
    """Whether every process surely has a row of a class as long as its longest: rows of a class are equally long where
    all is chosen by position, or so many of each row."""
    rules = [part for i, part in enumerate(plan.classes) if cls in (i, part.rows_of)]
    by_number = all(
        t.kind in _BY_POSITION if isinstance(t, Region) else t.scope == "head" and t.rank in ("top", "bottom")
        for part in rules
        for t in part.keep
    )
    moved = any(part.slides or part.losers or any(t.cond is not None for t in part.triggers) for part in rules)
    layers = plan.class_layers(cls)
    spread = len(layers) and all(members_of(plan, cls, [layer]) == everyone(plan) for layer in layers)
    return by_number and not moved and len(rules) == 1 and bool(spread)
