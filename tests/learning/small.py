"""What the tests of learning train on: a model of two layers with two KV heads, and sequences of unequal lengths."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from kvcompile.learning.data import Sequence
from tests.models import random_model, tokens

LOCAL = {"n_sink": 2, "window": 8}  # what a local head reads of sequences of some 40 tokens


def small_model(**changes: object) -> PreTrainedModel:
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    return random_model("llama64", **{**sizes, **changes})


def sequences(count: int = 8, least: int = 24) -> list[Sequence]:
    """The last third of each is predicted, and compared where states are."""
    out = []
    for i in range(count):
        ids = tokens(least + 3 * i, seed=i)
        out.append(Sequence(ids, None, [at >= 2 * len(ids) // 3 and at + 1 < len(ids) for at in range(len(ids))]))
    return out


def table(learned: object) -> torch.Tensor:
    return torch.tensor(learned.scores.values, dtype=torch.float64)  # type: ignore[attr-defined]
