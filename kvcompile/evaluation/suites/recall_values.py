"""Recall of several values: one name has several colours told, far apart; all of them must be listed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, ClassVar

from kvcompile.evaluation import tales
from kvcompile.evaluation.samples import Sample, Turn
from kvcompile.evaluation.suites import telling
from kvcompile.evaluation.suites.generated import Generated, answer_tokens
from kvcompile.evaluation.suites.options import number
from kvcompile.evaluation.suites.recall import FRONT

TOKENS_BETWEEN = 1  # a stop or a comma after each value


@dataclass(frozen=True, slots=True)
class RecallValues(Generated):
    """A name with several colours, among names with one colour each, in the first 40 % of the prompt."""

    values: int = number(4, 2, 12, "colours of the name asked for")
    facts: int = number(8, 0, len(tales.NAMES) - 1, "facts told of other names")
    wording: str = telling.wording()
    base: ClassVar[str] = "recall_values"

    def make(self, rng: random.Random, size: int, number: int, tokenizer: Any) -> Sample:
        english = telling.in_english(self.wording, tokenizer)
        known = tales.facts(rng, self.facts + 1)
        name, *others = known
        colours = rng.sample(tales.COLOURS, self.values)
        own = [tales.fact(name, colour) for colour in colours]
        told = own + [tales.fact(other, known[other]) for other in others]
        room = size if size >= tales.SHORTEST else 0
        sentences = tales.planted(rng, told, room, int((room + tales.FACT_WORDS * len(told)) * FRONT))
        first = next(sentence for sentence in sentences if sentence in own)
        question = telling.colour_question(name, english)
        if english:
            question = (
                f"Question: which {self.values} colours suit {name}? List all of them.\n"
                f"Answer: the colours that suit {name} are"
            )
        prompt = telling.ended(telling.told(sentences, english), question, english)
        tokens = (answer_tokens(tokenizer, list(tales.COLOURS)) + TOKENS_BETWEEN) * self.values
        needle = " ".join(first)
        turn = Turn("", " ".join(colours), tokens=tokens)
        return Sample(prompt, (turn,), telling.depth_of(prompt, needle), {"needle": needle})

    def score(self, turn: Turn, produced: str) -> float:
        """The part of the colours that is among the first so many different colours produced, in any order.

        Later ones do not count: else a list of all colours there are would be right.
        """
        right = turn.answer.split()
        said = [word for word in telling.words_of(produced) if word in tales.COLOURS]
        return len({*list(dict.fromkeys(said))[: len(right)]} & {*right}) / len(right)
