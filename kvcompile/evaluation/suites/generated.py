"""What the generated suites share: from a seed and a wanted length in tokens to samples of that length.

Takes a suite's `make(rng, size, number, tokenizer)`, where `size` is how much filler a sample gets, and finds the
size at which the prompt has the wanted number of tokens. Draws come from `random.Random(str)` alone, so samples
are the same on every machine.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from kvcompile.evaluation.samples import Sample, Turn
from kvcompile.evaluation.suites.options import check_options, name_of
from kvcompile.kernels.errors import KvCompileError

TRIES = 12  # of one sample's size; a word tokenizer needs at most three, sub-words settle in four or five
SHORT_BY = 0.05  # part of the length that may be missing
GOOD_ENOUGH = 0.002  # part of the length that is not worth another try


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of a prompt, special tokens included, as a model is fed them."""
    return list(tokenizer(text, verbose=False)["input_ids"])


def knows(tokenizer: Any, text: str) -> bool:
    """Whether the tokenizer can write a text without its unknown token."""
    # Some tokenizers start every prompt with the token that is their unknown token too.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids


def answer_tokens(tokenizer: Any, answers: list[str], spare: int = 4) -> int:
    """New tokens that are enough for each of some answers.

    One where each is a token of its own, as with word tokenizers: what a model adds after its answer is not asked
    for, and stands before the next turn. Otherwise `spare` more than the longest, for a space, a stop, a word before.
    """
    ids = tokenizer([f" {answer}" for answer in answers], add_special_tokens=False)["input_ids"]
    longest = max(map(len, ids))
    return longest if longest == 1 else longest + spare


@dataclass(frozen=True, slots=True)
class Generated:
    """A suite whose fields are its options and whose samples come from `make`."""

    base: ClassVar[str]
    version: ClassVar[int] = 1
    later: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def name(self) -> str:
        return name_of(self)

    def make(self, rng: random.Random, size: int, number: int, tokenizer: Any) -> Sample:
        """The sample with that number, with `size` units of filler (0 or more; words, unless the suite says else)."""
        raise NotImplementedError

    def score(self, turn: Turn, produced: str) -> float:
        raise NotImplementedError

    def samples(self, count: int, length: int, seed: int, tokenizer: Any) -> list[Sample]:
        """See `Suite`. Raises KvCompileError where not even a sample without filler fits, or a word is unknown."""
        if count < 1 or length < 1:
            raise KvCompileError(f"suite `{self.name}`: {count} samples of {length} tokens: give at least one of each")
        found: list[Sample] = []
        size = length
        for number in range(count):
            key = f"{self.name} {self.version} {seed} {length} {number}"

            def made(size: int, key: str = key, number: int = number) -> Sample:
                return self.make(random.Random(key), size, number, tokenizer)

            sample, size = fitted(made, length, tokenizer, size, self.name)
            if number == 0:
                self._check_words(sample, tokenizer)
            found.append(sample)
        return found

    def _check_words(self, sample: Sample, tokenizer: Any) -> None:
        for text in (sample.prompt, *(turn.ask + " " + turn.answer for turn in sample.turns)):
            if not knows(tokenizer, text):
                word = next((word for word in text.split() if not knows(tokenizer, word)), text[:20])
                raise KvCompileError(
                    f"suite `{self.name}`: the tokenizer does not know `{word}`, so the model cannot read the prompt: "
                    f"take a suite in the model's own words, such as `recall` for the shipped model"
                )


def fitted(made: Callable[[int], Sample], length: int, tokenizer: Any, start: int, name: str) -> tuple[Sample, int]:
    """The sample whose prompt has at most `length` tokens and comes nearest, and its size; `start`: size tried first.

    The count grows with the size nearly, not exactly, in a straight line: each try follows the line through the
    last two.
    """
    best: tuple[int, int, Sample] | None = None  # tokens, size, sample
    seen: dict[int, int] = {}  # size -> tokens
    size, slope = start, 0.0
    for _ in range(TRIES):
        sample = made(size)
        tokens = seen[size] = len(token_ids(tokenizer, sample.prompt))
        if tokens <= length and (best is None or tokens > best[0]):
            best = (tokens, size, sample)
        if 0 <= length - tokens <= length * GOOD_ENOUGH:
            break
        if size == 0 and tokens > length:
            raise KvCompileError(f"suite `{name}` needs prompts of at least {tokens} tokens: {length} are too few")
        others = [old for old in seen if old != size and seen[old] != tokens]
        near = min(others, key=lambda old: abs(old - size), default=None)
        slope = tokens / max(size, 1) if near is None else (tokens - seen[near]) / (size - near)
        wanted = max(0, size + round((length - tokens) / max(slope, 0.1)))
        while wanted in seen and wanted > 0:
            wanted -= 1
        if wanted in seen:
            break
        size = wanted
    if best is None or best[0] < length * (1 - SHORT_BY) - 4:
        reached = "none" if best is None else f"one of {best[0]}"
        raise KvCompileError(f"suite `{name}`: found no prompt of about {length} tokens, only {reached}")
    return best[2], best[1]
