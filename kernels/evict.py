"""Eviction of one head class: decide by `select`, carry out in the pools. Written once, for every layout."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompile.kernels.evaluate import Rows
from kvcompile.kernels.formulas import ties_heads
from kvcompile.kernels.gather import Fresh, apply, gather_rows, needs_keys, query_sources, sequence, with_queries
from kvcompile.kernels.judge import carry_out, gather_in_place, judging, numbers_of, place_of
from kvcompile.kernels.layout import Clock, Site, write
from kvcompile.kernels.plan import ClassPlan, PolicyPlan, formulas_of
from kvcompile.kernels.select import Means, Plainly, keep_mask
from kvcompile.kernels.span import competes, note_scores


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


def in_place(plan: PolicyPlan, cls: int) -> bool:
    """Whether a class is judged at the end of a piece only once the piece's entries are in its rows."""
    part = plan.classes[cls]
    return part.rows_of is not None or part.moves or plan.spans(cls)


def evict_prefill(
    plan: PolicyPlan, cls: int, site: Site, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, scale: float
) -> None:
    """End of a piece, one class of one layer: judge resident and fresh entries together, append the survivors.

    Sequences whose trigger does not fire in this piece just append. Shapes as in `insert`; q [B, q_heads, m, head_dim].
    Rows that are judged in place have their entries appended first, by the class that comes first among those of
    the same rows; of a class that spans layers only the scores are taken, `span.evict_span` decides.
    """
    facts, part = plan.facts, plan.classes[cls]
    layer = int(site.layer)
    heads = plan.heads(layer, cls)
    for b in range(site.batch if heads else 0):
        fresh = sequence(site, b, q, k, v, state, facts.kv_heads)
        if not fresh.real:
            continue
        fires = bool(site.fires[cls, b])
        if part.rows_of is None and (in_place(plan, cls) or not fires):
            _insert(plan, site, b, fresh, heads)
        if plan.spans(cls):
            note_scores(plan, cls, site, b, scale, fresh)
        elif fires and in_place(plan, cls):
            _judge_in_place(plan, cls, site, [b], list(heads), scale, fresh)
        elif fires:
            rows, order, index = gather_rows(plan, site, [b], list(heads), needs_keys(plan, part), scale, fresh)
            rows = with_queries(plan, site, b, list(heads), rows, query_sources(part), fresh)
            keep, won = decide(plan, cls, site, [b], list(heads), rows, order, Plainly())
            apply(site, index, keep, won, part, list(heads), fresh)


def evict_step(plan: PolicyPlan, sites: list[Site], scale: float) -> None:
    """After a step: the evictions of all layers and classes whose trigger fires, but for layers that compete."""
    for site in sites:
        for cls in plan.site_classes(int(site.layer)):
            firing = site.fires[cls].nonzero().flatten().tolist()
            if firing and not competes(plan.classes[cls]):
                evict_class(plan, cls, site, firing, scale)


def evict_class(plan: PolicyPlan, cls: int, site: Site, firing: list[int], scale: float) -> None:
    """After a step: one class of one layer, in the sequences where its trigger fires."""
    part = plan.classes[cls]
    heads = list(plan.heads(int(site.layer), cls))
    for sequences in [[b] for b in firing] if _alone(plan, part) else [firing]:
        _judge_in_place(plan, cls, site, sequences, heads, scale, None)


def _alone(plan: PolicyPlan, part: ClassPlan) -> bool:
    """Whether rows of several sequences cannot be taken at once: heads look at each other, or queries are read."""
    if needs_keys(plan, part) or query_sources(part) or any(s.scope != "head" for s in part.selections):
        return True
    return any(ties_heads(formula) for formula in formulas_of(part))


def _judge_in_place(
    plan: PolicyPlan, cls: int, site: Site, sequences: list[int], heads: list[int], scale: float, fresh: Fresh | None
) -> None:
    """Judge rows whose entries are all in the pools; `fresh` is the piece that came last (of one sequence)."""
    part = plan.classes[cls]
    rows, order, index = gather_in_place(plan, site, sequences, heads, needs_keys(plan, part), scale, fresh)
    sources = query_sources(part)
    if sources:
        rows = with_queries(plan, site, sequences[0], heads, rows, sources, fresh)
    keep, won = decide(plan, cls, site, sequences, heads, rows, order, Plainly())
    carry_out(plan, part, site, index, keep, won, heads)


def decide(
    plan: PolicyPlan,
    cls: int,
    site: Site,
    sequences: list[int],
    heads: list[int],
    rows: Rows,
    order: Tensor,
    means: Means,
) -> tuple[Tensor, Tensor]:
    """What these rows keep and which of it won a selection, in entry order: bool [rows, n] each.

    Rows where no condition of a trigger that fired holds keep all that they have. Fills slots for later layers.
    """
    part = plan.classes[cls]
    judged = judging(part, cls, site, sequences, len(heads), rows)
    place = place_of(cls, site, sequences, heads, judged)
    ends = site.clock[sequences, Clock.ENDS].bool().repeat_interleave(len(heads))
    keep, won = keep_mask(plan, part, rows, numbers_of(plan, part, site, sequences, heads, rows), ends, means, place)
    if judged is not None:
        keep, won = torch.where(judged[:, None], keep, rows.resident), won & judged[:, None]
    return torch.zeros_like(keep).scatter(1, order, keep), torch.zeros_like(won).scatter(1, order, won)
