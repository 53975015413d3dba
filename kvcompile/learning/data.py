"""What gates learn from: sequences of tokens, which of them are scored, and the batches of each step.

Takes sequences (files become such in `sources.py`); gives batches padded on the right. Guarantees: the batch of a step
follows from seed and step alone, every sequence comes once before any comes twice, and no sequence holds two documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from collections.abc import Sequence as Numbers
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from kvcompile.kernels.errors import KvCompileError

NO_LABEL = -100
MAX_SEQUENCES = 1 << 20
MAX_TOKENS = 1 << 28  # of all sequences together


@dataclass(frozen=True, slots=True)
class Sequence:
    """One sequence for Python users. All three have one value per token.

    ids: token ids. labels: `labels[t]` is the token that position t shall predict (already shifted), -100 for none;
    None: each token predicts the next one. answers: positions whose hidden state is compared; None: no position.
    """

    ids: Numbers[int]
    labels: Numbers[int] | None = None
    answers: Numbers[bool] | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """ids int64 [B, T], padded on the right; labels int64 [B, T], -100 for none; answers bool [B, T]."""

    ids: Tensor
    labels: Tensor
    answers: Tensor

    def part(self, rows: slice) -> Batch:
        """Some rows of the batch, without the columns that are padding in all of them."""
        held = (self.labels[rows] != NO_LABEL) | self.answers[rows]
        width = int(held.any(0).nonzero().max()) + 1 if bool(held.any()) else 1
        return Batch(self.ids[rows, :width], self.labels[rows, :width], self.answers[rows, :width])

    def to(self, device: torch.device) -> Batch:
        return Batch(self.ids.to(device), self.labels.to(device), self.answers.to(device))


@dataclass(frozen=True, slots=True)
class Row:
    """One checked sequence: ids int32 [n], labels int32 [n], answers bool [n], on the host."""

    ids: Tensor
    labels: Tensor
    answers: Tensor

    @property
    def scored(self) -> int:
        """Tokens up to the last position that any loss looks at; what follows it changes nothing."""
        held = ((self.labels != NO_LABEL) | self.answers).nonzero()
        return int(held.max()) + 1 if len(held) else 0


@dataclass(frozen=True)
class Data:
    """All sequences of a run. description: for people; digest: of every token and what is scored of it."""

    rows: tuple[Row, ...]
    description: str
    digest: str

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that any loss looks at."""
        return max(row.scored for row in self.rows)

    def chosen(self, seed: int, step: int, size: int) -> list[Row]:
        """The `size` sequences of a step, shuffled anew each time that all have had their turn."""
        count = len(self.rows)
        places = [divmod(step * size + i, count) for i in range(size)]
        return [self.rows[_order(seed, epoch, count)[place]] for epoch, place in places]

    def batch(self, seed: int, step: int, size: int) -> Batch:
        """The same, int64 on the host."""
        chosen = self.chosen(seed, step, size)
        shape = size, max(len(row.ids) for row in chosen)
        out = Batch(
            torch.zeros(shape, dtype=torch.int64),
            torch.full(shape, NO_LABEL, dtype=torch.int64),
            torch.zeros(shape, dtype=torch.bool),
        )
        for i, row in enumerate(chosen):
            n = len(row.ids)
            out.ids[i, :n], out.labels[i, :n], out.answers[i, :n] = row.ids, row.labels, row.answers
        return out


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(number("order", seed, epoch))
    return tuple(torch.randperm(count, generator=generator).tolist())


def number(*parts: object) -> int:
    """A seed in [0, 2^63) that follows from some values, so that streams of different purposes never meet."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def gather(rows: Iterable[Row], description: str, *, positions: int | None, labels: bool, answers: bool) -> Data:
    """The usable ones of some sequences.

    positions: what the model has, None for no bound. labels, answers: what the loss looks at; a sequence without it
    is left out. Raises KvCompileError where nothing is left, or where a sequence is longer than the model's positions.
    """
    kept, seen, tokens, digest = [], 0, 0, hashlib.sha256()
    for row in islice(rows, MAX_SEQUENCES + 1):
        seen, tokens = seen + 1, tokens + len(row.ids)
        if positions is not None and len(row.ids) > positions:
            raise KvCompileError(
                f"{description}: sequence {seen} has {len(row.ids)} tokens, the model has {positions} positions; "
                "give shorter ones, or cut texts with a smaller length"
            )
        if tokens > MAX_TOKENS or seen > MAX_SEQUENCES:
            raise KvCompileError(
                f"{description}: more than {MAX_TOKENS} tokens or {MAX_SEQUENCES} sequences; give a part of it"
            )
        if labels and not bool((row.labels != NO_LABEL).any()):
            continue
        if answers and not bool(row.answers.any()):
            continue
        kept.append(row)
        for part in (row.ids, row.labels, row.answers):
            digest.update(len(part).to_bytes(8, "big") + part.numpy().tobytes())
    if not kept:
        raise _useless(description, seen, answers)
    return Data(tuple(kept), f"{description}: {len(kept)} sequences", digest.hexdigest())


def _useless(description: str, seen: int, answers: bool) -> KvCompileError:
    if not seen:
        return KvCompileError(f"{description}: holds no usable sample; each needs two tokens or more")
    if answers:
        return KvCompileError(
            f"{description}: the loss compares answer tokens, and none of {seen} sequences has any; give "
            '{"prompt": ..., "answer": ...} lines, a suite (suite:NAME), or Sequence(..., answers=...)'
        )
    return KvCompileError(f"{description}: none of {seen} sequences has a token to predict; give longer ones")


def row_of(sequence: Any, where: str, vocabulary: int) -> Row:
    """A checked `Sequence`. `where` begins the messages. Raises KvCompileError for values that do not fit."""
    if not isinstance(sequence, Sequence):
        raise KvCompileError(
            f"{where}: is a {type(sequence).__name__}; give kvcompile.learning.data.Sequence objects, a file or a suite"
        )
    ids = _integers(sequence.ids, where, "ids")
    if len(ids) < 2:
        raise KvCompileError(f"{where}: has {len(ids)} tokens; two are the least, one that predicts the other")
    check_ids(ids, where, vocabulary)
    if sequence.labels is None:
        labels = torch.cat([ids[1:], torch.tensor([NO_LABEL], dtype=torch.int32)])
    else:
        labels = _integers(sequence.labels, where, "labels")
        check_ids(labels[labels != NO_LABEL], where, vocabulary, "label")
    answers = torch.zeros(len(ids), dtype=torch.bool)
    if sequence.answers is not None:
        answers = _integers(sequence.answers, where, "answers").bool()
    for name, part in (("labels", labels), ("answers", answers)):
        if len(part) != len(ids):
            raise KvCompileError(f"{where}: {len(part)} {name} for {len(ids)} ids; give one per token")
    return Row(ids, labels, answers)


def check_ids(ids: Tensor, where: str, vocabulary: int, what: str = "token id") -> None:
    outside = ids[(ids < 0) | (ids >= vocabulary)]
    if len(outside):
        raise KvCompileError(
            f"{where}: {what} {int(outside[0])} is outside of the model's vocabulary of {vocabulary}; "
            "was another tokenizer used?"
        )


def _integers(values: Any, where: str, what: str) -> Tensor:
    """int32 [n] of a list or a tensor; KvCompileError where it is no flat list of whole numbers."""
    try:
        found = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise KvCompileError(f"{where}: {what} is no list of whole numbers") from error
    if found.ndim != 1 or found.is_floating_point() or found.is_complex():
        raise KvCompileError(f"{where}: {what} is no flat list of whole numbers")
    if len(found) and not -(1 << 31) <= int(found.min()) <= int(found.max()) < 1 << 31:
        raise KvCompileError(f"{where}: {what} holds a number that is no token id")
    return found.cpu().to(torch.int32)
