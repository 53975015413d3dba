"""The critical KV footprint: the smallest footprint at which a method still does its task (PruLong, arXiv 2506.17121).

Takes (footprint, score) points of one method on one task and the score of full attention on it; gives `Critical`, or
None where no point below full attention's footprint is good enough. Guarantees: the headline figure is a point that
was measured; the crossing between points is given beside it and marked as interpolated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from kvcompile.kernels.errors import KvCompileError

FULL = 1.0  # footprint of full attention


@dataclass(frozen=True, slots=True)
class Critical:
    """The smallest measured footprint whose score is at least `threshold` times `full`, and that score.

    interpolated: where the straight line to the next smaller measured footprint reaches that score; None where the
    sweep has no smaller footprint, so that the critical one may lie lower still.
    """

    footprint: float
    score: float
    full: float
    threshold: float
    interpolated: float | None


@dataclass(frozen=True, slots=True)
class Spread:
    """Critical footprints of one curve over seeds.

    seeds: how many there are; reached: how many of them have a critical footprint. mean, lowest, highest: over all
    seeds, those without one counted as 1.0, which is what full attention costs; interpolated: mean of the crossings,
    None unless every seed has one. each: by seed.
    """

    label: str
    chunk: int | None
    suite: str
    length: int
    seeds: int
    reached: int
    mean: float
    lowest: float
    highest: float
    interpolated: float | None
    each: tuple[tuple[int, Critical | None], ...]


def critical_footprint(points: Iterable[tuple[float, float]], full: float, threshold: float = 0.9) -> Critical | None:
    """The critical footprint of one sweep; `points` are (footprint, score) in any order, scores in [0, 1].

    None where no point with a footprint below 1.0 reaches `threshold` times `full`, and where `full` is 0: then the
    model cannot do the task, and every score would be good enough. KvCompileError for numbers that are none.
    """
    points = list(points)
    if not 0 < threshold <= 1:
        raise KvCompileError(f"a threshold of {threshold} is outside of (0, 1]: give the part of the score to keep")
    if not all(math.isfinite(x) for point in (*points, (full, full)) for x in point):
        raise KvCompileError("a footprint or score is no finite number")
    wanted = threshold * full
    good = [point for point in points if point[1] >= wanted and point[0] < FULL]
    if full <= 0 or not good:
        return None
    footprint = min(x for x, _ in good)
    score = max(y for x, y in good if x == footprint)
    below = max(((x, y) for x, y in points if x < footprint), default=None)
    crossing = None
    if below is not None:
        x, y = below
        # Rounded sums may lie a hair beyond the point itself.
        crossing = min(x + (footprint - x) * (wanted - y) / (score - y), footprint)
    return Critical(footprint, score, full, threshold, crossing)


def spread(
    label: str, chunk: int | None, suite: str, length: int, each: Sequence[tuple[int, Critical | None]]
) -> Spread:
    """Critical footprints of one curve, (seed, critical or None), at least one."""
    values = [FULL if found is None else found.footprint for _, found in each]
    crossings = [found.interpolated for _, found in each if found is not None and found.interpolated is not None]
    return Spread(
        label, chunk, suite, length,
        seeds=len(each),
        reached=sum(found is not None for _, found in each),
        mean=fmean(values),
        lowest=min(values),
        highest=max(values),
        interpolated=fmean(crossings) if len(crossings) == len(each) else None,
        each=tuple(each),
    )  # fmt: skip
