"""How answers to the tasks of RULER, LongBench and HELMET are scored: one function per rule, by name in `RULES`.

Each takes what the model produced and a turn; gives a score in [0, 1]. The definitions are those of the papers and
their published scorers (RULER: Hsieh et al. 2024; LongBench: Bai et al. 2024, table 2; HELMET: Yen et al. 2025), as
far as the function's docstring does not say else.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable
from difflib import SequenceMatcher

from kvcompile.evaluation.samples import Turn

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def contained(produced: str, turn: Turn) -> float:
    """The part of the references that the text contains, whatever the case (RULER's string_match_all)."""
    text = produced.lower()
    return sum(reference.lower() in text for reference in turn.accepted) / len(turn.accepted)


def contained_any(produced: str, turn: Turn) -> float:
    """1 where the text contains one of the references, whatever the case (RULER's string_match_part)."""
    text = produced.lower()
    return float(any(reference.lower() in text for reference in turn.accepted))


def contained_normalised(produced: str, turn: Turn) -> float:
    """1 where the text contains a reference, both without case, punctuation and articles (HELMET's substring match)."""
    text = normalised(produced)
    return float(any(normalised(reference) in text for reference in turn.accepted))


def normalised(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces: the usual form for comparing answers (SQuAD)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def qa_f1(produced: str, turn: Turn) -> float:
    """The best F1 over the words of a normalised reference."""
    said = normalised(produced).split()
    return max(_f1(said, normalised(reference).split()) for reference in turn.accepted)


def qa_f1_first_line(produced: str, turn: Turn) -> float:
    """`qa_f1` of the first line, for tasks whose prompt is a row of examples that a model goes on with."""
    return qa_f1(first_line(produced), turn)


def _f1(said: list[str], right: list[str]) -> float:
    shared = (Counter(said) & Counter(right)).total()
    return 2 * shared / (len(said) + len(right)) if shared else 0.0


def first_line(produced: str) -> str:
    """The first line that is not empty at the start of the text."""
    return produced.lstrip("\n").partition("\n")[0]


def rouge_l(produced: str, turn: Turn) -> float:
    """The best ROUGE-L of a reference: F1 over the longest common subsequence of words (Lin 2004, with beta = 1).

    The package that LongBench uses works sentence by sentence, so its figures differ somewhat.
    """
    said = produced.lower().split()
    best = 0.0
    for reference in turn.accepted:
        right = reference.lower().split()
        if common := _common_subsequence(said, right):
            best = max(best, 2 * common / (len(said) + len(right)))
    return best


def rouge_l_first_line(produced: str, turn: Turn) -> float:
    """`rouge_l` of the first line."""
    return rouge_l(first_line(produced), turn)


def _common_subsequence(a: list[str], b: list[str]) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def classification(produced: str, turn: Turn) -> float:
    """1 over the number of classes that the first line names, if the right one is among them.

    A class whose name is part of the right one's name is not counted. `accepted`: all classes.
    """
    text = first_line(produced)
    named = {label for label in turn.accepted if label in text}
    named = {label for label in named if label == turn.answer or label not in turn.answer}
    return 1 / len(named) if turn.answer in named else 0.0


def number(produced: str, turn: Turn) -> float:
    """The part of the numbers in the text that are the reference's first number (retrieval and count)."""
    right = re.search(r"\d+", turn.answer)
    said = re.findall(r"\d+", produced)
    return said.count(right.group()) / len(said) if right and said else 0.0


def code_similarity(produced: str, turn: Turn) -> float:
    """How alike the first line of code is to a reference: twice the matched letters over all letters, at best.

    Lines with a backtick, `#` or `//` are passed over: they are fences and comments.
    """
    lines = produced.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return max(SequenceMatcher(None, line, reference, autojunk=False).ratio() for reference in turn.accepted)


RULES: dict[str, Callable[[str, Turn], float]] = {
    rule.__name__: rule
    for rule in (
        contained,
        contained_any,
        contained_normalised,
        qa_f1,
        qa_f1_first_line,
        rouge_l,
        rouge_l_first_line,
        classification,
        number,
        code_similarity,
    )
}
