"""`verify`: what it compares, in which precision, and that it leaves the model alone."""

from __future__ import annotations

import pytest
import torch

from kvcompile.kernels.errors import KvCompileError
from kvcompile.verify import verify
from tests.models import random_model, tokens


def test_the_model_is_left_as_it_was() -> None:
    model = random_model("llama64", num_hidden_layers=2)
    before = set(vars(model))
    outcome = verify(model, "streaming", torch.tensor([tokens(48)]), steps=3, n_sink=2, window=14)
    assert outcome.ok and (outcome.prompt, outcome.steps) == (48, 3)
    assert set(vars(model)) == before
    # The prompt is cut to 16 entries per row, and so is every step: 2 layers, 2 heads, two moments.
    assert outcome.kept_entries == 2 * 2 * 2 * 16
    assert outcome.kept_fraction == pytest.approx(16 / 51)


def test_sixteen_bits_have_their_own_bounds() -> None:
    model = random_model("llama64", num_hidden_layers=2).to(torch.bfloat16)
    outcome = verify(model, "knorm", torch.tensor([tokens(64)]), steps=2, budget=20)
    assert outcome.ok, str(outcome)
    assert outcome.logit_bound > 1e-2


@pytest.mark.parametrize("ids", [torch.zeros(2, 8, dtype=torch.int64), torch.zeros(1, 0, dtype=torch.int64)])
def test_one_prompt_at_a_time(ids: torch.Tensor) -> None:
    with pytest.raises(KvCompileError, match="one prompt"):
        verify(random_model("llama64", num_hidden_layers=1), "keep_all", ids)


def test_double_precision_is_refused() -> None:
    model = random_model("llama64", num_hidden_layers=1).double()
    with pytest.raises(KvCompileError, match="float64"):
        verify(model, "keep_all", torch.tensor([tokens(8)]))
