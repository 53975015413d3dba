"""The shipped model and a suite of a few short tales, for tests of how policies are evaluated."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from kvcompile.evaluation import tales
from kvcompile.evaluation.samples import Sample, Turn

FOLDER = Path(__file__).parents[2] / "examples" / "recall_model"


@lru_cache(maxsize=1)
def shipped() -> tuple[Any, Any]:
    """Model and tokenizer, loaded once."""
    model = AutoModelForCausalLM.from_pretrained(FOLDER, local_files_only=True).eval()
    return model, AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


@dataclass(frozen=True, slots=True)
class Ragged:
    """Prompts of several lengths; one to three questions after each, answers of one or two tokens, then some text."""

    name: str = "ragged"
    version: int = 1
    later: bool = True

    def samples(self, count: int, length: int, seed: int, tokenizer: Any) -> list[Sample]:
        return [self._sample(random.Random(f"{seed} {number}"), length - 9 * number, number) for number in range(count)]

    def _sample(self, rng: random.Random, length: int, number: int) -> Sample:
        known = tales.facts(rng, 4)
        told = [tales.fact(name, colour) for name, colour in known.items()]
        sentences = tales.planted(rng, told, length - 1 - 4 * tales.FACT_WORDS, length // 2)
        turns = [
            Turn(f"{'. ' if i else ''}colour of {name}", known[name], tokens=1 + (number + i) % 2)
            for i, name in enumerate(list(known)[: 1 + number % 3])
        ]
        if number % 2:
            turns.append(Turn(". the old dog", "barks . the cat sleeps .", kind="text"))
        return Sample(" ".join(word for s in sentences for word in s), tuple(turns), depth=0.25 * (number % 4))

    def score(self, turn: Turn, produced: str) -> float:
        return float(produced.split()[:1] == [turn.answer])
