"""Text to syntax tree.

Takes a policy text and a name for it; gives `ast.File`, or an expression for `parse_value`.
Guarantees: PolicyError is the only exception, whatever the text; the grammar is built once per process
and on first use; CRLF and a byte order mark are accepted, texts end at 1 MiB.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from typing import cast

from lark import Lark, Token
from lark.exceptions import UnexpectedInput

from kvcompile.dsl import ast
from kvcompile.dsl.build import Builder
from kvcompile.dsl.diagnostics import PolicyError, fail
from kvcompile.dsl.layout import Layout, LayoutError
from kvcompile.dsl.recover import further
from kvcompile.dsl.source import Source
from kvcompile.dsl.syntax import explain

MAX_BYTES = 1 << 20


def parse(text: str, name: str = "<text>") -> ast.File:
    """Parse a policy text. `name` is shown in findings. PolicyError for anything that is no policy text, with a
    finding for each broken clause."""
    source = _source(text, name)
    try:
        return _file(source)
    except PolicyError as error:
        first = error.diagnostics[0]
        others = further(source, first, _file)
    raise PolicyError(*sorted([first, *others], key=lambda found: found.span.start))


def _file(source: Source) -> ast.File:
    return cast(ast.File, _run(source, "file"))


def parse_value(text: str, name: str = "<value>") -> ast.Expr:
    """Parse one expression, as it may stand for a parameter: `512`, `10% of prompt`."""
    source = _source(text.strip(), name)
    return cast(ast.Expr, _run(source, "value"))


def words(text: str) -> Iterator[Token]:
    """The words and marks of a text that parses, and the marks of its layout (`_NL`, `_INDENT`, `_DEDENT`)."""
    return _grammar().parse_interactive(_without_tail(text), start="file").iter_parse()


def normal(text: str) -> str:
    """The text with plain line ends and without a byte order mark, as it is parsed."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def _source(text: str, name: str) -> Source:
    if len(text) > MAX_BYTES or len(text.encode("utf-8", "replace")) > MAX_BYTES:
        raise fail(
            "K009", f"the text is larger than {MAX_BYTES} bytes", Source(name, "").span(0, 0), "is this a policy text?"
        )
    return Source(name, normal(text))


def _run(source: Source, start: str) -> ast.Node:
    grammar = _grammar()
    try:
        tree = grammar.parse(_without_tail(source.text), start=start)
    except LayoutError as error:
        raise fail(error.code, error.message, source.span(error.start, error.end), error.hint) from None
    except UnexpectedInput as error:
        shown = {term.name: str(term.pattern.value) for term in grammar.terminals if term.pattern.type == "str"}
        raise explain(error, source, start, shown) from None
    builder = Builder(source)
    builder.check_depth(tree)
    return cast(ast.Node, builder.build(tree))


def _without_tail(text: str) -> str:
    """The text without blank and comment lines at its end: their depth says nothing."""
    end = len(text)
    while end:
        start = text.rfind("\n", 0, end) + 1
        line = text[start:end].strip(" \t")
        if line and not line.startswith("#"):
            break
        end = max(start - 1, 0)
    return text[:end]


@cache
def _grammar() -> Lark:
    return Lark(
        files("kvcompile.dsl").joinpath("grammar.lark").read_text(encoding="utf-8"),
        parser="lalr",
        lexer="contextual",
        start=["file", "value"],
        postlex=Layout(),
        propagate_positions=_counts,
        maybe_placeholders=False,
    )


def _counts(node: object) -> bool:
    """Whether a token or tree belongs to the span of its parent: line ends and block marks do not."""
    return not (isinstance(node, Token) and node.type in ("_NL", "_INDENT", "_DEDENT"))
