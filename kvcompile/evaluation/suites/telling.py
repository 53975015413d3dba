"""How a tale is put to a model: as it stands, or in English for models that have not been trained on tales.

Takes the tale's sentences and a question; gives the text before, the text of the question and where a needle lies.
The shipped models know no words but the tale's own; models of natural language get an instruction before the tale,
and a question whose last words the answer completes, which base and instruct models can both continue.
"""

from __future__ import annotations

import re
from typing import Any

from kvcompile.evaluation import tales
from kvcompile.evaluation.suites.generated import knows
from kvcompile.evaluation.suites.options import choice

AUTO, TALE, ENGLISH = "auto", "tale", "english"
INTRODUCTION = (
    "The text below says which colour suits whom and what the talk turns to, among much else. "
    "Remember it; you will be asked about it.\n\n"
)
_WORD = re.compile(r"[^\W_]+")


def wording() -> Any:
    """The option of a tale's suite."""
    return choice(AUTO, (AUTO, TALE, ENGLISH), "`auto`: English where the tokenizer can write it")


def in_english(wanted: str, tokenizer: Any) -> bool:
    """Whether a tale is put in English, for what the option says."""
    return wanted == ENGLISH or (wanted == AUTO and knows(tokenizer, INTRODUCTION))


def colour_question(name: str, english: bool) -> str:
    """What asks for a name's colour; the next word is the answer."""
    if not english:
        return f"colour of {name}"
    return f"Question: which colour suits {name}? Answer with one word.\nAnswer: the colour that suits {name} is"


def topic_question(english: bool) -> str:
    """What asks for the word that goes with the topic. The English question must say which words go with which."""
    if not english:
        return "so they say"
    pairs = ", ".join(f"{topic}: {mood}" for topic, mood in zip(tales.TOPICS, tales.MOODS, strict=True))
    return (
        f"Question: each subject has a word that goes with it ({pairs}). Which word goes with the subject that the "
        f"talk turned to? Answer with one word.\nAnswer: so they say"
    )


def told(sentences: list[list[str]], english: bool) -> str:
    """The tale as text."""
    text = " ".join(" ".join(sentence) for sentence in sentences)
    return INTRODUCTION + text if english else text


def ended(text: str, question: str, english: bool) -> str:
    """A tale that ends in a question."""
    return f"{text}\n\n{question}" if english else f"{text} {question}"


def asked_later(questions: list[str], english: bool) -> list[str]:
    """What is fed in each of several later turns. In a tale, the stop ends what was answered before."""
    if english:
        return [f"\n\n{question}" for question in questions]
    return [f" {question}" if i == 0 else f" . {question}" for i, question in enumerate(questions)]


def depth_of(prompt: str, needle: str) -> float:
    """The part of a prompt's words that stand before the first place of a needle."""
    return len(prompt[: prompt.index(needle)].split()) / len(prompt.split())


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return _WORD.findall(text.casefold())


def first_of(produced: str, possible: tuple[str, ...]) -> str | None:
    """The first word produced that could be an answer at all: `the colour is red.` says `red`."""
    return next((word for word in words_of(produced) if word in possible), None)
