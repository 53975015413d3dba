"""Launches what queries read by: landmarks of units, what each query chooses, attention over what was chosen.

All for one layer a call, all heads at once; heads that read all go through their whole rows in the same launch.
Guarantees: no device value is read back, grids follow from shapes alone, so a step can be captured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kvcompile.kernels.choose_listed import in_pieces, reads_in_pieces
from kvcompile.kernels.layout import Clock, Site
from kvcompile.kernels.marks import layout_of
from kvcompile.kernels.plan import PolicyPlan
from kvcompile.kernels.stages import Unprintable
from kvcompile.kernels.triton_backend.attend import attend
from kvcompile.kernels.triton_backend.decode import DecodeStep
from kvcompile.kernels.triton_backend.library import At, library

# Programs of a row that bring landmarks up to date: a step fills a unit now and then, a piece many.
IN_STEPS, IN_PIECES = 4, 32
# Bytes of what the queries of a prompt have chosen, as lists and bits, beyond which they go in stretches. It is a bit
# for each unit of each query and head: 4 GiB for 128k tokens in pages of 16, where keys and values of a layer have
# 0.5. A stretch of so many is thousands of tiles, which fill a GPU: 8192 queries of 32 heads there.
TABLES = 256 << 20


def _tables(plan: PolicyPlan, device: torch.device) -> tuple[Tensor, Tensor]:
    """reading and readers, as `Reading` has them."""
    lines = [plan.reading(layer) for layer in range(plan.facts.layers)], layout_of(plan).readers
    reading, readers = (torch.tensor(part, dtype=torch.int32, device=device) for part in lines)
    return reading, readers


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
        files = library(plan)
        decode = files.listed_decode(at)
        units = tuple(files.listed_units(read, at) for read in range(len(plan.reads)))
        asks = any(hasattr(module, "MARK_SIZE") for module in units)
        marks = files.listed_marks(at) if asks else None
        places = max(capacity, site.marks.shape[2] * layout_of(plan).span)  # rows that drop entries go on to count
        scratch = [module.make_scratch(rows, places, device) for module in units]
        for later in scratch[1:]:  # a row goes by one of the reads
            later |= {name: scratch[0][name] for name in ("spans", "total")}
        return cls(
            marks,
            units,
            DecodeStep.prepare(decode, plan.facts.layers, rows, capacity, device, files.target(at, listed=True)),
            *_tables(plan, device),
            tuple(scratch),
        )

    def __call__(self, site: Site, q: Tensor, k: Tensor, v: Tensor, scale: float, **variant: float | Tensor) -> Tensor:
        """[B, 1, Hq, D], zeros where a sequence brings no token. q [B, Hq, D]; k, v [B, Hkv, D]."""
        active, start, prompt = (site.clock[:, column] for column in (Clock.NEW, Clock.START, Clock.PROMPT))
        kept = site.marks, site.edges
        if self.marks is not None:
            self.marks.launch(
                site.k, site.pos, site.table, site.length, site.layer, self.readers, start, *kept, site.marked,
                programs=IN_STEPS,
            )  # fmt: skip
        for read, (module, scratch) in enumerate(zip(self.units, self.scratch, strict=True)):
            chooses = (self.readers, *kept) if hasattr(module, "MARK_SIZE") else ()
            module.launch(
                q, start, active, prompt, site.counts, site.pos, site.table, site.length, site.layer, self.reading,
                read, *chooses, scratch=scratch,
            )  # fmt: skip
        lists = {"spans": self.scratch[0]["spans"], "span_count": self.scratch[0]["total"], "reading": self.reading}
        more = lists | {"prompt": prompt, "counts": site.counts}
        out, _ = self.decode(q, k, v, site, start, active, site.layer, scale, **variant, **more)
        return out


@dataclass(frozen=True)
class PieceReading:
    """Kernels of a plan's reads in pieces of prompts, and their tables; shared by all layers.

    chosen: index of a read -> its kernels; rules: of each read the line of `Site.fires` of the rule that narrows
    pieces, -1 where it always does, None where none does.
    """

    marks: ModuleType | None
    chosen: dict[int, ModuleType]
    blocks: ModuleType
    reading: Tensor
    readers: Tensor
    rules: tuple[int | None, ...]

    @classmethod
    def prepare(cls, plan: PolicyPlan, site: Site, tokens: int) -> PieceReading:
        """Raises `stages.Unprintable` where a read has no form."""
        device = site.k.device
        at, files, narrow = At(device, site.batch * plan.facts.kv_heads, tokens), library(plan), reads_in_pieces(plan)
        if plan.peek:
            raise Unprintable("queries that are asked ahead of a piece have no Triton form for narrowed reads yet")
        rules: list[int | None] = []
        line = len(plan.classes)
        for index, read in enumerate(plan.reads):
            own = in_pieces(plan, index) if index in narrow else None
            rules.append(None if own is None else line + own if read.rules[own].triggers else -1)
            line += len(read.rules)
        chosen = {read: files.listed_piece(read, at) for read in narrow}
        asks = any(hasattr(module, "MARK_SIZE") for module in chosen.values())
        marks = files.listed_marks(at) if asks else None
        return cls(marks, chosen, files.listed_blocks(at), *_tables(plan, device), tuple(rules))

    def __call__(self, site: Site, q: Tensor, k: Tensor, v: Tensor, scale: float, **variant: Any) -> Tensor:
        """As `attend.attend`: [B, m, Hq, D]."""
        q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
        batch, heads, tokens, width = q.shape
        out = q.new_zeros(batch, tokens, heads, width)
        for lists in self.choose(site, q, k):
            attend(self.blocks, site, q, k, v, scale, **variant, **lists, out=out)
        return out

    def choose(self, site: Site, q: Tensor, k: Tensor) -> Iterator[dict[str, Any]]:
        """What the queries q [B, Hq, m, D] of a piece with keys k [B, Hkv, m, D] read, as `blocks` takes it: stretch by
        stretch, each in the place of the one before it, as many as sizes alone say."""
        q, k = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k))
        new, peek, start, prompt = (
            site.clock[:, column] for column in (Clock.NEW, Clock.PEEK, Clock.START, Clock.PROMPT)
        )
        if self.marks is not None:
            self.marks.launch(
                site.k, site.pos, site.table, site.length, site.layer, self.readers, start, site.marks, site.edges,
                site.marked, k_new=k, new=new, peek=peek, programs=IN_PIECES,
            )  # fmt: skip
        # Those that choose come first, as they say how wide bits are; a read without choices adds its lists.
        reads = sorted(self.chosen.items(), key=lambda item: not hasattr(item[1], "MARK_SIZE"))
        first = reads[0][1]
        units = site.marks.shape[2] * first.UNIT_EACH if hasattr(first, "MARK_SIZE") else 0
        by, made = (
            self._by(site),
            first.make_lists(
                q, site.table, site.length, k.shape[1], *self.blocks.queries_of(q.shape[2]), units, TABLES
            ),
        )
        lists = {name: made[name] for name in ("lists", "totals", "bits")}
        for begins_at in range(0, q.shape[2], made["stretch"]):
            for read, module in reads:
                chooses = (self.readers, site.marks) if hasattr(module, "MARK_SIZE") else ()
                module.launch(
                    q, new, peek, start, prompt, site.counts, site.pos, site.table, site.length, site.layer, by, read,
                    *chooses, read == min(self.chosen), made, begins_at,
                )  # fmt: skip
            yield lists | {"by": by, "prompt": prompt, "numbers": site.counts, "begins_at": begins_at}

    def _by(self, site: Site) -> Tensor:
        """By which read each row's queries go in this forward, int32 [B * Hkv], -1: by none."""
        own = self.reading.index_select(0, site.layer)[0]
        always, never = torch.ones_like(site.fires[0]), torch.zeros_like(site.fires[0])
        lines = [never if line is None else always if line < 0 else site.fires[line] for line in self.rules]
        fires = torch.stack(lines).index_select(0, own.clamp(min=0)) != 0  # [Hkv, B]
        return torch.where((own >= 0)[:, None] & fires, own[:, None], -1).T.flatten().contiguous()
