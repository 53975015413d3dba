"""P5 for every supported model family: no graph breaks, and a graph is made anew at most twice, whatever the lengths.

Layers of one class that differ (windows, rotary or not, dense or mixture of experts) have graphs of their own.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import kvcompile
from kvcompile.api import optimized
from tests.families import FAMILIES, family_model, prompt
from tests.model.test_families import POLICIES, options_of, sample_of

LENGTHS = (3, 40, 17, 2, 64, 9, 33, 128, 26, 51)
UNLIKE = ("qwen2_sliding", "qwen2_moe", "gemma2", "gemma3", "gpt_oss", "olmo3", "cohere2", "smollm3")  # layers differ


def graphs_of(name: str, policy: str, folder: Path, steps: tuple[int, ...]) -> tuple[int, int, int]:
    """Graph breaks, recompiles and graphs of a decode step after prompts of `LENGTHS`, with so many steps each."""
    model, sample = family_model(name), sample_of(policy, name)
    kvcompile.optimize(model, sample.policy, backend="cpu", compile="eager", **options_of(sample, folder))
    for seed, (length, more) in enumerate(zip(LENGTHS, steps, strict=False)):
        ids = torch.tensor([prompt(length, seed=seed)])
        model.generate(ids, max_new_tokens=more + 1, min_new_tokens=more + 1, do_sample=False)
    said = kvcompile.report(model).to_dict()
    records = optimized(model).forward.engine.layers.records
    return said["graph_breaks"], said["recompiles"], sum(record.phase == "step" for record in records)


@pytest.mark.parametrize("name", ["gemma3", "qwen2_moe"])
def test_graphs_of_a_family_hold_for_other_lengths(name, tmp_path):
    assert graphs_of(name, "h2o", tmp_path, (3, 3, 3)) == (0, 0, 1 + (name in UNLIKE))


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_p5_graphs_of_a_family_hold_for_ten_lengths_and_256_steps(family, policy, tmp_path):
    breaks, recompiles, _ = graphs_of(family, policy, tmp_path, (256,) * len(LENGTHS))
    assert breaks == 0
    assert recompiles <= 2
