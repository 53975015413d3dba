"""Topics: a tale sets one in its first part, far back, and the word that goes with it is asked for.

`topic`: the question ends the prompt. `topic_later`: it comes only after the prompt, as a turn. Unlike a fact, a
topic is not found by an equal word: the question names nothing of the sentence that answers it.
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
from kvcompile.evaluation.suites.recall import FRONT


@dataclass(frozen=True, slots=True)
class Topic(Generated):
    """The topic among facts that nobody asks for, all in the first 40 % of the prompt."""

    facts: int = number(12, 0, len(tales.NAMES), "facts told besides the topic")
    wording: str = telling.wording()
    base: ClassVar[str] = "topic"

    def make(self, rng: random.Random, size: int, number: int, tokenizer: Any) -> Sample:
        english = telling.in_english(self.wording, tokenizer)
        topic = rng.randrange(len(tales.TOPICS))
        told = [tales.topic_told(topic), *(tales.fact(*pair) for pair in tales.facts(rng, self.facts).items())]
        room = size if size >= tales.SHORTEST else 0
        words = room + sum(map(len, told))
        prompt = telling.told(tales.planted(rng, told, room, int(words * FRONT)), english)
        question = telling.topic_question(english)
        if self.later:
            (ask,) = telling.asked_later([question], english)
        else:
            prompt, ask = telling.ended(prompt, question, english), ""
        needle = " ".join(tales.topic_told(topic))
        turn = Turn(ask, tales.MOODS[topic], tokens=answer_tokens(tokenizer, list(tales.MOODS)))
        return Sample(prompt, (turn,), telling.depth_of(prompt, needle), {"needle": needle})

    def score(self, turn: Turn, produced: str) -> float:
        """1 where the first of the topics' words that is produced is the right one."""
        return float(telling.first_of(produced, tales.MOODS) == turn.answer)


@dataclass(frozen=True, slots=True)
class TopicLater(Topic):
    """The same, asked for only after the prompt. A tale has one topic, so there is one turn."""

    base: ClassVar[str] = "topic_later"
    later: ClassVar[bool] = True
