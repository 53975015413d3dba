"""Where generated files go: `$KVC_CACHE`, else ~/.cache/kvcompile, else a private temporary folder of this process.

Takes nothing, gives folders. A folder is used only if it can be written and nobody else may write to it: what lies
there is run. Guarantees: whatever is wrong with it costs time and one warning that names folder, reason and way out.
"""

from __future__ import annotations

import atexit
import errno
import grp
import os
import pwd
import shutil
import stat
import tempfile
import threading
import time
import warnings
from functools import cache
from pathlib import Path

from kvcompile.kernels.errors import KvCompileError

SCRATCH = ".build-"  # how the names of half-made files and folders begin
DAY = 24 * 3600.0
_left: dict[Path, str] = {}  # cache folders that were given up, and why
_lock = threading.Lock()


def wanted() -> Path | None:
    """The cache folder that was asked for, whatever its state; None where there is not even a home folder."""
    chosen = os.environ.get("KVC_CACHE")
    if chosen:
        place = Path(chosen)
        try:
            return place.expanduser().absolute()
        except RuntimeError:  # `~` of nobody: a name like any other
            return place.absolute()
    try:
        return Path.home() / ".cache" / "kvcompile"
    except RuntimeError:
        return None


def root() -> Path:
    """The cache folder: the one that was asked for, until it turns out not to be usable. Touches no disk itself."""
    place = wanted()
    if place is None:
        _warn("no cache folder: there is no home folder; set KVC_CACHE to a folder that can be written")
        return private()
    return private() if place in _left else place


def ready(folder: Path) -> Path:
    """The folder, made if need be. One below the cache folder that cannot be used is replaced by a private one.

    Raises:
        OSError: a folder elsewhere that cannot be made.
    """
    place = root()
    if not folder.is_relative_to(place):
        own = _instead(folder)
        (own or folder).mkdir(parents=True, exist_ok=True)
        return own or folder
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        inner = folder.relative_to(place).parts
        for depth in range(len(inner) + 1):
            _make(place.joinpath(*inner[:depth]))
    except OSError as error:
        return leave(folder, error)
    return folder


def leave(folder: Path, error: OSError) -> Path:
    """Give up the cache folder that `folder` is in, because of `error`; the same folder in the private one, made.

    Raises:
        OSError: the error itself, where `folder` is not in the cache folder, or is in the private one already.
    """
    place = wanted()
    if place is None or not folder.is_relative_to(place):
        raise error
    with _lock:
        if place not in _left:
            reason = error.strerror or str(error)
            at = "" if error.filename in (None, str(place)) else f", at {error.filename}"
            _left[place] = reason
            _warn(
                f"the cache folder {place} is not used: {reason}{at}; generated files go to a temporary folder and are "
                "made anew in each process; mend that folder, or set KVC_CACHE to a folder of your own"
            )
    own = private() / folder.relative_to(place)
    own.mkdir(parents=True, exist_ok=True)
    return own


@cache
def private() -> Path:
    """A temporary folder that only this process uses; it goes when the process ends."""
    try:
        place = Path(tempfile.mkdtemp(prefix="kvcompile-"))
    except OSError as error:
        raise KvCompileError(
            f"no folder can be written, not even a temporary one ({error.strerror or error}); "
            "set KVC_CACHE or TMPDIR to one that can"
        ) from error
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # and not a fork of it
            shutil.rmtree(place, ignore_errors=True)

    atexit.register(remove)
    return place


def is_ours(path: Path) -> bool:
    """Whether a file is a plain one of this user that nobody else may write to: only such a file is ever run."""
    try:
        seen = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(seen.st_mode) and seen.st_uid == os.geteuid() and not _others_write(seen)


def put(data: bytes, path: Path) -> None:
    """Write a file in one step; something else in its place, even a folder, makes way.

    Raises:
        OSError: there is no room, or no right to write; nothing is left behind.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=SCRATCH)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        if path.is_dir() and not path.is_symlink():
            os.replace(path, f"{name}.aside")  # `sweep` takes it away
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sweep(path.parent)


def sweep(folder: Path) -> None:
    """Take away what processes that were killed left half-made in a folder, once it is a day old."""
    for path in folder.glob(f"{SCRATCH}*"):
        try:
            if time.time() - path.lstat().st_mtime < DAY:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
        except OSError:  # another process was faster
            continue


def _instead(folder: Path) -> Path | None:
    """The private counterpart of a folder that was named before its cache folder was given up."""
    place = wanted()
    return private() / folder.relative_to(place) if place in _left and folder.is_relative_to(place) else None


def _make(folder: Path) -> None:
    """Make a folder in one that is fit for use, unless it is there, and see that it is fit, too."""
    try:
        folder.mkdir(mode=0o755)
    except FileExistsError:
        if not folder.exists():
            raise FileNotFoundError(errno.ENOENT, "it is a link to nowhere", str(folder)) from None
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from None
    _check(folder)


def _check(folder: Path) -> None:
    seen = folder.stat()
    if seen.st_uid != os.geteuid():
        raise PermissionError(0, f"it belongs to user {seen.st_uid}, this is user {os.geteuid()}", str(folder))
    if _others_write(seen) and not seen.st_mode & stat.S_ISVTX:
        raise PermissionError(0, "other users may write to it", str(folder))
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
        raise PermissionError(0, "it cannot be written", str(folder))


def _others_write(seen: os.stat_result) -> bool:
    return bool(seen.st_mode & stat.S_IWOTH or (seen.st_mode & stat.S_IWGRP and not _of_one(seen.st_gid, os.geteuid())))


@cache
def _of_one(group: int, user: int) -> bool:
    """Whether a user is all of a group: where each has one, folders are made with rights for it."""
    try:
        who, found = pwd.getpwuid(user), grp.getgrgid(group)
    except KeyError:
        return False
    return who.pw_gid == group and found.gr_name == who.pw_name and set(found.gr_mem) <= {who.pw_name}


@cache
def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)
