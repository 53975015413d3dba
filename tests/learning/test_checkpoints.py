"""Checkpoints of a training: bit for bit what was saved, one state at a time, other runs and damage refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from kvcompile.kernels.errors import KvCompileError
from kvcompile.learning import checkpoints
from kvcompile.learning.checkpoints import State, read_files, save_state, state_of

RUN = {"seed": 0, "steps": 10, "policy digest": "abc", "lr": 0.1, "length": None}


def state(step: int = 2) -> State:
    generator = torch.Generator().manual_seed(step)
    tensors = {"gates": torch.randn(3, 4, generator=generator), "adam.0.step": torch.tensor(float(step))}
    history = tuple({"step": i, "loss": 1 / (i + 3)} for i in range(step))
    return State(step, tensors, history)


def loaded(folder: Path, identity: dict[str, Any] = RUN) -> State:
    files = read_files(folder)
    assert files is not None
    return state_of(files, folder, identity)


def test_a_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    save_state(folder, state(), RUN)
    found, given = loaded(folder), state()
    assert (found.step, found.history) == (given.step, given.history)
    assert found.tensors.keys() == given.tensors.keys()
    assert all(torch.equal(found.tensors[name], given.tensors[name]) for name in given.tensors)
    assert found.tensors["adam.0.step"].shape == ()


def test_the_newest_state_alone_stays_and_other_files_are_left(tmp_path: Path) -> None:
    (tmp_path / "state-of-the-art.txt").write_text("mine")
    for step in (1, 2, 3):
        save_state(tmp_path, state(step), RUN)
    assert loaded(tmp_path).step == 3
    assert sorted(os.listdir(tmp_path)) == ["state-000003.safetensors", "state-of-the-art.txt", "state.json"]


def test_an_empty_folder_holds_no_state(tmp_path: Path) -> None:
    assert read_files(tmp_path) is None
    assert read_files(tmp_path / "none") is None


@pytest.mark.parametrize("broken", ["state-", "state.json"])
def test_a_crash_while_writing_leaves_the_state_before(
    tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_state(tmp_path, state(1), RUN)
    move = os.replace

    def crash(source: Any, target: Any) -> None:
        if Path(target).name.startswith(broken):
            raise OSError(28, "No space left on device")
        move(source, target)

    monkeypatch.setattr(checkpoints.os, "replace", crash)
    with pytest.raises(OSError, match="No space"):
        save_state(tmp_path, state(2), RUN)
    monkeypatch.undo()
    assert loaded(tmp_path).step == 1
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"policy digest": "b" * 40}, "policy digest is abc there and bbbbbbbbbbbbbbbbbbbb... here"),
        ({"length": 64}, "length is missing there and 64 here"),
        ({"lr": 0.2, "steps": 20}, "lr is 0.1 there and 0.2 here; steps is 10 there and 20 here"),
    ],
)
def test_a_state_of_another_run_is_refused_by_field(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    save_state(tmp_path, state(), RUN)
    with pytest.raises(KvCompileError, match=f"of another run: {message}.*resume=False"):
        loaded(tmp_path, RUN | change)


def rewrite(folder: Path, **changes: Any) -> None:
    path = folder / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def damage(folder: Path, how: str) -> None:
    tensors = folder / "state-000002.safetensors"
    data = tensors.read_bytes()
    match how:
        case "half":
            tensors.write_bytes(data[: len(data) // 2])
        case "bit":
            tensors.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        case "gone":
            tensors.unlink()
        case "no json":
            (folder / "state.json").write_text('{"format": 1, "iden')
        case "no object":
            (folder / "state.json").write_text("[1]")
        case "format":
            rewrite(folder, format=99)
        case "outside":
            rewrite(folder, tensors="../state-000002.safetensors")
        case "steps":
            rewrite(folder, step=5)
        case "words":
            rewrite(folder, history=[{"step": 1, "loss": "small"}, {"step": 2, "loss": 0.5}])
        case "no steps":
            rewrite(folder, step="2")
        case "whose":
            rewrite(folder, identity=None)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("half", "state-000002.safetensors is not the file that state.json was written for"),
        ("bit", "state-000002.safetensors is not the file that state.json was written for"),
        ("gone", "state-000002.safetensors is missing"),
        ("no json", "state.json is no JSON"),
        ("no object", "state.json is no JSON object"),
        ("format", "state.json has format 99, this version reads 1"),
        ("outside", "state.json names no file of tensors"),
        ("steps", "state.json does not tell the figures of 5 steps"),
        ("words", "state.json does not tell the figures of 2 steps"),
        ("no steps", "state.json lacks step"),
        ("whose", "state.json does not say whose state it is"),
    ],
)
def test_damage_is_named(tmp_path: Path, how: str, message: str) -> None:
    save_state(tmp_path, state(), RUN)
    damage(tmp_path, how)
    with pytest.raises(KvCompileError, match=f"is damaged: {message}.*Delete the folder"):
        loaded(tmp_path)


def test_a_link_in_the_drafts_place_is_not_written_through(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("mine")
    (tmp_path / f".state.json.{os.getpid()}").symlink_to(other)
    save_state(tmp_path, state(), RUN)
    assert other.read_text() == "mine" and loaded(tmp_path).step == 2


def test_what_is_read_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_state(tmp_path, state(), RUN)
    monkeypatch.setattr(checkpoints, "MAX_BYTES", 100)
    with pytest.raises(KvCompileError, match=r"state.json is larger than 100 bytes"):
        read_files(tmp_path)


def test_tensors_that_are_none_are_named(tmp_path: Path) -> None:
    import hashlib

    save_state(tmp_path, state(), RUN)
    (tmp_path / "state-000002.safetensors").write_bytes(b"\xff" * 64)
    rewrite(tmp_path, sha256=hashlib.sha256(b"\xff" * 64).hexdigest())
    with pytest.raises(KvCompileError, match=r"is damaged: state-000002.safetensors: .*header"):
        loaded(tmp_path)
