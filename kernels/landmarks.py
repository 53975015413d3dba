"""What landmarks are, in torch: the meaning that every kernel which keeps them is tested against.

Takes a layer's tensors between reads; brings `Site.marks`, `edges` and `marked` up to date. Guarantees: a landmark that
is current is of the entries that its row holds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompile.kernels.evaluate import landmarks_of
from kvcompile.kernels.layout import Site
from kvcompile.kernels.marks import MarksLayout, layout_of
from kvcompile.kernels.plan import PolicyPlan
from kvcompile.kernels.rows import Rows


def refresh(plan: PolicyPlan, site: Site, k: Tensor | None = None, v: Tensor | None = None) -> None:
    """Bring the landmarks of a layer up to date, before its queries read: in torch, row by row, all of them anew.

    Those of units that are full by the tokens that were there before; with a piece's k and v [B, kv_heads, m, D],
    right-aligned, also of the units that it fills.
    """
    layout, kv_heads = layout_of(plan), plan.facts.kv_heads
    for head, reader in enumerate(layout.readers[int(site.layer)]):
        for b, (new, peek, start) in enumerate(site.clock[:, :3].tolist()) if reader >= 0 else ():
            row = site.base(kv_heads) + b * kv_heads + head
            slots = site.slots(row, 0, int(site.length[row]))
            pos, keys, values = site.pos[slots].long(), site.k[slots], site.v[slots]
            seen = start
            if k is not None and v is not None:
                at = slice(k.shape[2] - new - peek, k.shape[2] - peek)
                pos = torch.cat([pos, torch.arange(start, start + new, device=pos.device)])
                keys, values = torch.cat([keys, k[b, head, at]]), torch.cat([values, v[b, head, at]])
                seen += new
            _refresh_row(layout, site, reader, b, pos, keys, values, seen)


def _refresh_row(
    layout: MarksLayout, site: Site, reader: int, b: int, pos: Tensor, k: Tensor, v: Tensor, seen: int
) -> None:
    there, none = torch.ones_like(pos, dtype=torch.bool)[None], torch.zeros(1, dtype=torch.int64, device=pos.device)
    rows = Rows(pos[None], there, there, ~there, none, none, {}, k=k[None], v=v[None])
    for i, kind in enumerate(layout.kinds):
        full = kind.unit.full(seen)
        blocks = -(-full // kind.each)
        if layout.evicts[reader] and full:
            first = kind.unit.offset + torch.arange(blocks * kind.each, device=pos.device) * kind.unit.stride
            edges = torch.stack([torch.searchsorted(pos, first), torch.searchsorted(pos, first + kind.unit.size)], 1)
            own = slice(kind.edge, kind.edge + kind.each)
            site.edges[reader, b, :blocks, own] = edges.view(blocks, kind.each, 2).to(site.edges.dtype)
        if full and kind.landmarks:
            found = landmarks_of(rows, kind.unit, [expr for _, expr in kind.landmarks])[0, :full]
            found = torch.nn.functional.pad(found, (0, 0, 0, blocks * kind.each - len(found)))
            own = slice(kind.first, kind.first + kind.each * kind.channels)
            site.marks[reader, b, :blocks, own] = found.view(blocks, -1).to(site.marks.dtype)
        site.marked[reader, b, i] = full


def forget(marked: Tensor, layout: MarksLayout, b: int, seen: int) -> None:
    """A sequence goes back to its first `seen` tokens: what was full beyond them is not current any more."""
    for i, kind in enumerate(layout.kinds):
        marked[:, b, i].clamp_(max=kind.unit.full(seen))
