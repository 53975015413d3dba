"""Line structure: which line ends close a clause, where blocks open and close.

Takes the lexer's tokens of a text without blank or comment lines at its end; gives the stream that the grammar
wants (`_NL`, `_INDENT`, `_DEDENT`). Guarantees: a block opens only after a line whose last token is a colon; other
deeper lines, and lines inside brackets, continue the clause above; nesting and length are
bounded.
"""

from __future__ import annotations

from collections.abc import Iterator

from lark.lark import PostLex
from lark.lexer import Token

MAX_NESTING = 64
MAX_WORDS = 10_000  # words and marks of a text: library policies have about a hundred

_OPEN = frozenset({"LPAR", "LSQB"})
_CLOSE = frozenset({"RPAR", "RSQB"})


class LayoutError(Exception):
    """A fault of layout, as offsets into the text; the parser turns it into a finding."""

    def __init__(self, code: str, message: str, start: int, end: int, hint: str) -> None:
        super().__init__(message)
        self.code, self.message, self.start, self.end, self.hint = code, message, start, end, hint


class Layout(PostLex):
    """The post-lexer. It keeps nothing between texts: all state lives in one run of `process`."""

    always_accept = ("_NL",)

    def process(self, stream: Iterator[Token]) -> Iterator[Token]:
        """Rewrite the line ends of one text, and see that no two words touch."""
        indents = [0]
        depth = 0
        previous: Token | None = None
        for count, token in enumerate(stream):
            if count > MAX_WORDS:
                raise LayoutError(
                    "K009", f"the text has more than {MAX_WORDS} words", *_place(token), "is this a policy text?"
                )
            if token.type == "_NL":
                if depth == 0:
                    yield from _line_end(token, previous, indents)
                continue
            if previous is not None and previous.end_pos == token.start_pos and _is_word(previous) and _is_word(token):
                raise _touching(previous, token)
            if previous is None and token.line == 1:
                indents[0] = (token.column or 1) - 1
            depth = max(depth + (token.type in _OPEN) - (token.type in _CLOSE), 0)
            if depth > MAX_NESTING:
                raise LayoutError(
                    "K008",
                    f"brackets are nested more than {MAX_NESTING} deep",
                    *_place(token),
                    "name a part of the expression as a score",
                )
            previous = token
            yield token
        if previous is None:
            return
        if previous.type == "COLON":
            raise _empty_block(previous)
        last = _place(previous)[1]
        if depth == 0:
            yield Token("_NL", "", start_pos=last, end_pos=last)
            yield from (Token("_DEDENT", "", start_pos=last, end_pos=last) for _ in indents[1:])


def _line_end(token: Token, previous: Token | None, indents: list[int]) -> Iterator[Token]:
    tail = token.rsplit("\n", 1)[1]
    width = len(tail)
    end = _place(token)[1]
    if "\t" in tail:
        raise LayoutError("K004", "a tab in the indentation", end - width, end, "indent by spaces")
    if previous is None:
        indents[0] = width  # a text may be indented as a whole
        yield token
        return
    if previous.type == "COLON":
        if width <= indents[-1]:
            raise _empty_block(previous)
        if len(indents) > MAX_NESTING:
            raise LayoutError(
                "K008", f"blocks are nested more than {MAX_NESTING} deep", end - width, end, "flatten them"
            )
        indents.append(width)
        yield token
        yield Token.new_borrow_pos("_INDENT", "", token)
        return
    if width > indents[-1]:
        return  # the clause above goes on
    yield token
    while width < indents[-1] and len(indents) > 1:
        indents.pop()
        yield Token.new_borrow_pos("_DEDENT", "", token)
    if width != indents[-1]:
        raise LayoutError(
            "K004",
            "this line is as deep as no block above it",
            end - width,
            end,
            "give every clause of a block the same indentation",
        )


def _is_word(token: Token) -> bool:
    return (token[-1:] + token[:1]).replace("_", "a").isalnum()


def _touching(first: Token, second: Token) -> LayoutError:
    """Where only some words may stand, the lexer would find one of them at the start of `elsewhere`."""
    hint = f"put a blank between `{first}` and `{second}`, or write another word"
    if first.type in ("INT", "FLOAT", "SIZE"):
        hint = f"names begin with a letter; a product is written `{first} * {second}`"
    message = f"`{first}{second}` is no word of the language here"
    return LayoutError("K001", message, _place(first)[0], _place(second)[1], hint)


def _empty_block(colon: Token) -> LayoutError:
    return LayoutError(
        "K006",
        "no clauses follow the `:`",
        *_place(colon),
        "indent the clauses below it, or leave the `:` out of a policy without clauses",
    )


def _place(token: Token) -> tuple[int, int]:
    return token.start_pos or 0, token.end_pos or 0
