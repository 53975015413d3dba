"""Who competes with whom in a selection, and who wins: scopes, ranks and ties.

Takes one score per contestant (entries of a row, or its units), gives the winners. Guarantees: ties go to the older
contestant, then the lower head, then the lower layer; NaN is beaten by every number; sums of `cover` are float64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from kvcompile.kernels.plan import PolicyPlan, Selection


@dataclass(frozen=True)
class Place:
    """Where rows that are judged together stand: of each its layer, KV head and sequence; `cls`, their class.

    picked int32 [picks, batch, kv_heads, positions]: what layers choose for later ones; judged bool [rows]: which
    rows decide now, None for all of them; first: the model's index of KV head 0, where other processes hold heads, too.
    segment, links: as in `Site`, where a set reads by stretches of the text.
    """

    cls: int
    layer: tuple[int, ...]
    head: tuple[int, ...]
    sequence: tuple[int, ...]
    picked: Tensor | None = None
    judged: Tensor | None = None
    first: int = 0
    segment: Tensor | None = None
    links: Tensor | None = None

    def leads(self, plan: PolicyPlan, sharing: int) -> list[bool]:
        """Of every `sharing` layers of the class, the first that holds the row's head decides for the others."""
        layers = plan.class_layers(self.cls)
        found = []
        for layer, head in zip(self.layer, self.head, strict=True):
            start = layers.index(layer) // sharing * sharing
            group = layers[start : start + sharing]
            found.append(layer == next(x for x in group if head + self.first in plan.whole.heads(x, self.cls)))
        return found

    def chosen(self, slot: int, pos: Tensor) -> Tensor:
        """Which of the positions int64 [rows, n] slot `slot` holds: bool [rows, n]."""
        return self.marks(slot, pos) != 0

    def marks(self, slot: int, pos: Tensor) -> Tensor:
        """What slot `slot` holds for the positions int64 [rows, n]: int32 [rows, n], 0 where nothing is chosen."""
        assert self.picked is not None
        marks = self.picked[slot, list(self.sequence), list(self.head)]
        inside = (pos >= 0) & (pos < marks.shape[1])
        return marks.gather(1, torch.where(inside, pos, 0)).masked_fill(~inside, 0)

    def mark(self, slot: int, pos: Tensor, bits: Tensor, rows: Tensor) -> None:
        """Put bits int64 [all rows, n] of some rows, bool [all rows], into a slot, in place of what it held."""
        assert self.picked is not None
        for row in rows.nonzero().flatten().tolist():
            marks = self.picked[slot, self.sequence[row], self.head[row]]
            marks.zero_()
            there = bits[row] != 0
            marks[pos[row, there]] = bits[row, there].to(marks.dtype)

    def choose(self, slot: int, pos: Tensor, won: Tensor, rows: list[int]) -> None:
        """Put the winners of some rows into a slot, in place of what it held for them: pos, won [all rows, n]."""
        assert self.picked is not None
        for row in rows:
            marks = self.picked[slot, self.sequence[row], self.head[row]]
            if self.judged is None or bool(self.judged[row]):
                marks.zero_()
                marks[pos[row, won[row]]] = -1  # every query head of the KV head


@dataclass(frozen=True)
class Contest:
    """Rows of one line decide together, by their mean score; lines of one group compete for the sum of their numbers.

    line int64 [rows]; first int64 [lines], a row of each; group int64 [lines]. Lines count up by head, then layer.
    """

    line: Tensor
    first: Tensor
    group: Tensor

    @classmethod
    def of(cls, term: Selection, place: Place, device: torch.device) -> Contest | None:
        """The contest of a selection; None where each row decides alone.

        ValueError for query heads that compete over layers, which no policy can ask for.
        """
        over_layers = term.layers == "across"
        if term.scope == "query_head" and over_layers:
            raise ValueError("query heads cannot compete over layers")
        if term.scope in ("head", "query_head") and not over_layers:
            return None
        heads = [-1] * len(place.head) if term.scope == "shared" else list(place.head)
        speakers = list(zip(heads, place.layer, place.sequence, strict=True))
        lines = sorted(set(speakers))
        pools = [(s, -1 if over_layers else x, -1 if term.scope == "across" else h) for h, x, s in lines]
        groups = {pool: i for i, pool in enumerate(dict.fromkeys(pools))}
        return cls(
            torch.tensor([lines.index(who) for who in speakers], device=device),
            torch.tensor([speakers.index(who) for who in lines], device=device),
            torch.tensor([groups[pool] for pool in pools], device=device),
        )

    def total(self, numbers: Tensor) -> Tensor:
        """Each row's group's sum of a number per row, that of a line counted once: int64 [rows]."""
        own = numbers[self.first]
        sums = own.new_zeros(len(self.group)).index_add(0, self.group, own)
        return sums[self.group][self.line]

    def by_unit(self, units: int) -> Contest:
        """The same for rows that fall into units, [rows * units]: each unit is a contest of its own."""
        offset = torch.arange(units, device=self.line.device)
        line, first, group = ((x[:, None] * units + offset).flatten() for x in (self.line, self.first, self.group))
        return Contest(line, first, group)


def budget(term: Selection, versus: Contest | None, candidates: Tensor, n: Tensor) -> Tensor:
    """How many may win in each row's group, int64 [rows]; candidates bool [rows, contestants], n int64 [rows].

    A bare fraction is of the group's own candidates, exact and truncated once.
    """
    there = n if term.fraction is None else candidates.sum(1)
    if versus is not None:
        there = versus.total(there)
    return there if term.fraction is None else there * term.fraction.numerator // term.fraction.denominator


def winners(
    term: Selection, versus: Contest | None, values: Tensor, age: Tensor, candidates: Tensor, n: Tensor
) -> Tensor:
    """The winners, bool [rows, contestants].

    values float [rows, contestants], of query heads [rows, group, contestants]; age int64 [rows, contestants], rising
    among candidates; n int64 [rows] as `budget` gives it.
    """
    if term.rank == "where":
        return candidates & (values != 0) & ~values.isnan()
    if values.ndim == 3:
        return in_query_heads(term, values, candidates, n).any(1)
    if versus is None:
        return _in_rows(term, values, candidates, n)
    shared = len(versus.first) < len(versus.line)
    if shared:
        values = torch.stack([values[versus.line == line].mean(0) for line in range(len(versus.first))])
    else:
        values = values[versus.first]
    age, candidates, n = age[versus.first], candidates[versus.first], n[versus.first]
    if int(versus.group[-1]) + 1 == len(versus.group):
        return _in_rows(term, values, candidates, n)[versus.line]
    won = torch.zeros_like(candidates)
    for group in range(int(versus.group.max()) + 1):
        lines = (versus.group == group).nonzero().flatten()
        won[lines] = _pooled(term, values[lines], age[lines], candidates[lines], n[lines])
    return won[versus.line]


def in_query_heads(term: Selection, values: Tensor, candidates: Tensor, n: Tensor) -> Tensor:
    """What each query head chooses of its KV head's candidates: values [rows, group, contestants], bool alike."""
    group = values.shape[1]
    each = [x.repeat_interleave(group, 0) for x in (candidates, n)]
    return _in_rows(term, values.flatten(0, 1), *each).unflatten(0, (-1, group))


def _in_rows(term: Selection, values: Tensor, candidates: Tensor, n: Tensor) -> Tensor:
    if term.rank == "cover":
        assert term.fraction is not None
        return covering(values, candidates, term.fraction)
    return best(-values if term.rank == "bottom" else values, candidates, n)


def _pooled(term: Selection, values: Tensor, age: Tensor, candidates: Tensor, n: Tensor) -> Tensor:
    """Lines compete for n, the same on each line: floors first, then raw scores; ties to the older, the lower line."""
    values = -values if term.rank == "bottom" else values
    order = torch.argsort(age.flatten(), stable=True)
    safe = torch.zeros_like(candidates)
    if term.rank != "cover":
        # The floor is of the equal share, truncated once.
        safe = best(values, candidates, n * term.floor.numerator // (term.floor.denominator * len(n)))
    open_ = (candidates & ~safe).flatten()[order][None]
    chosen = _in_rows(_top(term), values.flatten()[order][None], open_, (n[:1] - safe.sum()).clamp(min=0))[0]
    return safe | torch.zeros_like(chosen).scatter(0, order, chosen).reshape(safe.shape)


def _top(term: Selection) -> Selection:
    """The same where higher is better."""
    return replace(term, rank="top") if term.rank == "bottom" else term


def best(values: Tensor, candidates: Tensor, n: Tensor) -> Tensor:
    """The n [rows] highest of each row's candidates; ties to the earlier column, NaN last: bool [rows, columns]."""
    rank = torch.empty(values.shape, dtype=torch.int64, device=values.device)
    columns = torch.arange(values.shape[1], device=values.device).expand_as(rank)
    rank.scatter_(1, _order(values, candidates), columns)
    return candidates & (rank < n[:, None])


def _order(values: Tensor, candidates: Tensor) -> Tensor:
    """Columns from best to worst: real scores first, then NaN, then what is no candidate; stable throughout."""
    broken = values.isnan()
    key = torch.where(candidates & ~broken, values, float("-inf"))
    order = torch.argsort(key, dim=1, descending=True, stable=True)
    place = torch.where(candidates, broken.to(torch.uint8), 2)
    if not bool((place == 1).any()) and bool((key > float("-inf")).sum() == candidates.sum()):
        return order
    return order.gather(1, torch.argsort(place.gather(1, order), dim=1, stable=True))


def covering(values: Tensor, candidates: Tensor, part: Fraction) -> Tensor:
    """The fewest of each row's candidates that hold `part` of the sum of their scores, best first, with the one that
    crosses it; negative scores and NaN count as 0, ties go to the earlier column. bool [rows, columns]."""
    mass = torch.where(candidates & (values > 0), values, 0).double()
    order = torch.argsort(mass, dim=1, descending=True, stable=True)
    upto = mass.gather(1, order).cumsum(1)
    if not upto.shape[1]:
        return candidates.clone()
    before = torch.cat([torch.zeros_like(upto[:, :1]), upto[:, :-1]], 1)
    taken = before < float(part) * upto[:, -1:]
    return candidates & torch.zeros_like(candidates).scatter(1, order, taken)
