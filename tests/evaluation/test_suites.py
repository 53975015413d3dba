"""Each suite means what it says: answers are in the prompt, once, where claimed; the scores are right."""

from __future__ import annotations

import re

import pytest
from transformers import PreTrainedTokenizerBase

from kvcompile.evaluation import tales
from kvcompile.evaluation.samples import SUITES, Sample, suite
from kvcompile.evaluation.suites.library_text import library_files
from kvcompile.kernels.errors import KvCompileError

GENERATIVE = tuple(name for name in SUITES if name != "library_text")


def drawn(name: str, tokenizer: PreTrainedTokenizerBase, count: int = 6, length: int = 1600) -> list[Sample]:
    return suite(name).samples(count, length, 11, tokenizer)


@pytest.mark.parametrize("name", GENERATIVE)
def test_the_needle_stands_once_and_at_the_depth_claimed(name: str, sub_words: PreTrainedTokenizerBase) -> None:
    for sample in drawn(name, sub_words):
        assert sample.prompt.count(sample.facts["needle"]) == 1
        before = sample.prompt.split(sample.facts["needle"])[0].split()
        assert sample.depth == pytest.approx(len(before) / len(sample.prompt.split()))
        assert 0 <= sample.depth < 1


@pytest.mark.parametrize("name", ["recall", "recall_many", "recall_later"])
def test_each_answer_of_recall_is_told_by_one_fact(name: str, topic_words: PreTrainedTokenizerBase) -> None:
    for sample in drawn(name, topic_words, length=288):
        names = [(turn.ask or sample.prompt).split()[-1] for turn in sample.turns]
        assert len(set(names)) == len(names) == (3 if name == "recall_later" else 1)
        for who, turn in zip(names, sample.turns, strict=True):
            assert re.findall(rf"(\w+) suits {who} \.", sample.prompt) == [turn.answer]
        assert sample.facts["needle"] == f"{sample.turns[0].answer} suits {names[0]} ."
        told = re.findall(r"(\w+) suits", sample.prompt)
        assert len(told) == (24 if name == "recall_many" else 12)
        last = sample.prompt.rindex("suits")
        assert len(sample.prompt[:last].split()) <= 0.4 * 288


def test_later_questions_follow_the_answers_as_in_the_texts_of_training(topic_words: PreTrainedTokenizerBase) -> None:
    for sample in drawn("recall_later", topic_words, length=256):
        asks = [turn.ask.split() for turn in sample.turns]
        assert [ask[:-1] for ask in asks] == [["colour", "of"], [".", "colour", "of"], [".", "colour", "of"]]


def test_depths_put_the_needle_at_equal_steps(shipped_words: PreTrainedTokenizerBase) -> None:
    samples = suite("recall:depths=5").samples(10, 400, 0, shipped_words)
    assert [sample.facts["wanted_depth"] for sample in samples] == [0, 0.25, 0.5, 0.75, 1] * 2
    for sample in samples:
        # Half a sentence on either side, and the question after it.
        assert sample.depth == pytest.approx(sample.facts["wanted_depth"], abs=8 / 400)
    (one,) = suite("recall:depths=1").samples(1, 400, 0, shipped_words)
    assert one.depth == 0


def test_a_topic_is_set_once_in_the_first_part(topic_words: PreTrainedTokenizerBase) -> None:
    for name in ("topic", "topic_later"):
        for sample in drawn(name, topic_words, length=288):
            (topic,) = re.findall(r"talk turns to (\w+) \.", sample.prompt)
            (turn,) = sample.turns
            assert tales.MOODS[tales.TOPICS.index(topic)] == turn.answer
            assert turn.answer not in sample.prompt.split()
            assert sample.depth < 0.4
            assert (turn.ask or sample.prompt).endswith("so they say")


def test_all_values_of_a_name_are_told(shipped_words: PreTrainedTokenizerBase) -> None:
    for sample in suite("recall_values:values=5").samples(6, 256, 2, shipped_words):
        who = sample.prompt.split()[-1]
        told = re.findall(rf"(\w+) suits {who} \.", sample.prompt)
        assert len(set(told)) == 5 and {*told} == {*sample.turns[0].answer.split()}
        assert sample.facts["needle"] == f"{told[0]} suits {who} ."


def followed(prompt: str, value: str) -> set[str]:
    """All variables with a value, by reading the text from start to end."""
    values: dict[str, str] = {}
    for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", prompt):
        values[name] = values.get(source, source)
    return {name for name, found in values.items() if found == value}


def test_following_the_assignments_gives_the_answer(sub_words: PreTrainedTokenizerBase) -> None:
    for sample in suite("tracking:chains=3,hops=5").samples(5, 1600, 0, sub_words):
        (value,) = re.findall(r"have the value (\d+),", sample.prompt)
        assert followed(sample.prompt, value) == {*sample.turns[0].answer.split(", ")}
        assert len(re.findall(r"VAR \w+ =", sample.prompt)) == 18


def test_following_the_roads_gives_the_answer(sub_words: PreTrainedTokenizerBase) -> None:
    for sample in suite("walk:steps=9").samples(5, 1600, 0, sub_words):
        roads = dict(re.findall(r"From (\w+) the road leads to (\w+)\.", sample.prompt))
        (start, end), steps = re.search(r"The way from (\w+) to (\w+):\n$", sample.prompt).groups(), []
        place = start
        while place != end:
            steps.append(f"{place} -> {roads[place]}")
            place = roads[place]
        assert len(steps) == 9 and "\n".join(steps) == sample.turns[0].answer
        assert len(roads) == 27


def test_every_row_is_told_in_order(sub_words: PreTrainedTokenizerBase) -> None:
    for sample in suite("to_tsv:rows=12").samples(4, 1600, 0, sub_words):
        rows = [row.split("\t") for row in sample.turns[0].answer.splitlines()]
        places = [sample.prompt.index(row[0]) for row in rows]
        assert len(rows) == 12 and places == sorted(places)
        for row in rows:
            near = sample.prompt[max(0, sample.prompt.index(row[0]) - 80) :][:200]
            assert all(value in near for value in row)


def test_lists_are_copied_and_reversed(sub_words: PreTrainedTokenizerBase) -> None:
    for name, step in (("copy", 1), ("reverse", -1)):
        for words in (5, 90):
            for sample in suite(f"{name}:words={words}").samples(2, 1600, 0, sub_words):
                told = re.search(r"words: ([\w ]+)\.", sample.prompt).group(1).split()
                assert len(told) == words
                assert sample.turns[0].answer.split() == told[::step]


def test_text_goes_on_as_in_the_library(sub_words: PreTrainedTokenizerBase) -> None:
    library = "".join(path.read_text(encoding="utf-8", errors="replace") for path in library_files())
    samples = suite("library_text:tokens=50").samples(16, 600, 0, sub_words)
    for sample in samples:
        (turn,) = sample.turns
        assert turn.kind == "text" and turn.ask == "" and sample.depth is None
        assert turn.answer[0].isspace() and not sample.prompt[-1].isspace()
        if len(sample.facts["modules"]) == 1:
            assert sample.prompt + turn.answer in library
        assert 40 <= len(sub_words(turn.answer)["input_ids"]) <= 50
    assert any(len(sample.facts["modules"]) == 1 for sample in samples)
    with pytest.raises(KvCompileError, match="scored by logits"):
        suite("library_text").score(samples[0].turns[0], "x")


@pytest.mark.parametrize("name", GENERATIVE)
def test_the_answer_scores_one_and_nothing_scores_zero(name: str, sub_words: PreTrainedTokenizerBase) -> None:
    made = suite(name)
    for sample in drawn(name, sub_words, count=3):
        for turn in sample.turns:
            assert made.score(turn, turn.answer) == 1
            assert made.score(turn, f"  {turn.answer}\n") == 1
            assert made.score(turn, "") == 0
            assert made.score(turn, "\t\n .,") == 0


@pytest.mark.parametrize("name", GENERATIVE)
def test_the_answer_to_another_sample_is_not_right(name: str, sub_words: PreTrainedTokenizerBase) -> None:
    made = suite(name)
    first, *others = (sample.turns[0] for sample in drawn(name, sub_words, count=4))
    other = next(turn for turn in others if turn.answer != first.answer)
    assert made.score(first, other.answer) < 0.7
    if len(first.answer.split()) == 1:
        assert made.score(first, other.answer) == 0


@pytest.mark.parametrize(
    ("produced", "score"),
    [
        ("{0}", 1),
        (" {0}.\nQuestion: which", 1),
        ("**{0}**", 1),
        ("is {0} .", 1),
        ("{0} {1}", 1),
        ("{1} {0}", 0),
        ("{1}", 0),
        ("un{0}", 0),
    ],
)
@pytest.mark.parametrize(("name", "words"), [("recall", tales.COLOURS), ("topic", tales.MOODS)])
def test_the_first_word_that_could_be_an_answer_counts(
    name: str, words: tuple[str, ...], produced: str, score: float, topic_words: PreTrainedTokenizerBase
) -> None:
    (sample,) = suite(name).samples(1, 256, 0, topic_words)
    right = sample.turns[0].answer
    wrong = next(word for word in words if word != right)
    assert suite(name).score(sample.turns[0], produced.format(right, wrong)) == score
    assert suite(name).score(sample.turns[0], produced.format(right, wrong).upper()) == score


def test_lists_are_scored_in_parts_and_naming_everything_does_not_help(sub_words: PreTrainedTokenizerBase) -> None:
    for name in ("recall_values", "tracking"):
        made = suite(name)
        (sample,) = made.samples(1, 1200, 0, sub_words)
        turn = sample.turns[0]
        parts = turn.answer.replace(",", "").split()
        assert made.score(turn, " and ".join(reversed(parts))) == 1
        assert made.score(turn, f"{parts[1]}, {parts[1]}, {parts[0]}.") == 2 / len(parts)
        others = [other for other in re.findall(r"VAR (\w+) =", sample.prompt) if other not in parts]
        if name == "tracking":
            assert len(others) == 5 and made.score(turn, " ".join([*others, *parts])) == 0
            assert made.score(turn, " ".join([*parts, *others])) == 1
    made = suite("recall_values")
    (sample,) = made.samples(1, 1200, 0, sub_words)
    first = [colour for colour in tales.COLOURS if colour not in sample.turns[0].answer.split()]
    assert made.score(sample.turns[0], " ".join(first + sample.turns[0].answer.split())) == 0


def test_rows_are_scored_by_f1(sub_words: PreTrainedTokenizerBase) -> None:
    made = suite("to_tsv:rows=4")
    (sample,) = made.samples(1, 900, 0, sub_words)
    turn = sample.turns[0]
    rows = turn.answer.splitlines()
    assert made.score(turn, "\n".join(rows[:2])) == pytest.approx(2 * 2 / (4 + 2))
    assert made.score(turn, "\n".join([*rows, "1\ta\t2\tb\tc"])) == pytest.approx(2 * 4 / (4 + 5))
    assert made.score(turn, "\n".join([rows[0]] * 4)) == pytest.approx(2 * 1 / 8)
    messy = [row.replace("\t", " \t  ").upper() for row in rows]
    assert made.score(turn, "\n".join(["```", "order\tbuyer\tcount\titem\ttown", *messy, "", "That is all."])) == 1
    assert made.score(turn, turn.answer.replace("\n", "\r\n")) == 1


def test_a_walk_is_right_up_to_the_first_wrong_step(sub_words: PreTrainedTokenizerBase) -> None:
    made = suite("walk:steps=4")
    (sample,) = made.samples(1, 900, 0, sub_words)
    turn = sample.turns[0]
    steps = turn.answer.splitlines()
    assert made.score(turn, "\n".join(steps[:3])) == 3 / 4
    assert made.score(turn, "\n".join([*steps[:2], "A -> B", *steps[2:]])) == 2 / 4
    assert made.score(turn, "\n".join(steps[1:])) == 0
    assert made.score(turn, "Sure:\n1. " + turn.answer.replace(" -> ", " to ") + "\nA -> B") == 1


def test_lists_are_scored_by_position(sub_words: PreTrainedTokenizerBase) -> None:
    for name in ("copy", "reverse"):
        made = suite(f"{name}:words=8")
        (sample,) = made.samples(1, 900, 0, sub_words)
        turn = sample.turns[0]
        words = turn.answer.split()
        assert made.score(turn, " ".join(words[:6])) == 6 / 8
        assert made.score(turn, " ".join(["x", *words[1:]])) == 7 / 8
        assert made.score(turn, " ".join(words[1:])) == 0
        assert made.score(turn, ", ".join(words).title() + ". More words.") == 1
