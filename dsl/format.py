"""One way to lay out a policy text.

Takes a text; gives the same words with plain blanks between them, four blanks a block, and long clauses on several
lines. Guarantees: words and comments are those of the text, each comment on a line of its own or behind the same word
as before; the meaning is the same; what has been laid out stays as it is. PolicyError for a text that does not parse.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from lark import Token

from kvcompile.dsl.parser import normal, parse, words
from kvcompile.dsl.spacing import broken, spaced

STEP = 4
_BLANK = " \t\r"  # other white space may belong to a comment
_MARKS = ("_NL", "_INDENT", "_DEDENT")


def format_text(text: str, name: str = "<text>") -> str:
    """The text laid out anew; it ends in a line feed unless it is empty. `name` is shown in findings."""
    before = parse(text, name)
    source = normal(text)
    out = "".join(f"{line}\n" for line in _laid_out(source))
    if parse(out, name) != before or comments(out) != comments(source):
        raise RuntimeError("laying out the text would have changed it")  # a fault of this module: nothing is written
    return out


def comments(text: str) -> list[str]:
    """The comments of a text that parses, in order."""
    found: list[str] = []
    end = 0
    for token in words(text):
        if token.type not in _MARKS:
            found += _comments_in(text[end : _start(token)])
            end = _end(token)
    return found + _comments_in(text[end:])


@dataclass(slots=True)
class _Clause:
    """A clause or header: how many blocks it stands in, the column where it stood, its words."""

    level: int
    column: int
    tokens: list[Token] = field(default_factory=list)

    @property
    def start(self) -> int:
        return _start(self.tokens[0])

    @property
    def end(self) -> int:
        return _end(self.tokens[-1])

    @property
    def opens(self) -> bool:
        return self.tokens[-1].type == "COLON"


def _laid_out(text: str) -> Iterator[str]:
    clauses = list(_clauses(text))
    if not clauses:
        yield from _trimmed(_between(text.split("\n"), [0], 0, 0), first=True, last=True)
        return
    columns = [clauses[0].column]  # of the latest clause at each level
    before = _between(text[: clauses[0].start].split("\n")[:-1], columns, 0, 0)
    yield from _trimmed(before, first=True)
    for clause, after in zip(clauses, [*clauses[1:], None], strict=True):
        columns[clause.level :] = [clause.column]
        behind, *rest = text[clause.end : after.start if after else len(text)].split("\n")
        *lines, last = _lines_of(clause, text)
        yield from lines
        yield last + _behind(behind)
        level = after.level if after else 0
        own = _between(rest[:-1] if after else rest, columns, clause.level, level)
        if after and level == 0 and "" not in own and not _are_heads(clause, after):
            own.insert(next((i for i, line in enumerate(own) if line.startswith("#")), len(own)), "")
        yield from _trimmed(own, first=clause.opens, last=after is None)


def _clauses(text: str) -> Iterator[_Clause]:
    level = 0
    current: _Clause | None = None
    for token in words(text):
        if token.type in _MARKS:
            level += (token.type == "_INDENT") - (token.type == "_DEDENT")
            if token.type == "_NL" and current is not None:
                yield current
                current = None
        elif current is None:
            current = _Clause(level, (token.column or 1) - 1, [token])
        else:
            current.tokens.append(token)


def _are_heads(clause: _Clause, after: _Clause) -> bool:
    """Head classes may stand close together; other items have a blank line between them."""
    return clause.level == 0 and clause.tokens[0].type == after.tokens[0].type == "HEADS"


# ---------------------------------------------------------------- one clause


def _lines_of(clause: _Clause, text: str) -> list[str]:
    indent = STEP * clause.level
    deeper = indent + (2 * STEP if clause.opens else STEP)  # deeper than the block that a header opens
    gaps = [text[_end(a) : _start(b)] for a, b in zip(clause.tokens, clause.tokens[1:], strict=False)]
    if any("#" in gap for gap in gaps):
        lines = _as_written(clause, gaps)
    else:
        lines = broken(clause.tokens, indent, deeper - indent)
    return [" " * (deeper if i else indent) + line for i, line in enumerate(lines)]


def _as_written(clause: _Clause, gaps: Sequence[str]) -> list[str]:
    """A clause with comments inside keeps its lines: each comment belongs to the words before it."""
    out: list[str] = []
    current = [clause.tokens[0]]
    for token, gap in zip(clause.tokens[1:], gaps, strict=True):
        behind, *rest = gap.split("\n")
        if rest:
            out.append(spaced(current) + _behind(behind))
            out += [line.strip(_BLANK) for line in rest if line.strip(_BLANK)]
            current = []
        current.append(token)
    return [*out, spaced(current)]


# ---------------------------------------------------------------- what stands between clauses


def _behind(blank_or_comment: str) -> str:
    return f"  {blank_or_comment.strip(_BLANK)}" if blank_or_comment.strip(_BLANK) else ""


def _between(lines: Sequence[str], columns: Sequence[int], above: int, below: int) -> list[str]:
    """Comments at the level where they stood, between that of the clause above and that of the one below."""
    out: list[str] = []
    for line in lines:
        comment = line.strip(_BLANK)
        column = len(line) - len(line.lstrip(_BLANK))
        level = next((n for n in range(above, below, -1) if columns[n] <= column), below)
        out.append(" " * (STEP * level) + comment if comment else "")
    return out


def _trimmed(lines: Sequence[str], first: bool = False, last: bool = False) -> list[str]:
    """No two blank lines together; none at the `first` lines of a text or block, none at the `last` of a text."""
    out: list[str] = []
    for line in lines:
        if line or (out[-1] if out else not first):
            out.append(line)
    while last and out and not out[-1]:
        out.pop()
    return out


def _comments_in(gap: str) -> list[str]:
    return [line.strip(_BLANK) for line in gap.split("\n") if line.strip(_BLANK)]


def _start(token: Token) -> int:
    return token.start_pos or 0


def _end(token: Token) -> int:
    return token.end_pos or 0
