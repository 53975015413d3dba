"""Tuned configurations on disk: whole files or none, no lost entries, and what is unusable is named and left out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from kvcompile.kernels import tuning_store
from kvcompile.kernels.errors import KvCompileError
from kvcompile.kernels.gpus import GPUS
from kvcompile.kernels.tuning_store import Bucket, Entry, TuneKey, file_of, read, save, text, user_folder

H200 = GPUS["H200"]


def entry(spec: str = "a" * 16, how: str = "timed", rows: int = 8, seconds: float = 1e-5, **config: int) -> Entry:
    key = TuneKey("pack-" + "0" * 16, spec, H200.identity, Bucket(rows, 4096), "f" * 16)
    facts = (("head_dim", 128), ("page", 16))
    return Entry(key, tuple(sorted(config.items())) or (("warps", 4),), how, seconds, "pack", facts, (("triton", "3"),))


def test_entries_come_back_and_equal_contents_are_equal_files(tmp_path: Path) -> None:
    entries = (entry(), entry("b" * 16, "analytic", warps=8), entry(rows=16))
    path = save(entries, H200, tmp_path)
    assert path.name == "nvidia_h200.json" and set(read(path)) == set(entries)
    assert read(path)[0].facts == entry().facts and read(path)[0].versions == (("triton", "3"),)
    first = path.read_text()
    save(tuple(reversed(entries)), H200, tmp_path)
    assert path.read_text() == first and text(H200.identity, entries) == first
    assert [p.name for p in tmp_path.iterdir() if p.suffix not in (".json", ".lock")] == []


def test_a_new_entry_replaces_its_own_and_a_ranking_never_a_measurement(tmp_path: Path) -> None:
    path = save((entry(warps=4), entry("b" * 16, "analytic", warps=4)), H200, tmp_path)
    save((entry(warps=8), entry("b" * 16, "analytic", warps=8)), H200, tmp_path)
    assert {e.key.spec[0]: dict(e.config)["warps"] for e in read(path)} == {"a": 8, "b": 8}
    save((entry(how="analytic", warps=2), entry("b" * 16, "timed", warps=2)), H200, tmp_path)
    assert {e.key.spec[0]: dict(e.config)["warps"] for e in read(path)} == {"a": 8, "b": 2}
    # A measurement among other candidates is worth less than a ranking of today's.
    other = entry(how="analytic", warps=1)
    save((replace(other, key=replace(other.key, space="e" * 16)),), H200, tmp_path)
    assert {e.key.spec[0]: dict(e.config)["warps"] for e in read(path)} == {"a": 1, "b": 2}


def test_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("KVC_TUNED", raising=False)
    monkeypatch.setenv("KVC_CACHE", str(tmp_path))
    assert user_folder() == tmp_path / "tuned"
    monkeypatch.setenv("KVC_TUNED", str(tmp_path / "mine"))
    assert user_folder() == tmp_path / "mine"
    assert file_of(tmp_path, ("../NVIDIA GeForce RTX 4090", "sm_89", 1, 1)).name == "nvidia_geforce_rtx_4090.json"


WRITER = """
import sys
from pathlib import Path
from tests.kernels.test_tuning_store import H200, entry, save
for i in range(25):
    save((entry(f"{sys.argv[1]}{i:015x}"),), H200, Path(sys.argv[2]))
"""


def test_two_processes_lose_nothing_and_a_reader_never_sees_half(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-c", WRITER]
    writers = [subprocess.Popen([*command, mark, str(tmp_path)], env=environment, cwd=root) for mark in "ab"]
    path, looks = file_of(tmp_path, H200.identity), 0
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            json.loads(path.read_text())
            looks += 1
        time.sleep(0.002)
    assert [writer.returncode for writer in writers] == [0, 0] and looks > 0
    assert sorted(e.key.spec for e in read(path)) == sorted(f"{mark}{i:015x}" for mark in "ab" for i in range(25))
    assert not list(tmp_path.glob("*.tmp"))


def whole() -> dict[str, object]:
    return json.loads(text(H200.identity, (entry(),)))  # type: ignore[no-any-return]


def broken() -> dict[str, tuple[str, str]]:
    found = whole()
    config = found["configs"][0]  # type: ignore[index]
    return {
        "half a file": (json.dumps(found)[:200], "not JSON"),
        "empty": ("", "not JSON"),
        "a list": ("[]", "not a file of tuned configurations"),
        "another version": (json.dumps(found | {"format": 7}), "format 7 of another version of kvcompile"),
        "no gpu": (json.dumps({"format": 1, "configs": []}), "malformed"),
        "a config that is text": (json.dumps(found | {"configs": [config | {"config": {"warps": "4"}}]}), "malformed"),
        "a config of zero": (json.dumps(found | {"configs": [config | {"config": {"warps": 0}}]}), "malformed"),
        "an unknown how": (json.dumps(found | {"configs": [config | {"how": "guessed"}]}), "how is 'guessed'"),
        "not objects": (json.dumps(found | {"configs": [3]}), "malformed"),
        "deep": ("[" * 100000, "not JSON"),
    }


@pytest.mark.parametrize("kind", broken())
def test_unusable_files_are_named_and_left_out(kind: str, tmp_path: Path) -> None:
    content, reason = broken()[kind]
    path = file_of(tmp_path, H200.identity)
    path.write_text(content)
    with pytest.warns(UserWarning, match=reason) as told:
        assert read(path) == ()
    assert str(path) in str(told[0].message) and "next source" in str(told[0].message)
    # A writer does not lose what it cannot read.
    with pytest.warns(UserWarning, match="begun anew"):
        save((entry(),), H200, tmp_path)
    assert [e.key.spec for e in read(path)] == ["a" * 16]
    (aside,) = tmp_path.glob("*.aside")
    assert aside.read_text() == content


def test_bytes_that_are_no_text_and_huge_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = file_of(tmp_path, H200.identity)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.warns(UserWarning, match="not JSON"):
        assert read(path) == ()
    monkeypatch.setattr(tuning_store, "LARGEST", 10)
    path.write_text(text(H200.identity, (entry(),)))
    with pytest.warns(UserWarning, match="more than 10"):
        assert read(path) == ()


def test_a_file_that_is_a_folder_and_none_at_all(tmp_path: Path) -> None:
    path = file_of(tmp_path, H200.identity)
    assert read(path) == ()
    path.mkdir()
    with pytest.warns(UserWarning, match="directory"):
        assert read(path) == ()


def test_a_file_of_another_device_of_that_name_is_kept_aside(tmp_path: Path) -> None:
    path = save((entry(),), H200, tmp_path)
    half = replace(H200, multiprocessors=66)
    mine = replace(entry(), key=replace(entry().key, gpu=half.identity))
    with pytest.warns(UserWarning, match="it is for"):
        save((mine,), half, tmp_path)
    assert [e.key.gpu for e in read(path)] == [half.identity] and list(tmp_path.glob("*.aside"))


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_text("")
    with pytest.raises(KvCompileError, match=r"cannot write tuned configurations to .*KVC_TUNED"):
        save((entry(),), H200, place)
    if os.geteuid() != 0:  # root may write anywhere
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o500)
        with pytest.raises(KvCompileError, match=r"Permission denied.*KVC_TUNED"):
            save((entry(),), H200, closed)


def test_a_writer_that_does_not_end_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save((entry(),), H200, tmp_path)
    monkeypatch.setattr(tuning_store, "WAIT", 0.05)
    with tuning_store._locked(path), pytest.raises(KvCompileError, match="held by another process"):
        save((entry("b" * 16),), H200, tmp_path)
    save((entry("b" * 16),), H200, tmp_path)
    assert len(read(path)) == 2


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save((entry(),), H200, tmp_path)
    before = path.read_text()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tuning_store.os, "replace", fail)
    with pytest.raises(KvCompileError, match="No space left"):
        save((entry("b" * 16),), H200, tmp_path)
    assert path.read_text() == before and not list(tmp_path.glob("*.tmp"))


def test_buckets_round_up() -> None:
    assert Bucket.of(5, 4097) == Bucket(8, 8192) and Bucket.of(1, 1) == Bucket(1, 1)
    assert Bucket(8, 4096).distance(Bucket(32, 2048)) == 3 and Bucket(8, 1).distance(Bucket(8, 1)) == 0
