"""Suites from data that the user has on disk: a folder or file of RULER, LongBench or HELMET.

Takes a path; gives a `Suite` over every task below it, in turn. Nothing is cut: a sample whose prompt is longer than
the wanted length is left out, counted, and told of in a warning. Files are not trusted: sizes are bounded, rows are
checked, links out of the folder are refused, and messages name file and line.
"""

from __future__ import annotations

import hashlib
import json
import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from kvcompile.evaluation.samples import Sample, Turn
from kvcompile.evaluation.suites.generated import token_ids
from kvcompile.evaluation.suites.layouts import UNDERSTOOD, Layout, Refused, layout_of, task_of
from kvcompile.evaluation.suites.rules import RULES
from kvcompile.kernels.errors import KvCompileError

MOST_FILES = 2000
LONGEST_FILE = 4 << 30  # bytes
LONGEST_LINE = 64 << 20  # bytes, also of a .json file as a whole
ENDINGS = (".jsonl", ".json")


@dataclass(frozen=True, slots=True)
class Source:
    """A data file. rows: byte offset and length of each row's line; empty lines are not among them.

    Of a .json file the only row is the whole file, and `inside` is the number of objects in its list `data`.
    """

    path: Path
    layout: Layout
    task: str
    rows: tuple[tuple[int, int, int], ...]  # line, offset, bytes
    inside: int = 0

    def __len__(self) -> int:
        return self.inside or len(self.rows)

    def sample(self, number: int) -> Sample:
        """The sample of a row. Raises KvCompileError with file and line where the row is wrong."""
        if self.inside:
            row = _whole(self.path, self.path.stat().st_mtime_ns)["data"][number]
            where = f"{self.path}, object {number + 1} of `data`"
        else:
            row, where = _row(self.path, self.rows[number]), f"{self.path}, line {self.rows[number][0]}"
        try:
            if not isinstance(row, dict):
                raise Refused("a row must be a JSON object")
            sample = self.layout.read(row, self.task)
        except Refused as error:
            raise KvCompileError(f"{where}: {error}") from None
        return replace(sample, facts={"task": self.task, "row": number})


def _row(path: Path, row: tuple[int, int, int]) -> Any:
    line, offset, size = row
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(size)
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise KvCompileError(f"{path}, line {line}: this is not JSON in UTF-8 ({error})") from None


@lru_cache(maxsize=1)
def _whole(path: Path, changed: int) -> Any:
    """A .json file, read once for all of its samples; `changed`: when it was last written."""
    return _row(path, (1, 0, LONGEST_LINE))


def _lines(path: Path, digest: Any) -> tuple[tuple[int, int, int], ...]:
    """Line number, offset and size of every line that is not empty; all bytes go into the digest."""
    if path.stat().st_size > LONGEST_FILE:
        raise KvCompileError(f"{path} has more than {LONGEST_FILE} bytes: split it")
    found, offset, number = [], 0, 0
    whole = path.suffix == ".json"
    with path.open("rb") as file:
        while line := (file.read(LONGEST_LINE + 1) if whole else file.readline(LONGEST_LINE + 1)):
            number += 1
            if len(line) > LONGEST_LINE:
                raise KvCompileError(f"{path}, line {number}: more than {LONGEST_LINE} bytes")
            digest.update(line)
            if line.strip():
                found.append((number, offset, len(line)))
            offset += len(line)
    return tuple(found)


def _source(path: Path, digest: Any) -> Source:
    """The file as a source. Raises Refused where it is none of the layouts."""
    rows = _lines(path, digest)
    if not rows:
        raise Refused("the file is empty")
    first, inside = _row(path, rows[0]), 0
    if path.suffix == ".json":
        data = first.get("data") if isinstance(first, dict) else None
        if not isinstance(data, list) or not data:
            raise Refused("a .json file must hold a list `data`")
        first, inside = data[0], len(data)
    layout = layout_of(first) if isinstance(first, dict) else None
    if layout is None:
        raise Refused("its first row has the fields of no layout")
    return Source(path, layout, task_of(path, layout, first), rows, inside)


@dataclass(frozen=True, slots=True)
class FolderSuite:
    """All tasks of a folder. `name` ends in a digest of the files' bytes, so that other data has another name."""

    name: str
    sources: tuple[Source, ...] = field(repr=False)
    version: ClassVar[int] = 1
    later: ClassVar[bool] = False

    @classmethod
    def open(cls, path: Path) -> FolderSuite:
        """The suite of a folder or of one file. Files of no known layout are left out, with a warning.

        Raises KvCompileError where no file is understood, and for files that are too large or lie outside.
        """
        path = path.resolve()
        digest = hashlib.sha256()
        sources, refused = [], []
        for file in _files(path):
            digest.update(file.relative_to(path.parent).as_posix().encode())
            try:
                sources.append(_source(file, digest))
            except Refused as error:
                refused.append(f"{file.relative_to(path.parent)}: {error}")
        if not sources:
            why = "".join(f"\n  {line}" for line in refused[:5]) or " it holds no .jsonl or .json file"
            layouts = "".join(f"\n  {layout}" for layout in UNDERSTOOD)
            raise KvCompileError(f"{path} is no data that can be read:{why}\nwhat is understood:{layouts}")
        if refused:
            warnings.warn(f"{len(refused)} files of {path} left out, such as {refused[0]}", stacklevel=2)
        names = "+".join(sorted({source.layout.name for source in sources})).lower()
        return cls(f"{names}-{path.name}-{digest.hexdigest()[:12]}", tuple(sources))

    def samples(self, count: int, length: int, seed: int, tokenizer: Any) -> list[Sample]:
        """`count` samples of at most `length` tokens each, fewer where there are no more; one of each task, in turn.

        Where a task has several files, as HELMET has one per length, they are one task, and their rows are mixed.
        `facts`: task, row, and `left_out`, how many samples were too long among those looked at.
        """
        if count < 1 or length < 1:
            raise KvCompileError(f"suite `{self.name}`: {count} samples of {length} tokens: give at least one of each")
        tasks = sorted({source.task for source in self.sources})
        too_long = [0]
        turns = [self._fitting(task, length, seed, tokenizer, too_long) for task in tasks]
        found = list(islice(_in_turn(turns), count))
        if not found:
            raise KvCompileError(
                f"suite `{self.name}`: none of its {too_long[0]} samples has at most {length} tokens; "
                f"samples are never cut: give a greater length"
            )
        if too_long[0] or len(found) < count:
            told = f"{len(found)} of {count} samples found; {too_long[0]} left out, longer than {length} tokens"
            warnings.warn(f"suite `{self.name}`: {told}", stacklevel=2)
        return [replace(sample, facts={**sample.facts, "left_out": too_long[0]}) for sample in found]

    def _fitting(self, task: str, length: int, seed: int, tokenizer: Any, too_long: list[int]) -> Iterator[Sample]:
        rows = [(source, i) for source in self.sources if source.task == task for i in range(len(source))]
        random.Random(f"{task} {seed}").shuffle(rows)
        for source, i in rows:
            sample = source.sample(i)
            if len(token_ids(tokenizer, sample.prompt)) <= length:
                yield sample
            else:
                too_long[0] += 1

    def score(self, turn: Turn, produced: str) -> float:
        """By the rule of the turn's task."""
        return RULES[turn.rule](produced, turn)


def _in_turn(turns: list[Iterator[Sample]]) -> Iterator[Sample]:
    """One of each, again and again, until none has more."""
    while turns:
        left = []
        for source in turns:
            for sample in islice(source, 1):
                yield sample
                left.append(source)
        turns = left


def _files(path: Path) -> list[Path]:
    """The data files at or below a path, in the order of their names. Raises KvCompileError for links that lead out."""
    if path.is_file():
        return [path]
    found = sorted(file for file in islice(path.rglob("*"), 10 * MOST_FILES) if file.suffix in ENDINGS)
    if len(found) > MOST_FILES:
        raise KvCompileError(f"{path} holds more than {MOST_FILES} data files: name a folder further down")
    for file in found:
        if not file.resolve().is_relative_to(path):
            raise KvCompileError(f"{file} is a link out of {path}: give a folder that holds the files themselves")
    return [file for file in found if file.is_file()]
