"""`bench`: what it measures, what it refuses, and what needs a GPU."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvcompile import cli_bench
from kvcompile.benching import Contestant, Course, bench, cache_bytes
from kvcompile.cli import main
from kvcompile.kernels.errors import KvCompileError

SIZES = ("--prompt", 48, "--generate", 5, "--rounds", 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with 96 positions; no tokenizer, which the command does not need."""
    from tests.models import random_model

    where = tmp_path_factory.mktemp("model")
    random_model("llama64", num_hidden_layers=2, max_position_embeddings=96).save_pretrained(where)
    return where


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["bench", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


def test_figures_of_a_policy_and_the_untouched_model(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    asked = ("streaming", "--model", folder, *SIZES, "--batch", 2, "--set", "window=12", "--set", "n_sink=4", "--json")
    code, out, err = run(capsys, *asked)
    assert code == 0, err
    data = json.loads(out)
    assert {key: data[key] for key in ("policy", "base", "prompt", "generate", "batch", "rounds")} == {
        "policy": "streaming", "base": "untouched", "prompt": 48, "generate": 5, "batch": 2, "rounds": 2,
    }  # fmt: skip
    ours, full = data["contestants"]
    assert (ours["name"], full["name"]) == ("streaming", "untouched")
    # Two sequences, two layers, two KV heads, 53 tokens, keys and values of 64 float32 channels.
    assert full["bytes_held"] == 2 * 2 * 2 * 53 * 2 * 64 * 4 and full["footprint"] == 1.0
    assert ours["bytes_held"] < full["bytes_held"] and ours["bytes_peak"] >= ours["bytes_held"]
    assert 0 < ours["footprint"] < 1 and ours["ceiling"] > 1
    for row in data["contestants"]:
        assert 0 < row["step_p10"] <= row["step_p90"] and row["prefill_seconds"] > 0
        assert row["tokens_per_second"] == pytest.approx(2e3 / row["step_ms"])
        assert row["step_ratio"] == pytest.approx(row["step_ms"] / full["step_ms"]) and len(row["step_ratios"]) == 2


def test_the_table_names_everyone(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    own = tmp_path / "short.kvp"
    own.write_text("policy short():\n    keep recent(8)\n    at prefill.end, step\n")
    several = ("--against", "untouched", "--against", "reference", "--against", own)
    code, out, err = run(capsys, "streaming", "--model", folder, *SIZES, *several, "--backend", "cpu")
    assert code == 0, err
    _, times, memory, last = out.split("\n\n")
    names = ["streaming", "untouched", "streaming, reference", "short"]
    assert [re.split(" {2,}", row)[0] for row in times.splitlines()] == ["time", *names]
    assert [re.split(" {2,}", row)[0] for row in memory.splitlines()] == ["memory", *names]
    assert "part of untouched's; of streaming in each round" in last and "memory traffic allows at most 1." in last
    assert max(map(len, out.splitlines())) <= 80


def test_nonsense_is_refused_before_weights_are_read(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_bench.shared, "load_model", lambda *_: pytest.fail("weights were read"))
    code, out, err = run(capsys, "streaming", "--model", folder, "--prompt", 90, "--generate", 7)
    assert (code, out) == (1, "")
    assert "90 tokens and 7 steps need 97 positions, and this model has 96: at most --prompt 89" in err
    assert run(capsys, "streaming", "--model", folder, "--generate", 96)[0] == 1
    for wrong in (("--prompt", 0), ("--generate", 0), ("--batch", 0), ("--rounds", 0), ("--backend", "gpu")):
        assert run(capsys, "streaming", "--model", folder, *wrong)[0] == 2
    code, _, err = run(capsys, "streaming", "--model", folder, "--against", "streaming")
    assert code == 2 and "takes part already" in err
    code, _, err = run(capsys, "streaming", "--model", folder, "--against", "streeming")
    assert code == 1 and "streeming" in err
    assert run(capsys, "streeming", "--model", folder)[0] == 1
    code, _, err = run(capsys, "streaming", "--model", folder / "none", *SIZES)
    assert code == 1 and "does not exist" in err


def test_the_usual_prompt_fits_the_model(folder: Path) -> None:
    config = cli_bench.shared.load_config(folder)
    assert cli_bench._usual_prompt(config, 6) == 90
    config.max_position_embeddings = 8192
    assert cli_bench._usual_prompt(config, 6) == cli_bench.USUAL


def test_kernels_need_a_gpu_and_say_so(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_bench, "_device", lambda: None)
    code, out, err = run(capsys, "streaming", "--model", folder, "--kernels")
    assert (code, out) == (1, "") and "there is no CUDA device here" in err and "kvcompile inspect POLICY" in err
    monkeypatch.setattr(cli_bench, "_device", lambda: "a GPU")
    monkeypatch.setattr(
        cli_bench.subprocess, "run",
        lambda command, **_: SimpleNamespace(returncode=0, stdout=f"bench: {Path(command[1]).stem}\n", stderr=""),
    )  # fmt: skip
    code, out, err = run(capsys, "streaming", "--model", folder, "--kernels", "--json")
    data = json.loads(out)
    assert code == 0 and data["gpu"] == "a GPU" and data["kernels"]
    assert all(found == {"ok": True, "said": f"bench: {kernel}"} for kernel, found in data["kernels"].items())
    monkeypatch.setattr(
        cli_bench.subprocess, "run",
        lambda command, **_: SimpleNamespace(returncode=1, stdout="", stderr="Traceback\nno memory\n"),
    )  # fmt: skip
    assert cli_bench._bench_file(Path("x.py")) == (False, "no memory")
    assert main(["bench", "streaming", "--model", str(folder), "--kernels"]) == 1


def test_all_are_fed_the_same_and_the_model_is_left_alone() -> None:
    from tests.models import random_model

    model: Any = random_model("llama64", num_hidden_layers=2)
    before, ids = dict(vars(model)), torch.arange(3, 23)[None]
    fed: list[list[int]] = []
    inside = model.model.embed_tokens.register_forward_pre_hook(lambda _, args: fed.append(args[0].flatten().tolist()))
    found = bench(model, [Contestant("keep_all", "keep_all"), Contestant("untouched")], Course(ids, 16, 1))
    inside.remove()
    assert vars(model).keys() == before.keys()
    prompt, steps = list(range(3, 19)), [[n] for n in range(19, 23)]
    # Two untimed courses of two steps, then the timed ones.
    assert fed == [prompt, *steps[:2]] * 2 + [prompt, *steps] * 2
    assert found.contestants[0].footprint == pytest.approx(1.0) and found.contestants[0].ceiling == pytest.approx(1.0)


def test_an_optimised_model_is_refused() -> None:
    import kvcompile
    from tests.models import random_model

    model = kvcompile.optimize(random_model("llama64", num_hidden_layers=1), "keep_all")
    with pytest.raises(KvCompileError, match="restore it first"):
        bench(model, [Contestant("untouched")], Course(torch.ones(1, 8, dtype=torch.long), 6, 1))


def test_a_cache_without_entries_has_no_bytes() -> None:
    from transformers import DynamicCache

    assert cache_bytes(DynamicCache()) == 0
