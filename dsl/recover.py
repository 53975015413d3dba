"""What else is wrong in a text that does not parse: the faults of clauses after a broken one.

Takes a source, its first finding and a way to parse; gives further findings, each at its own clause. Guarantees:
places are those of the text as given; a fault that a broken clause causes elsewhere is not reported; work is bounded.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from kvcompile.dsl.diagnostics import Diagnostic, PolicyError
from kvcompile.dsl.source import Source

_MOST = 20  # findings of one text
_WORK = 60_000  # characters that are parsed anew
_STRUCTURE = frozenset({"K004", "K008", "K009"})  # after these, nothing says where the next clause begins
_STRING = re.compile(r'"[^"\n]*"')


def further(source: Source, first: Diagnostic, parse: Callable[[Source], object]) -> list[Diagnostic]:
    """The findings after `first`, in the order found. `parse` raises PolicyError with its one finding first."""
    found: list[Diagnostic] = []
    gone: list[tuple[int, int]] = []
    text, last = source.text, first
    for _ in range(min(_MOST, _WORK // max(len(text), 1))):
        if last.code in _STRUCTURE or any(start <= last.span.start <= end for start, end in gone):
            break
        if last is not first:
            found.append(replace(last, span=source.span(last.span.start, last.span.end)))
        clause = _clause_at(text, last.span.start)
        if clause.end - clause.start < len(clause.filler):
            break
        gone.append((clause.start, clause.end))
        text = clause.replaced_in(text)
        try:
            parse(Source(source.name, text))
            break
        except PolicyError as error:
            last = error.diagnostics[0]
    return found


@dataclass(frozen=True, slots=True)
class _Line:
    start: int
    text: str

    @property
    def empty(self) -> bool:
        return not self.text.strip() or self.text.lstrip().startswith("#")

    @property
    def depth(self) -> int:
        return len(self.text) - len(self.text.lstrip(" "))

    @property
    def opens(self) -> bool:
        """Whether a block may follow."""
        return _STRING.sub("", self.text).split("#")[0].rstrip().endswith(":")


@dataclass(frozen=True, slots=True)
class _Clause:
    """From the first character of a clause, or of an item with all its clauses, to the end of its last line.
    `filler` is a clause for a block that may be empty without this one."""

    start: int
    end: int
    filler: str

    def replaced_in(self, text: str) -> str:
        blank = re.sub(r"[^\n]", " ", text[self.start + len(self.filler) : self.end])
        return text[: self.start] + self.filler + blank + text[self.end :]


def _clause_at(text: str, offset: int) -> _Clause:
    lines: list[_Line] = []
    start = 0
    for line in text.split("\n"):
        lines.append(_Line(start, line))
        start += len(line) + 1
    at = max(i for i, line in enumerate(lines) if line.start <= offset)
    while at and lines[at].empty:
        at -= 1
    above = _above(lines, at)
    while above is not None and not lines[above].opens:
        at, above = above, _above(lines, above)  # a deeper line goes on with the clause above
    below = at + 1
    while below < len(lines) and (lines[below].empty or lines[below].depth > lines[at].depth):
        below += 1
    alone = all(line.empty for line in lines[above + 1 : at]) if above is not None else False
    if below < len(lines) and lines[below].depth == lines[at].depth:
        alone = False
    filler = _filler(lines, above) if alone and above is not None else ""
    first = lines[at].start + lines[at].depth
    return _Clause(first, max(lines[below - 1].start + len(lines[below - 1].text), first), filler)


def _filler(lines: list[_Line], opening: int) -> str:
    """A clause that may stand in the block which a line opens."""
    if re.search(r"\bon\b", lines[opening].text):
        return "a = 0"
    while (outer := _above(lines, opening)) is not None:
        opening = outer
    return "mix 0" if lines[opening].text.split()[0] == "learn" else "off"


def _above(lines: list[_Line], at: int) -> int | None:
    """The nearest line above that is less deep."""
    found = (i for i in range(at - 1, -1, -1) if not lines[i].empty and lines[i].depth < lines[at].depth)
    return next(found, None)
