"""Building, keeping and loading C++ kernels, and everything that may be wrong with compiler or cache folder."""

from __future__ import annotations

import ctypes
import grp
import os
import pwd
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvcompile.kernels import cache_folder, tuning_store
from kvcompile.kernels.cpp_backend import build as building
from kvcompile.kernels.cpp_backend import library as libraries
from kvcompile.kernels.cpp_backend.assembly import assembly, machine
from kvcompile.kernels.cpp_backend.build import NoCompiler, NoUsableCompiler, compiler, library_path, says_why_not
from kvcompile.kernels.cpp_backend.library import built
from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.gpus import GPUS
from kvcompile.kernels.render import folder, load, write

GCC = says_why_not() is None
needs_compiler = pytest.mark.skipif(not GCC, reason=str(says_why_not()))


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A process that has seen nothing yet, and a cache folder of its own."""
    forget()
    monkeypatch.setenv("KVC_CACHE", str(tmp_path / "cache"))
    yield tmp_path
    if cache_folder.private.cache_info().currsize:  # a worker of a parallel run ends without clearing up
        shutil.rmtree(cache_folder.private(), ignore_errors=True)
    forget()


def forget() -> None:
    cache_folder._left.clear()
    building._refused.clear()
    building._useless.clear()
    for known in (
        building.load,
        building._compiler,
        building._fault,
        building._tell,
        building._loads_smallest,
        cache_folder._warn,
        cache_folder._of_one,
        cache_folder.private,
    ):
        known.cache_clear()
    libraries.cpp_library.cache_clear()


def text(answer: int) -> str:
    return f'/* any */\n#include <omp.h>\nextern "C" int answer() {{ return {answer}; }}\n'


def loaded(answer: int) -> int:
    """As a new process would get it: whatever this one has loaded is forgotten."""
    building.load.cache_clear()
    return int(building.load(text(answer), built()).answer())


def script(folder: Path, name: str, says: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{says}\n")
    path.chmod(0o755)
    return path


# ------------------------------------------------------------------ the library


@needs_compiler
def test_a_library_is_built_once_and_found_again(fresh: Path) -> None:
    assert loaded(1) == 1
    (path,) = (fresh / "cache" / "built").iterdir()
    stamp = path.stat().st_mtime_ns
    assert loaded(1) == 1 and path.stat().st_mtime_ns == stamp
    other = text(1).replace("any", "another policy, the same code")
    assert library_path(other, built()) == path != library_path(text(2), built())


@needs_compiler
@pytest.mark.parametrize("damage", ["zeros", "short", "empty", "a bit", "another's", "folder", "link", "text"])
def test_a_damaged_library_is_built_anew(fresh: Path, damage: str) -> None:
    path = library_path(text(3), cache_folder.ready(built()))
    building._compile(text(3), path)
    data = path.read_bytes()
    path.unlink()
    match damage:
        case "zeros":
            path.write_bytes(bytes(len(data)))
        case "short":
            path.write_bytes(data[: len(data) // 2])  # the loader itself would crash on this
        case "empty":
            path.write_bytes(b"")
        case "a bit":
            path.write_bytes(data[:4200] + bytes([data[4200] ^ 1]) + data[4201:])
        case "another's":
            building._compile(text(4), library_path(text(4), built()))
            library_path(text(4), built()).rename(path)
        case "folder":
            (path / "inner").mkdir(parents=True)
        case "link":
            path.symlink_to(fresh / "nowhere")
        case _:
            path.write_text("no library")
    assert not building.is_sound(path)
    assert loaded(3) == 3 and building.is_sound(path)


@needs_compiler
def test_a_library_that_another_user_could_write_is_never_loaded(fresh: Path) -> None:
    path = building.build(text(5), built())
    path.chmod(0o666)
    assert not building.is_sound(path)
    assert loaded(5) == 5 and not path.stat().st_mode & 0o022


@needs_compiler
def test_processes_that_build_at_once_all_get_it_right(fresh: Path) -> None:
    code = "from tests.kernels.test_cpp_build import loaded; print(loaded(6))"
    command = [sys.executable, "-c", code]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0] for process in running] == ["6\n", "6\n"]
    (path,) = (fresh / "cache" / "built").iterdir()
    assert building.is_sound(path)


@needs_compiler
def test_what_a_killed_build_left_goes_after_a_day(fresh: Path) -> None:
    place = cache_folder.ready(built())
    old, new, other = place / ".build-old", place / ".build-new", place / "mine"
    for made in (old, new, other):
        made.mkdir()
        (made / "kernel.cpp").write_text("")
    (place / ".build-file").write_text("")
    for made in (old, other, place / ".build-file"):
        os.utime(made, (0, time.time() - 25 * 3600))
    assert loaded(7) == 7
    assert {path.name for path in place.iterdir() if path.suffix != ".so"} == {".build-new", "mine"}


# ------------------------------------------------------------------ the cache folder


def check_private(reason: str, asked: Path) -> None:
    """Files go to a private folder, with one warning that names folder, reason and way out."""
    with pytest.warns(UserWarning) as seen:
        path = write("x = 1\n", folder("any", "0123456789") / "kernel.py")
        assert load(write("x = 2\n", folder("other", "0123456789") / "kernel.py")).x == 2
        if GCC:
            assert loaded(8) == 8
    (message,) = {str(w.message) for w in seen}
    assert str(asked) in message and reason in message and "KVC_CACHE" in message
    assert path.is_relative_to(cache_folder.private()) and path.read_text() == "x = 1\n"
    assert cache_folder.private().stat().st_mode & 0o777 == 0o700


def test_a_file_in_its_place(fresh: Path) -> None:
    (fresh / "cache").write_text("")
    check_private("Not a directory", fresh / "cache")


def test_a_file_in_the_place_of_a_folder_below(fresh: Path) -> None:
    (fresh / "cache").mkdir()
    (fresh / "cache" / "kernels").write_text("")
    check_private("Not a directory", fresh / "cache")


def test_a_place_where_no_folder_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVC_CACHE", "/proc/kvcompile")
    check_private("No such file", Path("/proc/kvcompile"))


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("KVC_CACHE")
    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.warns(UserWarning, match="no home folder; set KVC_CACHE") as seen:
        path = write("x = 1\n", folder("any", "0123456789") / "kernel.py")
        assert write("x = 1\n", path) == path
    assert len(seen) == 1 and path.is_relative_to(cache_folder.private())
    # Tuned constants are not for one process: none are written where they would be lost.
    monkeypatch.delenv("KVC_TUNED", raising=False)
    with pytest.raises(KvCompileError, match="no home folder; set KVC_TUNED"):
        tuning_store.save((), GPUS["H200"])


def test_a_folder_below_that_others_may_write_is_not_used(fresh: Path) -> None:
    (fresh / "cache" / "kernels").mkdir(parents=True)
    (fresh / "cache" / "kernels").chmod(0o777)
    check_private("other users may write to it, at", fresh / "cache")


@pytest.mark.parametrize("members", [None, ["another"]])
def test_what_a_group_may_write_is_used_only_where_this_user_is_all_of_it(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, members: list[str] | None
) -> None:
    user, group = pwd.getpwuid(os.geteuid()), (fresh / ".").stat().st_gid
    of_one = members is None
    monkeypatch.setattr(pwd, "getpwuid", lambda _: SimpleNamespace(pw_name=user.pw_name, pw_gid=group))
    monkeypatch.setattr(grp, "getgrgid", lambda _: SimpleNamespace(gr_name=user.pw_name, gr_mem=members or []))
    cache_folder._of_one.cache_clear()
    (fresh / "cache").mkdir()
    (fresh / "cache").chmod(0o775)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        path = write("x = 1\n", folder("any", "0123456789") / "kernel.py")
    assert path.is_relative_to(fresh / "cache") == of_one
    assert ["other users may write to it" in str(w.message) for w in seen] == ([] if of_one else [True])
    path.chmod(0o664)
    assert cache_folder.is_ours(path) == of_one


def test_a_folder_that_others_may_write_is_not_used_and_nothing_is_made_in_it(fresh: Path) -> None:
    (fresh / "cache").mkdir()
    (fresh / "cache").chmod(0o777)
    check_private("other users may write to it", fresh / "cache")
    assert list((fresh / "cache").iterdir()) == []


def test_a_link_to_nowhere_is_called_one(fresh: Path) -> None:
    (fresh / "cache").symlink_to(fresh / "nowhere")
    check_private("it is a link to nowhere", fresh / "cache")


def test_a_home_folder_may_be_named_by_its_sign(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(fresh))
    monkeypatch.setenv("KVC_CACHE", "~/of mine")
    assert cache_folder.root() == fresh / "of mine"
    monkeypatch.setenv("KVC_CACHE", "~no-such-user/of mine")
    assert cache_folder.root() == Path.cwd() / "~no-such-user" / "of mine"


def test_a_sticky_folder_is_used(fresh: Path) -> None:
    (fresh / "cache").mkdir()
    (fresh / "cache").chmod(0o1777)
    assert write("x = 1\n", folder("any", "0123456789") / "kernel.py").is_relative_to(fresh / "cache")


def test_another_users_folder_is_not_used(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fresh / "cache").mkdir()
    owner, real = (fresh / "cache").stat().st_uid, os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: real + 1)
    with pytest.warns(UserWarning, match=f"it belongs to user {owner}, this is user {real + 1}"):
        assert cache_folder.ready(folder("any", "0")).is_relative_to(cache_folder.private())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_a_read_only_folder(fresh: Path) -> None:
    """Rights do not bind root, so this one gives them up for a moment."""
    place = fresh / "cache"
    place.mkdir()
    os.chown(place, 65534, 65534)
    place.chmod(0o555)
    private = cache_folder.private()
    os.chown(private, 65534, 65534)
    for part in (*fresh.parents, fresh):
        if part.stat().st_uid == 0 and str(part).startswith("/tmp/pytest"):
            part.chmod(0o755)
    os.seteuid(65534)
    try:
        with pytest.warns(UserWarning, match="is not used: it cannot be written"):
            path = write("x = 1\n", folder("any", "0123456789") / "kernel.py")
    finally:
        os.seteuid(0)
        os.chown(private, 0, 0)
    assert path.is_relative_to(private) and list(place.iterdir()) == []


def test_a_full_disk(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file that has content is refused in the cache folder, and only there."""
    real = cache_folder.put

    def put(data: bytes, path: Path) -> None:
        if path.is_relative_to(fresh):
            raise OSError(28, "No space left on device", str(path))
        real(data, path)

    monkeypatch.setattr(cache_folder, "put", put)
    check_private("No space left on device", fresh / "cache")


def test_a_folder_of_the_callers_own_is_an_error(fresh: Path) -> None:
    (fresh / "mine").write_text("")
    with pytest.raises(OSError, match="File exists"):
        write("x = 1\n", fresh / "mine" / "kernel.py")


@pytest.mark.parametrize("left", ["", "x = \x00", "x = 3\n", None])
def test_a_damaged_source_is_written_anew(fresh: Path, left: str | None) -> None:
    path = folder("any", "0123456789") / "kernel.py"
    if left is None:
        path.mkdir(parents=True)
    else:
        path.parent.mkdir(parents=True)
        path.write_text(left)
    assert load(write("x = 1\n", path)).x == 1
    # The same size within the same second: byte code of the old text is never taken.
    assert load(write("x = 2\n", path)).x == 2
    assert not (path.parent / "__pycache__").exists()


def test_a_file_that_fails_is_not_taken_for_loaded(fresh: Path) -> None:
    path = write("x = 1\nraise ValueError\n", fresh / "kernel.py")
    for _ in range(2):
        with pytest.raises(ValueError):
            load(path)


# ------------------------------------------------------------------ the compiler


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVC_CXX", "none")
    with pytest.raises(NoUsableCompiler, match="switched off by KVC_CXX=none"):
        building.build(text(9), built())


def test_nothing_on_the_path(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVC_CXX", raising=False)
    monkeypatch.setenv("PATH", str(fresh))
    with pytest.raises(NoUsableCompiler, match=r"g\+\+ and c\+\+ not found; install g\+\+ or set KVC_CXX"):
        compiler()


def test_a_compiler_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVC_CXX", "/bin/false")
    with pytest.raises(NoUsableCompiler, match="/bin/false does not answer --version"):
        compiler()


def test_a_compiler_without_openmp(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    says = 'case "$1" in --version) echo small 1.0;; *) echo "error: unsupported option -fopenmp" >&2; exit 1;; esac'
    monkeypatch.setenv("KVC_CXX", str(script(fresh, "small", says)))
    for answer in (10, 11):
        with pytest.raises(NoUsableCompiler, match=r"cannot build kernels .*OpenMP.*unsupported option -fopenmp"):
            building.build(text(answer), built())


def test_a_compiler_that_hangs_is_stopped_with_all_that_it_started_and_not_asked_again(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = fresh / "started"
    says = f'[ "$1" = --version ] && echo slow && exit; echo $$ >> {started}; sleep 100 & echo $! >> {started}; wait'
    monkeypatch.setenv("KVC_CXX", str(script(fresh, "slow", says)))
    monkeypatch.setattr(building, "_SECONDS", 0.5)
    monkeypatch.setattr(building, "_SECONDS_SMALLEST", 0.5)
    with pytest.raises(NoUsableCompiler, match=r"cannot build kernels .* timed out after 0\.5 seconds"):
        building.build(text(15), built())
    with pytest.raises(NoUsableCompiler, match="cannot build kernels"):
        building.build(text(16), built())
    known = started.read_text().split()
    assert len(known) == 4  # the text and the smallest one: a shell and its child each
    assert not [number for number in known if is_running(int(number))]
    assert list(built().iterdir()) == []


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@needs_compiler
def test_libraries_that_do_not_load_say_so_of_the_compiler_and_stay_nowhere(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a compiler writes for another machine, or what its code needs is not installed."""
    real, works = compiler().path, fresh / "works"
    says = f'[ "$1" = --version ] && echo odd 1.0 && exit; [ -e {works} ] && exec {real} "$@"; '
    says += 'for out; do :; done; echo nothing > "$out"'
    monkeypatch.setenv("KVC_CXX", str(script(fresh, "odd", says)))
    messages = set()
    for answer in (17, 18):
        with warnings.catch_warnings(), pytest.raises(NoUsableCompiler, match="odd makes cannot be loaded") as found:
            warnings.simplefilter("error")  # the cache folder is not to blame
            loaded(answer)
        messages.add(str(found.value))
    assert len(messages) == 1 and list(built().iterdir()) == []
    works.touch()
    shutil.rmtree(cache_folder.private())
    assert loaded(17) == 17


@needs_compiler
def test_a_text_that_is_refused_is_tried_once(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = fresh / "runs"
    says = f'echo "$*" >> {runs}; exec {compiler().path} "$@"'
    monkeypatch.setenv("KVC_CXX", str(script(fresh, "counting", says)))
    for _ in range(3):
        with pytest.raises(NoCompiler, match="no_such_thing") as found:
            building.build('extern "C" int f() { return no_such_thing; }\n', built())
        assert not isinstance(found.value, NoUsableCompiler)
        assert "no_such_thing" in str(found.value).splitlines()[0]  # what a report shows
    compiled = [line for line in runs.read_text().splitlines() if "--version" not in line]
    assert len(compiled) == 2  # the text, and the smallest one
    assert loaded(12) == 12


@needs_compiler
def test_assembly_is_read(fresh: Path) -> None:
    source = 'extern "C" void twice(float* x) { for (int i = 0; i < 1024; ++i) x[i] *= 2; }\n'
    found = machine(assembly(source))
    assert found.vector_bits >= 128 and found.instructions > 3 and found.stack_moves == 0
    assert found.compiler == compiler().version and "nothing spilled" in found.line()
    many = "".join(f"  V a{i}; for (int l = 0; l < 16; ++l) a{i}[l] = x[{i} * 16 + l];\n" for i in range(48))
    told = "typedef float V __attribute__((vector_size(64)));\nvoid other();\n"
    body = many + "  other();\n" + "".join(f"  *(V*)(x + {i} * 16) = a{i} * a{(i + 1) % 48};\n" for i in range(48))
    spilled = machine(assembly(f'{told}extern "C" void all(float* x) {{\n{body}}}\n'))
    assert spilled.stack_moves >= 48  # no vector register outlives a call


def test_no_room_anywhere_is_an_error_with_a_way_out(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> str:
        raise OSError(28, "No space left on device")

    (fresh / "cache").write_text("")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(KvCompileError, match=r"not even a temporary one .*set KVC_CACHE or TMPDIR"):
            write("x = 1\n", folder("any", "0123456789") / "kernel.py")


def test_ctypes_is_what_is_loaded() -> None:
    if GCC:
        assert isinstance(building.load(text(13), built()), ctypes.CDLL)
