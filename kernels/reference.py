"""The eager reference: what attention over a policy's cache means. The oracle of every other backend.

Plain loops over sequences and KV heads, explicit float32 softmax, any layout, any device. Speed is
somebody else's business.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from kvcompile.kernels.evaluate import Queries, Rows, score
from kvcompile.kernels.gather import Fresh, entries_of_state, gather_rows, sequence
from kvcompile.kernels.layout import Clock, Site, write
from kvcompile.kernels.plan import PolicyPlan, QuerySource, StatePlan

BLOCK = 256  # queries whose probabilities are held at a time
FORWARD = QuerySource("forward")


def attend_prefill(plan: PolicyPlan, site: Site, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Each token of a piece reads what is resident and the piece's earlier tokens.

    q [B, q_heads, m, D], k, v [B, kv_heads, m, D], right-aligned. Returns [B, m, q_heads, D]; columns
    that hold no token are zero. Also files the newest queries in the ring.
    """
    out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], q.shape[3])
    heads = list(range(plan.facts.kv_heads))
    for b in range(site.batch):
        fresh = sequence(site, b, q, k, v, None, plan.facts.kv_heads)
        n = fresh.k.shape[1]
        if not n:
            continue
        fresh = replace(fresh, state=torch.zeros(len(plan.states), len(heads), fresh.real, device=q.device))
        rows, _, _ = gather_rows(plan, site, [b], heads, True, scale, fresh)
        assert rows.k is not None and rows.v is not None
        for at in range(0, n, BLOCK):
            block = slice(at, min(at + BLOCK, n))
            p = _probabilities(rows, fresh.q[:, :, block], fresh.pos[block])
            read = torch.einsum("hgqn,hnd->qhgd", p, rows.v.float()).flatten(1, 2).to(q.dtype)
            out[b, out.shape[1] - n + block.start : out.shape[1] - n + block.stop] = read
        file_queries(site, b, q[b, :, q.shape[2] - n :], fresh.real, fresh.start)
    return out


def _probabilities(rows: Rows, q: Tensor, pos: Tensor) -> Tensor:
    """float32 [kv_heads, group, q, n]; what a query may not read has probability 0."""
    assert rows.k is not None
    logits = torch.einsum("hgqd,hnd->hgqn", q.float(), rows.k.float()) * rows.scale
    seen = rows.readable[:, None, None, :] & (rows.pos[:, None, None, :] <= pos[None, None, :, None])
    return torch.softmax(logits.masked_fill(~seen, float("-inf")), -1)


def file_queries(site: Site, b: int, q: Tensor, real: int, start: int) -> None:
    """Put the newest of a sequence's real queries q [q_heads, n, D] into the ring, at position mod window."""
    window = site.ring.shape[2]
    if not window:
        return
    first = max(0, real - window)
    slots = torch.arange(start + first, start + real, device=q.device) % window
    site.ring[b, :, slots] = q[:, first:real].to(site.ring.dtype)


def growth(states: tuple[StatePlan, ...], rows: Rows, fresh: Fresh) -> dict[str, Tensor]:
    """What a piece's queries add to each state: name -> float32 [kv_heads, n], in the rows' order.

    Runs block by block over queries, whose sums add up.
    """
    heads = len(rows.pos)
    grown = {s.name: torch.zeros_like(rows.state[s.name]) for s in states if s.add is not None}
    for at in range(0, fresh.real, BLOCK):
        block = slice(at, min(at + BLOCK, fresh.real))
        queries = Queries(fresh.q[:, :, block], fresh.pos[block].expand(heads, -1))
        part = replace(rows, queries={FORWARD: queries}, now=fresh.pos[block.stop - 1].expand(heads))
        for state in states:
            if state.add is not None:
                grown[state.name] += score(state.add, part, rows.resident)
    return grown


Growth = Callable[[tuple[StatePlan, ...], Rows, Fresh], dict[str, Tensor]]


def observe(
    plan: PolicyPlan, site: Site, q: Tensor, k: Tensor, v: Tensor, scale: float, growth: Growth = growth
) -> Tensor:
    """`on attend` for a piece: every state grows by what the piece's real queries give it.

    Resident entries' states change in place; returns those of the piece's entries, float32
    [states, B, kv_heads, m], right-aligned. A backend may bring its own `growth`, with the same meaning.
    """
    facts = plan.facts
    out = torch.zeros(len(plan.states), q.shape[0], facts.kv_heads, q.shape[2], device=q.device)
    heads = list(range(facts.kv_heads))
    for b in range(site.batch):
        fresh = sequence(site, b, q, k, v, None, facts.kv_heads)
        if not fresh.real:
            continue
        fresh = _real_only(plan, fresh)
        rows, order, index = gather_rows(plan, site, [b], heads, True, scale, fresh)
        grown = growth(plan.states, rows, fresh)
        for i, state in enumerate(plan.states):
            total = rows.state[state.name] + grown.get(state.name, 0.0)
            total = torch.zeros_like(total).scatter(1, order, total)
            width = total.shape[1] - fresh.real
            slots = site.slot_matrix(index, width)
            there = torch.arange(width, device=slots.device) < site.length[index][:, None]
            site.state[i, slots[there]] = total[:, :width][there]
            stop = q.shape[2] - int(site.clock[b, Clock.PEEK])
            out[i, b, :, stop - fresh.real : stop] = total[:, width:]
    return out


def _real_only(plan: PolicyPlan, fresh: Fresh) -> Fresh:
    """Without peeked tokens, which leave no states; with the states that new entries start from."""
    pos = fresh.pos[: fresh.real]
    start = torch.stack([entries_of_state(s, pos) for s in plan.states])
    state = start[:, None].expand(-1, fresh.k.shape[0], -1)
    return replace(
        fresh, q=fresh.q[:, :, : fresh.real], k=fresh.k[:, : fresh.real], v=fresh.v[:, : fresh.real], state=state
    )


def attend_step(plan: PolicyPlan, site: Site, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One token of each sequence: append its entry, read the row, let the states grow.

    q [B, q_heads, 1, D], k, v [B, kv_heads, 1, D]. Returns [B, 1, q_heads, D], zero where a sequence brings no token.
    """
    facts = plan.facts
    out = q.new_zeros(q.shape[0], 1, q.shape[1], q.shape[3])
    heads = list(range(facts.kv_heads))
    for b in range(site.batch):
        if not int(site.clock[b, Clock.NEW]):
            continue
        pos = site.clock[b, Clock.START].reshape(1)
        append(plan, site, b, k[b, :, 0], v[b, :, 0], pos)
        rows, order, index = gather_rows(plan, site, [b], heads, True, scale)
        assert rows.v is not None
        p = _probabilities(rows, q[b].unflatten(0, (facts.kv_heads, -1)), pos)
        out[b, 0] = torch.einsum("hgqn,hnd->qhgd", p, rows.v.float())[0].flatten(0, 1).to(q.dtype)
        file_queries(site, b, q[b], 1, int(pos))
        grow_states(plan, site, replace(rows, attn=p), order, index)
    return out


def append(plan: PolicyPlan, site: Site, b: int, k: Tensor, v: Tensor, pos: Tensor) -> None:
    """One new entry for each KV head of a sequence: k, v [kv_heads, D], pos int64 [1]."""
    base = site.base(plan.facts.kv_heads) + b * plan.facts.kv_heads
    new = torch.stack([entries_of_state(s, pos) for s in plan.states]) if plan.states else site.state[:, :1] * 0
    for h in range(plan.facts.kv_heads):
        write(site, base + h, k[h][None], v[h][None], pos, torch.zeros_like(pos), new)


def grow_states(plan: PolicyPlan, site: Site, rows: Rows, order: Tensor, index: Tensor) -> None:
    """`on attend` of a step, from the probabilities that the read has left in `rows.attn`."""
    for i, state in enumerate(plan.states):
        if state.add is None:
            continue
        total = rows.state[state.name] + score(state.add, rows, rows.resident)
        total = torch.zeros_like(total).scatter(1, order, total)
        slots = site.slot_matrix(index, total.shape[1])
        there = torch.arange(total.shape[1], device=slots.device) < site.length[index][:, None]
        site.state[i, slots[there]] = total[there]
