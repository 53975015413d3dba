"""Copy and reverse: a list of words, told at the start of the prompt, must be repeated or reversed at its end."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, ClassVar

from kvcompile.evaluation import tales
from kvcompile.evaluation.samples import Sample, Turn
from kvcompile.evaluation.suites import prose
from kvcompile.evaluation.suites.generated import Generated
from kvcompile.evaluation.suites.options import number
from kvcompile.evaluation.suites.telling import depth_of, words_of

POOL = (*tales.NAMES, *tales.COLOURS)  # words that filler does not use


@dataclass(frozen=True, slots=True)
class Copy(Generated):
    """The list as it was told. Filler stands between the list and the question."""

    words: int = number(24, 2, 4000, "words in the list")
    base: ClassVar[str] = "copy"
    how: ClassVar[str] = "in the same order"

    def make(self, rng: random.Random, size: int, number: int, tokenizer: Any) -> Sample:
        words = rng.sample(POOL, self.words) if self.words <= len(POOL) else rng.choices(POOL, k=self.words)
        told = " ".join(words)
        prompt = (
            f"Remember this list of {self.words} words: {told}.\n\n{' '.join(prose.filler(rng, size))}\n\n"
            f"Now write the {self.words} words of the list {self.how}, with spaces between them.\nThe words:"
        )
        answer = " ".join(self.wanted(words))
        turn = Turn("", answer, tokens=prose.room_for(tokenizer, answer))
        return Sample(prompt, (turn,), depth_of(prompt, told), {"needle": told})

    def wanted(self, words: list[str]) -> list[str]:
        """The words as they must be written."""
        return words

    def score(self, turn: Turn, produced: str) -> float:
        """The part of the positions at which the right word stands; case and punctuation do not count."""
        right, said = turn.answer.split(), words_of(produced)
        return sum(a == b for a, b in zip(right, said, strict=False)) / len(right)


@dataclass(frozen=True, slots=True)
class Reverse(Copy):
    """The list from its last word to its first."""

    base: ClassVar[str] = "reverse"
    how: ClassVar[str] = "in reverse order, the last word first"

    def wanted(self, words: list[str]) -> list[str]:
        return words[::-1]
