"""What entries that are not kept leave behind: merged into survivors, or folded into fewer. The meaning of `else`.

Takes a decision over rows whose entries are all in the pools (`settle`), changes those pools in place and gives the
keep mask with what now stands in losers' slots. Guarantees: actions see keys, values and counts from before the
decision, sums are float32, what is written is rounded once to the pools' dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from kvcompile.kernels.arithmetic import divide, holds
from kvcompile.kernels.evaluate import score
from kvcompile.kernels.layout import Clock, Site
from kvcompile.kernels.plan import ClassPlan, Expr, Loser, PolicyPlan
from kvcompile.kernels.rotary import places, rotate
from kvcompile.kernels.rows import Rows

ENTRIES = 1 << 17  # of rows that are settled together; several copies of their keys are held at a time
BLOCK = 64  # losers of a row whose likeness to all its survivors is held at a time


@dataclass(frozen=True, slots=True)
class _Decided:
    """Rows before their decision is carried out; n entries each, padded, in entry order.

    number int64 [rows]: their numbers; slots, pos int64 [rows, n]; there, survivors bool [rows, n]; losers int64
    [rows, m]: columns in position order; lost bool [rows, m]: which of those there are.
    """

    number: Tensor
    slots: Tensor
    pos: Tensor
    there: Tensor
    survivors: Tensor
    losers: Tensor
    lost: Tensor

    def of(self, columns: Tensor) -> Tensor:
        """Slots of some columns, int64 [rows, m]."""
        return self.slots.gather(1, columns)


@dataclass(frozen=True, slots=True)
class _Merged:
    """Slots of losers that go into survivors, of those survivors, int64 [m], and weights, float32 [m]."""

    source: Tensor
    into: Tensor
    weight: Tensor


def settle(plan: PolicyPlan, part: ClassPlan, site: Site, index: Tensor, keep: Tensor) -> Tensor:
    """Carry out a class's loser actions in the rows `index` (int64 [rows]); the first that takes an entry has it.

    keep bool [rows, n], in entry order. Returns the entries that stay, bool [rows, n]: those of `keep`, the entry
    without position, and what merging and folding have put in place of losers. What no action takes is dropped.
    """
    width = keep.shape[1]
    slots = site.slot_matrix(index, width)
    there = torch.arange(width, device=keep.device) < site.length[index][:, None]
    pos = site.pos[slots].long()
    if reach := plan.facts.reach(int(site.layer)):  # what a sliding window has left leaves nothing behind
        sequences = (index - site.base(plan.facts.kv_heads)) // plan.facts.kv_heads
        seen = (site.clock[sequences, Clock.START] + site.clock[sequences, Clock.NEW])[:, None]
        there = there & ((pos > seen - reach) | (pos < 0))
    keep = there & (keep | (pos < 0))
    lost = there & ~keep
    deciding = lost.any(1).nonzero().flatten()
    for r in deciding.split(max(1, ENTRIES // width)) if len(deciding) else ():
        many = int(lost[r].sum(1).max())
        order = torch.where(lost[r], pos[r], torch.iinfo(torch.int64).max).topk(many, 1, largest=False).indices
        survivors = keep[r] & (pos[r] >= 0)
        rows = _Decided(index[r], slots[r], pos[r], there[r], survivors, order, lost[r].gather(1, order))
        keep[r] |= _settle_rows(plan, part, site, rows)
    return keep


def _settle_rows(plan: PolicyPlan, part: ClassPlan, site: Site, rows: _Decided) -> Tensor:
    """Carries out the actions of some rows; gives the losers' places that hold an entry from now on, bool [rows, n]."""
    stays = torch.zeros_like(rows.there)
    left = rows.lost
    merges: list[_Merged] = []
    for loser in part.losers:
        if loser.kind == "drop" or not bool(left.any()):
            break
        if loser.kind == "merge":
            merged, left = _choose(plan, site, rows, loser, left)
            merges.append(merged)
            continue
        if loser.fn == "mean":
            _fold_into_one(plan, site, rows, left, stays)
        else:
            for r in left.any(1).nonzero().flatten().tolist():
                columns = rows.losers[r, left[r]]
                stays[r, _fold_into_fewer(plan, site, rows.slots[r, columns], columns, loser)] = True
        break
    if merges:
        _merge(plan, site, merges)
    return stays


# -- merge -------------------------------------------------------------------------------------------------------------


def _choose(plan: PolicyPlan, site: Site, rows: _Decided, loser: Loser, left: Tensor) -> tuple[_Merged, Tensor]:
    """The merges of one action, and the losers that it leaves: those that `when` refuses, and rows of losers only."""
    near, sim = _nearest(plan, site, rows, loser)
    asked = left & rows.survivors.any(1)[:, None]
    values = _Formulas(plan, site, rows, asked, sim)
    taken = asked if loser.when is None else asked & holds(values(loser.when))
    weight = torch.ones_like(sim) if loser.weight is None else values(loser.weight)
    weight = weight.nan_to_num(0.0, 0.0, 0.0).clamp(min=0)
    return _Merged(rows.of(rows.losers)[taken], rows.of(near)[taken], weight[taken]), left & ~taken


def _nearest(plan: PolicyPlan, site: Site, rows: _Decided, loser: Loser) -> tuple[Tensor, Tensor]:
    """The column of the survivor most like each loser, ties to the older, and how like it is: [rows, m] each.

    In a row without survivors both mean nothing.
    """
    # Older survivors first, because of equals argmax gives the first; what is no survivor comes last.
    order = torch.where(rows.survivors, rows.pos, torch.iinfo(torch.int64).max).argsort(1)
    order = order[:, : max(1, int(rows.survivors.sum(1).max()))]
    others, absent = _likened(plan, site, rows, loser, order), ~rows.survivors.gather(1, order)[:, None]
    near, sims = [], []
    for block in _likened(plan, site, rows, loser, rows.losers).split(BLOCK, 1):
        sim = -(block - others.mT).abs() if loser.fn == "pos" else block @ others.mT
        near.append(sim.masked_fill(absent | sim.isnan(), -math.inf).argmax(2))
        sims.append(sim.gather(2, near[-1][..., None])[..., 0])
    return order.gather(1, torch.cat(near, 1)), torch.cat(sims, 1)


def _likened(plan: PolicyPlan, site: Site, rows: _Decided, loser: Loser, columns: Tensor) -> Tensor:
    """What entries are likened by, float32 [rows, m, ..]: positions, or vectors whose dot products say it.

    Keys are taken as queries read them; for the cosine vectors have length 1, or 0 where they had.
    """
    if loser.fn == "pos":
        return rows.pos.gather(1, columns)[..., None].float()
    x = (site.v if loser.of == "v" else site.k)[rows.of(columns)]
    if loser.of == "k" and plan.compact:
        x = rotate(x, places(rows.pos, rows.there).gather(1, columns), site.rope)
    x = x.float()
    return x if loser.fn == "dot" else x.mul_(divide(x.new_ones(()), x.norm(dim=-1, keepdim=True)))


def _merge(plan: PolicyPlan, site: Site, merges: list[_Merged]) -> None:
    """Survivors become the weighted mean of their own (weight 1) and of what they take; counts add up."""
    source, into, weight = (torch.cat([getattr(m, name) for m in merges]) for name in _Merged.__slots__)
    target, which = into.unique(return_inverse=True)
    total = weight.new_ones(len(target)).index_add(0, which, weight)[:, None]
    for pool in (site.k, site.v):
        sums = pool[target].float().index_add(0, which, weight[:, None] * pool[source].float())
        pool[target] = (sums / total).to(pool.dtype)
    counts = _counts(plan, site)
    counts[target] = counts[target].index_add(0, which, counts[source])


class _Formulas:
    """`when` and `weight` of the losers that an action is asked about: bool and float32 [rows, m].

    Each `ema` moves its number in the rows that have such losers, once, however often it is read.
    """

    def __init__(self, plan: PolicyPlan, site: Site, rows: _Decided, asked: Tensor, sim: Tensor) -> None:
        self.scalar, self.number = site.scalar, rows.number
        pos, nothing = rows.pos.gather(1, rows.losers), torch.zeros_like(rows.number)
        self.states = {"sim": sim, "@count": _counts(plan, site)[rows.of(rows.losers)]}
        self.losers = Rows(pos, asked, asked, torch.zeros_like(asked), nothing, nothing, self.states)
        self.plain: dict[Expr, Expr] = {}  # each node by one that `score` knows

    def __call__(self, formula: Expr) -> Tensor:
        for node in formula.walk():
            if node not in self.plain:
                self.plain[node] = self._plain(replace(node, args=tuple(self.plain[arg] for arg in node.args)))
        return score(self.plain[formula], self.losers, self.losers.resident)

    def _plain(self, node: Expr) -> Expr:
        if node.op == "sim":
            return Expr("state", (), "sim", node.axes)
        if node.op != "ema":
            return node
        assert isinstance(node.value, tuple)
        slot, beta = int(node.value[0]), float(node.value[1])
        now = score(node.args[0], self.losers, self.losers.resident)[:, 0]
        before = self.scalar[slot, self.number]
        after = torch.where(before.isnan(), now, beta * before + (1 - beta) * now)
        after = torch.where(self.losers.resident.any(1) & ~after.isnan(), after, before)
        self.scalar[slot, self.number] = after
        name = f"@ema:{slot}"
        self.states[name] = after[:, None].expand_as(self.losers.pos)
        return Expr("state", (), name, "i")


# -- fold --------------------------------------------------------------------------------------------------------------


def _fold_into_one(plan: PolicyPlan, site: Site, rows: _Decided, left: Tensor, stays: Tensor) -> None:
    """Losers and entry without position of each row, as one such entry: the mean weighted by counts. Marks `stays`."""
    r = left.any(1).nonzero().flatten()
    folded = rows.there[r] & (rows.pos[r] < 0)
    columns = torch.cat([folded.byte().argmax(1, keepdim=True), rows.losers[r]], 1)
    members = torch.cat([folded.any(1, keepdim=True), left[r]], 1)
    # The first that there is: it stands in its slot, the one without position if the row has one.
    first = members.byte().argmax(1, keepdim=True)
    slots = rows.slots[r].gather(1, columns)
    target = slots.gather(1, first)[:, 0]
    count = torch.where(members, _counts(plan, site)[slots], 0.0)
    weight = (count / count.sum(1, keepdim=True))[:, None]
    for pool in (site.k, site.v):
        entries = pool[slots].float().masked_fill(~members[..., None], 0.0)
        pool[target] = torch.matmul(weight, entries)[:, 0].to(pool.dtype)
    site.pos[target], site.frozen[target] = -1, 0
    for i, state in enumerate(plan.states):
        site.state[i, target] = float(state.init.value) if isinstance(state.init.value, (Fraction, int)) else 0.0
    _counts(plan, site)[target] = count.sum(1)
    stays[r[:, None], columns.gather(1, first)] = True


def _fold_into_fewer(plan: PolicyPlan, site: Site, slots: Tensor, columns: Tensor, loser: Loser) -> Tensor:
    """A row's losers, in position order, as fewer entries at positions of theirs, spread evenly. Gives their columns.

    The sum of counts stays: each has its run's own under `pool`, an equal part under `dct`, where all are mixed.
    """
    n, run = len(slots), int(1 / loser.part)
    m = max(1, int(n * loser.part)) if loser.fn == "dct" else -(-n // run)
    stays = torch.arange(m, device=slots.device) * n // m
    target = slots[stays]
    for pool in (site.k, site.v):
        x = pool[slots].float()
        pool[target] = (_low_frequencies(x, m) if loser.fn == "dct" else _means(x, run)).to(pool.dtype)
    count = _counts(plan, site)[slots]
    each = count.sum() / m if loser.fn == "dct" else _means(count[:, None], run)[:, 0] * _lengths(count, run)
    _counts(plan, site)[target] = each
    site.frozen[target] = 0
    return columns[stays]


def _low_frequencies(x: Tensor, m: int) -> Tensor:
    """x [n, channels] by the m lowest frequencies of its DCT-II, back by a DCT-III of m points: [m, channels].

    Both orthonormal, by Fourier transforms of twice the length; sqrt(m / n) keeps the level (FreqKV, arXiv:2505.00570).
    """
    n = len(x)
    spectrum = torch.fft.rfft(torch.cat([x, x.flip(0)]), dim=0)[:m]
    # A DCT is half of such a transform, turned by half a sample; all factors together are 2 / n, for the mean 1 / n.
    turn = torch.arange(m, device=x.device) * (math.pi / 2)
    low = (spectrum * torch.polar(torch.ones_like(turn), turn / m - turn / n)[:, None]) * (m / n)
    low[0] /= 2
    return torch.fft.ifft(low, n=2 * m, dim=0)[:m].real * 2


def _means(x: Tensor, run: int) -> Tensor:
    """Means of runs of x [n, channels], the last one maybe shorter: [ceil(n / run), channels]."""
    lengths = _lengths(x, run)
    which = torch.arange(len(x), device=x.device) // run
    return x.new_zeros(len(lengths), x.shape[1]).index_add(0, which, x) / lengths[:, None]


def _lengths(x: Tensor, run: int) -> Tensor:
    """How long each run of x [n, ..] is, float32 [ceil(n / run)]."""
    return (len(x) - torch.arange(0, len(x), run, device=x.device)).clamp(max=run).float()


def _counts(plan: PolicyPlan, site: Site) -> Tensor:
    """Tokens that each slot's entry stands for, float32 [slots]: a view of the pool."""
    return site.state[[s.name for s in plan.states].index("@count")]
