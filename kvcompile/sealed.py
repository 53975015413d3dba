"""One safetensors file that carries a digest of its own bytes, replaced in one step, read as if anybody had written it.

`put` takes text and tensors; `take` gives them back. Guarantees: a kill or a failed write at any point leaves the old
file as it was; nothing is allocated before the header has been checked against the file's size, and nothing is
returned unless every byte is the one that was written. Whatever is wrong is a KvCompileError that names the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import torch
from torch import Tensor

from kvcompile.kernels.errors import KvCompileError

MAX_HEADER = 16 << 20
DAY = 24 * 3600.0
SEAL = "sha256"  # of the whole file, the digest's own 64 characters being zeros
_BLANK = "0" * 64
_BLOCK = 1 << 22
_DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Part(NamedTuple):
    """A tensor to be written: made when its turn comes, so that no two need stand in the host's memory at once."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


class Found(NamedTuple):
    """A tensor in a header that has been checked."""

    dtype: torch.dtype
    shape: tuple[int, ...]


Check = Callable[[Mapping[str, str], Mapping[str, Found]], None]


def put(path: Path, text: Mapping[str, str], parts: Sequence[Part]) -> None:
    """Write a file, readable by its owner only. A link is followed; drafts of killed writers go after a day."""
    with _told(path, "cannot be written"):
        target = path.resolve()
        if target.is_dir():
            raise IsADirectoryError(0, "it is a folder", str(target))
        draft_name = f".{target.name}.draft-"
        handle, draft = tempfile.mkstemp(dir=target.parent, prefix=draft_name)
        try:
            with os.fdopen(handle, "wb") as file:
                _fill(file, text, parts)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, target)
        except BaseException:
            Path(draft).unlink(missing_ok=True)
            raise
        _settle(target.parent, draft_name)


def take(path: Path, check: Check) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Text and tensors of a file. check: raises KvCompileError where they are not wanted, before any is read."""
    with _told(path, "cannot be read"), _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > memory():
            raise _damaged(path, f"its {size} bytes are more than this machine's memory")
        header, start = _header(file, size, path)
        text, found = _parsed(header, size - start, path)
        seal = text.pop(SEAL, "")
        if len(seal) != len(_BLANK):
            raise KvCompileError(f"{path} is no saved cache of kvcompile: it carries no digest of itself")
        try:
            check(text, found)
        except KvCompileError:
            if not _intact(file, header, seal):  # so what it says of itself is worth nothing
                raise _damaged(path, "its bytes are not those that were written") from None
            raise
        whole = _started(header, seal)
        tensors = {}
        for name, (dtype, shape) in found.items():
            tensors[name] = tensor = torch.empty(shape, dtype=dtype)
            data = _bytes_of(tensor)
            if file.readinto(data) != len(data):  # type: ignore[attr-defined]
                raise _damaged(path, "it ends in the middle of a tensor")
            whole.update(data)
        if whole.hexdigest() != seal or file.read(1):
            raise _damaged(path, "its bytes are not those that were written")
        return text, tensors


# -- writing ----------------------------------------------------------------------------------------------------------


def _fill(file: BinaryIO, text: Mapping[str, str], parts: Sequence[Part]) -> None:
    entries: dict[str, Any] = {"__metadata__": {SEAL: _BLANK, **text}}
    at = 0
    ordered = sorted(parts, key=lambda p: -p.dtype.itemsize)  # every tensor aligned, as readers in place like it
    for part in ordered:
        size = math.prod(part.shape) * part.dtype.itemsize
        entries[part.name] = {
            "dtype": _NAMES[part.dtype], "shape": list(part.shape), "data_offsets": [at, at + size]
        }  # fmt: skip
        at += size
    words = json.dumps(entries, separators=(",", ":")).encode()
    words += b" " * (-len(words) % 8)
    if len(words) > MAX_HEADER:
        raise OSError(0, f"its header would have {len(words)} bytes, more than {MAX_HEADER}")
    header = len(words).to_bytes(8, "little") + words
    file.write(header)
    whole = hashlib.sha256(header)
    for part in ordered:
        tensor = part.make().detach().to("cpu").contiguous()
        assert (tensor.dtype, tuple(tensor.shape)) == (part.dtype, part.shape), part.name
        data = _bytes_of(tensor)
        file.write(data)
        whole.update(data)
    file.seek(header.index(_BLANK.encode()))
    file.write(whole.hexdigest().encode())


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous host tensor."""
    return memoryview(cast(Any, tensor.reshape(-1).view(torch.uint8).numpy()))


def _settle(folder: Path, drafts: str) -> None:
    """The new name is on the disk, too; what killed writers have left goes."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    for left in folder.iterdir():
        if left.name.startswith(drafts):
            with contextlib.suppress(OSError):
                if time.time() - left.lstat().st_mtime > DAY:
                    left.unlink()


# -- reading ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would wait for a writer
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(0, "it is not a plain file")
        with os.fdopen(handle, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(handle)


def _header(file: BinaryIO, size: int, path: Path) -> tuple[bytes, int]:
    """Everything before the tensors, and where they start."""
    first = file.read(8)
    length = int.from_bytes(first, "little")
    if len(first) < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
        raise _damaged(path, "it does not begin like a safetensors file, or has been cut off")
    words = file.read(length)
    if len(words) != length:
        raise _damaged(path, "it has been cut off")
    return first + words, 8 + length


def _parsed(header: bytes, room: int, path: Path) -> tuple[dict[str, str], dict[str, Found]]:
    """Text and tensors of a header, the tensors in the order of their bytes, which fill the file exactly."""
    try:
        entries = json.loads(header[8:].decode())
    except (ValueError, RecursionError):
        raise _damaged(path, "its header is no JSON") from None
    text = entries.pop("__metadata__", {}) if isinstance(entries, dict) else None
    if not isinstance(text, dict) or not all(isinstance(value, str) for value in text.values()):
        raise _damaged(path, "its header is none of safetensors")
    placed = {}
    for name, entry in entries.items():
        sensible = _entry(entry)
        if sensible is None:
            raise _damaged(path, f"its header says nothing sensible of the tensor {name[:40]!r}")
        placed[name] = sensible
    at = 0
    out = {}
    for name, (found, start, stop) in sorted(placed.items(), key=lambda item: item[1][1:]):
        if start != at or stop - start != math.prod(found.shape) * found.dtype.itemsize:
            raise _damaged(path, f"the tensor {name[:40]!r} does not have the bytes that its shape needs")
        at, out[name] = stop, found
    if at != room:
        raise _damaged(path, f"it has {room} bytes of tensors where its header says {at}")
    return text, out


def _entry(entry: Any) -> tuple[Found, int, int] | None:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return None
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES or not _sizes(shape) or not _sizes(offsets):
        return None
    return (Found(_DTYPES[dtype], tuple(shape)), *offsets) if len(offsets) == 2 else None


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 8 and all(type(n) is int and 0 <= n < 1 << 48 for n in value)


def _started(header: bytes, seal: str) -> Any:
    """The digest of a file, as far as its header goes."""
    return hashlib.sha256(header.replace(seal.encode(), _BLANK.encode(), 1))


def _intact(file: BinaryIO, header: bytes, seal: str) -> bool:
    whole = _started(header, seal)
    file.seek(len(header))
    while block := file.read(_BLOCK):
        whole.update(block)
    return bool(whole.hexdigest() == seal)


def memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def _told(path: Path, what: str) -> Iterator[None]:
    """The system's errors in our words."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: links in a circle, no memory
        reason = getattr(error, "strerror", None) or str(error)
        raise KvCompileError(
            f"the saved cache {path} {what}: {reason}; check the path, its rights and the room"
        ) from error


def _damaged(path: Path, why: str) -> KvCompileError:
    return KvCompileError(
        f"the saved cache {path} cannot be used: {why}. Nothing of it was loaded; run the conversation again, or take "
        "another file"
    )
