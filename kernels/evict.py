"""Eviction of one head class: decide by `select`, carry out in the pools. Written once, for every layout."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompile.kernels.gather import (
    Fresh,
    apply_fresh,
    few,
    gather_rows,
    needs_keys,
    pieces_of,
    query_sources,
    sequence,
    together,
    with_queries,
)
from kvcompile.kernels.judge import carry_out, gather_in_place, judging, met, numbers_of, place_of
from kvcompile.kernels.layout import Clock, Site, write
from kvcompile.kernels.plan import ClassPlan, PolicyPlan
from kvcompile.kernels.ranks import has_joint
from kvcompile.kernels.reads import with_reads
from kvcompile.kernels.rows import Rows
from kvcompile.kernels.select import Means, Plainly, keep_mask
from kvcompile.kernels.span import competes, note_scores


def insert(plan: PolicyPlan, cls: int, site: Site, k: Tensor, v: Tensor, state: Tensor | None) -> None:
    """Append a piece's real entries to the rows of a class that drops nothing now.

    k, v [B, kv_heads, m, head_dim], right-aligned; state float32 [states, B, kv_heads, m] or None.
    """
    heads = list(plan.heads(int(site.layer), cls))
    for alike in _equally_far(site, cls).values() if heads else ():
        for sequences in few(alike, k[0].numel()):
            _insert(plan, site, sequences, together(site, sequences, k, k, v, state, plan.facts.kv_heads), heads)


def _insert(plan: PolicyPlan, site: Site, sequences: list[int], fresh: Fresh, heads: list[int]) -> None:
    kv_heads, n = plan.facts.kv_heads, fresh.real
    if not n:
        return
    base = site.base(kv_heads)
    rows = [base + b * kv_heads + h for b in sequences for h in heads]
    picks = pieces_of(sequences, heads, kv_heads)
    k, v = (t[picks, :n].flatten(0, 1) for t in (fresh.k, fresh.v))
    pos = fresh.pos[:n].repeat(len(rows))
    write(site, rows, [n] * len(rows), k, v, pos, torch.zeros_like(pos), fresh.state[:, picks].flatten(1))


def _equally_far(site: Site, cls: int) -> dict[tuple[int, ...], list[int]]:
    """Sequences by what their clock says and what fires for a class: those of a kind can be taken at once."""
    found: dict[tuple[int, ...], list[int]] = {}
    for b, (clock, fires) in enumerate(zip(site.clock.tolist(), site.fires[cls].tolist(), strict=True)):
        found.setdefault((fires, *clock), []).append(b)
    return found


def in_place(plan: PolicyPlan, cls: int) -> bool:
    """Whether a class is judged at the end of a piece only once the piece's entries are in its rows."""
    part = plan.classes[cls]
    return part.rows_of is not None or part.moves or plan.spans(cls)


def evict_prefill(
    plan: PolicyPlan, cls: int, site: Site, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, scale: float,
    means: Means | None = None,
) -> None:  # fmt: skip
    """End of a piece, one class of one layer: judge resident and fresh entries together, append the survivors.

    Sequences whose trigger does not fire in this piece just append. Shapes as in `insert`; q [B, q_heads, m, head_dim].
    Rows that are judged in place have their entries appended first, by the class that comes first among those of
    the same rows; of a class that spans layers only the scores are taken, `span.evict_span` decides. A backend may
    bring its own `means`.
    """
    facts, part = plan.facts, plan.classes[cls]
    heads = list(plan.heads(int(site.layer), cls))
    for (fires, *_), alike in _equally_far(site, cls).items() if heads else ():
        for sequences in _batches(plan, cls, site, alike, k.shape[2], len(heads)):
            fresh = together(site, sequences, q, k, v, state, facts.kv_heads)
            if not fresh.real:
                continue
            if part.rows_of is None and (in_place(plan, cls) or not fires):
                _insert(plan, site, sequences, fresh, heads)
            if plan.spans(cls):
                for b in sequences:
                    note_scores(plan, cls, site, b, scale, sequence(site, b, q, k, v, state, facts.kv_heads))
            elif fires and in_place(plan, cls):
                _judge_in_place(plan, cls, site, sequences, heads, scale, fresh)
            elif fires:
                rows, order, _ = gather_rows(plan, site, sequences, heads, needs_keys(plan, part), scale, fresh)
                rows = _asked(plan, cls, site, sequences, heads, rows, fresh)
                keep, won = decide(plan, cls, site, sequences, heads, rows, order, means or Plainly())
                apply_fresh(plan, site, sequences, heads, keep, won, part, fresh)


def _batches(plan: PolicyPlan, cls: int, site: Site, alike: list[int], columns: int, heads: int) -> list[list[int]]:
    """Equally far sequences, cut so that what is gathered at a time stays small."""
    facts, part = plan.facts, plan.classes[cls]
    if has_joint(plan, part):  # other processes' rows are of other lengths, and all have to cut alike
        return [[b] for b in alike]
    asked = [columns if s.kind in ("forward", "sample") else s.width for s in query_sources(part)]
    width = columns + int(site.length.max())
    size = heads * width * max(facts.head_dim, facts.group * sum(asked), 1)
    return few(alike, size)


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
    """Whether rows of several sequences are not taken at once: they may be at different places, and keys are many."""
    return needs_keys(plan, part) or bool(query_sources(part))


def _judge_in_place(
    plan: PolicyPlan, cls: int, site: Site, sequences: list[int], heads: list[int], scale: float, fresh: Fresh | None
) -> None:
    """Judge rows whose entries are all in the pools; `fresh` is the piece that came last (of equally far sequences)."""
    part = plan.classes[cls]
    rows, order, index = gather_in_place(plan, site, sequences, heads, needs_keys(plan, part), scale, fresh)
    rows = _asked(plan, cls, site, sequences, heads, rows, fresh)
    keep, won = decide(plan, cls, site, sequences, heads, rows, order, Plainly())
    carry_out(plan, part, site, index, keep, won)


def _asked(
    plan: PolicyPlan, cls: int, site: Site, sequences: list[int], heads: list[int], rows: Rows, fresh: Fresh | None
) -> Rows:
    """Rows with the queries that a class's formulas ask for; those of this forward read what they did read."""
    sources = query_sources(plan.classes[cls])
    if any(s.kind in ("forward", "sample") for s in sources):
        rows = with_reads(plan, site, sequences, heads, rows, fresh)
    if sources:
        rows = with_queries(plan, site, sequences, heads, rows, sources, fresh)
    return met(plan, cls, site, rows)


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
    known = all(trigger.cond is None for trigger in part.triggers) and not plan.picks
    if judged is not None and known and not bool(judged.any()):  # a window has moved on, no more
        kept = torch.zeros_like(rows.resident).scatter(1, order, rows.resident)
        return kept, torch.zeros_like(kept)
    place = place_of(cls, site, sequences, heads, judged, plan.first_head)
    ends = site.clock[sequences, Clock.ENDS].bool().repeat_interleave(len(heads))
    keep, won = keep_mask(plan, part, rows, numbers_of(plan, part, site, sequences, heads, rows), ends, means, place)
    if judged is not None:
        keep, won = torch.where(judged[:, None], keep, rows.resident), won & judged[:, None]
    return torch.zeros_like(keep).scatter(1, order, keep), torch.zeros_like(won).scatter(1, order, won)
