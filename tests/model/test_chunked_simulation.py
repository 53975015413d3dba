"""The real compiled run, piece by piece, against a simulation by dense masks: kept sets, logits and footprint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import kvcompile
from kvcompile.evaluation import tales
from tests import mask_simulation as dense
from tests.driving import drive, one_by_one

FOLDER = Path(__file__).parents[2] / "examples" / "recall_model"
PROMPT, PIECE, STEPS = 256, 32, 3
HEADS, FULL = 12, 3

STREAMING = "policy mine():\n    keep sink(4) | recent(60)\n    at chunk(32), step\n"
H2O = """policy mine():
    state acc = 0
    on attend: acc += mean[g] sum[q] attn
    keep recent(24) | top(40) by acc per head
    at chunk(32), step
"""
NAIVE = """policy mine():
    score s = avgpool(mean[g] sum[q in last(8)] attn, 5)
    keep all
    at chunk(32)
    keep frozen | top(8) by -age per head | top(40% of chunk - 8) by s per head
    at filled(32), prefill.end
"""


def retrieval() -> set[tuple[int, int]]:
    """The best heads of the shipped table."""
    rows = [[float(x) for x in line.split("\t")] for line in (FOLDER / "heads.tsv").read_text().splitlines()]
    ranked = sorted((-score, layer, head) for layer, row in enumerate(rows) for head, score in enumerate(row))
    return {(layer, head) for _, layer, head in ranked[:FULL]}


@dataclass(frozen=True)
class Case:
    policy: str
    rule: Callable[[], dense.Rule]
    params: dict[str, object] = field(default_factory=dict)
    peek: int = 0


CASES = {
    "streaming": Case(STREAMING, lambda: dense.streaming(4, 60)),
    "prulong": Case(
        "prulong",
        lambda: dense.prulong(retrieval(), 4, 60),
        {"n_sink": 4, "window": 60, "c": PIECE, "tables": {"retrieval": str(FOLDER / "heads.tsv")}},
    ),
    "snapkv patched": Case(
        "snapkv_chunked",
        lambda: dense.snapkv_patched(40, 8, 5),
        {"ratio": "40%", "observe": 8, "pool": 5, "c": PIECE},
        peek=8,
    ),
    "snapkv naive": Case(NAIVE, lambda: dense.snapkv_naive(40, 8, 5)),
    "h2o": Case(H2O, lambda: dense.h2o(40, 24)),
}


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)
    ids = tokenizer(tales.prompts(1, PROMPT, seed=4)[0].text)["input_ids"]
    assert len(ids) == PROMPT
    return ids


def shipped() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(FOLDER, local_files_only=True).eval()


@pytest.mark.parametrize("compile", ["off", "eager"])
@pytest.mark.parametrize("name", CASES)
def test_the_compiled_run_is_the_dense_simulation(name, compile, prompt):
    case, forced = CASES[name], prompt[40 : 40 + STEPS]
    simulated = dense.Simulation(shipped(), case.rule(), PIECE, case.peek)
    truth = [(simulated.feed(prompt), simulated.alive.clone())]
    truth += [(simulated.feed([token], step=True), simulated.alive.clone()) for token in forced]

    model = shipped()
    kvcompile.optimize(model, case.policy, backend="cpu", compile=compile, **case.params)
    seen = drive(model, prompt, *one_by_one(forced))
    for at, (mine, (logits, alive)) in enumerate(zip(seen, truth, strict=True)):
        assert mine.kept[0] == tuple(tuple(tuple(row.nonzero().flatten().tolist()) for row in x) for x in alive), at
        torch.testing.assert_close(mine.logits[0], logits, atol=1e-4, rtol=0)
    report = kvcompile.report(model).to_dict()
    for key, wanted in (("footprint_by_head", simulated.footprint()), ("peak_by_head", simulated.peak())):
        torch.testing.assert_close(torch.tensor(report[key], dtype=torch.float64), wanted, atol=1e-12, rtol=0)
    assert report["footprint"] == pytest.approx(simulated.footprint().mean().item(), abs=1e-12)
    assert report["footprint"] < 0.75
    assert report["graph_breaks"] == 0
    # One dense forward under the final mask is the same again, and its marks are the pairs; peeked ones left none.
    torch.testing.assert_close(simulated.dense(), torch.cat([logits for logits, _ in truth]), atol=1e-4, rtol=0)
    assert case.peek or torch.equal(simulated.read.sum((2, 3)), simulated.pairs)


def test_the_simulation_without_eviction_is_the_untouched_model(prompt):
    model = shipped()
    simulated = dense.Simulation(model, lambda look: (look.alive, look.frozen), PIECE)
    with torch.no_grad():
        untouched = model(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(simulated.feed(prompt), untouched, atol=1e-4, rtol=0)
    assert simulated.footprint().eq(1).all()
    assert simulated.peak().eq(1).all()
