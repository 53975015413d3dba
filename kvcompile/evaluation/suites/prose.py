"""Filler in plain English and things hidden in it, for the suites that models of natural language can answer."""

from __future__ import annotations

import random
from typing import Any

from kvcompile.evaluation import tales

SPARE = 16  # tokens beyond the answer's own, for a header or a space too many


def filler(rng: random.Random, words: int) -> list[str]:
    """Sentences of about `words` words in all, as `The old dog barks near the river.`; none for fewer than 4."""
    sentences = tales.filler(rng, words if words >= tales.SHORTEST else 0)
    return [" ".join(sentence[:-1]).capitalize() + "." for sentence in sentences]


def woven(rng: random.Random, items: list[str], words: int) -> str:
    """A text with the items, in their order, at random places among filler of about `words` words."""
    sentences = filler(rng, words)
    places = sorted(rng.randint(0, len(sentences)) for _ in items)
    parts: list[str] = []
    start = 0
    for place, item in zip(places, items, strict=True):
        parts += [*sentences[start:place], item]
        start = place
    return " ".join(parts + sentences[start:])


def room_for(tokenizer: Any, answer: str) -> int:
    """New tokens that are enough for an answer of this form: a quarter more than its own, and some to spare."""
    tokens = len(tokenizer(answer, add_special_tokens=False)["input_ids"])
    return tokens + tokens // 4 + SPARE
