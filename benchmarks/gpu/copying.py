"""The ceiling: bytes a second of a device-to-device copy, and of a sum that only reads."""

from __future__ import annotations

import torch
from measuring import Bench, Cell, Figures, Part

MIB = 1 << 20


def cells(size: str) -> list[Cell]:
    """Bytes moved, read and written together."""
    counts = {"full": (64, 128, 256, 512, 1024, 2048), "quick": (64, 512, 2048), "dry": (1,)}[size]
    return [{"mib": count} for count in counts]


def measure(bench: Bench, cell: Cell) -> Figures:
    count = cell["mib"] * MIB
    words = torch.randn(count // 4, device=bench.device)
    return {"copy": bench.copy_rate(count) / 1e12, "read": count / bench.seconds(lambda: words.sum()) / 1e12}


PART = Part(
    "copy",
    "Copy bandwidth",
    "A copy counts bytes read and bytes written; the sum reads float32 and writes one number.",
    cells,
    measure,
    (("copy", "copy", "TB/s"), ("read", "sum", "TB/s")),
)
