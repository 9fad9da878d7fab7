"""Percentiles and ratio intervals."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from perf.stats import MIN_PAIRS, Pair, median, paired_ratio, percentile

_FIGURES = st.floats(min_value=1e-3, max_value=1e6)
_PAIRS = st.lists(st.builds(Pair, _FIGURES, _FIGURES), min_size=MIN_PAIRS, max_size=20)


def test_a_percentile_between_two_values_is_interpolated():
    assert percentile([10.0, 20.0], 0.25) == 12.5


def test_the_ends_of_the_scale_are_the_smallest_and_the_largest_value():
    values = [3.0, 1.0, 2.0]
    assert (percentile(values, 0.0), percentile(values, 1.0)) == (1.0, 3.0)


def test_the_median_does_not_depend_on_the_order():
    assert median([9.0, 1.0, 5.0]) == median([1.0, 5.0, 9.0]) == 5.0


def test_a_percentile_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)


def test_twice_the_throughput_of_the_reference_is_a_ratio_of_two():
    ratio = paired_ratio([Pair(200.0, 100.0)] * 5, is_lower_better=False)
    assert ratio is not None
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((2.0, 2.0, 2.0))


def test_half_the_latency_of_the_reference_is_a_ratio_of_two():
    ratio = paired_ratio([Pair(5.0, 10.0)] * 5, is_lower_better=True)
    assert ratio is not None
    assert ratio.value == pytest.approx(2.0)


def test_noise_that_hits_both_sides_of_a_pair_does_not_widen_the_interval():
    noise = [1.0, 3.0, 0.5, 7.0, 2.0]
    ratio = paired_ratio([Pair(30.0 * factor, 20.0 * factor) for factor in noise], is_lower_better=False)
    assert ratio is not None
    assert ratio.high - ratio.low == pytest.approx(0.0, abs=1e-9)


def test_noise_that_hits_one_side_widens_the_interval():
    values = [10.0, 20.0, 15.0, 30.0, 12.0]
    ratio = paired_ratio([Pair(value, 10.0) for value in values], is_lower_better=False)
    assert ratio is not None
    assert 1.0 <= ratio.low < ratio.value < ratio.high <= 3.0


def test_too_few_pairs_give_no_ratio():
    assert paired_ratio([Pair(2.0, 1.0)] * (MIN_PAIRS - 1), is_lower_better=False) is None


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_a_figure_that_is_no_positive_number_gives_no_ratio(bad: float):
    assert paired_ratio([Pair(1.0, 1.0)] * MIN_PAIRS + [Pair(bad, 1.0)], is_lower_better=False) is None


@given(_PAIRS)
def test_the_interval_holds_the_ratio_and_stays_within_the_pairs(pairs: list[Pair]):
    ratio = paired_ratio(pairs, is_lower_better=False)
    assert ratio is not None
    single = [pair.value / pair.reference for pair in pairs]
    tolerance = 1 + 1e-9
    assert min(single) / tolerance <= ratio.low <= ratio.value * tolerance
    assert ratio.value <= ratio.high * tolerance <= max(single) * tolerance**2


@given(_PAIRS)
def test_lower_is_better_turns_the_ratio_over(pairs: list[Pair]):
    upright, inverse = paired_ratio(pairs, is_lower_better=False), paired_ratio(pairs, is_lower_better=True)
    assert upright is not None and inverse is not None
    assert upright.value * inverse.value == pytest.approx(1.0)


def test_the_same_pairs_always_give_the_same_interval():
    pairs = [Pair(value, 2.0) for value in (1.0, 2.0, 4.0, 3.0, 2.5)]
    assert paired_ratio(pairs, is_lower_better=False) == paired_ratio(list(pairs), is_lower_better=False)
