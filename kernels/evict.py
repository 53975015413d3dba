"""Eviction of one head class: decide by `select`, carry out in the pools. Written once, for every layout."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvcompile.kernels.evaluate import Rows
from kvcompile.kernels.gather import (
    Fresh,
    apply,
    gather_queries,
    gather_rows,
    needs_keys,
    query_sources,
    sequence,
)
from kvcompile.kernels.layout import Clock, Site, write
from kvcompile.kernels.plan import ClassPlan, PolicyPlan
from kvcompile.kernels.select import Means, Plainly, keep_mask


def insert(plan: PolicyPlan, cls: int, site: Site, k: Tensor, v: Tensor, state: Tensor | None) -> None:
    """Append a piece's real entries to the rows of a class that drops nothing now.

    k, v [B, kv_heads, m, head_dim], right-aligned; state float32 [states, B, kv_heads, m] or None.
    """
    heads = plan.heads(int(site.layer), cls)
    for b in range(site.batch if heads else 0):
        _insert(plan, site, b, sequence(site, b, k, k, v, state, plan.facts.kv_heads), heads)


def _insert(plan: PolicyPlan, site: Site, b: int, fresh: Fresh, heads: tuple[int, ...]) -> None:
    if not fresh.real:
        return
    base = site.base(plan.facts.kv_heads) + b * plan.facts.kv_heads
    real = slice(0, fresh.real)
    unjudged = torch.zeros(fresh.real, dtype=torch.uint8, device=fresh.k.device)
    for h in heads:
        write(site, base + h, fresh.k[h, real], fresh.v[h, real], fresh.pos[real], unjudged, fresh.state[:, h])


def evict_prefill(
    plan: PolicyPlan, cls: int, site: Site, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, scale: float
) -> None:
    """End of a piece, one class of one layer: judge resident and fresh entries together, append the survivors.

    Sequences whose trigger does not fire in this piece just append. Shapes as in `insert`; q [B, q_heads, m, head_dim].
    """
    facts, part = plan.facts, plan.classes[cls]
    layer = int(site.layer)
    heads = plan.heads(layer, cls)
    for b in range(site.batch if heads else 0):
        fresh = sequence(site, b, q, k, v, state, facts.kv_heads)
        if not fresh.real:
            continue
        if not int(site.fires[cls, b]):
            _insert(plan, site, b, fresh, heads)
            continue
        rows, order, index = gather_rows(plan, site, [b], list(heads), needs_keys(plan, part), scale, fresh)
        sources = {s: gather_queries(site, b, list(heads), facts.kv_heads, s, fresh) for s in query_sources(part)}
        rows = replace(rows, queries=sources)
        keep, won = decide(plan, part, site, [b], list(heads), rows, order, Plainly())
        apply(site, index, keep, won, part, list(heads), fresh)


def evict_step(plan: PolicyPlan, sites: list[Site], scale: float) -> None:
    """After a step: the evictions of all layers and classes whose trigger fires."""
    for site in sites:
        layer = int(site.layer)
        for cls in plan.site_classes(layer):
            firing = site.fires[cls].nonzero().flatten().tolist()
            if firing:
                evict_class(plan, plan.classes[cls], site, firing, list(plan.heads(layer, cls)), scale)


def evict_class(
    plan: PolicyPlan, part: ClassPlan, site: Site, firing: list[int], heads: list[int], scale: float
) -> None:
    """After a step: one class of one layer, in the sequences where its trigger fires."""
    keys = needs_keys(plan, part)
    alone = keys or any(s.scope != "head" for s in part.selections)
    for sequences in [[b] for b in firing] if alone else [firing]:
        rows, order, index = gather_rows(plan, site, sequences, heads, keys, scale)
        if alone:
            kv_heads = plan.facts.kv_heads
            found = {s: gather_queries(site, sequences[0], heads, kv_heads, s, None) for s in query_sources(part)}
            rows = replace(rows, queries=found)
        keep, won = decide(plan, part, site, sequences, heads, rows, order, Plainly())
        apply(site, index, keep, won, part, heads)


def decide(
    plan: PolicyPlan,
    part: ClassPlan,
    site: Site,
    sequences: list[int],
    heads: list[int],
    rows: Rows,
    order: Tensor,
    means: Means,
) -> tuple[Tensor, Tensor]:
    """What these rows keep and which of it won a selection, in entry order: bool [rows, n] each."""
    layer = int(site.layer)
    numbers = site.counts[layer][:, sequences].repeat_interleave(len(heads), 1)
    ends = site.clock[sequences, Clock.ENDS].bool().repeat_interleave(len(heads))
    keep, won = keep_mask(plan, part, rows, numbers, ends, means)
    return torch.zeros_like(keep).scatter(1, order, keep), torch.zeros_like(won).scatter(1, order, won)
