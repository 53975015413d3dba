"""`KVC_DUMP=dir`: every stage leaves its text there, numbered in the order in which stages ran."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

_number = itertools.count()


def dump_text(name: str, text: str, folder: str | Path | None = None) -> Path | None:
    """Write one stage's text as `NNN.name` into `folder` or $KVC_DUMP; nothing where neither is given."""
    folder = folder or os.environ.get("KVC_DUMP")
    if not folder:
        return None
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    path = target / f"{next(_number):03d}.{name}"
    path.write_text(text)
    return path
