"""Findings about a policy, and the exception that carries them.

Takes a code of the catalogue, a message, a span and a way out; gives text of the form
`file:line:col: error[K101]: message`, the source line, a caret run and the hint.
Guarantees: rendering never fails, whatever the source holds, and stays within a screen.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from kvcompile.dsl.codes import Severity, severity
from kvcompile.dsl.source import Source, Span

_WIDTH = 110  # columns of source text shown around a caret
_LONGEST = 400  # characters of a message or hint
_WORD = 40  # characters of a word that are compared
_SHOWN = 20  # findings rendered in full by str(PolicyError)


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One finding. `line` and `column` count from 1; `hint` is the way out, or empty."""

    code: str
    severity: Severity
    message: str
    span: Span
    hint: str = ""

    @property
    def line(self) -> int:
        return self.span.line

    @property
    def column(self) -> int:
        return self.span.column

    def __str__(self) -> str:
        return render(self)

    def to_dict(self) -> dict[str, str | int]:
        """As plain data, for `--json`."""
        words = {"code": self.code, "severity": self.severity, "message": self.message, "file": self.span.source.name}
        return {**words, "line": self.line, "column": self.column, "hint": self.hint}


class PolicyWarning(UserWarning):
    """What is odd about a policy that runs all the same: its file, line and column, the finding, its code, a hint."""


def finding(code: str, message: str, span: Span, hint: str = "") -> Diagnostic:
    """A diagnostic with the severity that the catalogue gives its code."""
    return Diagnostic(code, severity(code), _clipped(message), span, _clipped(hint))


class PolicyError(Exception):
    """A policy that cannot be used; `.diagnostics` holds every finding, errors first, at least one of them."""

    def __init__(self, *diagnostics: Diagnostic) -> None:
        rank = {"error": 0, "warning": 1, "note": 2}
        self.diagnostics: tuple[Diagnostic, ...] = tuple(sorted(diagnostics, key=lambda d: rank[d.severity]))
        super().__init__(*diagnostics)

    def __str__(self) -> str:
        shown = "\n".join(render(d) for d in self.diagnostics[:_SHOWN])
        more = len(self.diagnostics) - _SHOWN
        return f"{shown}\nand {more} more" if more > 0 else shown


def fail(code: str, message: str, span: Span, hint: str = "") -> PolicyError:
    """A PolicyError with a single finding, to be raised by the caller."""
    return PolicyError(finding(code, message, span, hint))


def outside(name: str) -> Span:
    """A place for findings about something that has no text, such as a path or an argument."""
    return Source(name, "").span(0, 0)


def render(diagnostic: Diagnostic) -> str:
    """The finding as text, without a trailing line end."""
    span = diagnostic.span
    out = [f"{_place(span)}: {diagnostic.severity}[{diagnostic.code}]: {_clean(diagnostic.message)}"]
    text = span.source.line(span.line)
    if text.strip():
        out += _excerpt(text, span)
    if diagnostic.hint:
        out.append(f"hint: {_clean(diagnostic.hint)}")
    return "\n".join(out)


def in_one_line(diagnostic: Diagnostic) -> str:
    """The finding without its source line."""
    hint = f"; {_clean(diagnostic.hint)}" if diagnostic.hint else ""
    return f"{_place(diagnostic.span)}: {_clean(diagnostic.message)} [{diagnostic.code}]{hint}"


def _place(span: Span) -> str:
    return _clean(str(span) if span.source.text else span.source.name)


def _clipped(text: str) -> str:
    """Words of a policy stand in messages, and nothing bounds the length of a word."""
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word most like `word`, or an empty string when none is close."""
    word = word.lower()[:_WORD]
    # The comparison is slow, so only words of about that length get so far.
    near = sorted(set(known), key=lambda other: (abs(len(other) - len(word)), other))[:100]
    close = difflib.get_close_matches(word, [other[:_WORD] for other in near], n=1, cutoff=0.6)
    return next((other for other in near if close and other.startswith(close[0])), "")


def did_you_mean(word: str, known: Iterable[str], listed: str = "") -> str:
    """A hint with the nearest known word, or with the list of known words under the heading `listed`."""
    known = sorted(set(known))
    close = nearest(word, known)
    if close:
        return f"did you mean `{close}`?"
    return f"{listed}: {', '.join(known[:40])}" if listed and known else ""


def _excerpt(text: str, span: Span) -> list[str]:
    start = span.column - 1
    stop = span.end_column - 1 if span.end_line == span.line else len(text.rstrip())
    first = 0
    if len(text) > _WIDTH:
        first = max(0, min(start - _WIDTH // 3, len(text) - _WIDTH))
    shown = _clean(text[first : first + _WIDTH])
    lead, tail = ("..." if first else ""), ("..." if first + _WIDTH < len(text) else "")
    number = str(span.line)
    width = max(1, min(stop, first + _WIDTH) - start)
    gutter = " " * len(number)
    return [
        f" {number} | {lead}{shown}{tail}",
        f" {gutter} | {' ' * (len(lead) + start - first)}{'^' * width}",
    ]


def _clean(text: str) -> str:
    """One printable column per character: a source text may hold control characters."""
    return "".join(
        char if char.isprintable() else " " if char in "\t\n\r" else "\N{REPLACEMENT CHARACTER}" for char in text
    )
