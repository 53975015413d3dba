"""The words of one clause as text: blanks between them, and where a long clause is broken.

Takes the tokens of a clause; gives lines without indentation. Guarantees: the same words in the same order; a line
ends in a colon only if the clause does, so that no block opens where none was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lark import Token

WIDTH = 120
_OPEN, _CLOSE = ("LPAR", "LSQB"), ("RPAR", "RSQB")
_VALUES = frozenset({"NAME", "INT", "FLOAT", "SIZE", "PERCENT", "STRING", "RPAR", "ALL", "REST"})
_TIGHT = frozenset({".", ".."})
_JOINS = frozenset({"by", "with", "from", "when", "weight", "as", "if", "where", "extends"})
_SUMS = frozenset({"+", "-", "and", "or"})
# Where a clause is broken, in this order: before `else` (0), before `|`, after commas, before words that join, in sums,
# in products (5); inside brackets after commas and in sums (7).
_LEVELS = 8
_Word = tuple[str, int, Token]  # the blank before a word, the level of a break there, and the word


def spaced(tokens: Sequence[Token]) -> str:
    """The words on one line."""
    return _text(list(_placed(tokens)))


def broken(tokens: Sequence[Token], indent: int, step: int) -> list[str]:
    """The words on one line if it fits behind `indent` blanks, else on several, the later ones `step` deeper."""
    lines: list[list[_Word]] = [list(_placed(tokens))]
    if len(_text(lines[0])) > WIDTH - indent:
        for level in range(_LEVELS):
            lines = [part for line in lines for part in _broken_at(line, level, WIDTH - indent - step)]
    return [_text(line) for line in lines]


def _text(line: Sequence[_Word]) -> str:
    return "".join(before + str(token) for before, _, token in line).strip()


def _broken_at(line: list[_Word], level: int, room: int) -> Iterator[list[_Word]]:
    """A line that is too long, cut at the breaks of one level; all of them for `else`, else as few as will do."""
    if len(_text(line)) <= room:
        yield line
        return
    parts: list[list[_Word]] = [[]]
    for word in line:
        if word[1] == level and parts[-1]:
            parts.append([])
        parts[-1].append(word)
    current: list[_Word] = []
    for part in parts:
        if current and (level == 0 or len(_text([*current, *part])) > room):
            yield current
            current = []
        current = [*current, *part]
    yield current


def _placed(tokens: Sequence[Token]) -> Iterator[_Word]:
    depth = 0
    before: Token | None = None
    sign = False  # whether `before` is a minus of one operand, or that of `last-2`
    for token in tokens:
        depth -= token.type in _CLOSE
        blank = _blank(before, token, sign, depth)
        yield blank, _break_level(before, token, depth) if blank else _LEVELS, token
        sign = token == "-" and (before is None or before.type not in _VALUES)
        depth += token.type in _OPEN
        before = token


def _blank(before: Token | None, token: Token, sign: bool, depth: int) -> str:
    if before is None or sign or before.type in _OPEN or before in _TIGHT or token in _TIGHT:
        return ""
    if token.type in _CLOSE or token.type in ("COMMA", "COLON", "LSQB"):
        return ""
    if token.type == "LPAR" and before.type in ("NAME", "RANK"):
        return ""
    if depth and "EQUAL" in (before.type, token.type):
        return ""  # a named argument
    return "" if before.type == "LAST" and token == "-" else " "


def _break_level(before: Token | None, token: Token, depth: int) -> int:
    if before is None or before.type == "COLON":
        return _LEVELS
    if depth:
        return 6 if before.type == "COMMA" else 7 if token in _SUMS else _LEVELS
    if token.type == "ELSE":
        return 0
    if token == "|":
        return 1
    if before.type == "COMMA":
        return 2
    if token in _JOINS and token.type != "NAME":
        return 3
    return 4 if token in _SUMS else 5 if token.type in ("STAR", "SLASH") else _LEVELS
