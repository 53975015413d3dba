"""The critical footprint: brute force, order, threshold, and what is said of points that were never measured."""

from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvcompile.evaluation.critical import Critical, critical_footprint, spread
from kvcompile.kernels.errors import KvCompileError

grid = st.integers(0, 20).map(lambda n: n / 20)
points = st.lists(st.tuples(grid, grid), max_size=8)
thresholds = st.integers(1, 20).map(lambda n: n / 20)


@given(points, grid, thresholds)
def test_it_is_what_brute_force_finds(points, full, threshold):
    found = critical_footprint(points, full, threshold)
    good = sorted(x for x, y in points if x < 1 and y >= threshold * full and full > 0)
    assert (None if found is None else found.footprint) == (good[0] if good else None)
    if found is not None:
        assert (found.footprint, found.score) in points
        assert all(y < threshold * full for x, y in points if x < found.footprint)


@given(points, grid, thresholds, st.randoms(use_true_random=False))
def test_the_order_of_points_does_not_matter(points, full, threshold, rng):
    mixed = list(points)
    rng.shuffle(mixed)
    assert critical_footprint(mixed, full, threshold) == critical_footprint(points, full, threshold)


@given(points, grid, thresholds, thresholds)
def test_a_higher_threshold_costs_no_less(points, full, one, two):
    low, high = (critical_footprint(points, full, t) for t in sorted((one, two)))
    if high is not None:
        assert low is not None and low.footprint <= high.footprint


@given(points, grid, thresholds)
@example([(0.0, 0.0), (0.45, 0.15)], 0.15, 1.0)
def test_the_crossing_lies_between_measured_points(points, full, threshold):
    found = critical_footprint(points, full, threshold)
    if found is None:
        return
    below = [x for x, _ in points if x < found.footprint]
    assert (found.interpolated is None) == (not below)
    if found.interpolated is not None:
        assert max(below) <= found.interpolated <= found.footprint


def test_an_example_by_hand():
    """From (0.2, 0.5) to (0.4, 1.0) the line reaches 0.9 at 0.36; exactly, as fractions say."""
    found = critical_footprint([(0.4, 1.0), (0.1, 0.0), (0.2, 0.5), (0.8, 0.95)], 1.0)
    assert found == Critical(0.4, 1.0, 1.0, 0.9, found.interpolated)
    crossing = Fraction(1, 5) + Fraction(1, 5) * (Fraction(9, 10) - Fraction(1, 2)) / Fraction(1, 2)
    assert found.interpolated == pytest.approx(float(crossing), abs=1e-12)


def test_nothing_below_full_attention_is_none():
    assert critical_footprint([(1.0, 1.0), (0.5, 0.2)], 1.0) is None
    assert critical_footprint([(0.5, 1.0)], 0.0) is None  # a task that full attention cannot do
    assert critical_footprint([], 1.0) is None


def test_spread_counts_seeds_without_one_as_full_attention():
    at = Critical(0.4, 1.0, 1.0, 0.9, 0.3)
    found = spread("snapkv", 32, "recall", 128, [(0, at), (1, None), (2, at)])
    assert (found.seeds, found.reached) == (3, 2)
    assert found.mean == pytest.approx(0.6) and (found.lowest, found.highest) == (0.4, 1.0)
    assert found.interpolated is None
    assert spread("snapkv", 32, "recall", 128, [(0, at), (2, at)]).interpolated == pytest.approx(0.3)


@pytest.mark.parametrize("threshold", [0, -1, 1.1, float("nan")])
def test_thresholds_out_of_range(threshold):
    with pytest.raises(KvCompileError, match="threshold"):
        critical_footprint([(0.5, 1.0)], 1.0, threshold)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none(bad):
    with pytest.raises(KvCompileError, match="finite"):
        critical_footprint([(0.5, bad)], 1.0)
    with pytest.raises(KvCompileError, match="finite"):
        critical_footprint([(0.5, 1.0)], bad)
