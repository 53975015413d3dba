"""`KVC_DUMP=dir`: graphs leave their text beside the policy's modules, numbered in the order in which they came."""

from __future__ import annotations

import os
from pathlib import Path


def dump_graph(policy: str, name: str, text: str) -> Path | None:
    """Write a graph's text as `$KVC_DUMP/POLICY/NN-NAME`; nothing where the variable is not set."""
    folder = os.environ.get("KVC_DUMP")
    if not folder:
        return None
    target = Path(folder) / policy
    target.mkdir(parents=True, exist_ok=True)
    path = target / f"{len(list(target.iterdir())):02d}-{name}"
    path.write_text(text, encoding="utf-8")
    return path
