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
import signal
import subprocess
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from kvcompile.kernels import cache_folder
from kvcompile.kernels.errors import KvCompileError

FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math",
    "-Wno-psabi",
)  # fmt: skip
_SECONDS, _SECONDS_SMALLEST = 300, 60  # until a compiler counts as one that hangs
_ROOM = 1 << 20  # bytes that a library may take: what a folder must have left for its compiler not to be blamed
_SMALLEST = '#include <cmath>\n#include <omp.h>\nextern "C" int smallest() { return omp_get_max_threads(); }\n'
_refused: dict[Path, NoCompiler] = {}  # what the compiler said of texts that it did not take in this process
_useless: dict[str, str] = {}  # compilers that cannot build kernels, and what is wrong with them
_running: set[subprocess.Popen[str]] = set()


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
    asked = asked.strip()
    if asked.lower() == "none":
        return "C++ kernels are switched off by KVC_CXX=none"
    names = [asked] if asked else ["g++", "c++"]
    path = next((found for name in names if (found := shutil.which(name, path=search))), None)
    if path is None:
        way = "install g++ or set KVC_CXX to a compiler" + (", without arguments" if " " in asked else "")
        return f"no C++ compiler: {' and '.join(names)} not found; {way}"
    try:
        code, said, complaint = _answer([path, "--version"], 30)
        failed = f"exit code {code}{complaint and ': '}{_gist(complaint)}" if code else ""
    except (OSError, subprocess.SubprocessError) as error:
        failed = str(error)
    if failed:
        return f"the C++ compiler {path} does not answer --version ({failed}); set KVC_CXX to one that works"
    return Compiler(path, said.split("\n", 1)[0])


def _answer(command: list[str], seconds: float, scratch: Path | None = None) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a program.

    Raises:
        OSError: it cannot be started.
        subprocess.TimeoutExpired: it takes longer than `seconds`; it and what it has started are over then.
    """
    environment = os.environ | {"LC_ALL": "C"} | ({} if scratch is None else {"TMPDIR": str(scratch)})
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, errors="replace", env=environment,
        start_new_session=True,
    ) as process:  # fmt: skip
        _running.add(process)
        try:
            said, complaint = process.communicate(timeout=seconds)
        except BaseException:
            _end(process)
            raise
        finally:
            _running.discard(process)
    return process.returncode, said, complaint


def _end(process: subprocess.Popen[str]) -> None:
    """The end of a program and of what it has started, which all is one session."""
    with suppress(ProcessLookupError, PermissionError):  # it is over, in the words of two systems
        os.killpg(process.pid, signal.SIGKILL)


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
    if _useless.get(compiler().path):
        raise NoUsableCompiler(_useless[compiler().path])
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
        try:
            list(pool.map(lambda source: build(source, folder), sources))
        except KeyboardInterrupt:  # it does not reach other sessions
            for process in list(_running):
                _end(process)
            raise


def _compile(source: str, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=cache_folder.SCRATCH) as scratch:
        made = Path(scratch) / "kernel.so"
        try:
            run_compiler(source, FLAGS, made)
        except NoCompiler as error:
            (Path(scratch) / "room").write_bytes(bytes(_ROOM))  # OSError: the disk is to blame
            if (fault := _fault(compiler().path)) is not None:
                _useless[compiler().path] = fault
                raise NoUsableCompiler(fault) from error
            raise
        code = made.read_bytes()
    cache_folder.put(code + _seal(path.name, code), path)


def run_compiler(source: str, flags: tuple[str, ...], made: Path, seconds: float | None = None) -> None:
    """Run the compiler on a text, in the folder of the file that it makes.

    Raises:
        NoCompiler: there is none, it fails, or it takes too long.
        OSError: the folder cannot be written.
    """
    text = made.with_suffix(".cpp")
    text.write_text(source, encoding="utf-8")
    command = [compiler().path, *flags, str(text), "-o", str(made)]
    try:
        code, _, said = _answer(command, seconds or _SECONDS, made.parent)
    except (OSError, subprocess.SubprocessError) as error:
        raise NoCompiler(f"the C++ compiler {compiler().path} failed: {error}") from error
    if code or not made.exists():
        said = said[-2000:].strip() or f"exit code {code}, and no word"
        raise NoCompiler(f"the C++ compiler {compiler().path} failed: {_gist(said)}\n{' '.join(command)}\n{said}")


def _gist(said: str) -> str:
    """The line of a compiler's words that tells most."""
    lines = said.strip().splitlines() or [""]
    return next((line for line in lines if "error" in line), lines[-1])


@cache
def _fault(path: str) -> str | None:
    """What is wrong with a compiler that cannot even build the smallest kernel; None: it can."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            run_compiler(_SMALLEST, FLAGS, Path(scratch) / "smallest.so", _SECONDS_SMALLEST)
        except NoCompiler as error:
            said = str(error).splitlines()[0].partition(" failed: ")[2]
            return (
                f"the C++ compiler {path} cannot build kernels (they need C++17, OpenMP and -march=native): "
                f"{said}; set KVC_CXX to g++ 11 or newer"
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
    except OSError as error:  # sound, and yet refused
        refused = str(error).removeprefix(f"{path}: ")
    try:  # elsewhere: files of that folder may not be run
        found = ctypes.CDLL(str(build(source, cache_folder.private() / "built")))
    except OSError:
        path.unlink(missing_ok=True)  # it would be found again once what is wrong is mended
        what = f"{refused}; mend the compiler, or set KVC_CACHE to a folder whose files may be run"
        if _loads_smallest():
            raise NoCompiler(f"the library of a kernel cannot be loaded: {what}") from None
        raise NoUsableCompiler(f"what the C++ compiler {compiler().path} makes cannot be loaded: {what}") from None
    cache_folder.leave(path.parent, PermissionError(0, f"the system does not run files there ({refused})"))
    return found


@cache
def _loads_smallest() -> bool:
    try:
        ctypes.CDLL(str(build(_SMALLEST, cache_folder.private() / "built")))
    except (OSError, NoCompiler):
        return False
    return True
