"""Variable tracking: chains of assignments hidden in filler; all variables with one chain's value must be named.

The task is that of RULER (Hsieh et al. 2024, section 3): `VAR A = 12345`, `VAR B = VAR A`, ... The text, the names
and the score's guard against naming every variable are ours.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any, ClassVar

from kvcompile.evaluation.samples import Sample, Turn
from kvcompile.evaluation.suites import prose
from kvcompile.evaluation.suites.generated import Generated
from kvcompile.evaluation.suites.options import number
from kvcompile.evaluation.suites.telling import depth_of

LETTERS = "BCDFGHJKLMNPQRSTVWXZ"  # no vowels: no name is a word
NAME_LETTERS = 5
_NAME = re.compile(rf"\b[{LETTERS}]{{{NAME_LETTERS}}}\b")


@dataclass(frozen=True, slots=True)
class Tracking(Generated):
    """One or more chains all over the prompt, each in its order; the question ends the prompt."""

    chains: int = number(2, 1, 20, "chains of assignments, one of them asked for")
    hops: int = number(4, 1, 50, "assignments after the first of a chain")
    base: ClassVar[str] = "tracking"

    def make(self, rng: random.Random, size: int, number: int, tokenizer: Any) -> Sample:
        names: list[str] = []
        while len(names) < self.chains * (self.hops + 1):
            name = "".join(rng.choices(LETTERS, k=NAME_LETTERS))
            if name not in names:
                names.append(name)
        values = [str(value) for value in rng.sample(range(10_000, 100_000), self.chains)]
        chains = [names[i :: self.chains] for i in range(self.chains)]
        items = self._interleaved(rng, chains, values)
        asked, value = chains[0], values[0]
        prompt = (
            "Some sentences of the text below assign a value to a variable, directly or from another variable. "
            "Keep track of which variable has which value.\n\n"
            f"{prose.woven(rng, items, size)}\n\n"
            f"Question: which {len(asked)} variables have the value {value}, directly or through other variables? "
            f"List their names.\nAnswer: the variables with the value {value} are"
        )
        answer = ", ".join(asked)
        needle = f"VAR {asked[0]} = {value}."
        turn = Turn("", answer, tokens=prose.room_for(tokenizer, answer))
        return Sample(prompt, (turn,), depth_of(prompt, needle), {"needle": needle})

    def _interleaved(self, rng: random.Random, chains: list[list[str]], values: list[str]) -> list[str]:
        """The assignments of all chains in a random order that keeps the order within each chain."""
        order = [i for i, chain in enumerate(chains) for _ in chain]
        rng.shuffle(order)
        steps = [
            [f"VAR {name} = {f'VAR {chain[i - 1]}' if i else value}." for i, name in enumerate(chain)]
            for chain, value in zip(chains, values, strict=True)
        ]
        return [steps[chain].pop(0) for chain in order]

    def score(self, turn: Turn, produced: str) -> float:
        """The part of the names that is among the first so many different names produced, in any order."""
        right = turn.answer.split(", ")
        said = dict.fromkeys(_NAME.findall(produced))
        return len({*list(said)[: len(right)]} & {*right}) / len(right)
