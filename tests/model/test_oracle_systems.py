"""The oracle's newer parts against what is known without them: closed forms, the untouched model, equal entries."""

import math
from fractions import Fraction
from typing import ClassVar

import pytest
import torch
from transformers import DynamicCache

from tests import oracle_policies as rules
from tests import oracle_systems as systems
from tests.models import FAMILIES, random_model, tokens
from tests.oracle import Oracle, Row


class AllCompact(rules.KeepAll):
    compact: ClassVar[bool] = True


def row_of(n: int, seed: int = 0, dim: int = 4) -> Row:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(n, dim, generator=generator), torch.randn(n, dim, generator=generator)
    everything = torch.ones(n, dtype=torch.bool)
    return Row(keys, values, torch.zeros(1, n, dim), everything, ~everything, torch.zeros(n), torch.zeros(1, 0, n),
               count=torch.ones(n))  # fmt: skip


# -- places -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_places_are_positions_where_nothing_is_dropped(family):
    model = random_model(family)
    prompt, forced = tokens(19, seed=1), tokens(3, seed=2)
    mine = Oracle(model, AllCompact(chunk=7)).run(prompt, forced)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        theirs = [model(torch.tensor([prompt]), past_key_values=cache).logits[0]]
        theirs += [model(torch.tensor([[t]]), past_key_values=cache).logits[0] for t in forced]
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-4)


def test_a_compact_row_reads_as_if_only_its_tokens_had_been_there():
    """With one layer, keys and values follow from the token alone: the model is given just those that stayed."""
    model = random_model("llama64", num_hidden_layers=1)
    run = Oracle(model, systems.StreamingCompact(sink=2, window=5))
    prompt = tokens(23, seed=3)
    *_, last = run.run(prompt, tokens(1, seed=4))
    with torch.no_grad():
        alone = model(torch.tensor([[*prompt[:2], *prompt[-5:], *tokens(1, seed=4)]]), use_cache=False).logits[0, -1:]
    torch.testing.assert_close(last, alone, atol=1e-4, rtol=1e-4)


# -- losers -----------------------------------------------------------------------------------------------------------


def test_equal_entries_may_be_folded_without_loss():
    """Three times the same key and value weigh as one entry that counts 3; folding again adds up."""
    model = random_model("llama64")
    query, logit = torch.randn(2, 4), torch.randn(2, 5)
    run = Oracle(model, rules.KeepAll())
    run.scaling = 0.7
    row = row_of(9)
    row.keys[:4], row.values[:4] = row.keys[0].clone(), row.values[0].clone()
    systems.fold_mean(row, [0, 1, 2])
    systems.fold_mean(row, [3])
    assert row.folded.count == 4
    torch.testing.assert_close(row.folded.value, row.values[0])
    mine, rest = run.shares(row, logit, query)
    same = (query @ row.keys[:4].T) * 0.7
    every = torch.softmax(torch.cat([logit, same], 1), 1)
    torch.testing.assert_close(mine, every[:, :5])
    torch.testing.assert_close(rest, every[:, 5:].sum(1))


def test_razor_stands_for_every_token_that_it_dropped():
    run = Oracle(random_model("llama64", max_position_embeddings=256), systems.Razor(sink=2, least=4, part=5))
    run.run(tokens(30, seed=5), tokens(6, seed=6))
    for row in (r for layer in run.rows for r in layer):
        assert row.positions() == [0, 1, *range(29, 36)]
        assert row.folded.count == 36 - 9
        dropped = list(range(2, 29))
        torch.testing.assert_close(row.folded.key, row.keys[dropped].mean(0), atol=1e-5, rtol=1e-5)
    assert run.lengths() == [[10, 10]] * 3


def test_a_merge_is_a_weighted_mean_with_weights_of_at_least_zero():
    row, before = row_of(4), row_of(4)
    systems.merge(row, {0: (2, 0.5), 1: (2, 2.0), 3: (2, -1.0)})
    torch.testing.assert_close(row.keys[2], (before.keys[2] + 0.5 * before.keys[0] + 2 * before.keys[1]) / 3.5)
    torch.testing.assert_close(row.values[2], (before.values[2] + 0.5 * before.values[0] + 2 * before.values[1]) / 3.5)
    torch.testing.assert_close(row.keys[3], before.keys[3])
    assert row.count.tolist() == [1, 1, 4, 1]


def test_the_nearest_survivor_is_the_older_one_on_ties():
    run = Oracle(random_model("llama64"), rules.KeepAll())
    assert systems.most_like(run, row_of(9), 4, [1, 3, 5, 8], systems.closeness) == (3, -1.0)


def test_cosines_turn_and_turn_back():
    basis = systems.cosines(7)
    torch.testing.assert_close(basis @ basis.T, torch.eye(7, dtype=torch.float64))
    x = torch.randn(7, dtype=torch.float64)
    by_hand = [
        math.sqrt((1 if f == 0 else 2) / 7) * sum(x[j] * math.cos(math.pi * f * (j + 0.5) / 7) for j in range(7))
        for f in range(7)
    ]
    torch.testing.assert_close(basis @ x, torch.tensor(by_hand, dtype=torch.float64))


def test_low_frequencies_keep_the_level_and_a_slow_wave():
    row = row_of(12)
    wave = torch.cos(math.pi * (torch.arange(12) + 0.5) / 12)
    row.keys[:], row.values[:] = 3.0, wave[:, None]
    assert systems.fold_dct(row, list(range(12)), Fraction(1, 2)) == [0, 2, 4, 6, 8, 10]
    torch.testing.assert_close(row.keys[::2], torch.full((6, 4), 3.0))
    slow = torch.cos(math.pi * (torch.arange(6) + 0.5) / 6)
    torch.testing.assert_close(row.values[::2], slow[:, None].expand(6, 4))


def test_runs_are_pooled_with_a_shorter_last_one():
    row, before = row_of(9), row_of(9)
    assert systems.fold_pool(row, [1, 2, 3, 5, 6, 7, 8], 3) == [1, 3, 6]
    torch.testing.assert_close(row.keys[1], before.keys[[1, 2, 3]].mean(0))
    torch.testing.assert_close(row.values[3], before.values[[5, 6, 7]].mean(0))
    torch.testing.assert_close(row.keys[6], before.keys[8])


# -- shares -----------------------------------------------------------------------------------------------------------


def test_parts_by_cover():
    run = Oracle(random_model("llama64"), rules.KeepAll())
    # The entries of the first layer need 0, .9 and .95, those of the second 0, .4, .7 and .9: six are all but .95.
    assert systems.covering(run, 3, [[0.05, 0.9, 0.05], [0.3, 0.2, 0.1, 0.4]]) == [2, 4]
    assert systems.covering(run, 2, [[0.05, 0.9, 0.05], [0.3, 0.2, 0.1, 0.4]]) == [1, 3]
    assert systems.covering(run, 9, [[1.0, 1.0], [1.0]]) == [2, 1]
    assert systems.covering(run, 1, [[0.0, -1.0, math.nan], [1.0, 1.0, 1.0]]) == [1, 1]


def test_parts_by_softmax_and_by_weights_keep_their_sum():
    run = Oracle(random_model("llama64"), rules.KeepAll())
    assert systems.by_softmax(run, 10, [0.5, 0.5, 0.5]) == [10, 10, 10]
    assert systems.by_softmax(run, 5, [math.log(3), 0.0]) == [8, 2]
    assert systems.by_weights(11, [Fraction(3), Fraction(1), Fraction(5, 2)]) == [15, 5, 13]
    assert sum(systems.by_softmax(run, 7, [0.1, -2.0, 1.3, 0.4])) == 28


def test_falling_budgets_of_groups():
    assert systems.falling(12, 4, 20, 64, 4) == rules.pyramid(12, 4, 20, 64, 4) == [24, 16, 8, 0]
    assert systems.falling(20, 2, 14, 400, 8) == [39, 1]
    assert systems.falling(20, 3, 14, 39, 8) == [20, 20, 20]  # a short prompt
    assert systems.falling(5, 3, 14, 12, 8) == [5, 5, 5]  # all of it fits
    assert systems.falling(5, 1, 14, 400, 8) == [5]
