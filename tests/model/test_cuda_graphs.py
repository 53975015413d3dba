"""CUDA graphs without a GPU: what is captured, replayed and captured anew, and that answers stay what they are.

A stand-in for torch.cuda carries a captured step out again when it is replayed, on the addresses and buffers that it
was captured with, and overwrites its output as a graph does; so a stale address or buffer shows as a wrong answer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import kvcompile
from kvcompile.cuda_graphs import AHEAD, CudaRecorder, StepGraphs, refuse_graphs
from kvcompile.kernels.plan import ModelFacts
from kvcompile.passes import compile_policy
from kvcompile.store import on_device
from tests.driving import LIBRARY, Sizes
from tests.models import random_model, tokens

SIZES = Sizes(budget=20, observe=4, chunk=16, percent=25)
STEPS = 40


@dataclass
class Recording:
    run: Callable[[], Any]
    log: list[str]
    output: Any = None

    def replay(self) -> Any:
        self.log.append("replay")
        found = self.run()
        if self.output is None:
            self.output = found
        else:
            self.output.logits.copy_(found.logits)
        return self.output


@dataclass
class Recorder:
    log: list[str] = field(default_factory=list)

    def aside(self, run: Callable[[], Any]) -> Any:
        self.log.append("aside")
        return run()

    def capture(self, run: Callable[[], Any]) -> Recording:
        self.log.append("capture")
        return Recording(run, self.log)


def model_of(name: str, folder: Path, graphs: StepGraphs | None, compile: str = "off") -> Any:
    """On pages, as on a GPU, but with the reference's operators."""
    sample = LIBRARY[name](SIZES)
    model = sample.model()
    kvcompile.optimize(model, sample.policy, backend="reference", compile=compile, **sample.options(folder))
    model.forward.engine.paged = True
    model.forward.engine.graphs = graphs
    return model


def decode(model: Any, steps: int, prompt: int = 50, batch: int = 2) -> tuple[list[torch.Tensor], list[list[int]]]:
    """Logits of each call and the positions kept; every output is held until the end."""
    logits, cache = [], None
    with torch.no_grad():
        ids = torch.tensor([tokens(prompt, seed=b) for b in range(batch)])
        for _ in range(steps + 1):
            out = model(ids, past_key_values=cache, logits_to_keep=1)
            logits.append(out.logits)
            cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
    layers = range(model.config.num_hidden_layers)
    return logits, [p.tolist() for layer in layers for row in range(batch) for p in cache.positions(layer, row)]


@pytest.mark.parametrize(
    ("name", "compile"),
    [
        ("keep_all", "off"),
        ("streaming", "off"),
        ("h2o", "off"),
        ("tova", "off"),
        ("h2o", "eager"),
        ("prulong", "eager"),
    ],
)
def test_replayed_steps_are_the_steps(name: str, compile: str, tmp_path: Path) -> None:
    expected, kept = decode(model_of(name, tmp_path, None, compile), STEPS)
    graphs = StepGraphs(Recorder())
    found, found_kept = decode(model_of(name, tmp_path, graphs, compile), STEPS)
    assert found_kept == kept
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert graphs.replayed >= STEPS - 6


def test_a_step_runs_then_is_captured_then_replayed(tmp_path: Path) -> None:
    recorder = Recorder()
    model = model_of("keep_all", tmp_path, StepGraphs(recorder))
    decode(model, 4)
    assert recorder.log == ["aside", "capture", "replay", "replay", "replay"]
    report = kvcompile.report(model)
    assert (report.cuda_graphs, report.cuda_graph_replays) == (1, 3)
    assert "CUDA: 1 captured, 3 replays" in str(report)


EVERY_FOURTH = """
policy fourth(n=24):
    keep recent(n)
    at prefill.end, every(4)
"""


def test_steps_with_and_without_evictions_have_a_graph_each() -> None:
    recorder = Recorder()
    model = random_model("llama64")
    kvcompile.optimize(model, EVERY_FOURTH, backend="reference", compile="eager")
    model.forward.engine.paged, model.forward.engine.graphs = True, StepGraphs(recorder)
    evicting: list[bool] = []
    original = model.forward._evict_opened
    model.forward._evict_opened = lambda call: (evicting.append(True), original(call))
    decode(model, 12)
    # Steps 1 to 3 decode (as it is, captured, replayed), the fourth evicts, and so on.
    assert recorder.log == [
        "aside", "capture", "replay", "replay", "aside",
        "replay", "replay", "replay", "capture", "replay",
        "replay", "replay", "replay", "replay",
    ]  # fmt: skip
    assert len(evicting) == 3


def test_a_pool_that_moves_is_captured_anew(tmp_path: Path) -> None:
    graphs = StepGraphs(Recorder())
    model = model_of("keep_all", tmp_path, graphs)
    with torch.no_grad():
        out = model(torch.tensor([tokens(20)]), logits_to_keep=1)
        cache, addresses = out.past_key_values, []
        for _ in range(AHEAD + 40):
            addresses.append(cache.store.pools.k.data_ptr())
            model(torch.tensor([[7]]), past_key_values=cache, logits_to_keep=1)
    moves = len(set(addresses)) - 1
    assert graphs.captured == 1 + moves
    assert 1 <= moves <= 2  # room is made for many steps at a time


def test_other_batches_and_caches_have_graphs_of_their_own(tmp_path: Path) -> None:
    graphs = StepGraphs(Recorder())
    model = model_of("streaming", tmp_path, graphs)
    step = torch.tensor([[7]])
    with torch.no_grad():
        one = model(torch.tensor([tokens(30)])).past_key_values
        two = model(torch.tensor([tokens(30, seed=1), tokens(30, seed=2)])).past_key_values
        for _ in range(4):  # in turns: each cache keeps its graph
            model(step, past_key_values=one, logits_to_keep=1)
            model(step.expand(2, 1), past_key_values=two, logits_to_keep=1)
        assert graphs.captured == 2
        before = graphs.replayed
        out = model(step, past_key_values=one, output_hidden_states=True)
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    assert graphs.replayed == before  # more than logits is asked for, so the step runs as it is
    assert len(graphs._held) == 2
    del one, two, out
    model.forward.run = None
    assert len(graphs._held) == 0  # graphs go with their cache


def test_embeddings_are_an_input_of_their_own(tmp_path: Path) -> None:
    graphs = StepGraphs(Recorder())
    model, plain = model_of("tova", tmp_path, graphs), model_of("tova", tmp_path, None)
    results = []
    for each in (model, plain):
        with torch.no_grad():
            cache = each(torch.tensor([tokens(30)])).past_key_values
            for token in (4, 5, 6):
                each(torch.tensor([[token]]), past_key_values=cache)
            for token in (7, 8, 9):
                embedded = each.get_input_embeddings()(torch.tensor([[token]]))
                results.append(each(inputs_embeds=embedded, past_key_values=cache).logits)
    assert all(torch.equal(a, b) for a, b in zip(results[:3], results[3:], strict=True))
    assert graphs.captured == 2


FACTS = ModelFacts(3, 4, 2, 64)


def test_what_cannot_be_captured_is_refused_with_the_reason() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    plan = compile_policy("snapkv", FACTS).plan
    refuse_graphs(plan, "triton", cuda)
    with pytest.raises(kvcompile.KvCompileError, match="needs backend 'triton', and here it is 'reference'"):
        refuse_graphs(plan, "reference", cuda)
    with pytest.raises(kvcompile.KvCompileError, match="needs a CUDA device, and the model is on cpu"):
        refuse_graphs(plan, "triton", cpu)
    with pytest.raises(kvcompile.KvCompileError, match=r"class all, after a step: .*condition"):
        refuse_graphs(compile_policy("r_kv", FACTS).plan, "triton", cuda)
    refuse_graphs(compile_policy("keydiff", FACTS).plan, "triton", cuda)  # only its prefill goes by the reference
    model = random_model("llama64")
    with pytest.raises(kvcompile.KvCompileError, match="needs backend 'triton', and here it is 'cpu'"):
        kvcompile.optimize(model, "snapkv", compile="cudagraph")
    with pytest.raises(kvcompile.KvCompileError, match=r"one of auto, .*inductor, cudagraph"):
        kvcompile.optimize(model, "snapkv", compile="graph")
    assert "_kvcompile" not in vars(model)


class Stream:
    """Notes what it is told to wait for."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


def test_a_first_run_is_ordered_with_what_comes_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    main, side = Stream("main", log), Stream("side", log)
    entered: list[str] = []

    @contextlib.contextmanager
    def on(stream: Stream):
        entered.append(stream.name)
        yield
        entered.pop()

    class Logits:
        def record_stream(self, stream: Stream) -> None:
            log.append(f"logits used on {stream.name}")

    @dataclass
    class Output:
        logits: Logits

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)

    def run() -> Output:
        log.append(f"run on {entered[-1]}")
        return Output(Logits())

    CudaRecorder(torch.device("cuda")).aside(run)
    assert log == ["side waits for main", "run on side", "main waits for side", "logits used on main"]


def test_launches_go_to_the_device_of_the_cache() -> None:
    """Triton launches on the current device, which need not be the model's."""
    there = on_device(torch.device("cuda:1"))
    assert isinstance(there, torch.cuda.device) and there.idx == 1
    with on_device(torch.device("cpu")):
        pass


def test_a_capture_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def refusing(*_: object, **__: object):
        yield
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", refusing)
    streams: list[str] = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "main")
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    recorder = CudaRecorder(torch.device("cuda"))
    with pytest.raises(kvcompile.KvCompileError, match=r"operation not permitted .*compile='eager'") as caught:
        recorder.capture(lambda: None)
    assert "\n" not in str(caught.value)
    assert streams == ["main"]  # torch would leave the capture's stream current
