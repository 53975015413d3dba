"""Syntax errors in words of the language.

Takes lark's error and the source; gives a PolicyError that names the fault at its cause (the bracket that was
never closed, the missing colon, the selection without a score) and shows how the clause reads.
Guarantees: never fails itself; no name of the grammar's tokens is shown.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass

from lark.exceptions import UnexpectedInput, UnexpectedToken

from kvcompile.dsl.diagnostics import PolicyError, did_you_mean, fail, nearest
from kvcompile.dsl.source import Source, Span

ITEMS = {
    "policy": "policy NAME(param=default, ...) [extends OTHER]:",
    "heads": 'heads NAME = table("f.tsv", top=30%) | probe("induction", top=14%) | OTHER | rest',
    "learn": "learn HEADS for POLICY:",
}
CLAUSES = {
    "keep": "keep SET [else ACTION]",
    "attend": "attend SET",
    "store": "store SET as FORMAT, ...",
    "at": "at TRIGGER, ... such as `at prefill.end, step`",
    "score": "score NAME = EXPRESSION",
    "unit": "unit NAME(SIZE) [from OFFSET] [with LANDMARK = EXPRESSION, ...]",
    "share": "share NAME = TOTAL by pyramid(20)",
    "pick": "pick NAME = SET",
    "state": "state NAME = START, ...",
    "on": "on attend [where CONDITION]: NAME += EXPRESSION, ...",
    "positions": "positions original|compact",
    "off": "layers 21..27: off",
    "layers": "layers 0, 2..last: CLAUSE",
    "gate": "gate NAME = hard_concrete(init=4.0) per head",
    "mix": "mix EXPRESSION",
    "loss": "loss EXPRESSION",
    "freeze": "freeze weights",
}
_LEARN = ("gate", "mix", "loss", "freeze")
_CHARACTERS = {
    "'": 'strings stand in double quotes: "masks.tsv"',
    "\u201c": "strings stand in plain double quotes",
    "\u201d": "strings stand in plain double quotes",
    "\u2013": "write a plain `-`",
    "\u2212": "write a plain `-`",
    "\u00d7": "write `*`",
    "\u00a0": "write a plain space",
    "&": "write `and`; sets are joined by `|`",
    "!": "write `not`, or `!=`",
    "{": "blocks are indented, without braces",
    "}": "blocks are indented, without braces",
    ";": "one clause a line",
    "^": "the language has no powers",
    "\r": "lines end in a line feed",
}
_AHEAD = 5000  # characters after a fault that are looked at, for the partner of a bracket
_CLOSERS = {"(": ")", "[": "]"}
_PIECES = re.compile(r'(?P<string>"[^"\n]*")|(?P<comment>#[^\n]*)|(?P<word>\w+)|(?P<line>\n)|(?P<mark>[^\s\w])')


@dataclass(frozen=True, slots=True)
class _Piece:
    kind: str
    text: str
    start: int
    end: int
    leads: bool  # first on its line


def explain(error: UnexpectedInput, source: Source, start: str, shown: Mapping[str, str]) -> PolicyError:
    """The finding for a parse error. `start` is what was being parsed, `shown` the text of each fixed token."""
    if not isinstance(error, UnexpectedToken):
        return _character(source, error.pos_in_stream or 0)
    token = error.token
    pieces = _scan(source.text[: (token.start_pos or 0) + _AHEAD] if token.type != "$END" else source.text)
    at_end = token.type in ("$END", "_NL", "_DEDENT")
    offset = pieces[-1].end if token.type == "$END" and pieces else token.start_pos or 0
    before = [piece for piece in pieces if piece.end <= offset]
    here = source.span(offset, offset if at_end else offset + len(token))
    expected = set(error.expected)
    return (
        _touching(source, here)
        or _brackets(source, pieces, before, here)
        or _selection(source, before, expected)
        or (_value(here, at_end) if start == "value" else None)
        or _start_of_line(source, pieces, before, here, expected, at_end)
        or _in_clause(before, here, expected, at_end, shown)
    )


def _scan(text: str) -> list[_Piece]:
    out: list[_Piece] = []
    leads = True
    for match in _PIECES.finditer(text):
        kind = match.lastgroup or ""
        if kind == "line":
            leads = True
        elif kind != "comment":
            out.append(_Piece(kind, match.group(), match.start(), match.end(), leads))
            leads = False
    return out


def _character(source: Source, offset: int) -> PolicyError:
    char = source.text[offset : offset + 1]
    here = source.span(offset, offset + 1)
    if char == '"':
        return fail("K003", "the string is not closed on its line", here, 'strings stand in double quotes: "masks.tsv"')
    name = (
        f"`{char}`" if " " < char <= "~" else f"U+{ord(char or chr(0)):04X} {unicodedata.name(char or ' ', '')}".strip()
    )
    hint = _CHARACTERS.get(char, "names are letters, digits and `_`; comments begin with `#`")
    return fail("K002", f"the language has no {name}", here, hint)


def _touching(source: Source, here: Span) -> PolicyError | None:
    """A word of which only the end is unexpected, since its beginning is a word that may stand here."""
    start = here.start
    while start and re.match(r"\w", source.text[start - 1]):
        start -= 1
    if start == here.start or not re.match(r"\w", here.text):
        return None
    place = source.span(start, here.end)
    begins = source.text[start : here.start]
    hint = f"put a blank between `{begins}` and `{here.text}`, or write another word"
    if begins[0].isdigit():
        hint = f"names begin with a letter; a product is written `{begins} * {here.text}`"
        if source.text[start - 1 : start] == "." and here.text in ("k", "m", "g"):
            hint = f"numbers with `{here.text}` are whole: write the number in full"
    return fail("K001", f"`{place.text}` is no word of the language here", place, hint)


def _brackets(source: Source, pieces: list[_Piece], before: list[_Piece], here: Span) -> PolicyError | None:
    open_: list[_Piece] = []
    for piece in before:
        if piece.text in _CLOSERS:
            open_.append(piece)
        elif piece.text in _CLOSERS.values() and open_:
            open_.pop()
    if here.text in _CLOSERS.values():
        if not open_:
            return fail("K003", f"`{here.text}` closes nothing", here, "remove it, or open the bracket before")
        due = _CLOSERS[open_[-1].text]
        if here.text != due:
            return fail("K003", f"`{here.text}` where `{due}` is due", here, f"the open bracket is `{open_[-1].text}`")
        return None
    if not open_ or _closes(pieces, open_[-1]):
        return None
    opening = source.span(open_[-1].start, open_[-1].end)
    due = _CLOSERS[open_[-1].text]
    return fail("K003", f"`{open_[-1].text}` is never closed", opening, f"close it with `{due}` before the next clause")


def _closes(pieces: list[_Piece], opening: _Piece) -> bool:
    """Whether a bracket finds its partner before the next clause begins."""
    depth = 0
    for piece in pieces[pieces.index(opening) :]:
        depth += (piece.text in _CLOSERS) - (piece.text in _CLOSERS.values())
        if depth == 0:
            return True
        if piece.leads and (piece.text in CLAUSES or piece.text in ITEMS):
            return False
    return False


def _selection(source: Source, before: list[_Piece], expected: set[str]) -> PolicyError | None:
    if "BY" not in expected:
        return None
    for i in range(len(before) - 1, -1, -1):
        piece = before[i]
        if piece.text == "by":
            return None
        if piece.text in ("top", "bottom", "cover"):
            depth, last = 0, i
            for last in range(i + 1, len(before)):
                depth += (before[last].text == "(") - (before[last].text == ")")
                if depth == 0:
                    break
            if depth:
                return None  # the fault is inside the count
            written = source.text[piece.start : before[last].end]
            plain = len(written) <= 60 and "\n" not in written
            hint = f"write `{written if plain else f'{piece.text}(n)'} by SCORE per head`"
            whole = source.span(piece.start, before[last].end)
            return fail("K201", f"`{piece.text}` does not say by which score", whole, hint)
        if piece.leads and piece.text in CLAUSES:
            return None
    return None


def _value(here: Span, at_end: bool) -> PolicyError:
    what = "the value ends too early" if at_end else f"`{here.text}` does not belong in a value"
    return fail("K001", what, here, "give a number, or text such as `10% of prompt`")


def _start_of_line(
    source: Source, pieces: list[_Piece], before: list[_Piece], here: Span, expected: set[str], at_end: bool
) -> PolicyError | None:
    """Faults that show at the first words of a line: unknown verbs, headers without a colon, `else` too far left."""
    leads = next((piece.leads for piece in pieces if piece.start == here.start), False)
    word = here.text
    if word == "else" and leads:
        return fail(
            "K005", "`else` stands at clause depth", here, "indent it deeper than the `keep` that it belongs to"
        )
    if leads and "POLICY" in expected:
        if word in CLAUSES:
            return fail(
                "K001", f"a `{word}` clause outside a policy", here, "clauses stand indented below `policy NAME():`"
            )
        close = nearest(word, ITEMS)
        return fail(
            "K001",
            f"`{word}` begins nothing that a file holds",
            here,
            f"did you mean `{close}`?" if close else "a file holds `policy`, `heads` and `learn`",
        )
    header = next((p for p in reversed(before) if p.leads), None)
    if header is None:
        return None
    if header.text == "else" and before[-1] is header:
        at = source.span(header.start, header.end)
        return fail("K005", "`else` stands at clause depth", at, "indent it deeper than the `keep` that it belongs to")
    if "COLON" in expected and header.text in ("policy", "learn", "on"):
        end = source.span(before[-1].start, before[-1].end)
        if leads or word in CLAUSES:
            return fail(
                "K006", f"the `{header.text}` line lacks its `:`", end, "a header ends in `:` before its clauses"
            )
    if before[-1] is header and header.text not in CLAUSES and header.text not in ITEMS and "COLON" in expected:
        at = source.span(header.start, header.end)
        hint = did_you_mean(header.text, CLAUSES) or f"clauses begin with {', '.join(list(CLAUSES)[:12])}"
        return fail("K001", f"no clause begins with `{header.text}`", at, hint)
    if leads and not at_end and {"KEEP", "GATE"} & expected:
        known = _LEARN if "GATE" in expected else [c for c in CLAUSES if c not in _LEARN]
        hint = did_you_mean(word, known) or f"here stand {', '.join(known)}"
        return fail("K001", f"no clause begins with `{word}`", here, hint)
    return None


def _in_clause(
    before: list[_Piece], here: Span, expected: set[str], at_end: bool, shown: Mapping[str, str]
) -> PolicyError:
    clause = ""
    for i in range(len(before) - 1, -1, -1):
        known = before[i].text in CLAUSES or before[i].text in ITEMS
        if known and (before[i].leads or before[i - 1].text == ":"):
            clause = before[i].text
            break
    where = f"in the `{clause}` line" if clause in ITEMS else f"in the `{clause}` clause" if clause else "here"
    after = f" after `{before[-1].text}`" if before else ""
    if at_end:
        what = f"the `{clause}` clause ends too early{after}" if clause else f"the text ends too early{after}"
    elif here.text == ":":
        what = f"a `:` {where}: only headers and prefixes end in one"
    else:
        what = f"`{here.text}` does not belong {where}{after}"
    usual = _usual(before, clause, here.text, at_end)
    if usual:
        return fail("K001", what, here, usual)
    wanted = sorted(f"`{shown[name]}`" for name in expected if name in shown)
    hint = f"expected {wanted[0]}" if len(wanted) == 1 and len(expected) == 1 else ""
    form = ITEMS.get(clause) or CLAUSES.get(clause)
    if form:
        hint = f"{hint}; it reads: {form}" if hint else f"it reads: {form}"
    hint = hint or "a file holds `policy`, `heads` and `learn`, and clauses indented below them"
    return fail("K001", what, here, hint)


def _usual(before: list[_Piece], clause: str, word: str, at_end: bool) -> str:
    """The way out of a mistake that many make, "" for any other."""
    last = before[-1].text if before else ""
    if word in CLAUSES and clause in CLAUSES:
        return f"a deeper line continues the clause above; indent `{word}` as far as `{clause}`"
    if at_end and last == "merge":
        return "write `merge into nearest by cos(k)`"
    if word == "*" and last == "*":
        return "the language has no powers: write `x * x`"
    if last.isdigit() and re.fullmatch(r"[kmgt]i?b?", word, re.IGNORECASE):
        return f"no blank stands inside a number: write `{last}{word}`"
    if clause == "layers" and last == ":" and not at_end:
        return "a prefix below another begins a line of its own, indented"
    if word == "=":
        return "compare by `==`" if clause != "score" else ""
    if clause in ("keep", "attend", "pick"):
        if word in ("+", ",", "and", "or", "with"):
            return "the terms of a set are joined by `|`: `sink(4) | recent(64)`"
        if word in ("<", ">", "<=", ">=", "==", "!="):
            return "a condition follows `where`: `where pos < 4`"
    return ""
