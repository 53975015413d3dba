"""Head tables: one number per KV head, one line per layer, from a file that nobody vouches for.

Takes a path and the model's shape; gives rows of floats, and the heads that a class takes of them.
Guarantees: at most 4 MiB is read; what is wrong is a PolicyError with line and column in the table; ties go to
the lower layer, then the lower head; a table of only 0 and 1 is taken as it is.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from pathlib import Path

from kvcompile.dsl.diagnostics import Diagnostic, fail, finding, outside
from kvcompile.dsl.source import Source, Span

MAX_BYTES = 4 << 20
Table = tuple[tuple[float, ...], ...]

_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?", re.ASCII)
_SEEN = 40  # characters of a wrong value that a message shows


def read_table(path: Path, layers: int, heads: int) -> Table:
    """The numbers of a table file, [layers][heads]. PolicyError with the place of what is wrong."""
    source = Source(str(path), _read(path))
    lines = source.text.rstrip().splitlines()
    if not lines:
        raise fail("K612", "the head table is empty", outside(str(path)), _wanted(layers, heads))
    rows = tuple(_row(source, number, line) for number, line in enumerate(lines, 1))
    for number, row in enumerate(rows, 1):
        if len(row) != heads:
            raise fail("K612", f"line {number} holds {len(row)} numbers", _line(source, number), _wanted(layers, heads))
    if len(rows) != layers:
        raise fail("K612", f"the table holds {len(rows)} lines", _line(source, min(layers + 1, len(rows))),
                   _wanted(layers, heads))  # fmt: skip
    return rows


def choose(table: Table, top: Fraction | None, span: Span) -> tuple[frozenset[tuple[int, int]], list[Diagnostic]]:
    """The (layer, head) pairs of a class: the `top` part of all heads of the model, the number truncated once.

    `span` is the place of the clause. Returns the pairs and warnings; PolicyError where the table needs a threshold.
    """
    places = [(layer, head) for layer, row in enumerate(table) for head in range(len(row))]
    if all(value in (0.0, 1.0) for row in table for value in row):
        chosen = frozenset((layer, head) for layer, head in places if table[layer][head] == 1.0)
        warning = "the table holds only 0 and 1, so `top` changes nothing"
        return chosen, [] if top is None else [finding("K614", warning, span, "leave `top` out")]
    if top is None:
        raise fail("K613", "the table holds other numbers than 0 and 1", span,
                   'say how many heads the class takes, such as table("f.tsv", top=30%)')  # fmt: skip
    best = sorted(places, key=lambda place: (-table[place[0]][place[1]], place))
    return frozenset(best[: int(top * len(places))]), []


def _read(path: Path) -> str:
    where = outside(str(path))
    try:
        if path.is_dir():
            raise fail("K610", "the head table is a directory", where, "name the file in it")
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise fail("K610", "no such head table", where, 'check the path, or give tables={"CLASS": path}') from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise fail("K610", f"cannot read the head table: {reason}", where, "check the path and its rights") from None
    if len(data) > MAX_BYTES:
        raise fail("K610", f"the head table is larger than {MAX_BYTES} bytes", where, "is this a head table?")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"the head table is no text (byte {error.start})"
        raise fail("K610", message, where, "save it as tab-separated text") from None


def _row(source: Source, number: int, line: str) -> tuple[float, ...]:
    values = []
    for word in re.finditer(r"[^\s,]+", line):
        start = source.offset(number, word.start() + 1)
        span = source.span(start, start + len(word.group()))
        value = float(word.group()) if _NUMBER.fullmatch(word.group()) else math.nan
        if not math.isfinite(value):
            seen = word.group()[:_SEEN]
            raise fail("K611", f"`{seen}` is no finite number", span, "a head table holds finite numbers only")
        values.append(value)
    return tuple(values)


def _line(source: Source, number: int) -> Span:
    start = source.offset(number, 1)
    return source.span(start, start + len(source.line(number)))


def _wanted(layers: int, heads: int) -> str:
    return f"this model needs {layers} lines of {heads} numbers, one per KV head"
