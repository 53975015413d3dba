"""`verify` of every library policy on the CPU: kept sets and logits are the reference's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvcompile.verify import verify
from tests.driving import LIBRARY, Sizes
from tests.models import tokens


@pytest.mark.parametrize("name", LIBRARY)
def test_a_library_policy_is_verified(tmp_path: Path, name: str) -> None:
    sample = LIBRARY[name](Sizes(budget=20))
    found = verify(
        sample.model(), sample.policy, torch.tensor([tokens(64)]), steps=8, backend="cpu", compile="off",
        **sample.options(tmp_path),
    )  # fmt: skip
    assert found.ok, str(found)
    assert found.kept_entries > 0
    assert found.kept_fraction < 1 or name == "keep_all", "nothing was dropped"
