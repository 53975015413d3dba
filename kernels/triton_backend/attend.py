"""Launches attention of a piece of a prompt: every query reads its rows' past and the piece before it.

Also what a model's attention has beyond plain softmax, as the arguments that a launch takes for it.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, arange, where
from torch.nn.functional import scaled_dot_product_attention

from kvcompile.kernels.layout import Clock, Site
from kvcompile.kernels.plan import PolicyPlan
from kvcompile.kernels.rows import Rows

# Tokens of a piece from which torch's own attention may save more than the look at the device costs that it takes.
LONG = 4096
Variant = dict[str, Any]  # argument of a launch -> Tensor or number


def variant(plan: PolicyPlan, site: Site) -> Variant:
    """Of all layers: cap (a number), sink float32 [layers, Hq] and reach int32 [layers], those that the model has."""
    return _asked(plan, plan.facts.softcap, site.sink, site.reach)


def variant_of(plan: PolicyPlan, rows: Rows) -> Variant:
    """The same for the heads and the one layer of some rows of a sequence: sink float32 [Hq], reach a number."""
    return _asked(plan, rows.cap, None if rows.sink is None else rows.sink.flatten(), rows.reach)


def _asked(plan: PolicyPlan, cap: float, sink: Tensor | None, reach: Tensor | int) -> Variant:
    facts, found = plan.facts, Variant()
    if facts.softcap:
        found["cap"] = cap
    if facts.sinks and sink is not None:
        found["sink"] = sink
    if any(facts.windows):
        found["reach"] = reach
    return found


def library_reads(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether torch has a flash kernel for a piece that is long enough to ask if it is `alone`; nothing is read back.

    Without one torch would make the whole matrix of probabilities.
    """
    if not q.is_cuda or q.shape[2] < LONG:
        return False
    asked = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, True, q.shape[1] != k.shape[1])
    return torch.backends.cuda.can_use_flash_attention(asked)


def alone(site: Site, k: Tensor) -> bool:
    """Whether a piece k [B, Hkv, m, D] is all that its queries read, and they all of it up to themselves.

    No padding, rows that hold nothing yet, no window that is shorter. Reads one number back, as what follows the read
    of a piece does anyway.
    """
    held = site.length.view(-1, k.shape[0] * k.shape[1]).index_select(0, site.layer)
    tokens = site.clock[:, Clock.NEW] + site.clock[:, Clock.PEEK]
    reach = site.reach.index_select(0, site.layer)
    whole = (reach == 0) | (reach >= k.shape[2])
    return bool((held == 0).all() & (tokens == k.shape[2]).all() & whole.all())


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """A piece that is `alone`, by torch's own attention: as `attend`."""
    out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).contiguous()


def attend(
    module: ModuleType,
    site: Site,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    first: Tensor | None = None,
    window: Tensor | None = None,
    lse: Tensor | None = None,
    **given: Tensor | float,
) -> Tensor:
    """[B, m, Hq, D] in q's dtype, zeros where no token is; one launch for all heads, no device value is read back.

    q [B, Hq, m, D], k, v [B, Hkv, m, D], right-aligned as the clock of the site says. first, window int32 [B * Hkv]:
    a row's queries read positions below `first` and the `window` newest (0: all); None: all of them are dense.
    lse float32 [B, Hq, m], written where given: natural, untouched where no token is. given: what the kernel's facts
    ask for, by the names of its `launch`: those of `variant`; lists, counts.
    """
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    new, peek, start = (site.clock[:, column] for column in (Clock.NEW, Clock.PEEK, Clock.START))
    out: Tensor = module.launch(
        q, k, v, new, peek, start, site.k, site.v, site.pos, site.table, site.length, site.layer, scale,
        first=first, window=window, lse=lse, **given,
    )  # fmt: skip
    return out


def file_queries(site: Site, q: Tensor) -> None:
    """Put the newest real queries of a piece q [B, Hq, m, D] into the ring, at position mod its width.

    As `reference.file_queries` for every sequence at once, by what the device knows.
    """
    width = site.ring.shape[2]
    if not width:
        return
    new, peek, start = (site.clock[:, column, None] for column in (Clock.NEW, Clock.PEEK, Clock.START))
    newest = start + new - 1
    at = newest - (newest - arange(width, device=q.device)) % width  # the newest position of each slot, [B, width]
    column = (q.shape[2] - new - peek + at - start).clamp(min=0)
    asked = q.gather(2, column[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
    site.ring.copy_(where((at >= start)[:, None, :, None], asked.to(site.ring.dtype), site.ring))
