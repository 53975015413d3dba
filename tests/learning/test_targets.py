"""What gates learn from equals plain loops over the published definitions, whatever the text's length."""

from __future__ import annotations

import math

import pytest
import torch

from kvcompile.dsl.learn_gate import GateBlock
from kvcompile.kernels.gates import Gate
from kvcompile.learning import targets
from kvcompile.learning.targets import (
    Text,
    asked_in,
    divergence,
    gate_logits,
    landmarks,
    recalled,
    rows_of,
    true_parts,
    units_of,
)

HEADS, GROUP, D, WIDTH = 2, 2, 4, 6


def text_of(tokens: int) -> Text:
    generator = torch.Generator().manual_seed(tokens)
    q = torch.randn(HEADS, GROUP, tokens, D, generator=generator) * 2
    k = torch.randn(HEADS, tokens, D, generator=generator)
    return Text(q, k, q + 1, k - 1, 0.7)


def gate_block(pooled: bool, joined: bool, size: int = 4, offset: int = 0) -> GateBlock:
    return GateBlock("live", pooled, joined, WIDTH, size, offset, ("min", "mean"), False)


def attention(text: Text, head: int, g: int, at: int) -> list[float]:
    logits = [text.scale * float(text.q[head, g, at] @ text.k[head, j]) for j in range(at + 1)]
    top = max(logits)
    total = sum(math.exp(x - top) for x in logits)
    return [math.exp(x - top) / total for x in logits]


def parts_by_hand(gate: GateBlock, text: Text, head: int) -> dict[int, list[list[float]]]:
    """For each query of the gate (its unit if it is pooled), and each group or 1: the part of every unit before."""
    tokens, out = text.k.shape[1], {}
    for at in range(tokens):
        own = (at - gate.offset) // gate.size
        if own < 1:
            continue
        lines = []
        for g in range(GROUP):
            attn = attention(text, head, g, at)
            starts = [gate.offset + u * gate.size for u in range(own)]
            lines.append([max(attn[s : s + gate.size]) for s in starts])
        key = own if gate.pooled else at
        before = out.setdefault(key, lines)
        out[key] = [[max(a, b) for a, b in zip(x, y, strict=True)] for x, y in zip(before, lines, strict=True)]
    if gate.joined:
        out = {key: [[max(column) for column in zip(*lines, strict=True)]] for key, lines in out.items()}
    return {key: [[x / sum(line) for x in line] for line in lines] for key, lines in out.items()}


@pytest.mark.parametrize("tokens", [23, 25, 24])
@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("pooled", [False, True])
def test_targets_are_those_of_plain_loops(
    pooled: bool, joined: bool, offset: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "WIDE", GROUP * tokens * 9)  # several blocks of queries
    gate, text = gate_block(pooled, joined, offset=offset), text_of(tokens)
    units = units_of(gate, tokens)
    for head in range(HEADS):
        expected, found = parts_by_hand(gate, text, head), {}
        for some in asked_in(gate, tokens, GROUP):
            parts = true_parts(gate, text, head, some, units)
            keys = some.which if pooled else some.place
            found |= {int(key): parts[:, i] for i, key in enumerate(keys)}
        assert found.keys() == expected.keys() and len(found) == rows_of(gate, tokens)
        for key, lines in expected.items():
            wide = torch.tensor([line + [0.0] * (units - len(line)) for line in lines])
            assert torch.allclose(found[key], wide, atol=1e-5)


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("pooled", [False, True])
def test_what_the_gate_says_is_of_the_mean_query_and_of_units_before(pooled: bool, joined: bool) -> None:
    gate, text, tokens = gate_block(pooled, joined, offset=2), text_of(21), 21
    generator = torch.Generator().manual_seed(0)
    q = (HEADS, GROUP * D, WIDTH) if joined else (HEADS * GROUP, D, WIDTH)
    weights = Gate(torch.randn(*q, generator=generator), torch.randn(HEADS, 2 * D, WIDTH, generator=generator))
    units = units_of(gate, tokens)
    assert units == 4  # the last query is the third of unit 4
    for some in asked_in(gate, tokens, GROUP):
        found = gate_logits(gate, weights, text, 1, some, units)
        for i, own in enumerate(some.which.tolist()):
            first = gate.offset + own * gate.size
            mine = range(first, min(first + gate.size, tokens)) if pooled else [int(some.place[i])]
            mean = torch.stack([text.asked[1, :, at] for at in mine]).mean(0)
            for g in range(1 if joined else GROUP):
                asked = mean.flatten() @ weights.q[1] if joined else mean[g] @ weights.q[GROUP + g]
                for u in range(units):
                    keys = text.held[1, 2 + 4 * u : 6 + 4 * u]
                    held = torch.cat([keys.min(0).values, keys.mean(0)]) @ weights.k[1]
                    expected = float(asked @ held) / math.sqrt(WIDTH) if u < own else float("-inf")
                    assert float(found[g, i, u]) == pytest.approx(expected, abs=1e-4)


def test_landmarks_are_pooled_in_the_order_of_the_gate() -> None:
    keys = torch.arange(24.0).view(1, 12, 2)
    assert landmarks(gate_block(True, True), keys, 2).tolist() == [[[0, 1, 3, 4], [8, 9, 11, 12]]]


@pytest.mark.parametrize(("tokens", "units"), [(0, 0), (8, 0), (9, 1), (12, 1), (13, 2)])
def test_a_unit_counts_once_a_query_comes_after_it(tokens: int, units: int) -> None:
    gate = gate_block(True, True, offset=4)
    assert units_of(gate, tokens) == units and (rows_of(gate, tokens) > 0) == (units > 0)


def test_divergence_is_0_for_the_gate_that_says_the_target_and_grows_from_there() -> None:
    target = torch.tensor([[[0.5, 0.25, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0]]])
    right = torch.tensor([[[0.5, 0.25, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0]]]).log()
    assert float(divergence(target, right)) == pytest.approx(0, abs=1e-6)
    even = torch.tensor([[[0.0, 0.0, 0.0, float("-inf")], [0.0] + [float("-inf")] * 3]])
    by_hand = 0.5 * math.log(0.5 * 3) + 2 * 0.25 * math.log(0.25 * 3)
    assert float(divergence(target, even)) == pytest.approx(by_hand, abs=1e-6)


def test_recall_counts_the_best_eighth_where_there_is_a_choice() -> None:
    gate, units = gate_block(False, True, size=1), 17
    some = next(iter(asked_in(gate, units + 1, GROUP)))
    target = torch.rand(1, units, units, generator=torch.Generator().manual_seed(0))
    target = target.masked_fill(torch.arange(units) >= some.which[:, None], 0.0)
    hits, judged = recalled(target, target.log(), some)
    assert (float(hits), int(judged)) == (16, 16)  # of 17 queries the first has one unit alone
    hits, _ = recalled(target, torch.where(target > 0, -target, float("-inf")), some)
    best = [-(-n // 8) for n in range(2, units + 1)]
    worst = [max(0, 2 * m - n) / m for n, m in zip(range(2, units + 1), best, strict=True)]
    assert float(hits) == pytest.approx(sum(worst))
