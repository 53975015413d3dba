"""Steps that are only counted and summed later: the same sums as forward by forward, whatever comes in between."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

import kvcompile
from kvcompile.tally import Tally
from tests.models import random_model, tokens

POLICIES = {
    "keep_all": "keep_all",
    "streaming in steps": "policy mine():\n    keep sink(2) | recent(9)\n    at chunk, every(3)\n",
    "a layer off": "policy mine():\n    layers 1: off\n    keep all\n",
}


class Plain:
    """The definition, forward by forward."""

    def __init__(self, tally: Tally) -> None:
        self.area, self.widest = torch.zeros_like(tally.area), torch.zeros_like(tally.widest)
        self.widest_sum, self.reads = torch.zeros_like(tally.widest_sum), tally.reads

    def before(self, counts: list[int], lengths: Tensor) -> None:
        n = torch.tensor(counts)[:, None]
        self.area += lengths * n
        now = lengths + n * self.reads
        self.widest = torch.maximum(self.widest, now)
        self.widest_sum = torch.maximum(self.widest_sum, now.sum((0, 2)))

    def select(self, sequences: list[int]) -> None:
        self.area, self.widest = self.area[:, sequences], self.widest[:, sequences]
        self.widest_sum = self.widest_sum[sequences]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(3))
def test_sums_are_those_of_every_forward(policy: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = kvcompile.optimize(random_model(), POLICIES[policy], backend="cpu")
    truth: list[Plain] = []
    plain = Tally.before

    def noted(self: Tally, counts: list[int], lengths: Tensor, grows: bool) -> None:
        if not truth:
            truth.append(Plain(self))
        truth[0].before(list(counts), lengths)
        plain(self, counts, lengths, grows)

    monkeypatch.setattr(Tally, "before", noted)
    draw = random.Random(seed)
    seen, ids = 8, torch.tensor([tokens(300, seed=seed), tokens(300, seed=seed + 9)])
    with torch.no_grad():
        cache = model(ids[:, :seen]).past_key_values
        for _ in range(12):
            match draw.choice(("steps", "steps", "turn", "crop", "select", "report")):
                case "steps":
                    for _ in range(draw.randint(1, 5)):
                        model(ids[: cache.batch, seen : seen + 1], past_key_values=cache)
                        seen += 1
                case "turn":
                    model(ids[: cache.batch, seen : seen + 4], past_key_values=cache)
                    seen += 4
                case "crop" if policy == "keep_all":
                    cache.crop(seen - 1)
                    seen -= 1
                case "select":
                    chosen = [draw.randrange(cache.batch) for _ in range(cache.batch)]
                    cache.select(chosen)
                    truth[0].select(chosen)
                case "report":
                    kvcompile.report(model)
    tally = cache.run.tally
    tally.settle()
    for name in ("area", "widest", "widest_sum"):
        assert torch.equal(getattr(tally, name), getattr(truth[0], name)), name


def test_to_ask_for_figures_leaves_the_account_to_the_thread_that_steps() -> None:
    model, ids = kvcompile.optimize(random_model(), "keep_all", backend="cpu"), torch.tensor([tokens(12)])
    with torch.no_grad():
        cache = model(ids[:, :8]).past_key_values
        for t in range(8, 12):
            model(ids[:, t : t + 1], past_key_values=cache)
    before = dict(vars(cache.run.tally))
    found = cache.stats()
    assert all(value is before[name] for name, value in vars(cache.run.tally).items())
    cache.run.tally.settle()
    assert cache.stats() == found
