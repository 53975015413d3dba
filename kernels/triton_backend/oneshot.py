"""What stays of a prompt that comes in one piece: regions by position, scores and winners on the kernels.

Takes the fresh keys and states of all sequences of a layer, gives keep and winner masks. Nothing is read back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompile.kernels.evaluate import Rows
from kvcompile.kernels.layout import Clock, Site
from kvcompile.kernels.plan import PolicyPlan, Region, Selection
from kvcompile.kernels.select import region_mask
from kvcompile.kernels.triton_backend import prefill
from kvcompile.kernels.triton_backend.evict import sites
from kvcompile.kernels.triton_backend.library import library


def decide(
    plan: PolicyPlan, cls: int, site: Site, heads: list[int], k: Tensor, pos: Tensor, state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Masks of one class's heads, False or 0 in other heads: keep bool, won uint8, both [B, kv_heads, m].

    k [B, kv_heads, m, head_dim]; pos int32 [B, m], -1 where no token is; state float32 [states, B, kv_heads, m].
    """
    shape = k.shape[:3]
    there = torch.zeros(shape, dtype=torch.bool, device=k.device)
    there[:, heads] = (pos >= 0)[:, None]
    numbers = site.counts.index_select(0, site.layer)[0]  # [counts, B]
    taken = _regions(plan, cls, site, pos, numbers)[:, None] & there
    won = torch.zeros(shape, dtype=torch.uint8, device=k.device)
    for term in plan.classes[cls].selections:
        taken, chosen = _select(plan, cls, term, site, k, pos, state, scale, there, taken, numbers)
        won |= chosen
    return taken, won


def _regions(plan: PolicyPlan, cls: int, site: Site, pos: Tensor, numbers: Tensor) -> Tensor:
    """Entries that a region takes: bool [B, m], the same for every head of the class."""
    there = pos >= 0
    clock = site.clock
    now = clock[:, Clock.START] + clock[:, Clock.NEW] - 1
    rows = Rows(pos.long(), there, there, torch.zeros_like(there), now, clock[:, Clock.PROMPT], {})
    taken = torch.zeros_like(there)
    for term in plan.classes[cls].keep:
        if isinstance(term, Region):
            taken |= region_mask(plan, term, rows, numbers)
    return taken


def _select(
    plan: PolicyPlan, cls: int, term: Selection, site: Site, k: Tensor, pos: Tensor, state: Tensor | None, scale: float,
    there: Tensor, taken: Tensor, numbers: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    candidates = there & ~taken
    wanted = torch.zeros(k.shape[:2], dtype=torch.int64, device=k.device)
    if term.count is not None:
        wanted = numbers[term.count][:, None].expand(k.shape[:2])
    if term.observed:
        now = (site.clock[:, Clock.START] + site.clock[:, Clock.NEW] - 1)[:, None]
        newest = (pos > now - term.observed) & (site.clock[:, Clock.ENDS, None] != 0)
        watched = candidates & newest[:, None]
        taken, candidates = taken | watched, candidates & ~watched
        wanted = (wanted - watched.sum(2)).clamp(min=0)
    everywhere = pos[:, None].expand(k.shape[:3]).contiguous()
    found = library(plan)
    stages = found.scores(term)
    if stages:
        queries, asked = newest_queries(site)
        scores = prefill.score(stages, queries, k, everywhere, asked, candidates, scale)
    else:
        assert state is not None
        scores = state[[s.name for s in plan.states].index(str(term.score.value))]
    groups = sites(plan, cls, term.scope != "head", k.device)
    mine = groups[groups[:, 0] == site.layer.to(groups.dtype)][:, 1:].contiguous()
    chosen = prefill.winners(found.select(cls, term), scores, candidates, everywhere, wanted, mine)
    return taken | (chosen != 0), chosen


def newest_queries(site: Site) -> tuple[Tensor, Tensor]:
    """The ring of newest queries and the position of each: [B, q_heads, window, D], int32 [B, window], -1: none yet."""
    window = site.ring.shape[2]
    now = (site.clock[:, Clock.START] + site.clock[:, Clock.NEW] - 1)[:, None]
    slot = torch.arange(window, device=site.ring.device)
    asked = now - (now - slot) % max(window, 1)
    return site.ring, asked.clamp(min=-1).int()
