"""Checkpoints of a training: a folder that holds the newest state, written so that a crash leaves the one before.

Takes states of tensors and JSON values; gives them back bit for bit. Guarantees: `state.json` is replaced in one
step, after the tensors that it names; a state of another run is refused with the fields that differ, a damaged one
with its file; nothing is read but safetensors and JSON of bounded size.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from kvcompile.kernels.errors import KvCompileError

FORMAT = 1
MAX_BYTES = 256 << 20  # of the index
MAX_TENSORS = 4 << 30  # gates of units and their optimiser's two moments; 700 MiB for 32 layers of 32 heads
INDEX = "state.json"
_NAME = re.compile(r"state-[0-9]+\.safetensors", re.ASCII)


@dataclass(frozen=True)
class State:
    """A training after `step` steps: its tensors by name, and one dict of figures a step."""

    step: int
    tensors: Mapping[str, Tensor]
    history: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Files:
    """The two files of a state as they lie on the disk, so that one process can read them for all."""

    index: bytes
    tensors: bytes


def prepared(folder: Path) -> None:
    """Make the folder, and find out before the first step whether it can be written; KvCompileError if not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise KvCompileError(f"checkpoint {folder}: cannot write there ({reason}); name another folder") from None


def save_state(folder: Path, state: State, identity: Mapping[str, Any]) -> None:
    """Write a state; what is in the folder stays valid until the new one is complete. OSError as the system says."""
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()})
    name = f"state-{state.step:06d}.safetensors"
    index = {
        "format": FORMAT,
        "identity": dict(identity),
        "step": state.step,
        "tensors": name,
        "sha256": hashlib.sha256(data).hexdigest(),
        "history": list(state.history),
    }
    replace_file(folder / name, data)
    replace_file(folder / INDEX, json.dumps(index, indent=1).encode())
    for other in folder.iterdir():
        if other.name != name and _NAME.fullmatch(other.name):
            other.unlink()


def replace_file(path: Path, data: bytes) -> None:
    """Write a file in one step: readers see the old one or the new one."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.unlink(missing_ok=True)
        with draft.open("xb") as stream:  # a link of that name would be written through
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def read_files(folder: Path) -> Files | None:
    """The files of the folder's state; None where it has none. KvCompileError where one is missing or too large."""
    index = folder / INDEX
    if not index.exists():
        return None
    text = _bounded(index, folder)
    name = _parsed(text, folder).get("tensors")
    if not isinstance(name, str) or not _NAME.fullmatch(name):  # also keeps the name inside of the folder
        raise _damaged(folder, f"{INDEX} names no file of tensors")
    return Files(text, _bounded(folder / name, folder, MAX_TENSORS))


def state_of(files: Files, folder: Path, identity: Mapping[str, Any]) -> State:
    """The state in some files. KvCompileError where they are damaged, or of a run with another `identity`."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    index = _parsed(files.index, folder)
    if index.get("format") != FORMAT:
        raise _damaged(folder, f"{INDEX} has format {str(index.get('format'))[:20]}, this version reads {FORMAT}")
    _check_same(folder, index.get("identity"), dict(identity))
    if hashlib.sha256(files.tensors).hexdigest() != index.get("sha256"):
        raise _damaged(folder, f"{index['tensors']} is not the file that {INDEX} was written for")
    step, history = index.get("step"), index.get("history")
    if type(step) is not int or step < 0 or not isinstance(history, list):
        raise _damaged(folder, f"{INDEX} lacks step or history")
    if len(history) != step or not all(_figures(entry) for entry in history):
        raise _damaged(folder, f"{INDEX} does not tell the figures of {step} steps")
    try:
        tensors = load(files.tensors)
    except SafetensorError as error:
        raise _damaged(folder, f"{index['tensors']}: {error}") from error
    return State(step, tensors, tuple(history))


def _figures(entry: Any) -> bool:
    return isinstance(entry, dict) and all(isinstance(value, (int, float)) for value in entry.values())


def _check_same(folder: Path, there: Any, here: dict[str, Any]) -> None:
    if not isinstance(there, dict):
        raise _damaged(folder, f"{INDEX} does not say whose state it is")
    here = json.loads(json.dumps(here))
    other = [
        f"{name} is {_short(there.get(name))} there and {_short(here.get(name))} here"
        for name in sorted(here.keys() | there.keys())
        if there.get(name) != here.get(name)
    ]
    if other:
        raise KvCompileError(
            f"checkpoint {folder} is of another run: {'; '.join(other)}. Take another folder, or start anew in this "
            "one with resume=False (--no-resume)"
        )


def _short(value: Any) -> str:
    text = "missing" if value is None else str(value)
    return text if len(text) <= 24 else f"{text[:20]}..."


def _bounded(path: Path, folder: Path, most: int | None = None) -> bytes:
    most = MAX_BYTES if most is None else most
    try:
        with path.open("rb") as stream:
            data = stream.read(most + 1)
    except FileNotFoundError:
        raise _damaged(folder, f"{path.name} is missing") from None
    if len(data) > most:
        raise _damaged(folder, f"{path.name} is larger than {most} bytes")
    return data


def _parsed(text: bytes, folder: Path) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise _damaged(folder, f"{INDEX} is no JSON") from None
    if not isinstance(value, dict):
        raise _damaged(folder, f"{INDEX} is no JSON object")
    return value


def _damaged(folder: Path, why: str) -> KvCompileError:
    return KvCompileError(
        f"checkpoint {folder} is damaged: {why}. Delete the folder, or start anew in it with resume=False (--no-resume)"
    )
