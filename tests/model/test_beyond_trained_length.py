"""Texts longer than a model was trained for: under `positions compact` no query and no key is turned that far."""

from __future__ import annotations

import pytest
import torch

import kvcompile
from kvcompile.api import optimized
from tests.models import random_model, tokens

TRAINED, PROMPT, MORE = 64, 200, 60
POLICY = """policy compact(n_sink=2, window=30, c=16):
    keep sink(n_sink) | recent(window)
    at chunk(c), step
    positions compact
"""


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_places_stay_within_the_trained_length_while_positions_go_far_beyond(
    monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    model = kvcompile.optimize(random_model("llama64", max_position_embeddings=TRAINED), POLICY, backend=backend)
    rope = optimized(model).forward.engine.rope
    asked = []
    plain = rope.upto
    monkeypatch.setattr(rope, "upto", lambda places: asked.append(places) or plain(places))
    out = model.generate(
        torch.tensor([tokens(PROMPT, seed=3)]), max_new_tokens=MORE, do_sample=False, return_dict_in_generate=True,
        eos_token_id=-1,
    )  # fmt: skip
    cache = out.past_key_values
    assert max(asked) <= 2 + 30 + 16 <= TRAINED
    assert cache.positions(0)[0].tolist() == [0, 1, *range(PROMPT + MORE - 1 - 30, PROMPT + MORE - 1)]


def test_what_is_read_does_not_depend_on_how_far_the_text_has_come() -> None:
    """One layer, so that entries are their tokens' own: after much text or little, the same tokens read alike."""
    model = random_model("llama64", max_position_embeddings=TRAINED, num_hidden_layers=1)
    kvcompile.optimize(model, POLICY, n_sink=0)
    last = tokens(48, seed=5)  # what the last piece can read, and itself
    logits = [model(torch.tensor([tokens(16 * n, seed=n) + last]), logits_to_keep=1).logits for n in (0, 1, 9)]
    for far in logits[1:]:
        torch.testing.assert_close(far, logits[0], atol=1e-5, rtol=1e-5)
