"""Launches what a step reads by: landmarks of units, what each head chooses, decode over the chosen spans.

All for one layer a call, all heads at once; heads that read all go through their whole rows in the same launch.
Guarantees: no device value is read back, grids follow from shapes alone, so a step can be captured.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kvcompile.kernels.layout import Clock, Site
from kvcompile.kernels.marks import layout_of
from kvcompile.kernels.plan import PolicyPlan
from kvcompile.kernels.triton_backend.decode import DecodeStep
from kvcompile.kernels.triton_backend.library import At, library

# Programs of a row that bring landmarks up to date: a step fills a unit now and then, the first after a prompt all.
MARKERS = 4


@dataclass(frozen=True)
class Reading:
    """Kernels of a plan's reads in steps, their tables and scratch; shared by all layers.

    reading, readers int32 [layers, Hkv]: by which read a head goes, and its line in the landmarks; -1: none.
    """

    marks: ModuleType | None
    units: tuple[ModuleType, ...]
    decode: DecodeStep
    reading: Tensor
    readers: Tensor
    scratch: tuple[dict[str, Any], ...]

    @classmethod
    def prepare(cls, plan: PolicyPlan, site: Site, capacity: int) -> Reading:
        """capacity: the most entries that any row may have. Raises `stages.Unprintable` where a read has no form."""
        rows, device = site.batch * plan.facts.kv_heads, site.k.device
        at = At(device, rows, capacity)
        files, layers = library(plan), range(plan.facts.layers)
        decode = files.listed_decode(at)
        units = tuple(files.listed_units(read, at) for read in range(len(plan.reads)))
        marks = files.listed_marks(at) if layout_of(plan).count else None
        table = lambda lines: torch.tensor(lines, dtype=torch.int32, device=device)  # noqa: E731
        places = max(capacity, site.marks.shape[2] * layout_of(plan).span)  # rows that drop entries go on to count
        scratch = [module.make_scratch(rows, places, device) for module in units]
        for later in scratch[1:]:  # a row goes by one of the reads
            later |= {name: scratch[0][name] for name in ("spans", "total")}
        return cls(
            marks,
            units,
            DecodeStep.prepare(decode, plan.facts.layers, rows, capacity, device),
            table([plan.reading(layer) for layer in layers]),
            table(layout_of(plan).readers),
            tuple(scratch),
        )

    def __call__(self, site: Site, q: Tensor, k: Tensor, v: Tensor, scale: float, **variant: float | Tensor) -> Tensor:
        """[B, 1, Hq, D], zeros where a sequence brings no token. q [B, Hq, D]; k, v [B, Hkv, D]."""
        active, start, prompt = (site.clock[:, column] for column in (Clock.NEW, Clock.START, Clock.PROMPT))
        kept = site.marks, site.edges
        if self.marks is not None:
            self.marks.launch(
                site.k, site.pos, site.table, site.length, site.layer, self.readers, start, *kept, site.marked,
                programs=MARKERS,
            )  # fmt: skip
        for read, (module, scratch) in enumerate(zip(self.units, self.scratch, strict=True)):
            chooses = (self.readers, *kept) if hasattr(module, "MARK_SIZE") else ()
            module.launch(
                q, start, active, prompt, site.counts, site.pos, site.table, site.length, site.layer, self.reading, read,
                *chooses, scratch=scratch,
            )  # fmt: skip
        lists = {"spans": self.scratch[0]["spans"], "span_count": self.scratch[0]["total"], "reading": self.reading}
        more = lists | {"prompt": prompt, "counts": site.counts}
        out, _ = self.decode(q, k, v, site, start, active, site.layer, scale, **variant, **more)
        return out
