"""How many slots a row of the CPU layout is given. Free of torch, because plans count bytes by it too."""

from __future__ import annotations

SLACK = 16  # an extent is a multiple of this many slots


def extent(entries: int) -> int:
    """Slots for a row of so many entries: room for one more and for a thirty-second part, so that growth is rare.

    A row grows by one entry a step and moves when its extent is full: once in len/32 steps, a copy of 1/len each.
    """
    return -(-(entries + 1 + entries // 32) // SLACK) * SLACK
