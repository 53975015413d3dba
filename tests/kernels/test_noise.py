"""Noise by place: the same numbers as a hash written with Python's whole numbers, whatever comes together with them."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcompile.kernels.noise import gumbel, hashed
from tests.driving import examples

WORD = 1 << 32


def mixed(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D % WORD
    x ^= x >> 15
    x = x * 0x846CA68B % WORD
    return x ^ x >> 16


def by_hand(seed: int, *values: int) -> int:
    x = seed % WORD
    for value in values:
        x = mixed(x ^ value % WORD)
    return x


NUMBERS = st.integers(-(2**62), 2**62)


@examples(200)
@given(seed=NUMBERS, values=st.lists(NUMBERS, min_size=1, max_size=5))
def test_the_hash_is_that_of_whole_numbers(seed: int, values: list[int]) -> None:
    assert int(hashed(seed, *(torch.tensor(v) for v in values))) == by_hand(seed, *values)
    assert int(hashed(seed, values[0], *(torch.tensor([v]) for v in values[1:]))) == by_hand(seed, *values)


def test_the_mixer_hits_nothing_twice() -> None:
    assert len(hashed(7, torch.arange(100_000)).unique()) == 100_000


@examples(20)
@given(data=st.data())
def test_noise_belongs_to_its_place(data: st.DataObject) -> None:
    group, layer = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 90))
    heads = data.draw(st.lists(st.integers(0, 70), min_size=1, max_size=3, unique=True))
    at = st.lists(st.integers(-1, 200_000), min_size=1, max_size=4)
    queries, entries = (torch.tensor(data.draw(at)).expand(len(heads), -1) for _ in range(2))
    found = gumbel(11, layer, torch.tensor(heads), group, queries, entries)
    assert found.dtype == torch.float32
    assert found.shape == (len(heads), group, queries.shape[1], entries.shape[1])
    for row, head in enumerate(heads):
        for g in range(group):
            for j, query in enumerate(queries[row].tolist()):
                for i, entry in enumerate(entries[row].tolist()):
                    word = by_hand(11, layer, head * group + g, query, entry)
                    u = ((word >> 9) + 0.5) / 2**23
                    meant = -math.log(-math.log(u))
                    assert abs(float(found[row, g, j, i]) - meant) <= 1e-5 * max(1, abs(meant))


def test_noise_is_finite_and_gumbel() -> None:
    values = gumbel(0, 0, torch.tensor([0]), 1, torch.arange(64)[None], torch.arange(2000)[None]).double()
    assert values.isfinite().all()
    # mean and variance of the standard Gumbel distribution, within five standard errors of 128,000 draws
    assert abs(values.mean() - 0.5772) < 5 * math.sqrt(math.pi**2 / 6 / values.numel())
    assert abs(values.var() - math.pi**2 / 6) < 0.05
