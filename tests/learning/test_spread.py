"""Training on two processes (gloo, on the CPU): the same scores as on one, and who writes what."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kvcompile.kernels.errors import KvCompileError
from kvcompile.learning.data import Sequence
from kvcompile.learning.learn import learn
from kvcompile.learning.spread import Group
from kvcompile.learning.training import _parts
from tests.learning.small import LOCAL, sequences, small_model, table

ROOT = Path(__file__).parents[2]
RUNS: tuple[dict[str, Any], ...] = (
    {"policy": "prulong"},
    {"policy": "duo", "lr": 0.1},
    {"policy": "prulong", "draws": 1, "gradient_checkpointing": True, "compile": "eager"},
)
STEPS, BATCH = 4, 4

# One process of a group: every run's scores and history to a file of its own, and which weights it saw sharded.
WORKER = """
import json, os, sys, torch
torch.set_num_threads(1)
from tests.learning.small import sequences, small_model
from tests.learning import test_spread as tests
from kvcompile.learning import training

kinds, make = set(), training.sharded
def seen(model, layers, group):
    runner = make(model, layers, group)
    kinds.update(f"{type(w).__name__} {tuple(w.to_local().shape)}" for n, w in runner.named_parameters()
                 if n.endswith("0.mlp.up_proj.weight"))
    return runner
training.sharded = seen

model = small_model()
found = [tests.outcome(model, run, sys.argv[1]) for run in tests.RUNS]
report = {"found": found, "kinds": sorted(kinds), "plain": type(model.model.layers[0]).__name__}
open(os.path.join(sys.argv[1], f"rank{os.environ['RANK']}.json"), "w").write(json.dumps(report))
"""


def outcome(model: Any, run: dict[str, Any], folder: str | None = None) -> dict[str, Any]:
    """Scores and history of one of `RUNS`; with a folder its state is written there."""
    options = {key: value for key, value in run.items() if key != "policy"}
    state = None if folder is None else Path(folder) / "state"
    done = learn(model, run["policy"], sequences(), steps=STEPS, batch=BATCH, seed=1, checkpoint=state, resume=False,
                 **options, **LOCAL)  # fmt: skip
    return {"scores": table(done).tolist(), "history": list(done.history)}


def together(commands: list[list[str]], timeout: int = 300) -> list[subprocess.CompletedProcess[str]]:
    """Run processes as ranks of one group, with the environment that torchrun gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": str(len(commands)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    group |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(
            command,
            env={**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank, command in enumerate(commands)
    ]
    try:
        said = [process.communicate(timeout=timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    return [subprocess.CompletedProcess(p.args, p.returncode, *text) for p, text in zip(started, said, strict=True)]


def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    done = together([[sys.executable, "-c", WORKER, str(tmp_path)]] * 2)
    assert [p.returncode for p in done] == [0, 0], done[0].stderr + done[1].stderr
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0]["found"] == ranks[1]["found"]
    # The weights of a layer were in halves, and the model itself was left alone.
    assert ranks[0]["kinds"] == ["DTensor (24, 32)"] and ranks[0]["plain"] == "LlamaDecoderLayer"
    model = small_model()
    for run, both in zip(RUNS, ranks[0]["found"], strict=True):
        alone = outcome(model, run)
        apart = torch.tensor(both["scores"]) - torch.tensor(alone["scores"])
        assert float(apart.abs().max()) < 1e-5, run
        for one, two in zip(alone["history"], both["history"], strict=True):
            assert two == pytest.approx(one, rel=1e-4, abs=1e-6), run
    # One process alone goes on from what two have written.
    state = tmp_path / "state"
    assert json.loads((state / "state.json").read_text())["step"] == STEPS
    last = RUNS[-1]
    options = {key: value for key, value in last.items() if key != "policy"}
    taken = learn(
        model, last["policy"], sequences(), steps=STEPS, batch=BATCH, seed=1, checkpoint=state, **options, **LOCAL
    )
    assert table(taken).tolist() == ranks[0]["found"][-1]["scores"]


@pytest.mark.slow
def test_the_command_under_torchrun(tmp_path: Path) -> None:
    """The standard launcher; the first process alone writes and speaks."""
    small_model().save_pretrained(tmp_path / "model")
    lines = [json.dumps({"input_ids": list(one.ids)}) for one in sequences()]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    arguments = ["learn", "prulong", "--model", "model", "--data", "data.jsonl", "--steps", "3", "--batch", "2"]
    arguments += ["--keep", "50%", "--set", "n_sink=2", "--set", "window=8", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    found = []
    for start, out in (([sys.executable, "-m"], "one.tsv"), (launcher, "two.tsv")):
        done = subprocess.run([*start, "kvcompile", *arguments, "--out", out], cwd=tmp_path, env=environment,
                              capture_output=True, text=True, timeout=200)  # fmt: skip
        assert done.returncode == 0, done.stderr
        found.append(torch.tensor(json.loads(done.stdout)["scores"]))
    assert torch.allclose(*found, atol=1e-5)
    assert (tmp_path / "one.tsv").read_text() == (tmp_path / "two.tsv").read_text()


def test_each_process_takes_as_many_forwards() -> None:
    from kvcompile.learning.sources import Reader, load_data

    given = [Sequence(range(3, 3 + n)) for n in (40, 4, 4, 4)]
    data = load_data(given, Reader(None, 256, None, None), count=4, seed=0, labels=True, answers=False)
    whole = data.batch(0, 0, 4)
    device = torch.device("cpu")
    parts = [_parts(whole, Group(rank, 2, device).rows(4)) for rank in range(2)]
    assert len(parts[0]) == len(parts[1])
    rows = sorted(row[0].tolist() for part in (*parts[0], *parts[1]) for row in part.ids.split(1))
    assert [row[:3] for row in rows] == [[3, 4, 5]] * 4 and max(map(len, rows)) == 39


def test_a_batch_that_processes_cannot_share_is_refused() -> None:
    with pytest.raises(KvCompileError, match="batch=3 cannot be shared evenly by 2 processes"):
        Group(0, 2, torch.device("cpu")).check(3)
