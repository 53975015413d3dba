"""From a policy argument to a parsed file and one chosen policy.

Takes a text (it has a line break), a path (it ends in `.kvp` or holds a separator), the name of a library
policy, a `File` or a `Loaded`; gives `Loaded`. Guarantees: whatever the argument, the only exception is
PolicyError with place, reason and way out; at most 1 MiB is read.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from kvcompile.dsl import ast, library
from kvcompile.dsl.diagnostics import Diagnostic, PolicyError, did_you_mean, fail, finding, outside
from kvcompile.dsl.parser import MAX_BYTES, parse

MAX_POLICIES = 64


@dataclass(frozen=True, slots=True)
class Loaded:
    """A parsed file, the policy chosen from it, and the folder that relative table paths count from.

    `base` is None for library files: their tables are given by the caller.
    """

    file: ast.File
    policy: ast.Policy
    base: Path | None


def load(policy: object, name: str | None = None, base: str | os.PathLike[str] | None = None) -> Loaded:
    """Find, read and parse `policy`. `name` picks one of several policies; `base` replaces the table folder."""
    if isinstance(policy, Loaded) and name in (None, policy.policy.name):
        return policy
    file, folder, wanted = _open(policy)
    _distinct(file)
    return Loaded(file, _choose(file, name or wanted), Path(base) if base is not None else folder)


@lru_cache(maxsize=128)
def library_file(name: str) -> ast.File:
    """The parsed file of a library policy. KeyError for an unknown name."""
    return parse(library.read(name), f"library/{name}.kvp")


def _open(policy: object) -> tuple[ast.File, Path | None, str | None]:
    if isinstance(policy, Loaded):
        return policy.file, policy.base, None
    if isinstance(policy, ast.File):
        return policy, Path.cwd(), None
    if isinstance(policy, os.PathLike):
        return _from_path(os.fspath(policy))
    if not isinstance(policy, str):
        raise fail(
            "K015",
            f"a policy cannot be a {type(policy).__name__}",
            outside("<policy>"),
            "give a policy text, the path of a .kvp file, or the name of a library policy",
        )
    if "\n" in policy or "\r" in policy:
        return parse(policy, "<text>"), Path.cwd(), None
    if policy.endswith(".kvp") or "/" in policy or os.sep in policy:
        return _from_path(policy)
    return _from_library(policy)


def _from_library(name: str) -> tuple[ast.File, Path | None, str | None]:
    if name in library.names():
        return library_file(name), None, name
    if not name.strip():
        raise fail("K015", "the policy is empty", outside("<policy>"), "name a library policy, such as `snapkv`")
    short = name if len(name) <= 60 else name[:57] + "..."
    if ":" in name or "(" in name:
        raise fail(
            "K015",
            f"`{short}` is neither a library policy nor a path",
            outside("<policy>"),
            "a policy text has a line break after its header",
        )
    hint = did_you_mean(name, library.names(), "library policies")
    if len(name) <= 100 and Path(name + ".kvp").is_file():
        hint = f"for the file in this folder write `./{name}.kvp`"
    raise fail("K013", f"no policy `{short}` in the library", outside(short), hint)


def _from_path(path: str | bytes) -> tuple[ast.File, Path | None, str | None]:
    shown = os.fsdecode(path)
    return parse(read_text(shown), shown), Path(shown).parent, None


def read_text(path: str) -> str:
    """The text of a policy file, its line ends as they are. PolicyError for what cannot be read."""
    where = Path(path)
    try:
        if where.is_dir():
            inside = sorted(p.name for p in where.glob("*.kvp"))[:5]
            hint = f"it holds {', '.join(inside)}" if inside else "name a .kvp file inside it"
            raise fail("K011", "the policy path is a directory", outside(path), hint)
        with where.open("rb") as stream:
            return decode(stream.read(MAX_BYTES + 1), path)
    except FileNotFoundError:
        known = where.name.removesuffix(".kvp")
        near = sorted(p.name for p in where.parent.glob("*.kvp")) if where.parent.is_dir() else []
        hint = f"the library has `{known}`: leave out the path" if path != known and known in library.names() else ""
        raise fail(
            "K011",
            "no such policy file",
            outside(path),
            hint or did_you_mean(where.name, near) or _listed(where.parent, near),
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise fail(
            "K010", f"cannot read the policy file: {reason}", outside(path), "check the path and its rights"
        ) from None


def _listed(folder: Path, names: list[str]) -> str:
    """A hint with the first policy files of a folder."""
    if not names:
        return "check the path"
    return f"{folder} holds {', '.join(names[:5])}{' and others' if len(names) > 5 else ''}"


def decode(data: bytes, name: str) -> str:
    """The text in the bytes of a policy file; a byte order mark is left out."""
    if len(data) > MAX_BYTES:
        raise fail("K009", f"the policy file is larger than {MAX_BYTES} bytes", outside(name), "is this a policy file?")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"the policy file is not UTF-8 (byte {error.start})"
        raise fail("K010", message, outside(name), "save it as UTF-8 text") from None


def _distinct(file: ast.File) -> None:
    """Names of a file stand for one thing, and learn blocks belong to a policy beside them."""
    if len(file.policies) > MAX_POLICIES:
        place = file.policies[MAX_POLICIES].header
        raise fail("K009", f"the text holds more than {MAX_POLICIES} policies", place, "split it into several files")
    problems: list[Diagnostic] = []
    groups: list[tuple[str, Sequence[ast.Declaration]]] = [("policy", file.policies), ("head class", file.heads)]
    groups += [("parameter", policy.params) for policy in file.policies]
    for what, nodes in groups:
        seen: set[str] = set()
        for node in nodes:
            if node.name in seen:
                message = f"the {what} `{node.name}` is defined twice"
                problems.append(finding("K106", message, node.name_span, "give one of them another name"))
            seen.add(node.name)
    known = [policy.name for policy in file.policies]
    for learn in file.learns[:MAX_POLICIES]:
        if learn.policy.id not in known:
            hint = did_you_mean(learn.policy.id, known, "policies here") or "write the policy beside it"
            message = f"no policy `{learn.policy.id}` in this text to learn for"
            problems.append(finding("K013", message, learn.policy.span, hint))
    if problems:
        raise PolicyError(*problems)


def _choose(file: ast.File, name: str | None) -> ast.Policy:
    known = [policy.name for policy in file.policies]
    where = file.source.span(0, 0)
    if name is not None:
        found = file.policy(name)
        if found is None:
            hint = did_you_mean(name, known, "policies here") or "the text holds no policy"
            raise fail("K013", f"no policy `{name}` in {file.source.name}", outside(file.source.name), hint)
        return found
    if not known:
        raise fail(
            "K012", "the text holds no policy", where, "write `policy NAME():` and its clauses below it, indented"
        )
    if len(known) > 1:
        listed = ", ".join(known[:20])
        raise fail(
            "K012",
            f"the text holds {len(known)} policies: {listed}",
            file.policies[1].header,
            f'pick one: --name {known[0]}, or name="{known[0]}"',
        )
    return file.policies[0]
