"""`verify` of the library on the triton backend: it does what the reference does, and lists what the reference does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import kvcompile
from kvcompile.verify import verify
from tests.driving import LIBRARY, Sizes, drive
from tests.kernels.triton_interpreted.watching import fallbacks, listed
from tests.models import tokens

SIZES = Sizes(budget=20)
# The interpreter takes seconds for what kernels do; these run as the reference for the greater part.
OFTEN = (
    "criticalkv", "d2o", "elastic", "freqkv", "keyformer", "lazy", "locret", "prefixkv", "r_kv", "razor",
    "streaming_compact",
)  # fmt: skip
POLICIES = [pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow) for name in LIBRARY]


@pytest.mark.parametrize("name", POLICIES)
def test_a_library_policy_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("KVC_CACHE", str(tmp_path))
    sample = LIBRARY[name](SIZES)
    model, options = sample.model(), sample.options(tmp_path)
    prompt = torch.tensor([tokens(48)])
    found = verify(model, sample.policy, prompt, steps=6, backend="triton", compile="off", **options)
    assert found.ok, str(found)
    assert found.backend == "triton"
    assert found.kept_fraction < 1 or name == "keep_all", "nothing was dropped"
    kvcompile.optimize(model, sample.policy, backend="triton", compile="off", **options)
    with fallbacks() as taken:
        drive(model, tokens(24), tokens(1), tokens(1))
    unlisted = taken - listed(kvcompile.inspect(model).unprintable)
    assert not unlisted, "the reference stood in where nothing says so"
