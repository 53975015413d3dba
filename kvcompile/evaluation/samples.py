"""What a model is asked: samples of turns, the suites that make and score them, and how a suite is named.

Takes the name of a suite, with options if need be (`recall`, `recall:facts=4,depths=5`), or a folder or file of
RULER, LongBench or HELMET data; gives the `Suite`. A name that is not known is refused with the nearest one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from kvcompile.kernels.errors import KvCompileError

ANSWER, TEXT = "answer", "text"  # the kinds of a turn


@dataclass(frozen=True, slots=True)
class Turn:
    """One thing asked of the model after all that came before it.

    ask: text fed before the answer, exactly as it is appended (no special tokens, leading space included); empty
        where the question ends the prompt.
    answer: what should follow. kind `answer`: the model generates up to `tokens` tokens, greedily, and the suite
        scores them. kind `text`: `answer` is fed as one piece and scored by how often each of its tokens had the
        highest logit.
    accepted, rule: of data files only: all reference answers (or all classes there are), and how they are compared.
    """

    ask: str
    answer: str
    kind: str = ANSWER
    tokens: int = 16
    accepted: tuple[str, ...] = ()
    rule: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt and its turns.

    depth: in [0, 1]; the part of the prompt's words that stand before the needle of the first turn; None where
        there is no needle.
    facts: what else is known of the sample, in JSON's types (`needle`: the text that holds the first answer).
    """

    prompt: str
    turns: tuple[Turn, ...]
    depth: float | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


class Suite(Protocol):
    """A source of samples and the rule that scores answers.

    name: as `suite()` reads it, options that are not the default included, so that equal names mean equal samples.
    version: grows when the same arguments give other samples or scores. later: no question stands in the prompt.
    """

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> int: ...

    @property
    def later(self) -> bool: ...

    def samples(self, count: int, length: int, seed: int, tokenizer: Any) -> list[Sample]:
        """`count` samples whose prompts have at most `length` tokens, special tokens included, and nearly as many.

        The same for the same arguments on every machine; a smaller count gives the first of a larger one.
        """
        ...

    def score(self, turn: Turn, produced: str) -> float:
        """How right the text that the model produced for a turn is, in [0, 1]."""
        ...


# Name -> file under suites/ and class in it; read when asked for, so that naming a suite costs no import.
_HOMES = {
    "recall": ("recall", "Recall"),
    "recall_many": ("recall", "RecallMany"),
    "recall_values": ("recall_values", "RecallValues"),
    "recall_later": ("recall", "RecallLater"),
    "topic": ("topic", "Topic"),
    "topic_later": ("topic", "TopicLater"),
    "tracking": ("tracking", "Tracking"),
    "to_tsv": ("to_tsv", "ToTsv"),
    "walk": ("walk", "Walk"),
    "copy": ("copying", "Copy"),
    "reverse": ("copying", "Reverse"),
    "library_text": ("library_text", "LibraryText"),
}


def _made(name: str, options: str = "") -> Suite:
    from kvcompile.evaluation.suites.options import read_options

    file, kind = _HOMES[name]
    module = import_module(f"kvcompile.evaluation.suites.{file}")
    return cast(Suite, read_options(getattr(module, kind), options))


SUITES: dict[str, Callable[[], Suite]] = {name: partial(_made, name) for name in _HOMES}


def suite(name_or_folder: str) -> Suite:
    """The suite of a name (`name` or `name:option=value,option=value`) or of a path to data on disk.

    A name of `SUITES` wins over a folder that is called the same; `./name` means the folder.
    Raises KvCompileError for a name that is neither, and for wrong options.
    """
    name, _, options = name_or_folder.partition(":")
    if name in SUITES:
        return _made(name, options)
    path = Path(name_or_folder).expanduser()
    if name_or_folder and path.exists():
        from kvcompile.evaluation.suites.folders import FolderSuite

        return cast(Suite, FolderSuite.open(path))
    if os.sep in name_or_folder or name_or_folder.startswith(("~", ".")):
        raise KvCompileError(f"no folder or file {name_or_folder}: give data of RULER, LongBench or HELMET, or a name")
    near = get_close_matches(name, SUITES, n=1, cutoff=0.0)[0]
    raise KvCompileError(f"no suite `{name}`; the nearest is `{near}`, all are: {', '.join(SUITES)}")
