"""Intervals and tests against numbers worked out by hand and against scipy's own."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from normlab.report.statistics import Sample, contrast, holm

errors = st.lists(
    st.floats(0, 100, allow_nan=False, width=32), min_size=3, max_size=12, unique=True
)


def test_an_interval_worked_out_by_hand():
    """1, 2, 3, 4, 5: mean 3, sd sqrt(2.5), t(0.975; 4) = 2.776445."""
    sample = Sample.of([1, 2, 3, 4, 5])
    half = 2.776445 * math.sqrt(2.5) / math.sqrt(5)
    assert sample.mean == 3
    assert sample.half() == pytest.approx(half, rel=1e-6)
    assert sample.interval() == pytest.approx((3 - half, 3 + half), rel=1e-6)


def test_ninety_percent_uses_its_own_quantile():
    """t(0.95; 4) = 2.131847."""
    half = Sample.of([1, 2, 3, 4, 5]).half(0.90)
    assert half == pytest.approx(2.131847 * math.sqrt(0.5), rel=1e-6)


@given(errors)
def test_a_contrast_is_the_paired_t_test(values: list[float]):
    one = dict(enumerate(values))
    other = {i: v * 0.5 + (i % 3) for i, v in one.items()}
    ours = contrast([(1, one), (-1, other)])
    theirs = stats.ttest_rel(list(one.values()), list(other.values()))
    if ours.sd < 1e-6:
        return  # scipy warns where the differences hardly differ
    two_sided = 2 * min(ours.p_above(0), ours.p_below(0))
    assert two_sided == pytest.approx(theirs.pvalue, rel=1e-6, abs=1e-12)
    assert ours.interval() == pytest.approx(tuple(theirs.confidence_interval(0.95)), abs=1e-6)


def test_a_contrast_takes_only_seeds_that_all_terms_have():
    sample = contrast([(1, {1: 10.0, 2: 20.0, 3: 99.0}), (-1, {1: 9.0, 2: 18.0, 4: 0.0})])
    assert (sample.n, sample.mean) == (2, 1.5)


def test_four_terms_are_summed_within_a_seed():
    terms = [
        (1, {1: 8.0, 2: 9.0}),
        (-1, {1: 4.0, 2: 4.0}),
        (-1, {1: 2.0, 2: 1.0}),
        (1, {1: 1.0, 2: 1.0}),
    ]
    assert contrast(terms).mean == pytest.approx((3 + 5) / 2)


def test_the_order_of_the_seeds_changes_no_bit():
    values = np.random.default_rng(0).normal(41, 1, 10).tolist()
    assert Sample.of(values) == Sample.of(values[::-1])


def test_one_seed_has_no_interval_and_proves_nothing():
    sample = Sample.of([4.0])
    assert math.isnan(sample.half())
    assert (sample.p_above(0), sample.p_below(0)) == (1.0, 1.0)


def test_seeds_without_any_spread_prove_nothing():
    sample = Sample.of([1.0, 1.0, 1.0])
    assert (sample.p_above(0.5), sample.p_below(1.5)) == (1.0, 1.0)
    assert all(map(math.isnan, sample.interval()))


def test_what_is_exact_needs_no_spread():
    sample = Sample(3, 1.0, 0.0, exact=True)
    assert (sample.p_above(0.5), sample.p_above(1.0), sample.p_below(0.5)) == (0.0, 1.0, 1.0)
    assert (sample.p_below(1.5), sample.interval()) == (0.0, (1.0, 1.0))


def test_no_seed_at_all():
    assert Sample.of([]).n == 0
    assert contrast([(1, {}), (-1, {1: 2.0})]).n == 0


def test_holm_by_hand():
    """0.01 x 4, then 0.02 x 3 = 0.06, 0.03 x 2 = 0.06, 0.04 kept up at 0.06."""
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])


def test_holm_lifts_a_later_p_to_an_earlier_one():
    """0.01, 0.013, 0.014 of three: 0.03, 0.026 lifted to 0.03, 0.014 lifted to 0.03."""
    assert holm([0.01, 0.013, 0.014]) == pytest.approx([0.03, 0.03, 0.03])


def test_holm_is_cut_at_one_and_empty_for_nothing():
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []
