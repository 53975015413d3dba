"""From slots to rows and back: builds `evaluate.Rows` for some heads of one sequence, applies what was decided.

A prefill's rows are the resident entries followed by the piece's fresh ones, which are not in the pools
yet: losers among them never will be.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from kvcompile.kernels.evaluate import Queries, Rows
from kvcompile.kernels.layout import Clock, Site, compact, write
from kvcompile.kernels.plan import ClassPlan, PolicyPlan, QuerySource, StatePlan, evidence_of


@dataclass(frozen=True)
class Fresh:
    """A piece of one sequence before it is in the cache.

    q [kv_heads, group, n, head_dim]; k, v [kv_heads, n, head_dim]; state float32 [states, kv_heads, n], where
    n counts real tokens first, then peeked ones (k, v, q only); `real` is the number of real tokens.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    state: Tensor
    real: int
    start: int

    @property
    def pos(self) -> Tensor:
        return torch.arange(self.start, self.start + self.k.shape[1], device=self.k.device)


def sequence(site: Site, b: int, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, kv_heads: int) -> Fresh:
    """Cut sequence b's own tokens out of a right-aligned forward: q [B, q_heads, m, D], k, v [B, kv_heads, m, D]."""
    new, peek, start = site.clock[b, :3].tolist()
    cut = slice(q.shape[2] - new - peek, q.shape[2])
    q = q[b, :, cut].unflatten(0, (kv_heads, -1))
    real = slice(cut.start, cut.start + new)
    state = torch.zeros(0, kv_heads, new, device=k.device) if state is None else state[:, b, :, real]
    return Fresh(q, k[b, :, cut], v[b, :, cut], state, new, start)


def entries_of_state(state: StatePlan, pos: Tensor) -> Tensor:
    """A new entry's state, float32: a number, or its own position where it starts at `now`."""
    if isinstance(state.init.value, Fraction):
        return torch.full(pos.shape, float(state.init.value), device=pos.device)
    return pos.float()


def needs_keys(plan: PolicyPlan, cls: ClassPlan) -> bool:
    """Whether a class's scores read keys, values or attention; else positions and states are enough."""
    formulas = [s.score for s in cls.selections] + [e for u in plan.units for _, e in u.landmarks]
    return any(
        n.op in ("evidence", "landmark") or (n.op == "field" and str(n.value) not in ("pos", "age"))
        for f in formulas
        for n in f.walk()
    )


def query_sources(cls: ClassPlan) -> set[QuerySource]:
    return {evidence_of(n)[1] for s in cls.selections for n in s.score.walk() if n.op == "evidence"}


def gather_queries(
    site: Site, b: int, heads: list[int], kv_heads: int, source: QuerySource, fresh: Fresh | None
) -> Queries:
    """The queries of a source for some KV heads of sequence b.

    `last` reads the ring of newest queries; `peek` the piece's peeked tokens, in the last piece the ring;
    `forward` this forward's own.
    """
    rows = len(heads)
    if source.kind == "forward" and fresh is not None:
        pos = fresh.pos[: fresh.real].expand(rows, -1)
        return Queries(fresh.q[heads][:, :, : fresh.real], pos)
    if source.kind == "peek" and fresh is not None and not int(site.clock[b, Clock.ENDS]):
        return Queries(fresh.q[heads][:, :, fresh.real :], fresh.pos[fresh.real :].expand(rows, -1))
    width = 1 if source.kind == "forward" else source.width
    now = int(site.clock[b, Clock.START] + site.clock[b, Clock.NEW]) - 1
    pos = torch.arange(now - width + 1, now + 1, device=site.ring.device)
    ring = site.ring[b].unflatten(0, (kv_heads, -1))[heads]
    return Queries(ring[:, :, pos % site.ring.shape[2]], pos.clamp(min=-1).expand(rows, -1))


def gather_rows(
    plan: PolicyPlan,
    site: Site,
    sequences: list[int],
    heads: list[int],
    keys: bool,
    scale: float,
    fresh: Fresh | None = None,
) -> tuple[Rows, Tensor, Tensor]:
    """The same KV heads of some sequences (of one where `fresh` comes in), sequence by sequence.

    Returns the rows in position order; the column order that led there, int64 [rows, n] (column c is entry
    order[row, c]: resident entries by their place in the row, then fresh ones); and the rows' indices.
    """
    base, kv_heads = site.base(plan.facts.kv_heads), plan.facts.kv_heads
    index = torch.tensor([base + b * kv_heads + h for b in sequences for h in heads], device=site.k.device)
    lengths = site.length[index].long()
    width = int(lengths.max())
    slots = site.slot_matrix(index, width)
    there = torch.arange(width, device=slots.device) < lengths[:, None]
    pos = site.pos[slots].long().masked_fill(~there, -1)
    resident, readable, frozen = there, there, (site.frozen[slots] != 0) & there
    state = site.state[:, slots].masked_fill(~there, 0)
    # Slots that no entry has used hold anything, NaN too, and 0 * NaN would reach a sum.
    k, v = (pool[slots].masked_fill(~there[..., None], 0) if keys and width else None for pool in (site.k, site.v))
    if fresh is not None:
        count, n = len(heads), fresh.k.shape[1]
        real = torch.arange(n, device=slots.device) < fresh.real
        pos = torch.cat([pos, fresh.pos.expand(count, -1)], 1)
        resident = torch.cat([resident, real.expand(count, -1)], 1)
        readable = torch.cat([readable, torch.ones(count, n, dtype=torch.bool, device=slots.device)], 1)
        frozen = torch.cat([frozen, torch.zeros(count, n, dtype=torch.bool, device=slots.device)], 1)
        pad = torch.zeros(state.shape[0], count, n - fresh.real, device=slots.device)
        state = torch.cat([state, fresh.state[:, heads], pad], 2)
        if keys:
            k = fresh.k[heads] if k is None else torch.cat([k, fresh.k[heads]], 1)
            v = fresh.v[heads] if v is None else torch.cat([v, fresh.v[heads]], 1)
    order = torch.arange(pos.shape[1], device=pos.device).expand_as(pos)
    if pos.shape[1] and bool((pos[:, 1:] < pos[:, :-1]).any()):
        order = torch.argsort(pos, dim=1, stable=True)
        pos, resident, readable, frozen = (t.gather(1, order) for t in (pos, resident, readable, frozen))
        state = state.gather(2, order.expand_as(state))
        k, v = (None if t is None else t.gather(1, order[..., None].expand_as(t)) for t in (k, v))
    clock = site.clock[sequences].repeat_interleave(len(heads), 0)
    rows = Rows(
        pos=pos,
        resident=resident,
        readable=readable,
        frozen=frozen,
        now=clock[:, Clock.START] + clock[:, Clock.NEW] - 1,
        prompt=clock[:, Clock.PROMPT],
        state={s.name: state[i] for i, s in enumerate(plan.states)},
        scale=scale,
        k=k,
        v=v,
    )
    return rows, order, index


def apply(
    site: Site, rows: Tensor, keep: Tensor, won: Tensor, cls: ClassPlan, heads: list[int], fresh: Fresh | None = None
) -> None:
    """Carry out a decision: keep and won bool [rows, n] in entry order, fresh entries last."""
    width = keep.shape[1] - (fresh.k.shape[1] if fresh else 0)
    if bool(won[:, :width].any()):
        site.frozen[site.slot_matrix(rows, width)[won[:, :width]]] = 1
    compact(site, rows, keep[:, :width], cls.by_position)
    if fresh is None:
        return
    for row, head, kept, winner in zip(rows.tolist(), heads, keep[:, width:], won[:, width:], strict=True):
        chosen = kept.nonzero().flatten()
        k, v, state = fresh.k[head][chosen], fresh.v[head][chosen], fresh.state[:, head][:, chosen]
        write(site, row, k, v, fresh.pos[chosen], winner[chosen], state)
