"""From the text of a C++ kernel to a loaded library: plain g++ with OpenMP, built once and kept.

Takes source text, gives a `ctypes.CDLL`. A library is found again by its code (comments of the head aside), the
compiler, the flags and the processor, so that a cache folder may be shared between machines. `$KVC_CXX` names
another compiler, or `none`. Guarantees: a library is put in place in one step with a seal at its end; one whose seal
is broken, or that another user could have written, is never loaded but built anew.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from kvcompile.kernels import cache_folder
from kvcompile.kernels.errors import KvCompileError

FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math",
    "-Wno-psabi",
)  # fmt: skip
_SECONDS = 300
_ROOM = 1 << 20  # bytes that a library may take: what a folder must have left for its compiler not to be blamed
_SMALLEST = '#include <cmath>\n#include <omp.h>\nextern "C" int smallest() { return omp_get_max_threads(); }\n'
_refused: dict[Path, NoCompiler] = {}  # what the compiler said of texts that it did not take in this process


@dataclass(frozen=True, slots=True)
class Compiler:
    """A C++ compiler that works here: its path and what it says of its version."""

    path: str
    version: str


class NoCompiler(KvCompileError):
    """There is no C++ compiler, or it refuses a kernel; the message says which and what to do."""


class NoUsableCompiler(NoCompiler):
    """No kernel at all can be built: there is no compiler, or it lacks what all kernels need."""


def compiler() -> Compiler:
    """The machine's C++ compiler: $KVC_CXX, else g++ or c++ on the path.

    Raises:
        NoUsableCompiler: none is there, it is switched off, or it does not answer.
    """
    found = _compiler(os.environ.get("KVC_CXX", ""), os.environ.get("PATH", ""))
    if isinstance(found, str):
        raise NoUsableCompiler(found)
    return found


def says_why_not() -> str | None:
    """Why no C++ kernel can be built here; None where the compiler answers."""
    try:
        compiler()
    except NoCompiler as error:
        return str(error)
    return None


def tell(message: str) -> None:
    """A warning, the same one once in a process."""
    _tell(message)


@cache
def _tell(message: str) -> None:
    warnings.warn(message, stacklevel=4)


@cache
def _compiler(asked: str, search: str) -> Compiler | str:
    """The compiler, or why there is none."""
    if asked.lower() == "none":
        return "C++ kernels are switched off by KVC_CXX=none"
    names = [asked] if asked else ["g++", "c++"]
    path = next((found for name in names if (found := shutil.which(name, path=search))), None)
    if path is None:
        return f"no C++ compiler: {' and '.join(names)} not found; install g++ or set KVC_CXX to a compiler"
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError) as error:
        return f"the C++ compiler {path} does not answer --version ({error}); set KVC_CXX to one that works"
    return Compiler(path, done.stdout.split("\n", 1)[0])


@cache
def _processor() -> str:
    """What -march=native depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().split("\n\n", 1)[0].split("\n") if info.exists() else []
    told = [line for line in lines if line.split("\t")[0].strip() in ("model name", "flags", "Features", "CPU part")]
    return "\n".join([platform.machine(), *told])


def code_of(source: str) -> str:
    """The text without the comment at its head, which names policy and sizes but changes nothing."""
    return source.split("*/", 1)[1] if source.startswith("/*") else source


def library_path(source: str, folder: Path) -> Path:
    """Where the library of a kernel's text lies in a cache folder."""
    told = (code_of(source), compiler().version, " ".join(FLAGS), _processor())
    return folder / f"{hashlib.sha256(chr(0).join(told).encode()).hexdigest()[:24]}.so"


def is_sound(path: Path) -> bool:
    """Whether a library is whole, was built under this name, and nobody else may have written it."""
    if not cache_folder.is_ours(path):
        return False
    try:
        data = path.read_bytes()
    except OSError:
        return False
    return len(data) > 32 and data[-32:] == _seal(path.name, data[:-32])


def _seal(name: str, code: bytes) -> bytes:
    """Bytes at the end of a library: a damaged one may crash the loader, or load and be wrong."""
    return hashlib.sha256(name.encode() + code).digest()


def build(source: str, folder: Path) -> Path:
    """Compile a kernel's text into the cache folder, unless its library is there.

    Raises:
        NoCompiler: there is none, or it refuses the text; with the end of what it said.
        OSError: a folder that is not the cache folder cannot be written.
    """
    folder = cache_folder.ready(folder)
    path = library_path(source, folder)
    if is_sound(path):
        return path
    if path in _refused:
        raise type(_refused[path])(str(_refused[path]))
    try:
        try:
            _compile(source, path)
        except OSError as error:
            path = cache_folder.leave(folder, error) / path.name
            _compile(source, path)
    except NoCompiler as error:
        _refused[path] = error
        raise
    return path


def build_all(sources: list[str], folder: Path) -> None:
    """Compile several texts side by side, as many at a time as there are processors."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    with ThreadPoolExecutor(max_workers=len(affinity(0)) if affinity else os.cpu_count()) as pool:
        list(pool.map(lambda source: build(source, folder), sources))


def _compile(source: str, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=cache_folder.SCRATCH) as scratch:
        made = Path(scratch) / "kernel.so"
        try:
            run_compiler(source, FLAGS, made)
        except NoCompiler as error:
            (Path(scratch) / "room").write_bytes(bytes(_ROOM))  # OSError: the disk is to blame
            if (fault := _fault(compiler().path)) is not None:
                raise NoUsableCompiler(fault) from error
            raise
        code = made.read_bytes()
    cache_folder.put(code + _seal(path.name, code), path)


def run_compiler(source: str, flags: tuple[str, ...], made: Path) -> None:
    """Run the compiler on a text, in the folder of the file that it makes.

    Raises:
        NoCompiler: there is none, it fails, or it takes too long.
        OSError: the folder cannot be written.
    """
    text = made.with_suffix(".cpp")
    text.write_text(source, encoding="utf-8")
    command = [compiler().path, *flags, str(text), "-o", str(made)]
    environment = os.environ | {"TMPDIR": str(made.parent), "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False, env=environment
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise NoCompiler(f"the C++ compiler {compiler().path} failed: {error}") from error
    if done.returncode or not made.exists():
        said = done.stderr[-2000:].strip() or f"exit code {done.returncode}, and no word"
        raise NoCompiler(f"{' '.join(command)} failed:\n{said}")


@cache
def _fault(path: str) -> str | None:
    """What is wrong with a compiler that cannot even build the smallest kernel; None: it can."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            run_compiler(_SMALLEST, FLAGS, Path(scratch) / "smallest.so")
        except NoCompiler as error:
            return (
                f"the C++ compiler {path} cannot build kernels (they need C++17, OpenMP and -march=native): "
                f"{str(error).splitlines()[-1]}; set KVC_CXX to g++ 11 or newer"
            )
    return None


@cache
def load(source: str, folder: Path) -> ctypes.CDLL:
    """The library of a kernel's text, built if need be; the same text is loaded once in a process.

    Raises:
        NoCompiler: it cannot be built, or the system refuses to load it.
        OSError: a folder that is not the cache folder cannot be written.
    """
    path = build(source, folder)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:  # sound, and yet refused: a folder whose files must not be run
        refused = error
    try:
        own = cache_folder.leave(path.parent, PermissionError(0, f"the system does not run files there ({refused})"))
        return ctypes.CDLL(str(build(source, own)))
    except OSError as error:
        way = "set KVC_CACHE to a folder whose files may be run"
        raise NoCompiler(f"{path} cannot be loaded: {error}; {way}") from error
