"""Bytes as people write and read them: units count in 1024, as in policies."""

from __future__ import annotations

import re

from kvcompile.kernels.errors import KvCompileError

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_FORM = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*(?:([kmgt]?)i?b?)", re.IGNORECASE)


def parse_bytes(value: object) -> int:
    """Bytes, from a whole number or from text such as `2GiB`, `512MB`, `1.5g`: units count in 1024, as in policies.

    KvCompileError for anything else and for less than 1.
    """
    found = 0
    if isinstance(value, int) and not isinstance(value, bool):
        found = value
    elif isinstance(value, str) and (match := _FORM.fullmatch(value.strip())):
        whole, _, part = match[1].partition(".")
        found = int(whole + part) * _UNITS[match[2].lower()] // 10 ** len(part)
    if found < 1:
        raise KvCompileError(f"max_bytes={value!r}: give a whole number of bytes, or text such as '2GiB' or '512MB'")
    return found


def size_text(count: float) -> str:
    """Bytes as a person reads them."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
