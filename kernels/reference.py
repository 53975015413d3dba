"""The eager reference: what attention over a policy's cache means. The oracle of every other backend.

Plain loops over sequences and KV heads, explicit float32 softmax, any layout, any device. Speed is
somebody else's business.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvcompile.kernels.evaluate import FORWARD, attention_logits, attention_weights
from kvcompile.kernels.gather import Fresh, gather_rows, placed, sequence
from kvcompile.kernels.layout import Clock, Site, write
from kvcompile.kernels.plan import PolicyPlan
from kvcompile.kernels.reads import HELD, fill_picks, held_set, holds_sets, with_reads
from kvcompile.kernels.rows import Queries, Rows
from kvcompile.kernels.states import BLOCK, UNTRAINED, Weights, first_states, follow_reads, grow_states


def attend_prefill(
    plan: PolicyPlan, site: Site, q: Tensor, k: Tensor, v: Tensor, scale: float, weights: Weights = UNTRAINED
) -> Tensor:
    """Each token of a piece reads what is resident and the piece's earlier tokens.

    q [B, q_heads, m, D], k, v [B, kv_heads, m, D], right-aligned. Returns [B, m, q_heads, D]; columns
    that hold no token are zero. Also files the newest queries in the ring. weights: as in `ops.Program`.
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
        file_queries(site, b, q[b, :, q.shape[2] - n :], fresh.real, fresh.start)
        asking = placed(rows, Queries(fresh.q, fresh.pos.expand(len(heads), -1)))
        rows = with_reads(plan, site, [b], heads, replace(rows, weights=weights), fresh)
        fill_picks(plan, rows, asking)
        assert rows.v is not None
        for at in range(0, n, BLOCK):
            block = slice(at, min(at + BLOCK, n))
            p = _probabilities(rows, Queries(asking.q[:, :, block], asking.pos[:, block]))
            read = torch.einsum("hgqn,hnd->qhgd", p, rows.v.float()).flatten(1, 2).to(q.dtype)
            out[b, out.shape[1] - n + block.start : out.shape[1] - n + block.stop] = read
    return out


def _probabilities(rows: Rows, queries: Queries) -> Tensor:
    """float32 [kv_heads, group, q, n]; what a query may not read, or does not, has probability 0."""
    logits = attention_logits(rows, queries.q, queries.pos)
    if rows.narrow is not None:
        logits = logits.masked_fill(~rows.narrow(rows, queries), float("-inf"))
    return attention_weights(rows, logits)


def file_queries(site: Site, b: int, q: Tensor, real: int, start: int) -> None:
    """Put the newest of a sequence's real queries q [q_heads, n, D] into the ring, at position mod window."""
    window = site.ring.shape[2]
    if not window:
        return
    first = max(0, real - window)
    slots = torch.arange(start + first, start + real, device=q.device) % window
    site.ring[b, :, slots] = q[:, first:real].to(site.ring.dtype)


def attend_step(
    plan: PolicyPlan, site: Site, q: Tensor, k: Tensor, v: Tensor, scale: float, weights: Weights
) -> Tensor:
    """One token of each sequence: append its entry, read the row, let the states change.

    q [B, q_heads, 1, D], k, v [B, kv_heads, 1, D]; weights as in `ops.Program`.
    Returns [B, 1, q_heads, D], zero where a sequence brings no token.
    """
    facts = plan.facts
    out = q.new_zeros(q.shape[0], 1, q.shape[1], q.shape[3])
    heads = list(range(facts.kv_heads))
    for b in range(site.batch):
        if not int(site.clock[b, Clock.NEW]):
            continue
        fresh = sequence(site, b, q, k, v, None, facts.kv_heads)
        append(plan, site, b, replace(fresh, state=first_states(plan, site, b, fresh, weights)))
        rows, order, index = gather_rows(plan, site, [b], heads, True, scale)
        file_queries(site, b, q[b], 1, fresh.start)
        asking = placed(rows, Queries(fresh.q, fresh.pos.expand(facts.kv_heads, -1)))
        rows = with_reads(plan, site, [b], heads, replace(rows, weights=weights), None)
        fill_picks(plan, rows, asking)
        assert rows.v is not None
        p = _probabilities(rows, asking)
        out[b, 0] = torch.einsum("hgqn,hnd->qhgd", p, rows.v.float())[0].flatten(0, 1).to(q.dtype)
        if follow_reads(plan) or holds_sets(plan):
            held = {HELD: held_set(plan, rows, asking)} if holds_sets(plan) else {}
            rows = replace(rows, attn=p, queries={FORWARD: asking}, state=rows.state | held)
            grow_states(plan, site, rows, order, index)
    return out


def append(plan: PolicyPlan, site: Site, b: int, fresh: Fresh) -> None:
    """A step's new entry, one for each KV head of a sequence."""
    kv_heads = plan.facts.kv_heads
    base = site.base(kv_heads) + b * kv_heads
    rows, pos = list(range(base, base + kv_heads)), fresh.pos.expand(kv_heads)
    write(site, rows, [1] * kv_heads, fresh.k[:, 0], fresh.v[:, 0], pos, torch.zeros_like(pos), fresh.state[:, :, 0])
