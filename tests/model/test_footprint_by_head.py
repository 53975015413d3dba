"""Footprint and peak of every layer and KV head: report against sums by hand, and explain against report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import kvcompile
from tests.driving import BACKENDS, call, drive, one_by_one, padded
from tests.models import random_model, tokens

Held = Callable[[int], int]  # entries of a row before a forward, from the tokens that it has seen
MASK = ((1, 0), (0, 1), (0, 0))
SINK, WINDOW = 3, 11


def everything(seen: int) -> int:
    return seen


def local(seen: int) -> int:
    recent = min(seen, WINDOW)
    return recent + min(seen - recent, SINK)


@dataclass(frozen=True)
class Case:
    """A policy whose rows' lengths follow from what was seen: its text, pieces, and what each row holds."""

    text: str
    chunk: int | None
    held: Callable[[int, int], Held]


CASES = {
    "keep_all": Case("policy mine():\n    keep all\n", None, lambda layer, head: everything),
    "streaming": Case(
        f"policy mine():\n    keep sink({SINK}) | recent({WINDOW})\n    at chunk, step\n", None, lambda *row: local
    ),
    "streaming in pieces": Case(
        f"policy mine():\n    keep sink({SINK}) | recent({WINDOW})\n    at chunk(8), step\n", 8, lambda *row: local
    ),
    "prulong": Case(
        'heads retrieval = table("mask.tsv")\nheads local = rest\n'
        "policy mine():\n    retrieval: keep all\n"
        f"    local: keep sink({SINK}) | recent({WINDOW})\n    at chunk(16), step\n",
        16,
        lambda layer, head: everything if MASK[layer][head] else local,
    ),
}


def cut(n: int, chunk: int | None) -> list[int]:
    size = chunk or n
    return [min(size, n - start) for start in range(0, n, size)]


def by_hand(forwards: Sequence[int], held: Held) -> tuple[float, float]:
    """Footprint and peak of one row: the definition, forward by forward."""
    seen = area = peak = 0
    for n in forwards:
        area += n * (n + 1) // 2 + n * held(seen)
        peak = max(peak, n + held(seen))
        seen += n
    return area / (seen * (seen + 1) / 2), peak / seen


def options(case: Case, tmp_path) -> dict[str, object]:
    if case is not CASES["prulong"]:
        return {}
    path = tmp_path / "mask.tsv"
    path.write_text("\n".join("\t".join(map(str, row)) for row in MASK) + "\n")
    return {"tables": {"retrieval": str(path)}}


def grid(case: Case, forwards: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Footprint and peak [layer][KV head] by hand."""
    rows = [[by_hand(forwards, case.held(layer, head)) for head in range(2)] for layer in range(3)]
    both = torch.tensor(rows, dtype=torch.float64)
    return both[..., 0], both[..., 1]


def same(found: list[list[float]], wanted: Tensor) -> None:
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), wanted, atol=1e-12, rtol=0)


def optimised(case: Case, backend: str, tmp_path):
    model = random_model()
    kvcompile.optimize(model, case.text, backend=backend, compile="off", **options(case, tmp_path))
    return model


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_one_prompt_and_its_steps(name, backend, tmp_path):
    """By hand, measured and explained."""
    case = CASES[name]
    model = optimised(case, backend, tmp_path)
    drive(model, tokens(45, seed=1), *one_by_one(tokens(7, seed=2)))
    report = kvcompile.report(model).to_dict()
    footprint, peak = grid(case, [*cut(45, case.chunk), *[1] * 7])
    same(report["footprint_by_head"], footprint)
    same(report["peak_by_head"], peak)
    assert report["footprint"] == pytest.approx(footprint.mean().item(), abs=1e-12)
    assert report["peak"] <= peak.mean().item() + 1e-12
    plan = kvcompile.explain(case.text, model.config, prompt=45, generate=7, **options(case, tmp_path)).to_dict()
    same([layer["footprint_by_head"] for layer in plan["by_layer"]], footprint)
    same([layer["peak_by_head"] for layer in plan["by_layer"]], peak)
    assert all(layer["exact"] and layer["exact_by_head"] for layer in plan["by_layer"])
    same([[layer["footprint"]] for layer in plan["by_layer"]], footprint.mean(1, keepdim=True))


@pytest.mark.parametrize("name", CASES)
def test_two_turns_go_on_counting(name, tmp_path):
    case = CASES[name]
    model = optimised(case, "cpu", tmp_path)
    drive(model, tokens(30, seed=3), *one_by_one(tokens(4, seed=4)), tokens(21, seed=5), *one_by_one(tokens(3, seed=6)))
    footprint, peak = grid(case, [*cut(30, case.chunk), *[1] * 4, *cut(21, case.chunk), *[1] * 3])
    report = kvcompile.report(model)
    same(report.footprint_by_head, footprint)
    same(report.peak_by_head, peak)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CASES)
def test_a_padded_batch_is_the_mean_of_its_sequences(name, side, tmp_path):
    """Prompts of other lengths need other numbers of pieces: a forward then brings some sequences nothing."""
    case = CASES[name]
    model = optimised(case, "cpu", tmp_path)
    lengths = (37, 61, 20)
    ids, mask = padded([tokens(n, seed=n) for n in lengths], side)
    _, cache = call(model, ids, mask=mask)
    for step in range(3):
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
        call(model, torch.tensor([[50 + step]] * 3), cache, mask)
    alone = [grid(case, [*cut(n, case.chunk), 1, 1, 1]) for n in lengths]
    report = kvcompile.report(model).to_dict()
    same(report["footprint_by_head"], torch.stack([footprint for footprint, _ in alone]).mean(0))
    same(report["peak_by_head"], torch.stack([peak for _, peak in alone]).mean(0))
    assert report["footprint"] == pytest.approx(sum(f.mean().item() for f, _ in alone) / 3, abs=1e-12)


def test_peeked_tokens_count_where_they_stand_and_not_in_the_total():
    """Pieces of 10 keep exactly 3 each: int(30 %), not 64 more; 2 tokens run along with all but the last."""
    model = random_model()
    kvcompile.optimize(model, "snapkv_chunked", backend="cpu", compile="off", ratio="30%", observe=2, pool=3, c=10)
    drive(model, tokens(30, seed=7), *one_by_one(tokens(2, seed=8)))
    area = 12 * 13 / 2 + (12 * 13 / 2 + 12 * 3) + (10 * 11 / 2 + 10 * 6) + (1 + 9) + (1 + 10)
    report = kvcompile.report(model).to_dict()
    same(report["footprint_by_head"], torch.full((3, 2), area / (32 * 33 / 2), dtype=torch.float64))
    same(report["peak_by_head"], torch.full((3, 2), 16 / 32, dtype=torch.float64))


def test_rows_are_those_of_kv_heads_and_the_printed_report_names_the_extremes(tmp_path):
    case = CASES["prulong"]
    model = optimised(case, "cpu", tmp_path)
    assert model.config.num_attention_heads == 2 * model.config.num_key_value_heads
    drive(model, tokens(45, seed=1))
    report = kvcompile.report(model)
    assert [len(row) for row in report.footprint_by_head] == [2, 2, 2]
    low = report.footprint_by_head[0][1]
    assert f"{low:.4f} (layer 0, KV head 1) to 1.0000 (layer 1, KV head 1)" in str(report)
    text = str(kvcompile.explain(case.text, model.config, prompt=45, **options(case, tmp_path)))
    assert f"footprint {low:.4f} in class local to 1.0000 in class retrieval" in text
    even = optimised(CASES["keep_all"], "cpu", tmp_path)
    drive(even, tokens(9, seed=1))
    assert "KV head 0" not in str(kvcompile.report(even))
