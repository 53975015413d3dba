"""Stretches of a prompt: what each of them may read, and at which positions its tokens stand.

Takes what a user says of one sequence, `Spans`; gives the tables that `span(...)` regions are tested with, and the
positions that the model is fed. Guarantees: what contradicts itself or the prompt is a KvCompileError that names the
stretches; the cache's own positions stay the tokens' order, whatever positions the model sees.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.plan import PolicyPlan
from kvcompile.kernels.spans import SELF, SOURCES, span_names

MOST = 1024  # stretches of one sequence: the tables have a line and a column for each
MOST_TOKENS = 1 << 22  # of one sequence that stretches and positions are about: each is a number in the host's memory
MOST_PLACE = (1 << 31) - 1  # positions are int32
MAX_NAME = 100  # characters


@dataclass(frozen=True, slots=True)
class Spans:
    """What is said of one sequence's prompt.

    segments: (name, start, stop) of stretches that do not overlap, in tokens of the prompt, padding not counted;
    several may bear one name. reads: for the stretches of a name, the names of those that they may read (their own
    tokens are `span("self")`); a stretch whose name is not in it may read all that stands before it. positions: where
    the model is told that the prompt's tokens stand, from the first one on; what comes after them stands behind the
    largest. None: tokens stand where they are.

    Raises KvCompileError for stretches that overlap, are empty or too many, for unknown names, and for a stretch that
    is to read a later one alone.
    """

    segments: tuple[tuple[str, int, int], ...] = ()
    reads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    positions: tuple[int, ...] | None = None
    shift: int = field(init=False, default=0)  # how far tokens behind the given positions stand from their own number

    def __post_init__(self) -> None:
        given = sorted(map(_segment, as_list(self.segments, "segments")), key=lambda s: s[1])
        object.__setattr__(self, "segments", tuple(given))
        _check_apart(self.segments)
        object.__setattr__(self, "reads", _checked_reads(self.reads, self.segments))
        if self.positions is not None:
            object.__setattr__(self, "positions", _checked_positions(self.positions))
            object.__setattr__(self, "shift", max(self.positions, default=-1) + 1 - len(self.positions))
        if self.tokens > MOST_TOKENS:
            raise KvCompileError(f"spans of {self.tokens} tokens; at most {MOST_TOKENS} are supported")

    def side_by_side(self, *names: str) -> Spans:
        """The same with positions at which neighbours of these names begin alike; the rest goes on after the longest.

        What parallel contexts, the sources of a graph and the members of a set have in common.
        """
        unknown = [name for name in names if name not in {s[0] for s in self.segments}]
        if unknown or not names:
            raise KvCompileError(f"no stretch is called {unknown[0]!r}" if unknown else "no stretch is named")
        out: list[int] = []
        begin = free = 0  # where the neighbours begin; the first position behind all
        former = -1  # where the latest stretch of these names stopped
        for name, start, stop in self.segments:
            between = range(free, free + start - len(out))
            out += between
            free += len(between)
            if name not in names or start != former:
                begin = free
            out += range(begin, begin + stop - start)
            free = max(free, begin + stop - start)
            former = stop if name in names else -1
        return Spans(self.segments, self.reads, tuple(out))

    @property
    def stop(self) -> int:
        """From which token on no stretch comes any more."""
        return self.segments[-1][2] if self.segments else 0

    @property
    def tokens(self) -> int:
        """How long a prompt these stretches and positions need."""
        return max(self.stop, len(self.positions or ()))

    def upto(self, tokens: int) -> Spans:
        """What is left of it when the sequence is cut to so many tokens."""
        if tokens >= self.tokens:
            return self
        segments = tuple((name, start, min(stop, tokens)) for name, start, stop in self.segments if start < tokens)
        names = {name for name, _, _ in segments}
        last = {name: start for name, start, _ in segments}
        first = {name: start for name, start, _ in reversed(segments)}
        # What stands behind all that is left of a name is nothing that it could read.
        reads = {
            name: tuple(n for n in of if n in names and (n == name or first[n] <= last[name]))
            for name, of in self.reads.items()
            if name in names
        }
        return Spans(segments, reads, None if self.positions is None else self.positions[:tokens])

    def places(self, start: int, count: int) -> list[int]:
        """The positions of tokens start..start+count-1 of the sequence."""
        known = (self.positions or ())[start : start + count]
        return [*known, *range(start + len(known) + self.shift, start + count + self.shift)]

    def segment(self, width: int) -> Tensor:
        """The stretch of each token from 1 on, 0: none; int32 [width]."""
        out = torch.zeros(width, dtype=torch.int32)
        for i, (_, start, stop) in enumerate(self.segments):
            out[start:stop] = i + 1
        return out

    def links(self, names: Sequence[str], size: int) -> Tensor:
        """Which stretches (columns) the regions of these names are to a query of each stretch (lines): uint8
        [names, size, size], line and column 0 for what is in none."""
        out = torch.zeros(len(names), size, size, dtype=torch.uint8)
        own = [name for name, _, _ in self.segments]
        for i, name in enumerate(names):
            if name not in (SELF, SOURCES):
                out[i, :, [j + 1 for j, n in enumerate(own) if n == name]] = 1
                continue
            out[i, 0] = 1
            for j, mine in enumerate(own):
                if name == SELF:
                    out[i, j + 1, j + 1] = 1
                elif mine not in self.reads:
                    out[i, j + 1] = 1
                    out[i, j + 1, j + 1] = 0
                else:
                    out[i, j + 1, [k + 1 for k, n in enumerate(own) if n in self.reads[mine] and k != j]] = 1
        return out

    def to_json(self) -> dict[str, Any]:
        """Plain values; positions as runs (first, count)."""
        runs: list[list[int]] = []
        for p in self.positions or ():
            if runs and p == sum(runs[-1]):
                runs[-1][1] += 1
            else:
                runs.append([p, 1])
        return {
            "segments": [list(s) for s in self.segments],
            "reads": {name: list(of) for name, of in self.reads.items()},
            "positions": None if self.positions is None else runs,
        }

    @classmethod
    def from_json(cls, value: Any, most: int) -> Spans:
        """The reverse, of values that anybody may have written, for at most so many tokens. KvCompileError."""
        if not isinstance(value, dict) or value.keys() != {"segments", "reads", "positions"}:
            raise KvCompileError("spans must be segments, reads and positions")
        runs = value["positions"]
        if runs is not None:
            pairs = [_pair(run) for run in as_list(runs, "positions")]
            if sum(count for _, count in pairs) > min(most, MOST_TOKENS):
                raise KvCompileError(f"positions of more than {min(most, MOST_TOKENS)} tokens")
            runs = tuple(first + i for first, count in pairs for i in range(count))
        if not isinstance(value["reads"], dict):
            raise KvCompileError("reads must be a table of names")
        found = cls(as_list(value["segments"], "segments"), value["reads"], runs)  # type: ignore[arg-type]
        if found.tokens > most:
            raise KvCompileError(f"spans of {found.tokens} tokens for a sequence of {most}")
        return found


def as_list(value: Any, what: str) -> list[Any]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise KvCompileError(f"{what} of spans must be a list, not {type(value).__name__}")
    return list(value)


def _pair(run: Any) -> tuple[int, int]:
    if not isinstance(run, list) or len(run) != 2 or not all(_whole(n) for n in run):
        raise KvCompileError("positions are no runs of first and count")
    return run[0], run[1]


def _whole(n: Any) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= MOST_PLACE


def _segment(value: Any) -> tuple[str, int, int]:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 3:
        raise KvCompileError(f"a stretch of the text is (name, start, stop), not {value!r:.60}")
    name, start, stop = value
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
        raise KvCompileError(f"the name of a stretch must be a text of 1 to {MAX_NAME} characters, not {name!r:.60}")
    if name in (SELF, SOURCES):
        raise KvCompileError(f"no stretch can be called {name!r}: that is what a policy calls those of the query")
    if not (_whole(start) and _whole(stop) and start < stop):
        raise KvCompileError(
            f"stretch {name!r} goes from token {start!r} to {stop!r}: it needs whole numbers, 0 <= start < stop"
        )
    return name, start, stop


def _check_apart(segments: tuple[tuple[str, int, int], ...]) -> None:
    if len(segments) > MOST:
        raise KvCompileError(f"{len(segments)} stretches in one sequence; at most {MOST} are supported")
    for (first, _, stop), (second, start, _) in pairwise(segments):
        if start < stop:
            raise KvCompileError(
                f"stretches {first!r} and {second!r} overlap: the first ends at token {stop}, the second begins at "
                f"{start}; a token is in one at most"
            )


def _checked_reads(reads: Any, segments: tuple[tuple[str, int, int], ...]) -> Mapping[str, tuple[str, ...]]:
    if not isinstance(reads, Mapping):
        raise KvCompileError(f"`reads` must be a table from names to names, not {type(reads).__name__}")
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for name, start, _ in segments:
        first.setdefault(name, start)
        last[name] = start
    out: dict[str, tuple[str, ...]] = {}
    for name, sources in reads.items():
        of = tuple(as_list(sources, f"what {name!r} reads"))
        for unknown in (n for n in (name, *of) if not isinstance(n, str) or n not in first):
            named = ", ".join(repr(n) for n in list(first)[:8]) or "none"
            raise KvCompileError(f"`reads` names {unknown!r:.60}, which no stretch is called; there are {named}")
        for source in of:
            if source != name and first[source] > last[name]:
                raise KvCompileError(
                    f"{name!r} (at token {last[name]}) is to read {source!r}, which comes later (at token "
                    f"{first[source]}): a token reads earlier ones only; put {source!r} first, or leave it out"
                )
        out[name] = of
    return out


def _checked_positions(positions: Any) -> tuple[int, ...]:
    given = positions.tolist() if isinstance(positions, Tensor) else as_list(positions, "positions")
    wrong = [p for p in given if not _whole(p)]
    if wrong:
        raise KvCompileError(f"positions must be whole numbers from 0, not {wrong[0]!r:.60}")
    return tuple(given)


def tables_of(plan: PolicyPlan, each: Sequence[Spans | None]) -> tuple[Tensor, Tensor]:
    """`Site.segment` int32 [batch, positions] and `Site.links` uint8 [batch, names, size, size] of these sequences.

    Sizes are powers of two, so that a graph sees a new one rarely, and never one or none where a policy asks for it.
    """
    names = span_names(plan)
    if not names:
        return torch.zeros(len(each), 0, dtype=torch.int32), torch.zeros(len(each), 0, 0, 0, dtype=torch.uint8)
    known = [s or Spans() for s in each]
    width, size = _sizes(known)
    return torch.stack([s.segment(width) for s in known]), torch.stack([s.links(names, size) for s in known])


def table_bytes(plan: PolicyPlan, each: Sequence[Spans | None]) -> int:
    """What the tables of these sequences take."""
    names = len(span_names(plan))
    width, size = _sizes([s or Spans() for s in each])
    return len(each) * (4 * width + names * size * size) if names else 0


def _sizes(each: Sequence[Spans]) -> tuple[int, int]:
    """Positions of one table, lines and columns of the other."""
    tokens, stretches = max((s.tokens for s in each), default=0), max((len(s.segments) for s in each), default=0)
    return _power(tokens, 64), _power(1 + stretches, 4)


def _power(n: int, least: int) -> int:
    return max(least, 1 << (n - 1).bit_length()) if n else least
