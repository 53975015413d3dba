"""Where learning data comes from: texts, lines of JSON, folders of both, suites, objects of Python.

Takes what a user names and the model's tokenizer; gives `Data`. Guarantees: files are bounded in size and read as text
or JSON only; what is wrong is a KvCompileError with file and line; a window of text never holds two documents.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO, TextIOWrapper
from itertools import count as counted
from pathlib import Path
from typing import Any

import torch

from kvcompile.kernels.errors import KvCompileError
from kvcompile.learning.data import NO_LABEL, Data, Row, Sequence, check_ids, gather, number, row_of

MAX_FILE = 256 << 20
MAX_LINE = 32 << 20
MAX_FILES = 4096
DEFAULT_LENGTH = 4096  # tokens of a window or of a suite's sample where the caller names none
SMALL = 16  # positions that a suite's answers get at least
MOST_SAMPLES = 512  # of a suite; more steps go round again
SUITE = "suite:"
FORMS = (
    '{"text": ...}, {"prompt": ..., "answer": ...}, {"prompt": ..., "turns": [...]} or '
    '{"input_ids": [...], "labels": [...]}'
)


@dataclass(frozen=True)
class Reader:
    """How text becomes tokens of one model. length: tokens of a window; opening: what every sequence starts with."""

    tokenizer: Any
    vocabulary: int
    positions: int | None
    length: int | None

    @property
    def window(self) -> int:
        """Tokens of a window: as asked, else as many as the model has positions for, within reason."""
        return self.length or min(self.positions or DEFAULT_LENGTH, DEFAULT_LENGTH)

    @property
    def opening(self) -> list[int]:
        """The token that the tokenizer begins a text with, if it has one."""
        begin = getattr(self.words, "bos_token_id", None)
        first = list(self.words("").input_ids)[:1]
        return first if first and first[0] == begin else []

    @property
    def words(self) -> Any:
        if self.tokenizer is None:
            raise KvCompileError(
                "text needs the model's tokenizer: save it into the model's folder, or give "
                "tokenizer=AutoTokenizer.from_pretrained(...)"
            )
        return self.tokenizer

    def encode(self, text: str, where: str) -> list[int]:
        """Token ids of a text by itself, without what the tokenizer puts around texts."""
        ids = list(self.words(text, add_special_tokens=False, verbose=False).input_ids)
        check_ids(torch.tensor(ids, dtype=torch.int64), where, self.vocabulary)
        return ids

    def windows(self, text: str, where: str) -> Iterator[Row]:
        """One document, cut into windows that each begin as a text does; a rest of one token is left out.

        The last token of a window predicts the first of the next one; what opens a window predicts nothing.
        """
        ids, opening = self.encode(text, where), self.opening
        size = self.window - len(opening)
        if size < 2:
            raise KvCompileError(f"length={self.window}: a window needs two tokens of text or more")
        for at in range(0, len(ids), size):
            here, following = ids[at : at + size], ids[at + 1 : at + size + 1]
            if len(here) < 2:
                return
            labels = [NO_LABEL] * len(opening) + following
            yield _row(opening + here, labels + [NO_LABEL] * (len(opening + here) - len(labels)), False)

    def answered(self, prompt: str, turns: Iterable[tuple[str, str]], where: str) -> Row:
        """A prompt and its later turns (ask, answer); the answers' tokens alone are predicted and compared.

        Each piece is tokenized by itself, as in a run, where the answer is written after the prompt is read. Compared
        are the states that predict an answer's tokens. DuoAttention compares those at the tokens of questions and
        answers, 32 words each; of an answer of one word, its own state says nothing of how it was found.
        """
        ids, asked = self.opening + self.encode(prompt, where), False
        targets = [NO_LABEL] * len(ids)
        for ask, answer in turns:
            before, after = self.encode(ask, where), self.encode(answer, where)
            if not after:
                raise KvCompileError(f"{where}: an answer has no tokens")
            asked = True
            ids += before + after
            targets += [NO_LABEL] * len(before) + after
        if not asked or len(ids) < 2:
            raise KvCompileError(f"{where}: has no answer")
        return _row(ids, [*targets[1:], NO_LABEL], True)


def _row(ids: list[int], labels: list[int], compared: bool) -> Row:
    shifted = torch.tensor(labels, dtype=torch.int32)
    return Row(torch.tensor(ids, dtype=torch.int32), shifted, (shifted != NO_LABEL) & compared)


def load_data(data: Any, reader: Reader, *, count: int, seed: int, labels: bool, answers: bool) -> Data:
    """The data that a user named: a path, `suite:NAME`, or an iterable of `Sequence`.

    count: sequences that the run will look at; seed: of the run; labels, answers: what the loss looks at.
    Raises KvCompileError, with file and line, for what cannot be used.
    """
    if reader.length is not None and reader.positions is not None and reader.length > reader.positions:
        raise KvCompileError(f"length={reader.length} is more than the model's {reader.positions} positions")
    needs: dict[str, Any] = {"positions": reader.positions, "labels": labels, "answers": answers}
    if isinstance(data, str) and data.startswith(SUITE):
        return gather(_suite_rows(data[len(SUITE) :], reader, min(count, MOST_SAMPLES), seed), data, **needs)
    if isinstance(data, (str, Path)):
        path = Path(data)
        return gather((row for file in _files(path) for row in _file_rows(file, reader)), path.name, **needs)
    if not isinstance(data, Iterable):
        raise KvCompileError(f"data is a {type(data).__name__}: give a path, `suite:NAME` or Sequence objects")
    rows = (row_of(one, f"sequence {n}", reader.vocabulary) for n, one in enumerate(data, 1))
    return gather(rows, "sequences", **needs)


def _suite_rows(name: str, reader: Reader, count: int, seed: int) -> Iterator[Row]:
    from kvcompile.evaluation.samples import suite

    # Questions and answers come after a prompt of the length that is asked for, and need positions too.
    room = reader.positions - max(SMALL, reader.positions // 8) if reader.positions else DEFAULT_LENGTH
    length = reader.length or max(1, min(DEFAULT_LENGTH, room))
    # A stream of its own: training on the very samples that an evaluation with the same seed asks would flatter it.
    samples = suite(name).samples(count, length, number("suite", seed) % (1 << 31), reader.words)
    for n, sample in enumerate(samples, 1):
        yield reader.answered(sample.prompt, [(t.ask, t.answer) for t in sample.turns], f"{SUITE}{name}, sample {n}")


def _files(path: Path) -> list[Path]:
    """The file itself, or the texts and lines of JSON that lie directly in a folder, by name."""
    if not path.exists():
        raise KvCompileError(f"{path}: no such file or folder; give one, or `suite:NAME`")
    if not path.is_dir():
        if path.suffix not in (".txt", ".jsonl"):
            raise KvCompileError(f"{path}: the name ends neither in .txt nor in .jsonl; give such a file, a folder of "
                                 "them, or `suite:NAME`")  # fmt: skip
        return [path]
    found = sorted(file for file in path.iterdir() if file.suffix in (".txt", ".jsonl") and file.is_file())
    if not found:
        raise KvCompileError(f"{path}: the folder holds neither .txt nor .jsonl files")
    if len(found) > MAX_FILES:
        raise KvCompileError(f"{path}: the folder holds {len(found)} files, more than {MAX_FILES}; give a part of them")
    return found


def _file_rows(path: Path, reader: Reader) -> Iterator[Row]:
    if path.suffix == ".txt":
        yield from reader.windows(_whole(path), str(path))
        return
    _check_size(path, path.stat().st_size)
    with path.open("rb") as stream:
        for line_number in counted(1):
            line = stream.readline(MAX_LINE + 1)
            if not line:
                return
            if len(line) > MAX_LINE:
                raise KvCompileError(f"{path}:{line_number}: the line is longer than {MAX_LINE} bytes")
            if line.strip():
                yield from _json_rows(line, f"{path}:{line_number}", reader)


def _whole(path: Path) -> str:
    """All of a text. What is read is counted, because devices and pipes tell no size."""
    with path.open("rb") as stream:
        data = stream.read(MAX_FILE + 1)
    _check_size(path, len(data))
    try:
        return TextIOWrapper(BytesIO(data), encoding="utf-8-sig").read()
    except UnicodeDecodeError as error:
        raise KvCompileError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def _check_size(path: Path, size: int) -> None:
    if size > MAX_FILE:
        raise KvCompileError(f"{path}: larger than {MAX_FILE} bytes; cut it into several files in a folder")


def _json_rows(line: bytes, where: str, reader: Reader) -> Iterator[Row]:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        column = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise KvCompileError(f"{where}{column}: no JSON; one object a line, such as {FORMS}") from error
    if not isinstance(value, dict):
        raise KvCompileError(f"{where}: no JSON object; one object a line, such as {FORMS}")
    if "input_ids" in value:
        yield _ready(value, where, reader.vocabulary)
    elif "prompt" in value:
        row = reader.answered(_text(value, "prompt", where), _turns(value, where), where)
        if reader.length is not None and len(row.ids) > reader.length:
            raise KvCompileError(f"{where}: the sample has {len(row.ids)} tokens, more than length={reader.length}")
        yield row
    elif "text" in value:
        yield from reader.windows(_text(value, "text", where), where)
    else:
        raise KvCompileError(f"{where}: none of the forms that are read: {FORMS}")


def _ready(value: dict[str, Any], where: str, vocabulary: int) -> Row:
    """Ids and labels as transformers writes them: a label stands at its own token, and -100 is none."""
    ids, labels = value["input_ids"], value.get("labels", value["input_ids"])
    for name, part in (("input_ids", ids), ("labels", labels)):
        if not isinstance(part, list) or not all(type(n) is int for n in part):
            raise KvCompileError(f"{where}: `{name}` is no list of whole numbers")
    if len(ids) != len(labels):
        raise KvCompileError(f"{where}: {len(labels)} labels for {len(ids)} ids; give one per token")
    odd = next((i for i, (n, label) in enumerate(zip(ids, labels, strict=True)) if label not in (n, NO_LABEL)), None)
    if odd is not None:
        raise KvCompileError(f"{where}: label {odd} is neither its own token nor -100; are the labels shifted already?")
    shifted = [*labels[1:], NO_LABEL]
    # Where only some tokens are labelled, those are the answers.
    some = NO_LABEL in labels[1:]
    answers = [some and label != NO_LABEL for label in shifted]
    return row_of(Sequence(ids, shifted, answers), where, vocabulary)


def _turns(value: dict[str, Any], where: str) -> list[tuple[str, str]]:
    if "turns" not in value:
        return [("", _text(value, "answer", where))]
    turns = value["turns"]
    if not isinstance(turns, list) or not turns:
        raise KvCompileError(f'{where}: `turns` is no list of {{"ask": ..., "answer": ...}}')
    found = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise KvCompileError(f'{where}: a turn is no object {{"ask": ..., "answer": ...}}')
        found.append((_text(turn, "ask", where) if "ask" in turn else "", _text(turn, "answer", where)))
    return found


def _text(value: dict[str, Any], key: str, where: str) -> str:
    text = value.get(key)
    if not isinstance(text, str):
        raise KvCompileError(f"{where}: `{key}` is {'missing' if key not in value else 'no text'}")
    return text
