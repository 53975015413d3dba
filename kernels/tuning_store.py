"""Tuned configurations as JSON, one file per GPU: `FOLDER/nvidia_h200.json`, an entry per kernel and bucket.

Takes and gives `Entry`s. Guarantees: a reader sees a whole file or none (a new file replaces the old one in one
step), two writers lose nothing of each other's (a lock beside the file), and what cannot be read is a warning with
file and reason and reads as no entries.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from kvcompile.kernels import cache_folder
from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.gpus import Gpu
from kvcompile.kernels.spec import Fact
from kvcompile.kernels.tuning_space import Config

FORMAT = 1
LARGEST = 8 * 1024 * 1024  # bytes of a file that are read; thousands of entries need less
WAIT = 20.0  # seconds for another writer
SHIPPED = Path(__file__).parent / "tuned"
HOWS = ("timed", "analytic")


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """What a launch's sizes are rounded up to: rows of it and entries of a row, both powers of two."""

    rows: int
    tokens: int

    @classmethod
    def of(cls, rows: int, tokens: int) -> Bucket:
        return cls(1 << max(0, rows - 1).bit_length(), 1 << max(0, tokens - 1).bit_length())

    def distance(self, other: Bucket) -> int:
        """Doublings between the two."""
        steps = [
            abs(a.bit_length() - b.bit_length()) for a, b in ((self.rows, other.rows), (self.tokens, other.tokens))
        ]
        return sum(steps)


@dataclass(frozen=True, slots=True)
class TuneKey:
    """What a config is for. kernel: template and digest of its source; spec: digest of the facts without run-time
    numbers; gpu: `Gpu.identity`; space: digest of the candidates that it was chosen from."""

    kernel: str
    spec: str
    gpu: tuple[str, str, int, int]
    bucket: Bucket
    space: str


@dataclass(frozen=True, slots=True)
class Entry:
    """A chosen config. how: timed on the device, or analytic: ranked by the model, nothing was run.

    seconds: measured median where timed, else predicted; says: the kernel's name, facts: what it is specialised on,
    both for readers and checks; versions: of what compiled and ran it, no part of the key.
    """

    key: TuneKey
    config: Config
    how: str
    seconds: float
    says: str = ""
    facts: tuple[tuple[str, Fact], ...] = field(default=(), compare=False)
    versions: tuple[tuple[str, str], ...] = field(default=(), compare=False)


def user_folder() -> Path:
    """$KVC_TUNED, else `tuned` in the cache folder that was asked for: results must outlive the process."""
    chosen = os.environ.get("KVC_TUNED")
    return Path(chosen) if chosen else (cache_folder.wanted() or cache_folder.root()) / "tuned"


def file_of(place: Path, identity: tuple[str, str, int, int]) -> Path:
    """The file of a GPU in a folder."""
    return place / (re.sub(r"[^a-z0-9]+", "_", identity[0].lower()).strip("_") + ".json")


def read(path: Path) -> tuple[Entry, ...]:
    """The entries of a file; none, and a warning, where it cannot be used. Read anew when it changes."""
    try:
        seen = path.stat()
    except FileNotFoundError:
        return ()
    except OSError as error:
        _left_out(path, error.strerror or str(error))
        return ()
    return _read(path, seen.st_mtime_ns, seen.st_size, seen.st_ino)


@lru_cache(maxsize=64)
def _read(path: Path, changed: int, size: int, inode: int) -> tuple[Entry, ...]:
    try:
        return _parsed(path, size)
    except OSError as error:
        _left_out(path, error.strerror or str(error))
    except _Unusable as reason:
        _left_out(path, str(reason))
    return ()


def _left_out(path: Path, reason: str) -> None:
    warnings.warn(
        f"tuned configurations of {path} are left out: {reason}; the next source is taken "
        "(`kvcompile tune` writes the file anew)",
        stacklevel=2,
    )


class _Unusable(Exception):
    """Why a file cannot be used."""


def _parsed(path: Path, size: int) -> tuple[Entry, ...]:
    if size > LARGEST:
        raise _Unusable(f"{size} bytes, more than {LARGEST}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _Unusable(f"not JSON ({error})") from error
    if not isinstance(data, dict) or "format" not in data:
        raise _Unusable("not a file of tuned configurations")
    if data["format"] != FORMAT:
        raise _Unusable(f"format {data['format']!r} of another version of kvcompile, here {FORMAT}")
    try:
        gpu = data["gpu"]
        identity = (str(gpu["name"]), str(gpu["arch"]), _whole(gpu["multiprocessors"]), _whole(gpu["l2"]))
        return tuple(_entry(identity, found) for found in data["configs"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _Unusable(f"an entry is malformed ({type(error).__name__}: {error})") from error


def _entry(identity: tuple[str, str, int, int], found: Any) -> Entry:
    bucket = Bucket(_whole(found["bucket"]["rows"]), _whole(found["bucket"]["tokens"]))
    key = TuneKey(str(found["kernel"]), str(found["spec"]), identity, bucket, str(found["space"]))
    if found["how"] not in HOWS:
        raise ValueError(f"how is {found['how']!r}")
    config = tuple(sorted((str(name), _whole(value)) for name, value in found["config"].items()))
    versions = tuple(sorted((str(name), str(value)) for name, value in found["versions"].items()))
    facts = tuple(sorted((str(name), _plain(value)) for name, value in found["facts"].items()))
    seconds = float(found["microseconds"]) / 1e6
    return Entry(key, config, found["how"], seconds, str(found["says"]), facts, versions)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{value!r} where a whole number stands")
    return value


def _plain(value: Any) -> Fact:
    if not isinstance(value, int | str):
        raise ValueError(f"{value!r} is no fact of a kernel")
    return value


def text(identity: tuple[str, str, int, int], entries: tuple[Entry, ...]) -> str:
    """The file's text: sorted, so that equal contents are equal files."""
    name, arch, multiprocessors, l2 = identity
    ordered = sorted(entries, key=lambda e: (e.says, e.key.kernel, e.key.spec, e.key.bucket, e.how))
    configs = [
        {
            "says": entry.says,
            "kernel": entry.key.kernel,
            "spec": entry.key.spec,
            "bucket": asdict(entry.key.bucket),
            "space": entry.key.space,
            "config": dict(entry.config),
            "how": entry.how,
            "facts": dict(entry.facts),
            "microseconds": round(entry.seconds * 1e6, 3),
            "versions": dict(entry.versions),
        }
        for entry in ordered
    ]
    gpu = {"name": name, "arch": arch, "multiprocessors": multiprocessors, "l2": l2}
    return json.dumps({"format": FORMAT, "gpu": gpu, "configs": configs}, indent=2) + "\n"


def save(entries: tuple[Entry, ...], gpu: Gpu, place: Path | None = None) -> Path:
    """Put entries into a GPU's file beside those that are there; returns the file.

    An entry replaces that of the same kernel, spec and bucket, but an analytic one never replaces a timed one of
    the same space. A file that cannot be used is kept under another name. KvCompileError where the folder cannot be
    written or another writer does not end.
    """
    if place is None and not os.environ.get("KVC_TUNED") and cache_folder.wanted() is None:
        raise KvCompileError("cannot write tuned configurations: there is no home folder; set KVC_TUNED to a folder")
    path = file_of(place or user_folder(), gpu.identity)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            merged = {_slot(entry): entry for entry in _kept(path, gpu.identity)}
            for entry in entries:
                old = merged.get(_slot(entry))
                if old is None or old.key != entry.key or (old.how, entry.how) != HOWS:
                    merged[_slot(entry)] = entry
            _replace(path, text(gpu.identity, tuple(merged.values())))
    except OSError as error:
        raise KvCompileError(
            f"cannot write tuned configurations to {path}: {error.strerror or error}; "
            "set KVC_TUNED to a folder that can be written"
        ) from error
    return path


def _slot(entry: Entry) -> tuple[str, str, Bucket]:
    return entry.key.kernel, entry.key.spec, entry.key.bucket


def _kept(path: Path, identity: tuple[str, str, int, int]) -> tuple[Entry, ...]:
    """What a file holds already; one that is unusable, or of another GPU of that name, is moved aside."""
    if not path.exists():
        return ()
    try:
        found = _parsed(path, path.stat().st_size)
        if all(entry.key.gpu == identity for entry in found):
            return found
        reason = f"it is for {found[0].key.gpu}, here is {identity}"
    except _Unusable as error:
        reason = str(error)
    aside = path.with_suffix(f".{time.time_ns()}.aside")
    os.replace(path, aside)
    warnings.warn(f"{path} was kept as {aside.name} and begun anew: {reason}", stacklevel=3)
    return ()


def _replace(path: Path, content: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer at a time; the system lets go of the lock when a process ends, however it ends."""
    lock = path.with_suffix(".lock")
    with open(lock, "a") as file:
        end = time.monotonic() + WAIT
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise KvCompileError(
                        f"{lock} is held by another process for {WAIT:.0f} s; wait for its end, then tune again"
                    ) from None
                time.sleep(0.02)
        yield
