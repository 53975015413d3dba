"""Long procedural generation: a way from place to place, written down step by step and checked step by step.

Roads are told in random order among filler, each place with one road out of it; the way from start to end must be
followed. The kind of task is that of LongProc's path traversal (Ye et al. 2025); text, places and score are ours.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

from kvcompile.evaluation.samples import Sample, Turn
from kvcompile.evaluation.suites import prose
from kvcompile.evaluation.suites.generated import Generated
from kvcompile.evaluation.suites.options import number
from kvcompile.evaluation.suites.telling import depth_of

FIRST = ("Bar", "Cor", "Dun", "Fal", "Gar", "Hol", "Kel", "Lor", "Mar", "Nor", "Pel", "Ros", "Sal", "Tor", "Vel", "Wil")
SECOND = ("a", "e", "i", "o", "u", "an", "en", "in", "on", "un")
THIRD = ("bury", "combe", "dale", "field", "gate", "ham", "ley", "mouth", "stow", "ton", "wick", "worth")
_STEP = re.compile(r"(\w+)\s*(?:->|→|\bto\b)\s*(\w+)")


@dataclass(frozen=True, slots=True)
class Walk(Generated):
    """A way of `steps` roads, among other ways as long that never meet it."""

    steps: int = number(16, 1, 400, "roads from start to end, lines to write")
    others: int = number(2, 0, 3, "other ways, as long")
    base: ClassVar[str] = "walk"

    def make(self, rng: random.Random, size: int, number: int, tokenizer: Any) -> Sample:
        every = [a + b + c for a in FIRST for b in SECOND for c in THIRD]
        places = rng.sample(every, (self.others + 1) * (self.steps + 1))
        ways = [places[i :: self.others + 1] for i in range(self.others + 1)]
        roads = [f"From {a} the road leads to {b}." for way in ways for a, b in pairwise(way)]
        way, needle = ways[0], roads[0]
        rng.shuffle(roads)
        prompt = (
            "The text below tells where roads lead, among other things. Remember every road.\n\n"
            f"{prose.woven(rng, roads, size)}\n\n"
            f"Follow the roads from {way[0]} to {way[-1]}, {self.steps} in all. Write one line for each road, such as "
            f"Place -> Next.\n\nThe way from {way[0]} to {way[-1]}:\n"
        )
        answer = "\n".join(f"{a} -> {b}" for a, b in pairwise(way))
        turn = Turn("", answer, tokens=prose.room_for(tokenizer, answer))
        return Sample(prompt, (turn,), depth_of(prompt, needle), {"needle": needle, "steps": self.steps})

    def score(self, turn: Turn, produced: str) -> float:
        """The part of the way that is right up to the first wrong step.

        A step is a line with `A -> B` or `A to B` in it; other lines do not count, nor does what follows the end.
        """
        right, said = _steps(turn.answer), _steps(produced)
        wrong = (i for i, step in enumerate(right) if i >= len(said) or said[i] != step)
        return next(wrong, len(right)) / len(right)


def _steps(text: str) -> list[tuple[str, ...]]:
    return [found.groups() for line in text.casefold().splitlines() if (found := _STEP.search(line))]
