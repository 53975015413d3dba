"""The policies that come with the package: one file `NAME.kvp` each, read as package data.

Takes a policy name; gives the text of its file. Guarantees: a name never reaches outside this folder.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files

_SUFFIX = ".kvp"


@cache
def names() -> tuple[str, ...]:
    """The names of the library policies, sorted."""
    return tuple(sorted(f.name.removesuffix(_SUFFIX) for f in files(__name__).iterdir() if f.name.endswith(_SUFFIX)))


def read(name: str) -> str:
    """The text of a library policy's file. KeyError for a name that is not in `names()`."""
    if name not in names():
        raise KeyError(name)
    return files(__name__).joinpath(name + _SUFFIX).read_text(encoding="utf-8")
