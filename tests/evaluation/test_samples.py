"""What every suite keeps: names and options, the same samples for the same arguments, the length asked for."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from kvcompile.evaluation import tales
from kvcompile.evaluation.samples import SUITES, Sample, suite
from kvcompile.kernels.errors import KvCompileError

ROOT = Path(__file__).parents[2]
IN_TALES = ("recall", "recall_many", "recall_values", "recall_later", "topic", "topic_later")


def digest(samples: list[Sample]) -> str:
    return hashlib.sha256(json.dumps([asdict(sample) for sample in samples]).encode()).hexdigest()[:16]


def tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer(text)["input_ids"])


class Simple:
    """A tokenizer without any library: a token for each word and each mark, nothing unknown."""

    unk_token_id = None

    def __call__(self, text: str | list[str], **_: bool) -> dict[str, list]:
        if isinstance(text, list):
            return {"input_ids": [self(one)["input_ids"] for one in text]}
        return {"input_ids": re.findall(r"\w+|[^\w\s]", text)}


# Results are published with the name and version of a suite: other samples need a new version.
GOLDEN = {
    "recall": "a07604ca8eebe8a9",
    "recall:depths=3": "4c1da058f793babe",
    "recall:wording=tale": "31067d85427ad594",
    "recall_many": "f1a009a1981ce30f",
    "recall_values": "4921f07ab1b180e4",
    "recall_later": "bb110165380b8772",
    "topic": "adfc664332e9f63f",
    "topic_later": "4c8d2bb42671c45e",
    "tracking": "f472f2a6606af5f4",
    "to_tsv": "3c6b3e0407b56d48",
    "walk": "bbbf29d812ad3f02",
    "copy": "df374ac5226d787d",
    "reverse": "b47057815113b063",
}


@pytest.mark.parametrize("name", GOLDEN)
def test_samples_are_those_of_the_golden_digests(name: str) -> None:
    made = suite(name)
    assert (made.version, digest(made.samples(3, 900, 5, Simple()))) == (1, GOLDEN[name])


def test_prompts_of_tales_are_those_of_earlier_versions() -> None:
    told = repr([tales.prompts(3, length, seed=2) for length in (100, 200, 640)])
    assert hashlib.sha256(told.encode()).hexdigest()[:16] == "ec90d163451ec46e"


def test_the_hash_seed_of_a_process_does_not_matter() -> None:
    script = (
        "from kvcompile.evaluation.samples import SUITES, suite\n"
        "class Simple:\n"
        "    unk_token_id = None\n"
        "    def __call__(self, text, **_):\n"
        "        return {'input_ids': [t.split() for t in text] if isinstance(text, list) else text.split()}\n"
        "for name in SUITES: print(suite(name).samples(2, 900, 0, Simple()))"
    )
    found = [
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert found[0] == found[1] and "suits" in found[0]


@pytest.mark.parametrize("name", SUITES)
def test_equal_arguments_give_equal_samples_and_others_do_not(name: str, sub_words: PreTrainedTokenizerBase) -> None:
    drawn = suite(name).samples(3, 1500, 7, sub_words)
    assert drawn == suite(name).samples(3, 1500, 7, sub_words)
    assert drawn[:2] == suite(name).samples(2, 1500, 7, sub_words)
    assert len({sample.prompt for sample in drawn}) == 3
    assert not {sample.prompt for sample in drawn} & {s.prompt for s in suite(name).samples(3, 1500, 8, sub_words)}


@pytest.mark.parametrize("length", [1500, 5000])
@pytest.mark.parametrize("name", SUITES)
def test_prompts_of_sub_words_have_nearly_the_length(
    name: str, length: int, sub_words: PreTrainedTokenizerBase
) -> None:
    for sample in suite(name).samples(3, length, 1, sub_words):
        assert length * 0.98 <= tokens(sub_words, sample.prompt) <= length


@pytest.mark.parametrize("length", [96, 257, 640])
@pytest.mark.parametrize("name", [name for name in IN_TALES if "recall" in name and name != "recall_many"])
def test_prompts_of_words_have_exactly_the_length(
    name: str, length: int, shipped_words: PreTrainedTokenizerBase
) -> None:
    assert {tokens(shipped_words, s.prompt) for s in suite(name).samples(8, length, 3, shipped_words)} == {length}


@pytest.mark.parametrize("name", ["recall_many", "topic", "topic_later"])
def test_prompts_of_words_with_topics_have_exactly_the_length(name: str, topic_words: PreTrainedTokenizerBase) -> None:
    assert {tokens(topic_words, s.prompt) for s in suite(name).samples(8, 288, 3, topic_words)} == {288}


@pytest.mark.parametrize("name", SUITES)
def test_answers_fit_into_the_tokens_of_their_turn(name: str, sub_words: PreTrainedTokenizerBase) -> None:
    for sample in suite(name).samples(2, 1500, 4, sub_words):
        for turn in sample.turns:
            assert len(sub_words(f" {turn.answer}")["input_ids"]) <= turn.tokens + (turn.kind == "text")


def test_one_token_is_asked_for_where_words_are_tokens(topic_words: PreTrainedTokenizerBase) -> None:
    for name in ("recall", "recall_later", "topic"):
        assert {t.tokens for s in suite(name).samples(2, 256, 0, topic_words) for t in s.turns} == {1}


@pytest.mark.parametrize("name", SUITES)
def test_later_suites_ask_in_turns_only(name: str, sub_words: PreTrainedTokenizerBase) -> None:
    made = suite(name)
    for sample in made.samples(2, 1500, 0, sub_words):
        assert all(bool(turn.ask) == made.later for turn in sample.turns)
        assert made.later == name.endswith("_later")
        if made.later:
            assert "uestion" not in sample.prompt and "Answer" not in sample.prompt


def test_suites_in_a_tale_s_own_words_hold_no_question_either(topic_words: PreTrainedTokenizerBase) -> None:
    for name in ("recall_later", "topic_later"):
        for sample in suite(name).samples(4, 256, 0, topic_words):
            assert "colour of" not in sample.prompt and "they say" not in sample.prompt
            assert sample.prompt.endswith(".")


def test_names_tell_the_options_and_are_read_back() -> None:
    for name in SUITES:
        assert suite(name).name == name
    made = suite("recall: facts = 4 ,depths=0,wording=tale")
    assert made.name == "recall:facts=4,wording=tale"
    assert suite(made.name) == made


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("recal", "no suite `recal`; the nearest is `recall`"),
        ("", "no suite ``"),
        ("recall:fact=3", "no option `fact`; the nearest is `facts`, all are: facts, depths, wording"),
        ("recall:facts", "`facts` is no option: write option=value"),
        ("recall:facts=4,facts=5", "`facts` stands twice"),
        ("recall:facts=0", "facts=0 is not possible: give a whole number from 1 to 48"),
        ("recall:facts=1e3", "facts=1e3 is not possible"),
        ("recall:facts=²", "is not possible"),
        ("recall:facts=" + "9" * 10_000, "is not possible"),
        ("recall:wording=french", "wording=french is not possible: give one of auto, tale, english"),
        ("recall:base=x", "no option `base`"),
        ("./no/such/folder", "no folder or file ./no/such/folder"),
    ],
)
def test_wrong_names_and_options_are_refused(name: str, message: str) -> None:
    with pytest.raises(KvCompileError) as caught:
        suite(name)
    assert message in str(caught.value)


def test_lengths_that_cannot_be_are_refused(
    shipped_words: PreTrainedTokenizerBase, sub_words: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(KvCompileError, match="`recall` needs prompts of at least 52 tokens: 40 are too few"):
        suite("recall").samples(1, 40, 0, shipped_words)
    with pytest.raises(KvCompileError, match=r"`copy` needs prompts of at least \d+ tokens"):
        suite("copy").samples(1, 60, 0, sub_words)
    with pytest.raises(KvCompileError, match="at least one of each"):
        suite("recall").samples(0, 400, 0, shipped_words)


@pytest.mark.parametrize("name", ["topic", "tracking", "to_tsv", "walk", "copy", "library_text"])
def test_a_tokenizer_that_does_not_know_the_words_is_refused(name: str, shipped_words: PreTrainedTokenizerBase) -> None:
    with pytest.raises(KvCompileError, match=r"the tokenizer does not know `.+`, so the model cannot read the prompt"):
        suite(name).samples(2, 640, 0, shipped_words)


def test_wording_follows_the_tokenizer_unless_it_is_told(
    shipped_words: PreTrainedTokenizerBase, sub_words: PreTrainedTokenizerBase
) -> None:
    (plain,) = suite("recall").samples(1, 300, 0, shipped_words)
    (english,) = suite("recall").samples(1, 600, 0, sub_words)
    (told,) = suite("recall:wording=tale").samples(1, 600, 0, sub_words)
    assert plain.prompt.split()[-3:-1] == ["colour", "of"] == told.prompt.split()[-3:-1]
    assert english.prompt.endswith(" is") and english.prompt.startswith("The text below")
    with pytest.raises(KvCompileError, match="does not know"):
        suite("recall:wording=english").samples(1, 600, 0, shipped_words)


def test_the_shipped_model_answers_the_recall_suite(shipped_words: PreTrainedTokenizerBase) -> None:
    model = AutoModelForCausalLM.from_pretrained(ROOT / "examples" / "recall_model", local_files_only=True).eval()
    recall = suite("recall")
    samples = recall.samples(16, 256, 0, shipped_words)
    inputs = shipped_words([sample.prompt for sample in samples], return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=samples[0].turns[0].tokens, do_sample=False)
    produced = shipped_words.batch_decode(out[:, inputs["input_ids"].shape[1] :])
    right = sum(recall.score(sample.turns[0], text) for sample, text in zip(samples, produced, strict=True))
    assert right >= 15


def test_the_page_has_a_row_for_each_suite_with_its_options() -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    rows = {cells[1].strip(" `"): cells for line in page.splitlines() if len(cells := line.split("|")) == 7}
    assert set(rows) - {"name", "---"} == set(SUITES)
    for name in SUITES:
        told = dict(re.findall(r"`(\w+)`(?: \((\d+; \d+ to \d+)\))?", rows[name][5]))
        known = {entry.name: entry for entry in fields(suite(name))}
        assert set(told) == set(known)
        for option, bounds in told.items():
            if bounds:
                entry = known[option]
                assert bounds == f"{entry.default}; {entry.metadata['low']} to {entry.metadata['high']}"
