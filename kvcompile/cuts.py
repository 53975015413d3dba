"""How a call's tokens are cut into the policy's pieces: columns, positions, and which logits are wanted."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvcompile.cache import KvCache
from kvcompile.kernels.plan import PolicyPlan
from kvcompile.padding import Columns
from kvcompile.sequences import Piece
from kvcompile.store import to_device


def positions_of(cache: KvCache, pieces: list[Piece], width: int, device: torch.device) -> Tensor:
    """Where the model is told that right-aligned tokens stand, int64 [batch, width]; 0 where there is none.

    That is their number in the sequence, unless the caller has given positions.
    """
    start = torch.tensor([s.seen for s in cache.sequences.each])[:, None]
    used = torch.tensor([p.new + p.peek for p in pieces])[:, None]
    offset = torch.arange(width) - (width - used)
    found = torch.where(offset >= 0, start + offset, 0)
    for line, seq, n in zip(found, cache.sequences.each, used[:, 0].tolist(), strict=True):
        if seq.spans is not None and n:
            line[width - n :] = torch.tensor(seq.spans.places(seq.seen, n))
    return to_device(found, device)


def next_positions(cache: KvCache, device: torch.device) -> Tensor:
    """Where the model is told that each sequence's next token stands, int64 [batch, 1]."""
    each = cache.sequences.each
    places = [s.seen if s.spans is None else s.spans.places(s.seen, 1)[0] for s in each]
    return to_device(torch.tensor(places)[:, None], device)


def last_position(cache: KvCache, columns: Columns) -> int:
    """The largest position that the model is told for these columns."""
    pairs = zip(cache.sequences.each, columns, strict=True)
    return max(
        s.seen + len(c) - 1 if s.spans is None or not c else max(s.spans.places(s.seen, len(c))) for s, c in pairs
    )


def places_of(plan: PolicyPlan, cache: KvCache, width: int) -> int:
    """Places that a forward of so many columns can ask for: of a row's entries, or original positions."""
    held = int(cache.store.lengths().max()) if plan.compact else max(s.seen for s in cache.sequences.each)
    return held + width


class Cut(NamedTuple):
    """One piece of a prompt: its real columns, the same with peeked ones, and what that makes of each sequence."""

    parts: Columns
    both: Columns
    pieces: list[Piece]


def cut_at(columns: Columns, start: int, size: int, peek: int) -> Cut:
    """Each sequence's tokens start..start+size-1 from its own first; its last tokens run along unless it ends here."""
    parts = [c[start : start + size] for c in columns]
    ends = [bool(p) and start + size >= len(c) for p, c in zip(parts, columns, strict=True)]
    tails = [c[-peek:] if peek and p and not e else [] for c, p, e in zip(columns, parts, ends, strict=True)]
    pieces = [Piece(len(p), len(t), e) for p, t, e in zip(parts, tails, ends, strict=True)]
    return Cut(parts, [p + t for p, t in zip(parts, tails, strict=True)], pieces)


def cuts_of(columns: Columns, plan: PolicyPlan) -> list[Cut]:
    """All pieces of a prefill, one at least."""
    longest = max(len(c) for c in columns)
    size = plan.chunk or max(1, longest)
    return [cut_at(columns, start, size, plan.peek) for start in range(0, max(1, longest), size)]


def keep_columns(logits: Tensor, keep: int | Tensor) -> Tensor:
    return logits[:, slice(-keep, None) if isinstance(keep, int) else keep]


def last_only(keep: int | Tensor) -> bool:
    return isinstance(keep, int) and keep == 1


def is_aligned(columns: Columns, width: int) -> bool:
    """Whether every sequence's tokens stand at the right edge, without gaps."""
    return all(c == list(range(width - len(c), width)) for c in columns)
