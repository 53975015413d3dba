"""Twenty thousand broken policies: always findings or a valid policy, in good time and bounded memory.

The texts run in a process of their own whose address space is limited, so that a runaway is a failure here.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.dsl.mutants import MEGABYTE, SECONDS, TEXTS, mutant

ROOT = Path(__file__).parents[2]


def tried(count: int, seed: int, timeout: int) -> dict[str, Any]:
    """What `tests.dsl.mutants` says of so many texts."""
    command = [sys.executable, "-m", "tests.dsl.mutants", str(count), str(seed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    said: dict[str, Any] = json.loads(done.stdout)
    assert sum(said["outcomes"].values()) == count
    return said


def test_two_hundred() -> None:
    said = tried(200, seed=0, timeout=120)
    assert said["breaches"] == {}


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("seed", [20250101, 20250102])
def test_ten_thousand(seed: int) -> None:
    said = tried(10_000, seed, timeout=2900)
    assert said["breaches"] == {}
    assert said["seconds"] < SECONDS
    assert said["mb"] < 400
    # The faults reach every stage: texts that are fine, and findings of every group that a text alone can have.
    groups = {code[:2] for code in said["outcomes"] if code.startswith("K")}
    assert said["outcomes"]["fine"] > 500 and groups >= {"K0", "K1", "K2", "K3", "K6", "K9"}


def test_the_faults_are_of_every_size() -> None:
    texts = [mutant(random.Random(seed)) for seed in range(1500)]
    assert len(set(texts)) > 1200
    assert any(len(text.encode("utf-8", "replace")) > MEGABYTE for text in texts)
    assert sum(text in TEXTS for text in texts) < 100
