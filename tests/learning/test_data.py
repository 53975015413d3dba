"""Learning data: windows, shifted labels, answer positions, batches that follow from seed and step, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kvcompile.kernels.errors import KvCompileError
from kvcompile.learning.data import NO_LABEL, Data, Sequence, number
from kvcompile.learning.sources import Reader, load_data

VOCABULARY, BEGIN = 64, 1


class Words:
    """A tokenizer of words w3, w4, ...: each is its own number, and every text begins with token 1."""

    bos_token_id = BEGIN

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> Any:
        ids = [int(word[1:]) for word in text.split()]
        return type("Encoding", (), {"input_ids": [BEGIN] * add_special_tokens + ids})


def words(*ids: int) -> str:
    return " ".join(f"w{i}" for i in ids)


def read(data: Any, *, length: int | None = None, positions: int | None = 100, labels: bool = True,
         answers: bool = False, count: int = 8, seed: int = 0, tokenizer: Any = None) -> Data:  # fmt: skip
    reader = Reader(tokenizer or Words(), VOCABULARY, positions, length)
    return load_data(data, reader, count=count, seed=seed, labels=labels, answers=answers)


def rows(data: Data) -> list[tuple[list[int], list[int], list[int]]]:
    return [(r.ids.tolist(), r.labels.tolist(), r.answers.int().tolist()) for r in data.rows]


def saved(folder: Path, *lines: object, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


# ---------------------------------------------------------------- what becomes of text


def test_a_text_is_cut_into_windows_that_begin_like_texts_and_lose_no_label(tmp_path: Path) -> None:
    path = saved(tmp_path, words(*range(3, 14)), name="data.txt")
    none = NO_LABEL
    assert rows(read(path, length=5)) == [
        ([1, 3, 4, 5, 6], [none, 4, 5, 6, 7], [0] * 5),
        ([1, 7, 8, 9, 10], [none, 8, 9, 10, 11], [0] * 5),
        ([1, 11, 12, 13], [none, 12, 13, none], [0] * 4),
    ]


def test_no_window_holds_two_documents(tmp_path: Path) -> None:
    path = saved(tmp_path, {"text": words(3, 4, 5)}, {"text": words(6, 7)}, "", {"text": "w8"})
    assert [ids for ids, _, _ in rows(read(path, length=20))] == [[1, 3, 4, 5], [1, 6, 7]]
    assert [labels[-1] for _, labels, _ in rows(read(path, length=20))] == [NO_LABEL] * 2


def test_answers_alone_are_predicted_and_compared_where_they_are_predicted(tmp_path: Path) -> None:
    one = {"prompt": words(3, 4), "answer": words(5, 6)}
    two = {"prompt": words(3), "turns": [{"ask": words(7), "answer": words(8)}, {"ask": words(9), "answer": "w10"}]}
    none = NO_LABEL
    assert rows(read(saved(tmp_path, one, two), answers=True)) == [
        ([1, 3, 4, 5, 6], [none, none, 5, 6, none], [0, 0, 1, 1, 0]),
        ([1, 3, 7, 8, 9, 10], [none, none, 8, none, 10, none], [0, 0, 1, 0, 1, 0]),
    ]


def test_ready_made_labels_stand_at_their_own_token(tmp_path: Path) -> None:
    path = saved(tmp_path, {"input_ids": [3, 4, 5], "labels": [-100, -100, 5]}, {"input_ids": [3, 4]})
    none = NO_LABEL
    expected = [([3, 4, 5], [none, 5, none], [0, 1, 0]), ([3, 4], [4, none], [0, 0])]
    assert rows(read(path)) == expected
    assert rows(read(path, answers=True)) == expected[:1]


def test_sequences_of_python_are_taken_as_they_are() -> None:
    given = [Sequence([3, 4, 5]), Sequence(torch.tensor([6, 7]), [9, NO_LABEL], [True, False])]  # type: ignore[arg-type]
    none = NO_LABEL
    assert rows(read(iter(given))) == [([3, 4, 5], [4, 5, none], [0, 0, 0]), ([6, 7], [9, none], [1, 0])]


def test_a_folder_is_read_by_name(tmp_path: Path) -> None:
    saved(tmp_path, {"text": words(5, 6)}, name="b.jsonl")
    saved(tmp_path, words(3, 4), name="a.txt")
    saved(tmp_path, "what is this", name="c.md")
    assert [ids for ids, _, _ in rows(read(tmp_path))] == [[1, 3, 4], [1, 5, 6]]


def test_a_suite_asks_other_samples_than_an_evaluation_with_the_same_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvcompile.evaluation import samples
    from kvcompile.evaluation.samples import Sample, Turn

    asked: list[tuple[int, int, int]] = []

    class Made:
        def samples(self, count: int, length: int, seed: int, tokenizer: Any) -> list[Sample]:
            asked.append((count, length, seed))
            turns = (Turn("", words(9)), Turn(words(7), words(8, 9)))
            return [Sample(words(*range(3, 3 + length - 1)), turns) for _ in range(count)]

    monkeypatch.setattr(samples, "suite", lambda name: {"made:deep=2": Made}[name]())
    data = read("suite:made:deep=2", length=6, answers=True, count=3)
    assert len(data.rows) == 3 and asked[0][:2] == (3, 6) and asked[0][2] not in range(1000)
    assert rows(data)[0][0] == [1, 3, 4, 5, 6, 7, 9, 7, 8, 9]
    assert sum(rows(data)[0][2]) == 3


# ---------------------------------------------------------------- batches


def numbered(count: int) -> Data:
    return read([Sequence([3 + i, 4, *range(10, 10 + i)]) for i in range(count)])


def firsts(data: Data, seed: int, step: int, size: int) -> list[int]:
    return (data.batch(seed, step, size).ids[:, 0] - 3).tolist()


def test_each_sequence_comes_once_before_any_comes_twice() -> None:
    data = numbered(6)
    seen = [i for step in range(9) for i in firsts(data, 0, step, 4)]
    epochs = [seen[at : at + 6] for at in range(0, 36, 6)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_batch_follows_from_seed_and_step_alone() -> None:
    forth, back = numbered(6), numbered(6)
    late = [back.batch(7, step, 3).ids.tolist() for step in reversed(range(8))]
    assert [forth.batch(7, step, 3).ids.tolist() for step in range(8)] == late[::-1]
    assert [firsts(forth, 7, s, 3) for s in range(8)] != [firsts(forth, 8, s, 3) for s in range(8)]


def test_batches_are_padded_on_the_right_and_parts_lose_the_padding() -> None:
    data = read([Sequence([3, 4]), Sequence([5, 6, 7, 8])])
    batch = data.batch(0, 0, 2)
    short = int((batch.ids[:, 0] == 3).nonzero())
    assert batch.ids[short].tolist() == [3, 4, 0, 0] and batch.labels[short].tolist() == [4] + [NO_LABEL] * 3
    part = batch.part(slice(short, short + 1))
    assert part.ids.tolist() == [[3]] and part.labels.tolist() == [[4]]
    assert (batch.ids.dtype, batch.labels.dtype, batch.answers.dtype) == (torch.int64, torch.int64, torch.bool)


def test_the_digest_tells_data_apart() -> None:
    base = read([Sequence([3, 4, 5])]).digest
    assert read([Sequence([3, 4, 5])]).digest == base
    others = (Sequence([3, 4, 6]), Sequence([3, 4, 5], [4, NO_LABEL, NO_LABEL]), Sequence([3, 4, 5], None, [1, 0, 0]))
    assert len({base, *(read([one]).digest for one in others)}) == 4


def test_streams_of_different_purposes_differ() -> None:
    assert len({number("a", 1, 2), number("a", 1, 3), number("b", 1, 2), number("a", 12)}) == 4


# ---------------------------------------------------------------- bad input

PAIR = {"prompt": words(3), "answer": words(4)}
BAD_LINES = [
    ("{", "data.jsonl:2, column [0-9]+: no JSON"),
    ("[1, 2]", "data.jsonl:2: no JSON object"),
    ("[" * 100_000, "data.jsonl:2.*no JSON"),
    ({"question": "x"}, "data.jsonl:2: none of the forms"),
    ({"text": 3}, "data.jsonl:2: `text` is no text"),
    ({"prompt": "w3"}, "data.jsonl:2: `answer` is missing"),
    ({"prompt": "w3", "answer": ""}, "data.jsonl:2: an answer has no tokens"),
    ({"prompt": "w3", "turns": []}, "data.jsonl:2: `turns` is no list"),
    ({"prompt": "w3", "turns": [3]}, "data.jsonl:2: a turn is no object"),
    ({"prompt": "w3", "answer": "w64"}, "data.jsonl:2: token id 64 is outside of the model's vocabulary of 64"),
    ({"input_ids": [3, 64]}, "data.jsonl:2: token id 64 is outside"),
    ({"input_ids": [3, -1]}, "data.jsonl:2: token id -1 is outside"),
    ({"input_ids": [3, 1 << 40]}, "data.jsonl:2: .*no token id"),
    ({"input_ids": [3, 1 << 80]}, "data.jsonl:2: .*no list of whole numbers"),
    ({"input_ids": [3, 4.5]}, "data.jsonl:2: `input_ids` is no list of whole numbers"),
    ({"input_ids": [3, True]}, "data.jsonl:2: `input_ids` is no list of whole numbers"),
    ({"input_ids": [3]}, "data.jsonl:2: has 1 tokens"),
    ({"input_ids": [3, 4], "labels": [3]}, "data.jsonl:2: 1 labels for 2 ids"),
    ({"input_ids": [3, 4, 5], "labels": [4, 5, -100]}, "data.jsonl:2: label 0 .* shifted already"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_a_bad_line_is_named(tmp_path: Path, line: object, message: str) -> None:
    with pytest.raises(KvCompileError, match=message):
        read(saved(tmp_path, PAIR, line))


def test_a_sample_that_the_model_or_the_user_has_no_room_for(tmp_path: Path) -> None:
    path = saved(tmp_path, PAIR, {"prompt": words(*range(3, 13)), "answer": "w4"})
    with pytest.raises(KvCompileError, match=r"data.jsonl:2: the sample has 12 tokens, more than length=11"):
        read(path, length=11)
    with pytest.raises(KvCompileError, match="sequence 2 has 12 tokens, the model has 11 positions"):
        read(path, positions=11)
    with pytest.raises(KvCompileError, match="length=50 is more than the model's 11 positions"):
        read(path, length=50, positions=11)
    assert len(read(path, positions=12).rows) == 2


def test_no_usable_sample_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(KvCompileError, match="no usable sample"):
        read(saved(tmp_path, "", {"text": "w3"}, {"text": ""}))
    with pytest.raises(KvCompileError, match="compares answer tokens, and none of 1 sequences has any"):
        read(saved(tmp_path, {"text": words(3, 4, 5)}), answers=True)
    with pytest.raises(KvCompileError, match="none of 1 sequences has a token to predict"):
        read([Sequence([3, 4], [NO_LABEL] * 2)])
    with pytest.raises(KvCompileError, match="a window needs two tokens"):
        read(saved(tmp_path, {"text": words(3, 4, 5)}), length=2)


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(KvCompileError, match=r"data\.bin: no such file or folder"):
        read(tmp_path / "data.bin")
    with pytest.raises(KvCompileError, match="holds neither"):
        read(tmp_path)
    (tmp_path / "data.bin").touch()
    with pytest.raises(KvCompileError, match=r"ends neither in \.txt nor in \.jsonl"):
        read(tmp_path / "data.bin")
    with pytest.raises(KvCompileError, match="data is a int"):
        read(3)
    with pytest.raises(KvCompileError, match="sequence 1: is a str"):
        read(["text"])
    with pytest.raises(KvCompileError, match="text needs the model's tokenizer"):
        reader = Reader(None, VOCABULARY, 100, None)
        load_data(saved(tmp_path, PAIR), reader, count=1, seed=0, labels=True, answers=False)
    (tmp_path / "latin.txt").write_bytes("w3 \xe9".encode("latin-1"))
    with pytest.raises(KvCompileError, match=r"latin.txt: not UTF-8 text \(byte 3\)"):
        read(tmp_path / "latin.txt")


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        (Sequence([3, 4], [4]), "1 labels for 2 ids"),
        (Sequence([3, 4], None, [True]), "1 answers for 2 ids"),
        (Sequence([3, 4], [64, NO_LABEL]), "label 64 is outside"),
        (Sequence([[3, 4]]), "ids is no flat list"),  # type: ignore[list-item]
        (Sequence([3.5, 4.0]), "ids is no flat list"),  # type: ignore[list-item]
        (Sequence("ab"), "ids is no list of whole numbers"),  # type: ignore[arg-type]
    ],
)
def test_bad_sequences_of_python(sequence: Sequence, message: str) -> None:
    with pytest.raises(KvCompileError, match=f"sequence 1: {message}"):
        read([sequence])


def test_sizes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvcompile.learning import data, sources

    path = saved(tmp_path, PAIR, PAIR)
    monkeypatch.setattr(sources, "MAX_LINE", 20)
    with pytest.raises(KvCompileError, match=r"data.jsonl:1: the line is longer than 20 bytes"):
        read(path)
    monkeypatch.setattr(sources, "MAX_FILE", 30)
    with pytest.raises(KvCompileError, match="larger than 30 bytes"):
        read(path)
    (tmp_path / "zeros.txt").symlink_to("/dev/zero")  # its size is 0, and it never ends
    with pytest.raises(KvCompileError, match=r"zeros.txt: larger than 30 bytes"):
        read(tmp_path / "zeros.txt")
    monkeypatch.setattr(data, "MAX_TOKENS", 5)
    with pytest.raises(KvCompileError, match="more than 5 tokens"):
        read([Sequence([3, 4, 5]), Sequence([3, 4, 5])])
