"""Options of suites: declared as fields of a suite, read from text, written back as the suite's name.

Takes a suite's class and `option=value,option=value`; gives the suite. Every value is a whole number within its
bounds or one of some words; all else is refused with what would be right.
"""

from __future__ import annotations

from dataclasses import field, fields
from difflib import get_close_matches
from typing import Any

from kvcompile.kernels.errors import KvCompileError


def number(default: int, low: int, high: int, what: str) -> Any:
    """A field for a whole number from `low` to `high`; `what` says what it does, in a few words."""
    return field(default=default, metadata={"low": low, "high": high, "what": what})


def choice(default: str, words: tuple[str, ...], what: str) -> Any:
    """A field for one of some words."""
    return field(default=default, metadata={"words": words, "what": what})


def read_options(kind: Any, text: str) -> Any:
    """The suite of class `kind` with the options of `text` (may be empty). Raises KvCompileError for wrong ones."""
    values: dict[str, Any] = {}
    for pair in text.split(",") if text else ():
        name, sign, value = (part.strip() for part in pair.partition("="))
        if not sign:
            raise KvCompileError(f"suite `{kind.base}`: `{pair}` is no option: write option=value,option=value")
        if name in values:
            raise KvCompileError(f"suite `{kind.base}`: option `{name}` stands twice: leave one out")
        values[name] = _value(kind, name, value)
    return kind(**values)


def _value(kind: Any, name: str, value: str) -> int | str:
    known = {entry.name: entry.metadata for entry in fields(kind)}
    if name not in known:
        near = get_close_matches(name, known, n=1, cutoff=0.0)
        hint = f"the nearest is `{near[0]}`, all are: {', '.join(known)}" if near else "it has none"
        raise KvCompileError(f"suite `{kind.base}` has no option `{name}`; {hint}")
    # A longer number is out of every option's bounds, and int() of a very long text is slow.
    is_number = "low" in known[name] and value.isascii() and value.isdigit() and len(value) < 10
    return int(value) if is_number else value


def check_options(suite: Any) -> None:
    """Raise KvCompileError where a field of the suite is outside what it declares."""
    for entry in fields(suite):
        value, bounds = getattr(suite, entry.name), entry.metadata
        if "words" in bounds:
            fits, right = value in bounds["words"], f"one of {', '.join(bounds['words'])}"
        else:
            fits = type(value) is int and bounds["low"] <= value <= bounds["high"]
            right = f"a whole number from {bounds['low']} to {bounds['high']}"
        if not fits:
            raise KvCompileError(f"suite `{suite.base}`: {entry.name}={value} is not possible: give {right}")


def name_of(suite: Any) -> str:
    """The suite's name with the options that differ from their defaults, in the order in which they are declared."""
    told = [(entry.name, getattr(suite, entry.name), entry.default) for entry in fields(suite)]
    changed = ",".join(f"{name}={value}" for name, value, default in told if value != default)
    return f"{suite.base}:{changed}" if changed else str(suite.base)
