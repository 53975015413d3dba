"""The KV footprint as PruLong's published code computes it, defects included, to be held against the true figure.

Takes a setting; gives (footprint, peak) as parts of full attention. Written from the formula (arXiv 2506.17121 and the
metric of its repository); not part of the product. `GOLDEN` are figures that the published code itself gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

WINDOW = 64  # entries that the formula adds to each piece of every eviction method


@dataclass(frozen=True, slots=True)
class Setting:
    """Lengths in tokens; `token_sparsity` is evicted of each piece in global heads, `head_sparsity` of the heads are
    local ones of `sink` and `window`. stabilizers, last: Locret's, None for the other methods."""

    prompt: int
    answer: int
    piece: int
    sink: int = 0
    window: int = 0
    token_sparsity: float = 0.0
    head_sparsity: float = 0.0
    stabilizers: int | None = None
    last: int = 0

    def pieces(self) -> Iterator[tuple[int, int]]:
        """(first, past the last) of each piece; Locret makes the prompt's last tokens a piece of their own."""
        head = self.prompt - self.last
        edges = [*range(0, head, self.piece), head, *([self.prompt] if self.last else [])]
        yield from pairwise(edges)


GOLDEN: tuple[tuple[Setting, float, float], ...] = (
    (Setting(131072, 100, 131072, 128, 1024), 1.0, 1.0),
    (Setting(131072, 100, 32768, 128, 1024, head_sparsity=0.7), 0.4839610, 0.4807855),
    (Setting(131072, 100, 32768, 128, 1024, head_sparsity=0.5), 0.6314007, 0.6289147),
    (Setting(131072, 100, 8192, 128, 1024, head_sparsity=0.7), 0.3552157, 0.3496356),
    (Setting(131072, 100, 131072, 128, 1024, head_sparsity=0.7), 0.9989425, 0.9992376),
    (Setting(1000, 10, 256, 4, 32, head_sparsity=0.5), 0.6497096, 0.6277228),
    (Setting(131072, 100, 32768, token_sparsity=0.7), 0.4761941, 0.4760925),
    (Setting(131072, 100, 131072, token_sparsity=0.7), 0.9989343, 0.9992376),
    (Setting(32000, 3072, 8192, token_sparsity=0.5), 0.6142419, 0.5675182),
    (Setting(32000, 3072, 32768, token_sparsity=0.9), 0.8564695, 0.9124088),
    (Setting(131072, 100, 32768, token_sparsity=0.7, stabilizers=2500, last=100), 0.5317416, 0.5310432),
)


def published(setting: Setting, *, extra: int = WINDOW, peeked: int = 0) -> tuple[float, float]:
    """Footprint and peak.

    extra: entries beyond its budget that a piece is said to keep (published: 64, whatever the method really does);
    peeked: tokens that run along with every piece but the last (published: not counted).
    """
    total = setting.prompt + setting.answer
    streaming, streaming_peaks = _streaming(setting)
    eviction, eviction_peaks = _global(setting, extra, peeked)
    local = setting.head_sparsity
    footprint = (local * streaming + (1 - local) * eviction) / triangle(total)
    peaks = (local * s + (1 - local) * g for s, g in zip(streaming_peaks, eviction_peaks, strict=True))
    return footprint, max(peaks) / total


def triangle(n: int) -> int:
    return n * (n + 1) // 2


def _streaming(setting: Setting) -> tuple[int, list[int]]:
    """Area and the most at once, piece by piece, of a head that keeps sink and window."""

    def held(seen: int) -> int:
        recent = min(seen, setting.window)
        return recent + min(seen - recent, setting.sink)

    area, peaks = 0, []
    for first, end in setting.pieces():
        area += triangle(end - first) + (end - first) * held(first)
        peaks.append(end - first + held(first))
    for seen in range(setting.prompt, setting.prompt + setting.answer):
        area += 1 + held(seen)
    return area, [*peaks, 1 + held(setting.prompt + setting.answer - 1)]


def _global(setting: Setting, extra: int, peeked: int) -> tuple[int, list[int]]:
    """The same of a head that keeps a part of each piece."""
    area = held = 0
    peaks = []
    extra = extra if setting.stabilizers is None else setting.stabilizers
    for first, end in setting.pieces():
        n = end - first
        wide = n + (peeked if end < setting.prompt else 0)
        area += triangle(wide) + wide * held
        peaks.append(wide + held)
        held += min(round((1 - setting.token_sparsity) * n) + extra, n)
    area += triangle(setting.answer) + setting.answer * held
    return area, [*peaks, held + setting.answer]


def pyramid(capacity: int, window: int, prompt: int, layers: int, beta: int = 20) -> list[int]:
    """Entries by layer as published for PyramidKV (arXiv 2406.02069), with the whole-number step that lets the mean
    drift from `capacity`."""
    rest = capacity - window
    if prompt < 2 * rest:
        return [capacity] * layers
    low = rest // beta
    high = 2 * rest - low
    if high >= prompt - window:
        high = prompt - window
        low = 2 * rest - high
    step = (high - low) // (layers - 1)
    return [high - layer * step + window for layer in range(layers)]
