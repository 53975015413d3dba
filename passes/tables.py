"""Tables: numbers per KV head or per layer, from files and probes that nobody vouches for.

Takes a path and the model's shape; gives rows of numbers, and the heads that a class takes of them.
Guarantees: at most 4 MiB is read; what is wrong is a PolicyError with line and column in the table; ties go to
the lower layer, then the lower head; a head table of only 0 and 1 is taken as it is. `masks` reads .safetensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from kvcompile.dsl.diagnostics import Diagnostic, fail, finding, outside
from kvcompile.dsl.source import Source, Span
from kvcompile.kernels.plan import ModelFacts
from kvcompile.passes import masks

MAX_BYTES = 4 << 20
Table = masks.Table

_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?", re.ASCII)
_TINY = 1e-30  # what is smaller weighs nothing, and its exact form would be long
_SEEN = 40  # characters of a wrong value that a message shows


def read_table(path: Path, layers: int | None = None, heads: int | None = None) -> Table:
    """The numbers of a table file, [layers][heads]; without a shape, of any, all layers alike.

    PolicyError with the place of what is wrong.
    """
    source = Source(str(path), _read(path))
    if layers is None or heads is None:
        return _rows(source, None, "a head table holds a line per layer, all of one length")
    rows = _rows(source, heads, _wanted(layers, heads))
    if len(rows) != layers:
        raise fail("K612", f"the table holds {len(rows)} lines", _line(source, min(layers + 1, len(rows))),
                   _wanted(layers, heads))  # fmt: skip
    return rows


def heads_of_file(
    path: Path, facts: ModelFacts, top: Fraction | None, span: Span
) -> tuple[frozenset[tuple[int, int]], list[Diagnostic]]:
    """The (layer, head) pairs of a class by its file, text or .safetensors, as `choose` gives them.

    Of a .safetensors file the mask counts, or with `top` the scores, whatever numbers they are.
    """
    if path.suffix != ".safetensors":
        return choose(read_table(path, facts.layers, facts.kv_heads), top, span)
    learned = masks.read_masks(path, read_bytes(path), facts.layers, facts.kv_heads)
    if top is not None:
        chosen = best(learned.scores, top)
        marked = None if learned.mask is None else choose(learned.mask, None, span)[0]
        if marked is None or marked == chosen:
            return chosen, []
        warning = f"the mask in {path.name} marks {len(marked)} heads, and `top` takes {len(chosen)} by their scores"
        return chosen, [
            finding("K614", warning, span, "leave `top` out, or save the mask as .tsv, which is taken as it is")
        ]
    if learned.mask is None:
        raise fail("K613", f"{path.name} holds scores, but no mask", span,
                   'say how many heads the class takes, such as table("f.safetensors", top=30%)')  # fmt: skip
    return choose(learned.mask, None, span)


def read_weights(path: Path, layers: int) -> tuple[Fraction, ...]:
    """The numbers of a share's table, one per layer, exactly. PolicyError with the place of what is wrong.

    Blank lines and what follows a `#` do not count.
    """
    source = Source(str(path), _read(path))
    found: list[Fraction] = []
    for number, line in enumerate(source.text.splitlines(), 1):
        words = line.split("#", 1)[0].split()
        if not words:
            continue
        value = float(words[0]) if _NUMBER.fullmatch(words[0]) else math.nan
        if len(words) > 1 or not math.isfinite(value) or value < 0:
            raise fail("K618", f"`{line.strip()[:_SEEN]}` is no number from 0", _line(source, number),
                       "a share's table holds one number per layer, none negative")  # fmt: skip
        found.append(Fraction(words[0]) if abs(value) > _TINY else Fraction(0))
    if len(found) != layers:
        raise fail("K618", f"the share's table holds {len(found)} numbers", outside(str(path)),
                   f"this model needs {layers}, one per layer")  # fmt: skip
    return tuple(found)


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
    return best(table, top), []


def best(table: Table, top: Fraction) -> frozenset[tuple[int, int]]:
    """The `top` part of all heads of the model, highest first; ties to the lower layer, then the lower head."""
    places = [(layer, head) for layer, row in enumerate(table) for head in range(len(row))]
    order = sorted(places, key=lambda place: (-table[place[0]][place[1]], place))
    return frozenset(order[: int(top * len(order))])


# ---------------------------------------------------------------- probes


def probe_key(what: str, tokens: int | None) -> str:
    """The name under which a probe's measurement is handed over: `induction`, or `induction:500`."""
    return what if tokens is None else f"{what}:{tokens}"


def probe_table(
    measured: Sequence[Sequence[float]] | None, facts: ModelFacts, key: str, span: Span
) -> tuple[Table, list[Diagnostic]]:
    """What a probe measured, [layer][kv head]; without a model every head alike, with a warning."""
    if measured is None:
        warning = finding("K617", f"the probe `{key}` has not been run: its heads are a guess", span,
                          "optimize a model to measure them")  # fmt: skip
        return ((0.0,) * facts.kv_heads,) * facts.layers, [warning]
    table = tuple(tuple(float(value) for value in row) for row in measured)
    if [len(row) for row in table] != [facts.kv_heads] * facts.layers:
        raise fail("K612", f"the probe `{key}` gave another shape", outside("<probes>"),
                   _wanted(facts.layers, facts.kv_heads))  # fmt: skip
    if not all(math.isfinite(value) for row in table for value in row):
        raise fail("K611", f"the probe `{key}` gave a number that is not finite", outside("<probes>"),
                   "measure again")  # fmt: skip
    return table, []


# ---------------------------------------------------------------- text


def read_bytes(path: Path) -> bytes:
    """All of a file of at most 4 MiB. PolicyError K610 for what cannot be read."""
    where = outside(str(path))
    try:
        if path.is_dir():
            raise fail("K610", "the table is a directory", where, "name the file in it")
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise fail(
            "K610", "no such table", where, "check the path; a relative one counts from the working folder"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise fail("K610", f"cannot read the table: {reason}", where, "check the path and its rights") from None
    if len(data) > MAX_BYTES:
        raise fail("K610", f"the table is larger than {MAX_BYTES} bytes", where, "is this a table?")
    return data


def _read(path: Path) -> str:
    data = read_bytes(path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"the table is no text (byte {error.start})"
        raise fail("K610", message, outside(str(path)), "save it as tab-separated text") from None


def _rows(source: Source, heads: int | None, wanted: str) -> Table:
    """The lines of a head table, each of `heads` numbers; None: each as long as the first."""
    lines = source.text.rstrip().splitlines()
    if not lines:
        raise fail("K612", "the head table is empty", outside(source.name), wanted)
    rows = tuple(_row(source, number, line) for number, line in enumerate(lines, 1))
    length = len(rows[0]) if heads is None else heads
    for number, row in enumerate(rows, 1):
        if len(row) != length or not row:
            raise fail("K612", f"line {number} holds {len(row)} numbers", _line(source, number), wanted)
    return rows


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
