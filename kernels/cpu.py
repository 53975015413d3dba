"""The CPU path: packed SDPA that reads each row's extent in place. Same meaning as `reference`, to rounding.

Grouped query heads stand where queries stand, so that keys are read once for the whole group; rows of
equal length at equal distance go into one call. What needs probabilities (states) or logits (soft-cap, a step's
sinks) computes them; sliding windows are masks.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcompile.kernels import reference
from kvcompile.kernels.evaluate import FORWARD, attention_logits, attention_weights
from kvcompile.kernels.gather import Fresh, few, gather_rows, placed, together
from kvcompile.kernels.layout import Clock, Site
from kvcompile.kernels.plan import PolicyPlan
from kvcompile.kernels.reads import narrows
from kvcompile.kernels.rotary import places, rotate
from kvcompile.kernels.rows import Queries
from kvcompile.kernels.states import (
    UNTRAINED,
    Weights,
    first_states,
    follow_reads,
    grow_states,
    plain_states,
    starts_plainly,
)

BLOCK = 256  # queries whose mask is held at a time
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def attend_prefill(
    plan: PolicyPlan, site: Site, q: Tensor, k: Tensor, v: Tensor, scale: float, weights: Weights = UNTRAINED
) -> Tensor:
    """As `reference.attend_prefill`: the piece's tokens and the resident past are two calls, merged by their LSE."""
    # Soft-caps stand between logits and softmax, where flash attention lets nobody in, as do sets of each query.
    if plan.facts.softcap or narrows(plan, site):
        return reference.attend_prefill(plan, site, q, k, v, scale, weights)
    kv_heads, layer = plan.facts.kv_heads, int(site.layer)
    reach = plan.facts.reach(layer)
    out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], q.shape[3])
    clock = site.clock.tolist()
    alike: dict[tuple[int, int], list[int]] = {}
    for b, line in enumerate(clock):
        if line[Clock.NEW] + line[Clock.PEEK]:
            alike.setdefault((line[Clock.NEW], line[Clock.PEEK]), []).append(b)
    turned = kv_heads * q.shape[3] * int(site.length.max()) if plan.compact else 0  # keys that a read copies
    several = [(n, b) for n, bs in alike.items() for b in few(bs, max(turned, q[0, :, : sum(n)].numel()))]
    for (new, peek), sequences in several:
        n = new + peek
        piece = together(site, sequences, q, k, v, None, kv_heads)
        rows = [b * kv_heads + h for b in sequences for h in range(kv_heads)]
        asking, keys = _turned_piece(site, rows, piece) if plan.compact else (piece.q, piece.k)
        read, lse = _read_piece(asking, keys, piece.v, scale, reach)
        _read_past(plan, site, rows, asking, read, lse, scale, reach)
        if plan.facts.sinks:
            sink = site.sink[layer].view(kv_heads, -1, 1).repeat(len(sequences), 1, 1)
            read = (read * torch.sigmoid(lse - sink)[..., None]).to(q.dtype)
        read = read.unflatten(0, (len(sequences), kv_heads)).flatten(1, 2).transpose(1, 2)
        if len(sequences) == len(clock):
            out[:, out.shape[1] - n :] = read
        else:
            out[sequences, out.shape[1] - n :] = read
        for b in sequences if site.ring.shape[2] else ():
            reference.file_queries(site, b, q[b, :, q.shape[2] - n :], new, clock[b][Clock.START])
    return out


def _read_piece(q: Tensor, k: Tensor, v: Tensor, scale: float, reach: int) -> tuple[Tensor, Tensor]:
    """A piece reads itself: q [rows, group, n, D], k, v [rows, n, D] give [rows, group, n, D] and the LSE."""
    n = q.shape[2]
    if not reach or n <= reach:
        read, lse = _flash(q, *(t[:, None].expand(q.shape) for t in (k, v)), 0.0, True, scale=scale)
        return read, lse
    read, lse = torch.empty_like(q), torch.empty(q.shape[:3])
    for a in range(0, n, BLOCK):
        z, first = min(a + BLOCK, n), max(0, a - reach + 1)
        own, at = torch.arange(a, z)[:, None], torch.arange(first, z)
        mask = _masked((at <= own) & (at > own - reach))[None, None]
        keys, values = (t[:, None, first:z].expand(-1, q.shape[1], -1, -1) for t in (k, v))
        found = _flash(q[:, :, a:z], keys, values, 0.0, False, attn_mask=mask, scale=scale)
        read[:, :, a:z], lse[:, :, a:z] = found
    return read, lse


def _masked(sees: Tensor) -> Tensor:
    """What is added to logits, so that only what a query sees is left: float32."""
    return torch.zeros(sees.shape).masked_fill(~sees, float("-inf"))


def _read_past(
    plan: PolicyPlan, site: Site, rows: list[int], q: Tensor, read: Tensor, lse: Tensor, scale: float, reach: int
) -> None:
    """Every query of a group, q [rows, group, n, D], reads all of its row, too: read [rows, group, n, D] and
    lse [rows, group, n] of what it has read before are brought up to date."""
    lengths, table = site.length.tolist(), site.table.tolist()
    begin = site.clock[[row // plan.facts.kv_heads for row in rows], Clock.START]
    held = sorted((lengths[row], table[row][0], i) for i, row in enumerate(rows) if lengths[row])
    for length, same in groupby(held, key=lambda w: w[0]):
        for start, stride, members in _strides([(start, i) for _, start, i in same]):
            shape = (len(members), 1, length, q.shape[3])
            step = (stride * q.shape[3], 0, q.shape[3], 1)
            keys, values = (t.as_strided(shape, step, start * q.shape[3]) for t in (site.k, site.v))
            bias = None
            if plan.compact or plan.folds or reach:
                pos = site.pos.as_strided(shape[::2], (stride, 1), start)
                if plan.compact:
                    keys = rotate(keys, _places(pos)[:, None], site.rope)
                if plan.folds:
                    count = _count(plan, site)
                    bias = _bias(pos, count.as_strided(shape[::2], (stride, 1), count.storage_offset() + start))
                    bias = bias[:, None, None]
            if reach:
                oldest = begin[members, None] + torch.arange(min(q.shape[2], reach - 1)) - reach
                _read_near(q, keys, values, bias, pos[:, None] > oldest[..., None], members, read, lse, scale)
                continue
            asking = q[members].flatten(1, 2)[:, None]
            past, past_lse = _flash(asking, keys, values, 0.0, False, attn_mask=bias, scale=scale)
            past, past_lse = past.reshape(-1, *q.shape[1:]), past_lse.reshape(-1, *q.shape[1:3])
            read[members], lse[members] = _merge(read[members], lse[members], past, past_lse)


def _read_near(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sees: Tensor, members: list[int], read: Tensor,
    lse: Tensor, scale: float,
) -> None:  # fmt: skip
    """`_read_past` of rows `members` whose first queries see only some entries: sees bool [members, queries, n];
    k, v [members, 1, n, D]; bias [members, 1, 1, n] or None."""
    keys, values = (t.expand(-1, q.shape[1], -1, -1) for t in (k, v))
    for a in range(0, sees.shape[1], BLOCK):
        part, now = sees[:, None, a : a + BLOCK], slice(a, min(a + BLOCK, sees.shape[1]))
        mask = _masked(part) if bias is None else _masked(part) + bias
        past, past_lse = _flash(q[members, :, now], keys, values, 0.0, False, attn_mask=mask, scale=scale)
        some = part.any(-1)  # of a query that sees nothing the operator says LSE 0, and promises no value
        past, past_lse = past.masked_fill(~some[..., None], 0.0), past_lse.masked_fill(~some, float("-inf"))
        read[members, :, now], lse[members, :, now] = _merge(
            read[members, :, now], lse[members, :, now], past, past_lse
        )


def _turned_piece(site: Site, rows: list[int], fresh: Fresh) -> tuple[Tensor, Tensor]:
    """A piece's queries and keys, turned by their places in each KV head's row: after all that it holds."""
    n = fresh.k.shape[1]
    held = []
    for row in rows:
        start, length = int(site.table[row, 0]), int(site.length[row])
        held.append(int((site.pos[start : start + length] >= 0).sum()))
    place = torch.tensor(held)[:, None] + torch.arange(n)
    return rotate(fresh.q, place[:, None], site.rope), rotate(fresh.k, place, site.rope)


def _places(pos: Tensor) -> Tensor:
    """Places of the entries of rows without padding, pos int32 [rows, n]: int64 [rows, n]."""
    return places(pos, torch.ones_like(pos, dtype=torch.bool))


def _count(plan: PolicyPlan, site: Site) -> Tensor:
    """Tokens that the entry of each slot stands for."""
    return site.state[[s.name for s in plan.states].index("@count")]


def _bias(pos: Tensor, count: Tensor) -> Tensor:
    """What is added to every query's logits: the log of its count for an entry without position. float32."""
    return torch.where(pos < 0, count.log(), 0.0)


def _merge(a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = ((x - lse).exp()[..., None] for x in (lse_a, lse_b))
    return (a * weight_a + b * weight_b).to(a.dtype), lse


def attend_step(
    plan: PolicyPlan, site: Site, q: Tensor, k: Tensor, v: Tensor, scale: float, weights: Weights
) -> Tensor:
    """As `reference.attend_step`."""
    if narrows(plan, site):
        return reference.attend_step(plan, site, q, k, v, scale, weights)
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
    new = torch.tensor([clock[b][Clock.START] for b in active], dtype=torch.int32).repeat_interleave(kv_heads)
    where = _append(site, rows, new, k, v, _first_states(plan, site, active, new, q, k, v, weights))
    if follow_reads(plan) or plan.facts.softcap or plan.facts.sinks:
        read = torch.stack([_read_and_grow(plan, site, b, q[i], scale, weights) for i, b in enumerate(active)])
    else:
        read = _read(plan, site, where, q.reshape(len(rows), plan.facts.group, q.shape[3]), scale)
    read = read.reshape(len(active), 1, q.shape[1], q.shape[3])
    window = site.ring.shape[2]
    for i, b in enumerate(active if window else ()):
        site.ring[b, :, clock[b][Clock.START] % window] = q[i, :, 0]
    if everyone:
        return read
    out[active] = read
    return out


def _first_states(
    plan: PolicyPlan, site: Site, active: list[int], pos: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Weights
) -> Tensor | None:
    """The states of one new entry a row, at pos int32 [rows]: float32 [states, rows]; q, k, v of active sequences."""
    if not plan.states:
        return None
    if starts_plainly(plan):
        return plain_states(plan, pos)
    kv_heads = plan.facts.kv_heads
    found = []
    for i, b in enumerate(active):
        own = torch.zeros(0, kv_heads, 1), 1, int(pos[i * kv_heads])
        fresh = Fresh(q[i].unflatten(0, (kv_heads, -1)), k[i], v[i], *own)
        found.append(first_states(plan, site, b, fresh, weights)[:, :, 0])
    return torch.cat(found, 1)


def _append(
    site: Site, rows: list[int], pos: Tensor, k: Tensor, v: Tensor, state: Tensor | None
) -> list[tuple[int, int, int]]:
    """One new entry a row, at pos int32 [rows]; the host has seen to it that every extent has room.

    state float32 [states, rows]. Returns (length, start, index) of each row, the new entry included.
    """
    lengths, table = site.length.tolist(), site.table.tolist()
    slots = torch.tensor([table[row][0] + lengths[row] for row in rows])
    site.k.index_copy_(0, slots, k.reshape(len(rows), -1))
    site.v.index_copy_(0, slots, v.reshape(len(rows), -1))
    site.pos.index_copy_(0, slots, pos)
    site.frozen.index_fill_(0, slots, 0)
    if state is not None:
        site.state.index_copy_(1, slots, state)
    if len(rows) == len(lengths):
        site.length.add_(1)
    else:
        site.length[rows] += 1
    return [(lengths[row] + 1, table[row][0], i) for i, row in enumerate(rows)]


def _read(plan: PolicyPlan, site: Site, where: list[tuple[int, int, int]], q: Tensor, scale: float) -> Tensor:
    """Rows' packed queries q [rows, group, D] read their extents, given as (length, start, row): [rows, group, D]."""
    out, bias = None, None
    plain = not plan.compact and not plan.folds and not plan.facts.reach(int(site.layer))
    for length, same in groupby(sorted(where), key=lambda w: w[0]):
        for start, stride, members in _strides([(start, i) for _, start, i in same]):
            shape = (len(members), 1, length, q.shape[2])
            step = (stride * q.shape[2], 0, q.shape[2], 1)
            keys, values = (t.as_strided(shape, step, start * q.shape[2]) for t in (site.k, site.v))
            alike = members == list(range(len(where)))
            packed = q[:, None] if alike else q[members, None]
            if not plain:
                packed, keys, bias = _adjusted(plan, site, packed, keys, (len(members), length), (stride, 1), start)
            read = F.scaled_dot_product_attention(packed, keys, values, attn_mask=bias, scale=scale)[:, 0]
            if alike:
                return read
            out = torch.empty_like(q) if out is None else out
            out[members] = read
    assert out is not None
    return out


def _adjusted(
    plan: PolicyPlan, site: Site, q: Tensor, k: Tensor, shape: tuple[int, int], step: tuple[int, int], start: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Queries [rows, 1, group, D] and keys [rows, 1, n, D] turned by their places, and what is added to their logits.

    The rows' positions lie at `start` with these strides; the queries' own entries are the newest, so the last.
    """
    bias = None
    pos = site.pos.as_strided(shape, step, start)
    if plan.folds:
        count = _count(plan, site)
        bias = _bias(pos, count.as_strided(shape, step, count.storage_offset() + start))[:, None, None]
    reach = plan.facts.reach(int(site.layer))
    if reach:
        near = _masked(pos > pos[:, -1:] - reach)[:, None, None]
        bias = near if bias is None else bias + near
    if plan.compact:
        place = _places(pos)
        k = rotate(k, place[:, None], site.rope)
        q = rotate(q, place[:, None, -1:], site.rope)
    return q, k, bias


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


def _read_and_grow(plan: PolicyPlan, site: Site, b: int, q: Tensor, scale: float, weights: Weights) -> Tensor:
    """Sequence b's token, whose probabilities are asked for: q [q_heads, 1, D] reads [q_heads, D]."""
    heads = list(range(plan.facts.kv_heads))
    rows, order, index = gather_rows(plan, site, [b], heads, True, scale)
    assert rows.k is not None and rows.v is not None
    now = site.clock[b, Clock.START].reshape(1, 1).expand(len(heads), 1)
    asking = placed(rows, Queries(q.unflatten(0, (len(heads), -1)), now))
    # In float32: from 16-bit logits a probability would be off by their rounding, half a percent and more.
    p = attention_weights(rows, attention_logits(rows, asking.q, asking.pos))
    if follow_reads(plan):
        grow_states(plan, site, replace(rows, attn=p, queries={FORWARD: asking}, weights=weights), order, index)
    return torch.matmul(p[:, :, 0].to(q.dtype), rows.v).flatten(0, 1)
