"""P2 over drawn batches: prompts of mixed lengths with padding on either side, holes, empty rows, rows of one token,
steps that some rows sit out and a second turn that is padded anew give what each sequence gives alone.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

import kvcompile
from kvcompile.passes.facts import model_facts
from tests.driving import BACKENDS, LIBRARY, Sizes, call
from tests.families import VOCABULARY, family_model, prompt

POLICIES = ("keep_all", "snapkv", "h2o", "streaming", "adakv", "prulong", "tova")
FAMILIES = ("llama", "gemma2", "gpt_oss", "gpt2", "opt")
BATCHES = 200
LARGEST = 1e-4

Turn = list[list[int]]  # token ids of each row, where a row may have none


def scattered(draw: random.Random, rows: Turn) -> tuple[Tensor, Tensor]:
    """Token ids [B, n] and mask [B, n]; each row padded on the left, on the right, or with holes between its tokens,
    by any token, and now and then a column that is padding in every row."""
    width = max(1, *map(len, rows)) + draw.choice([0, 0, 1, 3])
    ids, mask = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(2))
    sides = draw.choice([["left"], ["right"], ["holes"], ["left", "right", "holes"]])
    for b, row in enumerate(rows):
        match draw.choice(sides):
            case "left":
                places = list(range(width - len(row), width))
            case "right":
                places = list(range(len(row)))
            case _:
                places = sorted(draw.sample(range(width), len(row)))
        ids[b] = draw.randrange(VOCABULARY)
        ids[b, places] = torch.tensor(row, dtype=torch.long)
        mask[b, places] = 1
    return ids, mask


def drawn_turns(draw: random.Random, batch: int) -> list[Turn]:
    """A prompt, steps, another prompt, a step."""
    first, second = [0, 1, 1, 2, *range(3, 40)], [0, 1, *range(2, 20)]
    lengths = [[draw.choice(first) for _ in range(batch)]]
    lengths += [[draw.choice([1, 1, 1, 0]) for _ in range(batch)] for _ in range(3)]
    lengths += [[draw.choice(second) for _ in range(batch)], [1] * batch]
    texts = [iter(prompt(sum(turn[b] for turn in lengths), seed=draw.randrange(10**6))) for b in range(batch)]
    return [[[next(text) for _ in range(n)] for n, text in zip(turn, texts, strict=True)] for turn in lengths]


def optimized(number: int, folder: Path):
    """The model of a drawn batch: every policy meets every family in 35 batches, and every backend in 70."""
    family, policy = FAMILIES[number % len(FAMILIES)], POLICIES[number % len(POLICIES)]
    model = family_model(family)
    facts = model_facts(model)
    mask = tuple(tuple((layer + head) % 2 for head in range(facts.kv_heads)) for layer in range(facts.layers))
    sample = LIBRARY[policy](Sizes(budget=10, observe=3, pool=3, chunk=7, sink=1, mask=mask))
    backend = BACKENDS[number // 35 % len(BACKENDS)]
    return kvcompile.optimize(model, policy, backend=backend, compile="off", **sample.options(folder))


def largest_difference(number: int, folder: Path) -> float:
    """Between the logits of the drawn batch of this number and those of each row alone. Kept positions are asserted."""
    draw = random.Random(number)
    model = optimized(number, folder)
    turns = drawn_turns(draw, draw.randint(2, 4))
    batch, most = len(turns[0]), 0.0
    together, alone = None, [None] * batch
    seen = torch.zeros(batch, 0, dtype=torch.long)
    for which, turn in enumerate(turns):
        ids, mask = scattered(draw, turn)
        seen = torch.cat([seen, mask], 1)
        found, together = call(model, ids, together, seen)
        for b, row in enumerate(turn):
            if not row:
                continue
            truth, alone[b] = call(model, torch.tensor([row]), alone[b])
            assert found.kept[b] == truth.kept[0], f"batch {number}: kept by row {b} after turn {which}"
            most = max(most, (found.logits[b, mask[b].bool()] - truth.logits[0]).abs().max().item())
    return most


@pytest.mark.parametrize("number", range(0, BATCHES, 20))
def test_p2_a_drawn_batch_equals_each_of_its_rows_alone(number, tmp_path):
    assert largest_difference(number, tmp_path) <= LARGEST


@pytest.mark.slow
def test_p2_padded_equals_unpadded_over_200_drawn_batches(tmp_path):
    worst = max((largest_difference(number, tmp_path), number) for number in range(BATCHES))
    assert worst[0] <= LARGEST, f"logits of batch {worst[1]} are off by {worst[0]:.2e}"
