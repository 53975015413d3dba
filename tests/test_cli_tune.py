"""`tune`: what it says and writes with a device and without one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvcompile import cli_tune
from kvcompile.cli import main
from kvcompile.kernels import offline, tuning_rank, tuning_search
from kvcompile.kernels.gpus import GPUS
from kvcompile.kernels.offline import Resources
from kvcompile.kernels.spec import KernelSpec
from kvcompile.kernels.tuning_space import KNOBS, Config, space
from kvcompile.kernels.tuning_store import file_of, read


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a small Llama; no weights, which the command does not read."""
    from tests.models import random_model

    where = tmp_path_factory.mktemp("model")
    random_model("llama64", num_hidden_layers=2).config.save_pretrained(where)
    return where


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder; no device, and a compiler that answers at once."""

    def compiled(files: Any, gpu: Any) -> dict[Config, tuple[Resources, ...]]:
        return {c: (Resources("k", gpu.arch, 64, 0, 0, 8192, 0, dict(c)["warps"], (), ""),) for c in space(files.spec)}

    monkeypatch.setenv("KVC_TUNED", str(tmp_path))
    monkeypatch.setattr(cli_tune, "_device", lambda: None)
    monkeypatch.setattr(tuning_search, "compile_space", compiled)
    few = {"block_n": (64,), "warps": (2, 4, 8), "stages": (3,), "min_chunk": (256,), "units": (2, 3)}
    monkeypatch.setitem(KNOBS, "decode", few)
    return tmp_path


class Fake:
    def seconds(self, spec: KernelSpec, path: Path, config: Config, repeats: int) -> float:
        return 1e-5 / dict(config)["warps"]

    def right(self, path: Path) -> bool:
        return True


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["tune", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def test_without_a_device_nothing_is_timed_or_written(
    capsys: pytest.CaptureFixture[str], folder: Path, place: Path
) -> None:
    code, out, err = run(capsys, "streaming", "--model", folder)
    assert (code, out) == (1, "") and list(place.iterdir()) == []
    assert "nothing was timed: there is no CUDA device here; --effort none --gpu NAME (A100" in err
    code, _, err = run(capsys, "streaming", "--model", folder, "--gpu", "H200", "--effort", "full")
    assert code == 1 and "not NVIDIA H200; --effort none writes" in err
    code, _, err = run(capsys, "streaming", "--model", folder, "--effort", "none")
    assert code == 1 and "nothing was timed" in err
    assert list(place.iterdir()) == []


def test_a_ranking_is_written_and_marked(capsys: pytest.CaptureFixture[str], folder: Path, place: Path) -> None:
    code, out, err = run(capsys, "streaming", "--model", folder, "--gpu", "h200", "--effort", "none", "--tokens", 512)
    assert code == 0, err
    path = file_of(place, GPUS["H200"].identity)
    entries = read(path)
    assert {entry.how for entry in entries} == {"analytic"} and len(entries) == len(out.splitlines())
    assert all("analytic, nothing was run" in line for line in out.splitlines())
    assert "nothing was timed" in err and f"written to {path}" in err
    assert {entry.key.bucket.tokens for entry in entries} == {512}


def test_a_device_is_timed(
    capsys: pytest.CaptureFixture[str], folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_tune, "_device", lambda: GPUS["H200"])
    monkeypatch.setattr(cli_tune, "_timer", Fake)
    code, out, err = run(capsys, "streaming", "--model", folder, "--effort", "full", "--batch", "4", "--json")
    assert code == 0, err
    data = json.loads(out)
    assert data["gpu"] == "NVIDIA H200" and Path(data["file"]) == file_of(place, GPUS["H200"].identity)
    assert {kernel["how"] for kernel in data["kernels"]} == {"timed"} and "nothing was timed" not in err
    pack = next(kernel for kernel in data["kernels"] if kernel["kernel"].startswith("pack"))
    assert pack["config"] == {"warps": 8} and pack["microseconds"] == pytest.approx(1.25)
    assert pack["untuned_microseconds"] == pytest.approx(2.5) and pack["timed"] == 3
    assert pack["bucket"] == {"rows": 8, "tokens": 4096} and set(pack["versions"]) == {"torch", "triton"}
    # Another GPU than the one here cannot be timed.
    code, _, err = run(capsys, "streaming", "--model", folder, "--gpu", "A100")
    assert code == 1 and "the device here is NVIDIA H200, not NVIDIA A100-SXM4-80GB" in err


def test_no_triton_means_no_compiler_and_says_so(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offline, "has_triton", lambda: False)
    monkeypatch.setattr(tuning_search, "compile_space", lambda *_: pytest.fail("compiled without Triton"))
    code, out, err = run(capsys, "streaming", "--model", folder, "--gpu", "B200", "--effort", "none")
    assert code == 0 and "Triton is not installed" in err and "not compiled" in out


def test_wrong_words(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert run(capsys, "streaming", "--model", folder, "--effort", "huge")[0] == 2
    assert run(capsys, "streaming", "--model", folder, "--batch", "0")[0] == 2
    code, _, err = run(capsys, "streaming", "--model", folder, "--gpu", "Voodoo 2")
    assert code == 1 and "no facts about the GPU 'Voodoo 2'" in err
    code, _, err = run(capsys, "streaming", "--model", folder / "none", "--gpu", "H200", "--effort", "none")
    assert code == 1 and "does not exist" in err


def test_a_folder_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "file").write_text("")
    monkeypatch.setenv("KVC_TUNED", str(place / "file"))
    code, out, err = run(capsys, "streaming", "--model", folder, "--gpu", "H200", "--effort", "none")
    assert (code, out) == (1, "") and "cannot write tuned configurations" in err and "KVC_TUNED" in err


def test_gpus_that_cannot_be_compiled_for_are_ranked_by_guess(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert not tuning_rank.can_compile(GPUS["MI300X"])
    code, out, _ = run(capsys, "streaming", "--model", folder, "--gpu", "MI300X", "--effort", "none", "--json")
    assert code == 0 and not any(kernel["compiled"] for kernel in json.loads(out)["kernels"])
