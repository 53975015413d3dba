"""A whole decode step on the interpreter: nothing in it passes between host and device, and a replay is the step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvcompile
from kvcompile.cuda_graphs import StepGraphs
from tests.kernels.triton_interpreted.host_reads import HostRead, no_host_reads
from tests.model.test_cuda_graphs import Recorder

POLICIES: dict[str, dict[str, object]] = {
    "keep_all": {},
    "snapkv": {"budget": 16, "observe": 4},
    "h2o": {"heavy": 6, "local": 6},
    "tova": {"budget": 16},
    "prulong": {"n_sink": 2, "window": 8, "c": 16, "tables": {"retrieval": "far.tsv"}},
    "streaming": {"n_sink": 2, "window": 12},
    "moba": {"size": 8, "n": 2},
    "powerattention": {"size": 4, "n_sink": 2, "window": 6},
}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("KVC_CACHE", str(tmp_path))
    (tmp_path / "far.tsv").write_text("1\t0\n0\t0\n")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, vocab_size=97,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


class Watched(Recorder):
    """Replays where a host read is an error: what a replay carries out is what a graph would hold."""

    def capture(self, run: Any) -> Any:
        def watched() -> Any:
            with no_host_reads():
                return run()

        return super().capture(watched)


def run(model: Any, steps: int) -> torch.Tensor:
    with torch.no_grad():
        out = model(torch.arange(3, 23).expand(2, -1), logits_to_keep=1)
        cache, logits = out.past_key_values, [out.logits]
        for i in range(steps):
            logits.append(model(torch.tensor([[5 + i], [40 + i]]), past_key_values=cache).logits)
    return torch.cat(logits, 1)


SLOW = ("keep_all", "snapkv", "streaming", "powerattention")  # what the others show as well


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in POLICIES])
def test_a_captured_step_reads_nothing_on_the_host_and_is_the_step(name: str, model: Any) -> None:
    kvcompile.optimize(model, name, backend="triton", compile="eager", **POLICIES[name])
    expected = run(model, 2)
    graphs = model.forward.engine.graphs = StepGraphs(Watched())
    assert torch.equal(run(model, 2), expected)
    assert graphs.replayed == 1


def test_host_reads_are_seen() -> None:
    x = torch.arange(6.0)
    unsafe = (
        lambda: x.sum().item(),
        lambda: bool(x.any()),
        lambda: int(x[0]),
        lambda: x.nonzero(),
        lambda: x[x > 2],
        lambda: x.masked_select(x > 2),
        lambda: x.__setitem__(x > 2, 0.0),
        lambda: x.tolist(),
        lambda: torch.equal(x, x),
        lambda: x.to("cpu", torch.float64),
        lambda: torch.tensor([1, 2], device=x.device),
    )
    for read in unsafe:
        with pytest.raises(HostRead), no_host_reads():
            read()
    with no_host_reads():
        torch.where(x > 2, x, 0.0)[torch.arange(3)].sum()


def test_a_step_by_the_reference_would_be_seen(model: Any) -> None:
    kvcompile.optimize(model, "h2o", backend="reference", compile="off", **POLICIES["h2o"])
    model.forward.engine.paged, model.forward.engine.graphs = True, StepGraphs(Watched())
    with pytest.raises(HostRead):
        run(model, 3)
