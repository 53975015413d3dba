"""The CPU path: packed SDPA that reads each row's extent in place. Same meaning as `reference`, to rounding.

Grouped query heads stand where queries stand, so that keys are read once for the whole group; rows of
equal length at equal distance go into one call. What needs probabilities (states) computes them.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcompile.kernels import reference
from kvcompile.kernels.gather import entries_of_state, gather_rows, sequence
from kvcompile.kernels.layout import Clock, Site
from kvcompile.kernels.plan import PolicyPlan

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def attend_prefill(plan: PolicyPlan, site: Site, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """As `reference.attend_prefill`: the piece's tokens and the resident past are two calls, merged by their LSE."""
    kv_heads = plan.facts.kv_heads
    out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], q.shape[3])
    for b in range(site.batch):
        fresh = sequence(site, b, q, k, v, None, kv_heads)
        n = fresh.k.shape[1]
        if not n:
            continue
        shape = fresh.q.shape
        keys, values = (t[:, None].expand(shape) for t in (fresh.k, fresh.v))
        read, lse = _flash(fresh.q, keys, values, 0.0, True, scale=scale)
        base = b * kv_heads
        for h in range(kv_heads):
            if int(site.length[base + h]):
                read[h], lse[h] = _merge(read[h], lse[h], *_past(site, base + h, fresh.q[h], scale))
        out[b, out.shape[1] - n :] = read.flatten(0, 1).transpose(0, 1)
        reference.file_queries(site, b, q[b, :, q.shape[2] - n :], fresh.real, fresh.start)
    return out


def _past(site: Site, row: int, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Every query of a group [group, n, D] reads all of a row: output [group, n, D] and LSE [group, n]."""
    start, length = int(site.table[row, 0]), int(site.length[row])
    k, v = (t[start : start + length][None, None] for t in (site.k, site.v))
    out, lse = _flash(q.reshape(1, 1, -1, q.shape[-1]), k, v, 0.0, False, scale=scale)
    return out.reshape(q.shape), lse.reshape(q.shape[:2])


def _merge(a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = ((x - lse).exp()[..., None] for x in (lse_a, lse_b))
    return (a * weight_a + b * weight_b).to(a.dtype), lse


def attend_step(plan: PolicyPlan, site: Site, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """As `reference.attend_step`."""
    kv_heads = plan.facts.kv_heads
    clock = site.clock.tolist()
    active = [b for b, line in enumerate(clock) if line[Clock.NEW]]
    if not active:
        return q.new_zeros(q.shape[0], 1, q.shape[1], q.shape[3])
    rows = [b * kv_heads + h for b in active for h in range(kv_heads)]
    everyone = len(active) == len(clock)
    if not everyone:
        out = q.new_zeros(q.shape[0], 1, q.shape[1], q.shape[3])
        q, k, v = q[active], k[active], v[active]
    where = _append(plan, site, rows, [clock[b][Clock.START] for b in active], k, v)
    if any(s.add is not None for s in plan.states):
        read = torch.stack([_read_and_grow(plan, site, b, q[i], scale) for i, b in enumerate(active)])
    else:
        read = _read(site, where, q.reshape(len(rows), plan.facts.group, q.shape[3]), scale)
    read = read.reshape(len(active), 1, q.shape[1], q.shape[3])
    window = site.ring.shape[2]
    for i, b in enumerate(active if window else ()):
        site.ring[b, :, clock[b][Clock.START] % window] = q[i, :, 0]
    if everyone:
        return read
    out[active] = read
    return out


def _append(
    plan: PolicyPlan, site: Site, rows: list[int], pos: list[int], k: Tensor, v: Tensor
) -> list[tuple[int, int, int]]:
    """One new entry a row, of a token at pos; the host has seen to it that every extent has room.

    Returns (length, start, index) of each row, the new entry included.
    """
    lengths, table = site.length.tolist(), site.table.tolist()
    slots = torch.tensor([table[row][0] + lengths[row] for row in rows])
    new = torch.tensor(pos, dtype=torch.int32).repeat_interleave(plan.facts.kv_heads)
    site.k.index_copy_(0, slots, k.reshape(len(rows), -1))
    site.v.index_copy_(0, slots, v.reshape(len(rows), -1))
    site.pos.index_copy_(0, slots, new)
    site.frozen.index_fill_(0, slots, 0)
    for i, state in enumerate(plan.states):
        site.state[i].index_copy_(0, slots, entries_of_state(state, new))
    if len(rows) == len(lengths):
        site.length.add_(1)
    else:
        site.length[rows] += 1
    return [(lengths[row] + 1, table[row][0], i) for i, row in enumerate(rows)]


def _read(site: Site, where: list[tuple[int, int, int]], q: Tensor, scale: float) -> Tensor:
    """Rows' packed queries q [rows, group, D] read their extents, given as (length, start, row): [rows, group, D]."""
    out = None
    for length, same in groupby(sorted(where), key=lambda w: w[0]):
        for start, stride, members in _strides([(start, i) for _, start, i in same]):
            shape = (len(members), 1, length, q.shape[2])
            step = (stride * q.shape[2], 0, q.shape[2], 1)
            keys, values = (t.as_strided(shape, step, start * q.shape[2]) for t in (site.k, site.v))
            alike = members == list(range(len(where)))
            packed = q[:, None] if alike else q[members, None]
            read = F.scaled_dot_product_attention(packed, keys, values, scale=scale)[:, 0]
            if alike:
                return read
            out = torch.empty_like(q) if out is None else out
            out[members] = read
    assert out is not None
    return out


def _strides(rows: list[tuple[int, int]]) -> list[tuple[int, int, list[int]]]:
    """Cut (start, row) pairs, sorted, into runs of equal distance: (first start, distance, rows)."""
    runs: list[tuple[int, int, list[int]]] = []
    last = 0
    for start, row in rows:
        first, distance, members = runs[-1] if runs else (start, 0, [])
        if members and (len(members) == 1 or start - last == distance):
            members.append(row)
            runs[-1] = (first, start - last, members)
        else:
            runs.append((start, 0, [row]))
        last = start
    return runs


def _read_and_grow(plan: PolicyPlan, site: Site, b: int, q: Tensor, scale: float) -> Tensor:
    heads = list(range(plan.facts.kv_heads))
    rows, order, index = gather_rows(plan, site, [b], heads, True, scale)
    assert rows.k is not None and rows.v is not None
    # From 16-bit logits a probability would be off by their rounding, half a percent and more.
    packed = q.unflatten(0, (len(heads), -1))[:, :, 0].float()
    logits = torch.matmul(packed, rows.k.float().transpose(1, 2)) * scale
    p = torch.softmax(logits.masked_fill(~rows.resident[:, None], float("-inf")), -1)
    read = torch.matmul(p.to(q.dtype), rows.v)
    reference.grow_states(plan, site, replace(rows, attn=p[:, :, None]), order, index)
    return read.flatten(0, 1)
