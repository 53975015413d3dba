"""Recall of facts: names and their colours told in the first part of a tale, one or more asked for at the end.

`recall`: a few facts and one question that ends the prompt. `recall_many`: the same among many facts that differ
only in name and colour. `recall_later`: the prompt holds no question; three come after it, one turn each.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, ClassVar

from kvcompile.evaluation import tales
from kvcompile.evaluation.samples import Sample, Turn
from kvcompile.evaluation.suites import telling
from kvcompile.evaluation.suites.generated import Generated, answer_tokens
from kvcompile.evaluation.suites.options import number

FRONT = 0.4  # part of the prompt in which the facts stand
QUESTIONS = 3  # of the suites that ask later


@dataclass(frozen=True, slots=True)
class Recall(Generated):
    """One fact of several, asked for at the end of the prompt.

    depths: 0 puts all facts into the first 40 %. Otherwise the fact asked for stands, sample by sample, at the
    first, second, ... of so many depths from 0 to 1 in equal steps, as near as sentences allow, and the other
    facts anywhere: the rows of a heat map of needle depth.
    """

    facts: int = number(12, 1, len(tales.NAMES), "facts told")
    depths: int = number(0, 0, 50, "0: facts in the first 40 %; else so many needle depths in turn")
    wording: str = telling.wording()
    base: ClassVar[str] = "recall"

    def make(self, rng: random.Random, size: int, number: int, tokenizer: Any) -> Sample:
        english = telling.in_english(self.wording, tokenizer)
        known = tales.facts(rng, self.facts)
        asked = rng.sample(list(known), min(QUESTIONS, len(known)) if self.later else 1)
        sentences, extra = self._sentences(rng, known, asked[0], size, number)
        questions = [telling.colour_question(name, english) for name in asked]
        prompt = telling.told(sentences, english)
        if self.later:
            feeds = telling.asked_later(questions, english)
        else:
            prompt, feeds = telling.ended(prompt, questions[0], english), [""]
        tokens = answer_tokens(tokenizer, list(tales.COLOURS))
        turns = tuple(Turn(feed, known[name], tokens=tokens) for feed, name in zip(feeds, asked, strict=True))
        needle = " ".join(tales.fact(asked[0], known[asked[0]]))
        return Sample(prompt, turns, telling.depth_of(prompt, needle), {"needle": needle, **extra})

    def _sentences(
        self, rng: random.Random, known: dict[str, str], name: str, size: int, number: int
    ) -> tuple[list[list[str]], dict[str, float]]:
        room = size if size >= tales.SHORTEST else 0
        facts = [tales.fact(*pair) for pair in known.items()]
        words = room + sum(map(len, facts))
        if not self.depths:
            return tales.planted(rng, facts, room, int(words * FRONT)), {}
        wanted = number % self.depths / max(self.depths - 1, 1)
        needle = tales.fact(name, known[name])
        facts.remove(needle)
        rest = tales.planted(rng, facts, room, words - len(needle))
        return tales.at_depth(rest, needle, wanted), {"wanted_depth": wanted}

    def score(self, turn: Turn, produced: str) -> float:
        """1 where the first colour produced is the right one."""
        return float(telling.first_of(produced, tales.COLOURS) == turn.answer)


@dataclass(frozen=True, slots=True)
class RecallMany(Recall):
    """One fact among many alike."""

    facts: int = number(24, 1, len(tales.NAMES), "facts told")
    base: ClassVar[str] = "recall_many"


@dataclass(frozen=True, slots=True)
class RecallLater(Recall):
    """Three of several facts, asked for only after the prompt, one in each turn."""

    base: ClassVar[str] = "recall_later"
    later: ClassVar[bool] = True
