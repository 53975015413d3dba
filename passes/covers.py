"""The positions that regions take, as spans: counted, never listed.

Takes a class, its counts and the length of a sequence; gives `Cover`. Guarantees: exact for every region that is
named by position alone; `frozen`, `random` and `picked` are counted elsewhere.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable, Mapping

from kvcompile.kernels.plan import ClassPlan, PolicyPlan, Region


class Cover:
    """The positions below `seen` that the regions of a class take.

    counts: by index, those of its regions; a region whose count is None takes all, one whose count lacks is left out.
    """

    def __init__(
        self, plan: PolicyPlan, cls: ClassPlan, counts: Mapping[int, int | None], seen: int, prompt: int
    ) -> None:
        self.seen = seen
        spans: list[tuple[int, int]] = []
        strides: set[int] = set()
        for term in cls.keep:
            if not isinstance(term, Region) or (term.count is not None and term.count not in counts):
                continue
            n = counts[term.count] if term.count is not None else 0
            match term.kind:
                case "all":
                    spans.append((0, seen))
                case "prompt":
                    spans.append((0, prompt))
                case "generated":
                    spans.append((prompt, seen))
                case "newest":
                    assert term.unit is not None
                    unit = plan.unit(term.unit)
                    spans.append(((seen - 1 - unit.offset) // unit.size * unit.size + unit.offset, seen))
                case "sink" | "recent" | "stride" if n is None:
                    spans.append((0, seen))
                case "sink":
                    spans.append((0, n or 0))
                case "recent":
                    spans.append((seen - (n or 0), seen))
                case "stride":
                    strides.add(max(1, n or 0))
        self.spans = _merged([(max(0, a), min(b, seen)) for a, b in spans])
        self.strides = sorted(strides)

    def beside(self, spans: Iterable[tuple[int, int]]) -> Cover:
        """A cover of these spans, too; what of them is below 0 or not seen does not count."""
        found = copy.copy(self)
        found.spans = _merged([*self.spans, *((max(0, a), min(b, self.seen)) for a, b in spans)])
        return found

    def count(self, start: int, stop: int) -> int:
        """Positions from `start` up to but without `stop` that some region takes."""
        inside = [(max(a, start), min(b, stop)) for a, b in self.spans if a < stop and b > start]
        covered = sum(b - a for a, b in inside)
        return covered + self._multiples(start, stop) - sum(self._multiples(a, b) for a, b in inside)

    def _multiples(self, start: int, stop: int) -> int:
        found = 0
        for size in range(1, len(self.strides) + 1):
            for some in itertools.combinations(self.strides, size):
                step = math.lcm(*some)
                found -= (-1) ** size * ((stop - 1) // step - (start - 1) // step)
        return found


def _merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    out: list[tuple[int, int]] = []
    for a, b in sorted(span for span in spans if span[0] < span[1]):
        if out and a <= out[-1][1]:
            out[-1] = out[-1][0], max(b, out[-1][1])
        else:
            out.append((a, b))
    return out
