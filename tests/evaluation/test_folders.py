"""Folders of RULER, LongBench and HELMET: made up here, whole and broken; every rule by cases worked out by hand."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from kvcompile.evaluation.samples import Turn, suite
from kvcompile.evaluation.suites import folders
from kvcompile.evaluation.suites.layouts import LONGBENCH
from kvcompile.evaluation.suites.rules import RULES
from kvcompile.kernels.errors import KvCompileError

WORDS = "the quiet river runs past the old mill and nobody counts the days . "


@pytest.fixture(autouse=True)
def warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def ruler_row(i: int, words: int = 4) -> dict[str, Any]:
    text = f"{WORDS * words}The special number of mill-{i} is {1000 + i}. {WORDS}"
    return {"index": i, "input": f"{text}What is the number of mill-{i}?", "outputs": [str(1000 + i)], "length": 99}


def longbench_row(task: str, **changes: Any) -> dict[str, Any]:
    row = {"input": "Who runs?", "context": WORDS, "answers": ["the river"], "length": 14, "dataset": task}
    return {**row, "language": "en", "all_classes": None, "_id": "x", **changes}


def test_ruler(tmp_path: Path, sub_words: PreTrainedTokenizerBase) -> None:
    write(tmp_path / "4096" / "niah_single_1" / "validation.jsonl", [ruler_row(i) for i in range(3)])
    prefix = " Answer: they are:"
    row = {**ruler_row(9), "outputs": ["ABCDE", "FGHIJ"], "answer_prefix": prefix, "length_w_model_temp": 3}
    write(tmp_path / "4096" / "vt" / "validation.jsonl", [row] * 3)
    write(tmp_path / "4096" / "qa_1" / "validation.jsonl", [{**ruler_row(9), "outputs": ["Paris", "France"]}] * 3)
    made = suite(str(tmp_path))
    samples = made.samples(6, 400, 0, sub_words)
    assert [sample.facts["task"] for sample in samples] == ["niah_single_1", "qa_1", "vt"] * 2
    needle, answer, chain = samples[:3]
    assert needle.depth == pytest.approx(
        needle.prompt.split().index(f"{needle.turns[0].answer}.") / len(needle.prompt.split())
    )
    assert chain.prompt.endswith(f"mill-9?{prefix}") and not needle.prompt.endswith(prefix)
    assert [sample.turns[0].tokens for sample in (needle, answer, chain)] == [128, 32, 30]
    assert made.score(chain.turns[0], "abcde and others") == 0.5
    assert made.score(answer.turns[0], "It is france.") == 1
    assert made.score(needle.turns[0], f"is {needle.turns[0].answer}.") == 1
    assert samples == made.samples(6, 400, 0, sub_words)
    assert [s.prompt for s in samples] != [s.prompt for s in made.samples(6, 400, 1, sub_words)]


def test_one_file_is_a_suite_of_its_task(tmp_path: Path, sub_words: PreTrainedTokenizerBase) -> None:
    file = write(tmp_path / "niah_multivalue" / "validation.jsonl", [ruler_row(i) for i in range(2)])
    assert {s.facts["task"] for s in suite(str(file)).samples(2, 400, 0, sub_words)} == {"niah_multivalue"}


def test_other_data_has_another_name(tmp_path: Path) -> None:
    file = write(tmp_path / "vt" / "validation.jsonl", [ruler_row(1)])
    name = suite(str(tmp_path)).name
    assert name.startswith(f"ruler-{tmp_path.name}-") and name == suite(str(tmp_path)).name
    write(file, [ruler_row(2)])
    assert suite(str(tmp_path)).name != name


def test_longbench_reads_every_task_it_knows(tmp_path: Path, sub_words: PreTrainedTokenizerBase) -> None:
    special = {
        "trec": {"answers": ["Food"], "all_classes": ["Food", "Sport"]},
        "passage_retrieval_en": {"answers": ["Paragraph 12"]},
        "passage_count": {"answers": ["7"], "input": ""},
        "lcc": {"answers": ["x = 1"], "input": ""},
    }
    for task in LONGBENCH:
        write(tmp_path / f"{task}.jsonl", [longbench_row(task, **special.get(task, {}))])
    made = suite(str(tmp_path))
    samples = made.samples(len(LONGBENCH), 200, 0, sub_words)
    assert sorted(LONGBENCH) == [sample.facts["task"] for sample in samples]
    for sample in samples:
        assert WORDS in sample.prompt and "{" not in sample.prompt
        assert made.score(sample.turns[0], sample.turns[0].answer) == 1
        assert made.score(sample.turns[0], "") == 0


def test_longbench_of_equal_lengths_is_the_same_task(tmp_path: Path, sub_words: PreTrainedTokenizerBase) -> None:
    braces = longbench_row("hotpotqa", context="a {input} {context} {0} b")
    write(tmp_path / "hotpotqa_e.jsonl", [braces])
    (sample,) = suite(str(tmp_path)).samples(1, 200, 0, sub_words)
    assert sample.facts["task"] == "hotpotqa" and "a {input} {context} {0} b" in sample.prompt


def test_helmet(tmp_path: Path, sub_words: PreTrainedTokenizerBase) -> None:
    niah = {"context": f"{WORDS}of mill is: 77.", "query": "mill", "type_needle_v": "numbers", "answer": ["77", "78"]}
    uuids = {**niah, "type_needle_v": "uuids", "outputs": ["ab-cd"]}
    del uuids["answer"]
    pairs = {
        "context": '{"k1": "v-1", "k2": "v-2"}',
        "question": "k2",
        "answer": "v-2",
        "demos": [["k1", "v-1"], ["k3", "v-3"], ["k4", "v-4"]],
        "num_kvs": 2,
    }
    write(tmp_path / "ruler" / "niah_multivalue" / "validation_4096.jsonl", [niah])
    write(tmp_path / "ruler" / "niah_multikey_3" / "validation_4096.jsonl", [uuids])
    write(tmp_path / "json_kv" / "test_k2_dep6.jsonl", [pairs])
    made = suite(str(tmp_path))
    assert made.name.startswith("helmet-")
    found = {sample.facts["task"]: sample for sample in made.samples(3, 200, 0, sub_words)}
    assert set(found) == {"json_kv", "niah_multivalue", "niah_multikey_3"}
    kv = found["json_kv"]
    assert kv.prompt.endswith("Key: k1\nValue: v-1\n\nKey: k3\nValue: v-3\n\nKey: k2\nValue:")
    assert made.score(kv.turns[0], " V-2\n\nKey: k5") == 1 and made.score(kv.turns[0], "v-1") == 0
    assert made.score(found["niah_multivalue"].turns[0], "77") == 0.5
    assert [found[task].turns[0].tokens for task in ("niah_multivalue", "niah_multikey_3")] == [50, 100]


def test_a_json_file_holds_its_rows_in_data(tmp_path: Path, sub_words: PreTrainedTokenizerBase) -> None:
    rows = [{"context": "{}", "question": f"k{i}", "answer": "v", "demos": []} for i in range(3)]
    (tmp_path / "json_kv.json").write_text(json.dumps({"data": [*rows, 5]}))
    made = suite(str(tmp_path / "json_kv.json"))
    with pytest.raises(KvCompileError, match="object 4 of `data`: a row must be a JSON object"):
        made.samples(4, 200, 0, sub_words)


def test_samples_that_are_too_long_are_left_out_and_counted(tmp_path: Path, sub_words: PreTrainedTokenizerBase) -> None:
    rows = [ruler_row(i, words=40 if i % 2 else 2) for i in range(6)]
    write(tmp_path / "niah_single_1.jsonl", rows)
    made = suite(str(tmp_path))
    with pytest.warns(UserWarning, match="3 of 6 samples found; 3 left out, longer than 300 tokens"):
        samples = made.samples(6, 300, 0, sub_words)
    assert {sample.facts["row"] for sample in samples} == {0, 2, 4}
    assert {sample.facts["left_out"] for sample in samples} == {3}
    assert all(sample.prompt == rows[sample.facts["row"]]["input"] for sample in samples)
    exact = len(sub_words(samples[0].prompt)["input_ids"])
    shortest = min(len(sub_words(sample.prompt)["input_ids"]) for sample in samples)
    with pytest.warns(UserWarning, match="longer than"):
        assert samples[0].prompt in {sample.prompt for sample in made.samples(6, exact, 0, sub_words)}
    with pytest.raises(KvCompileError, match=f"none of its 6 samples has at most {shortest - 1} tokens"):
        made.samples(2, shortest - 1, 0, sub_words)
    with pytest.raises(KvCompileError, match="none of its 6 samples has at most 50 tokens; samples are never cut"):
        made.samples(2, 50, 0, sub_words)


def test_files_of_no_layout_are_left_out_with_a_warning(tmp_path: Path) -> None:
    write(tmp_path / "vt.jsonl", [ruler_row(1)])
    write(tmp_path / "other.jsonl", [{"a": 1}])
    with pytest.warns(
        UserWarning, match=r"1 files of .* left out, such as .*other.jsonl: its first row has the fields"
    ):
        made = suite(str(tmp_path))
    assert [source.task for source in made.sources] == ["vt"]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("readme.txt", "hello", "it holds no .jsonl or .json file"),
        ("vt.jsonl", "", "the file is empty"),
        ("vt.jsonl", "[1]\n", "its first row has the fields of no layout"),
        ("vt.jsonl", '{"x": 1}\n', "its first row has the fields of no layout"),
        ("some.jsonl", '{"input": "a", "outputs": ["b"]}\n', "neither file nor folder is named as a task of RULER"),
        ("dureader.jsonl", '{"input": "a", "context": "b", "answers": ["c"]}\n', "'dureader' of LongBench is not"),
        ("json_kv.json", '{"rows": []}', "a .json file must hold a list `data`"),
    ],
)
def test_a_folder_of_no_layout_names_the_layouts(tmp_path: Path, file: str, text: str, message: str) -> None:
    (tmp_path / file).write_text(text)
    with pytest.raises(KvCompileError) as caught:
        suite(str(tmp_path))
    assert message in str(caught.value)
    assert all(name in str(caught.value) for name in ("RULER: ", "LongBench: ", "HELMET recall: "))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 3: this is not JSON in UTF-8"),
        ("[" * 100_000, "line 3: this is not JSON in UTF-8"),
        ("5", "line 3: a row must be a JSON object"),
        ('{"input": 5, "outputs": ["b"]}', "line 3: field 'input' must be text"),
        ('{"input": "a\\ud800", "outputs": ["b"]}', "line 3: field 'input' holds half a character"),
        ('{"input": "a", "outputs": []}', "line 3: field 'outputs' must be a list of answers"),
        ('{"input": "a", "outputs": [""]}', "line 3: field 'outputs' must be a list of answers"),
        ('{"input": "a", "outputs": [true]}', "line 3: field 'outputs' must be a list of answers"),
        ('{"input": "a", "outputs": {"b": 1}}', "line 3: field 'outputs' must be a list of answers"),
        ('{"input": "a"}', "line 3: field 'outputs' must be a list of answers"),
    ],
)
def test_broken_rows_are_named(tmp_path: Path, line: str, message: str, sub_words: PreTrainedTokenizerBase) -> None:
    file = tmp_path / "vt.jsonl"
    file.write_text(f"{json.dumps(ruler_row(1))}\n\n{line}\n")
    with pytest.raises(KvCompileError) as caught:
        suite(str(tmp_path)).samples(2, 400, 0, sub_words)
    assert f"vt.jsonl, {message}" in str(caught.value)


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("trec", {"answers": ["a", "b"], "all_classes": ["a", "b"]}, "'answers' must hold one class"),
        ("trec", {"answers": ["a"], "all_classes": None}, "'all_classes' must be a list"),
        ("passage_count", {"answers": ["many"]}, "'answers' must hold a number"),
        ("qasper", {"context": None}, "'context' must be text"),
    ],
)
def test_broken_rows_of_longbench_are_named(
    tmp_path: Path, task: str, changes: dict[str, Any], message: str, sub_words: PreTrainedTokenizerBase
) -> None:
    write(tmp_path / f"{task}.jsonl", [longbench_row(task, **changes)])
    with pytest.raises(KvCompileError, match=message):
        suite(str(tmp_path)).samples(1, 400, 0, sub_words)


@pytest.mark.parametrize("demos", [None, "ab", [["k"]], [["k", 5]], [{"k": "v"}]])
def test_broken_demonstrations_are_named(tmp_path: Path, demos: Any, sub_words: PreTrainedTokenizerBase) -> None:
    write(tmp_path / "a.jsonl", [{"context": "{}", "question": "k", "answer": "v", "demos": demos}])
    with pytest.raises(KvCompileError, match="line 1: field 'demos' must be"):
        suite(str(tmp_path)).samples(1, 400, 0, sub_words)


def test_sizes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "vt.jsonl", [ruler_row(1)])
    monkeypatch.setattr(folders, "LONGEST_LINE", 100)
    with pytest.raises(KvCompileError, match="line 1: more than 100 bytes"):
        suite(str(tmp_path))
    monkeypatch.setattr(folders, "LONGEST_FILE", 50)
    with pytest.raises(KvCompileError, match="more than 50 bytes"):
        suite(str(tmp_path))
    write(tmp_path / "cwe.jsonl", [ruler_row(1)])
    monkeypatch.setattr(folders, "MOST_FILES", 1)
    with pytest.raises(KvCompileError, match="more than 1 data files"):
        suite(str(tmp_path))


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    outside = write(tmp_path / "outside" / "vt.jsonl", [ruler_row(1)])
    write(tmp_path / "data" / "cwe.jsonl", [ruler_row(1)])
    (tmp_path / "data" / "vt.jsonl").symlink_to(outside)
    with pytest.raises(KvCompileError, match=r"vt\.jsonl is a link out of"):
        suite(str(tmp_path / "data"))


def test_a_name_of_a_suite_wins_over_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "recall" / "vt.jsonl", [ruler_row(1)])
    monkeypatch.chdir(tmp_path)
    assert suite("recall").name == "recall"
    assert suite("./recall").name.startswith("ruler-recall-")


@pytest.mark.parametrize(
    ("rule", "accepted", "produced", "score"),
    [
        ("contained", ("12", "34"), "12 and 56", 0.5),
        ("contained", ("Ab",), "xaB", 1),
        ("contained_any", ("12", "34"), "34", 1),
        ("contained_any", ("12", "34"), "", 0),
        ("contained_normalised", ("The old mill!",), "it is  old MILL here", 1),
        ("contained_normalised", ("mill",), "river", 0),
        ("qa_f1", ("the old mill",), "An old house.", 0.5),  # old | old house, old mill
        ("qa_f1", ("x", "old mill"), "old mill", 1),
        ("qa_f1", ("old mill",), "old\nmill", 1),
        ("qa_f1_first_line", ("old mill",), "\n\nold mill\nQuestion: the next", 1),
        ("rouge_l", ("a b c d",), "a x c d", 0.75),
        ("rouge_l", ("a b", "c d e"), "c e", 0.8),
        ("rouge_l", ("a b",), "b a", 0.5),
        ("rouge_l_first_line", ("a b",), "a b\nc d e", 1),
        ("classification", ("red", "dark red", "blue"), "red or blue", 0.5),
        ("classification", ("red", "dark red", "blue"), "blue", 0),
        ("classification", ("red", "dark red", "blue"), "red\nblue", 1),
        ("number", ("Paragraph 12",), "Paragraph 12", 1),
        ("number", ("Paragraph 12",), "12 or 13", 0.5),
        ("number", ("Paragraph 12",), "112", 0),
        ("number", ("7",), "none", 0),
        ("code_similarity", ("ab = c",), "```python\n# set it\nab = c\nmore", 1),
        ("code_similarity", ("abcd",), "abxx", 0.5),
        ("code_similarity", ("abcd",), "`", 0),
    ],
)
def test_rules_by_hand(rule: str, accepted: tuple[str, ...], produced: str, score: float) -> None:
    turn = Turn("", accepted[0], accepted=accepted, rule=rule)
    assert RULES[rule](produced, turn) == pytest.approx(score)


def test_a_class_whose_name_is_part_of_the_right_one_does_not_count_against_it() -> None:
    turn = Turn("", "dark red", accepted=("red", "dark red", "blue"), rule="classification")
    assert RULES["classification"]("dark red", turn) == 1
    assert RULES["classification"]("dark red, blue", turn) == 0.5
    assert RULES["classification"]("red", turn) == 0
