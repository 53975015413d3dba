"""Source text and places in it.

Takes a text with a name; gives `Source` and `Span`, which know line and column of every place.
Guarantees: lines and columns count from 1, a span never leaves its text, and neither object
takes part in the equality of the nodes that carry it.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field


def _line_starts(text: str) -> tuple[int, ...]:
    starts = [0]
    while (end := text.find("\n", starts[-1])) >= 0:
        starts.append(end + 1)
    return tuple(starts)


@dataclass(frozen=True, slots=True)
class Source:
    """A policy text. `name` is a path, `library/NAME.kvp`, or a word in angle brackets for text without a file."""

    name: str
    text: str = field(repr=False)
    _starts: tuple[int, ...] = field(init=False, repr=False, compare=False, default=())

    def __post_init__(self) -> None:
        object.__setattr__(self, "_starts", _line_starts(self.text))

    def place(self, offset: int) -> tuple[int, int]:
        """Line and column, both from 1, of a character offset; offsets past the end mean the end."""
        offset = min(max(offset, 0), len(self.text))
        line = bisect_right(self._starts, offset)
        return line, offset - self._starts[line - 1] + 1

    def offset(self, line: int, column: int) -> int:
        """The character offset of a line and column, clipped to the text."""
        line = min(max(line, 1), len(self._starts))
        return min(self._starts[line - 1] + max(column, 1) - 1, len(self.text))

    def line(self, number: int) -> str:
        """The text of a line, from 1, without its line end; empty past the end."""
        if not 1 <= number <= len(self._starts):
            return ""
        start = self._starts[number - 1]
        end = self._starts[number] - 1 if number < len(self._starts) else len(self.text)
        return self.text[start:end].rstrip("\r")

    def span(self, start: int, end: int) -> Span:
        """The span from `start` up to but without `end`, as character offsets."""
        return Span(self, start, max(start, end))

    def at(self, line: int, column: int) -> Span:
        """An empty span at a line and column: for places that come back from outside, such as IR locations."""
        offset = self.offset(line, column)
        return Span(self, offset, offset)


@dataclass(frozen=True, slots=True)
class Span:
    """The characters `start` up to but without `end` of a source."""

    source: Source
    start: int
    end: int

    @property
    def line(self) -> int:
        return self.source.place(self.start)[0]

    @property
    def column(self) -> int:
        return self.source.place(self.start)[1]

    @property
    def end_line(self) -> int:
        return self.source.place(self.end)[0]

    @property
    def end_column(self) -> int:
        return self.source.place(self.end)[1]

    @property
    def text(self) -> str:
        return self.source.text[self.start : self.end]

    def __str__(self) -> str:
        line, column = self.source.place(self.start)
        return f"{self.source.name}:{line}:{column}"


NOWHERE = Source("<built>", "").span(0, 0)
