"""The theorems behind the verdicts: coverage, family-wise error, and t values as the tables have them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peelcli.verdict.statistics import (
    holm,
    holm_adjusted,
    p_greater,
    p_less,
    paired_interval,
    student_t_cdf,
    student_t_quantile,
)

p_values = st.lists(st.floats(0.0, 1.0), max_size=12)
losses = st.lists(st.floats(-20.0, 20.0).map(lambda value: round(value, 6)), min_size=2, max_size=30)
alphas = st.floats(0.001, 0.5)


@pytest.mark.parametrize(
    ("p", "degrees", "expected"),
    [
        (0.975, 1, 12.7062047362),
        (0.975, 2, 4.3026527297),
        (0.975, 5, 2.5705818356),
        (0.975, 10, 2.2281388520),
        (0.975, 30, 2.0422724563),
        (0.975, 120, 1.9799304051),
        (0.95, 8, 1.8595480375),
        (0.995, 20, 2.8453397098),
        (0.9995, 1, 636.6192487688),
        (0.9995, 10, 4.5868938587),
    ],
)
def test_quantiles_are_those_of_the_tables(p, degrees, expected):
    assert student_t_quantile(p, degrees) == pytest.approx(expected, rel=1e-9)
    assert student_t_cdf(expected, degrees) == pytest.approx(p, abs=1e-9)


@given(st.floats(-1e4, 1e4))
def test_cdf_is_the_closed_form_where_there_is_one(t):
    root = math.sqrt(4 + t * t)
    closed = {
        1: 0.5 + math.atan(t) / math.pi,
        2: 0.5 + t / (2 * math.sqrt(2 + t * t)),
        3: 0.5 + (math.atan(t / math.sqrt(3)) + math.sqrt(3) * t / (3 + t * t)) / math.pi,
        4: 0.5 + t / root * (1 + 2 / (root * root)) / 2,
    }
    for degrees, expected in closed.items():
        assert student_t_cdf(t, degrees) == pytest.approx(expected, abs=1e-12)


def test_many_degrees_of_freedom_approach_the_normal_distribution():
    for t in (-4.0, -1.96, -0.3, 0.0, 0.7, 2.5):
        normal = 0.5 * math.erfc(-t / math.sqrt(2))
        assert student_t_cdf(t, 10**7) == pytest.approx(normal, abs=1e-7)


@given(st.floats(1e-9, 1 - 1e-9), st.integers(1, 500))
def test_quantile_inverts_cdf(p, degrees):
    assert student_t_cdf(student_t_quantile(p, degrees), degrees) == pytest.approx(p, rel=1e-9)


@pytest.mark.parametrize(("n", "confidence"), [(4, 0.95), (4, 0.8), (24, 0.95), (24, 0.8)])
def test_interval_covers_the_true_mean_as_often_as_it_says(n, confidence):
    draws = np.random.default_rng(0).normal(0.3, 2.0, size=(3000, n))
    intervals = [paired_interval(row, confidence) for row in draws]
    covered = np.mean([interval.low <= 0.3 <= interval.high for interval in intervals])
    assert abs(covered - confidence) < 0.02


def test_interval_of_a_small_sample_by_hand():
    # mean 2, standard deviation 1, standard error 1/sqrt(3), t(0.975; 2) = 4.3026527
    interval = paired_interval([1.0, 2.0, 3.0])
    assert interval.mean == 2.0
    assert interval.n == 3
    assert interval.standard_error == pytest.approx(1 / math.sqrt(3))
    assert interval.low == pytest.approx(2 - 4.3026527297 / math.sqrt(3))
    assert interval.high == pytest.approx(2 + 4.3026527297 / math.sqrt(3))


def test_pairing_by_sequence_is_narrower_than_comparing_two_samples():
    rng = np.random.default_rng(1)
    difficulty = rng.normal(3.0, 0.5, size=64)  # shared by both networks: some text is harder
    ours, theirs = difficulty + rng.normal(0, 0.02, 64), difficulty - 0.01 + rng.normal(0, 0.02, 64)
    paired = paired_interval(ours - theirs)
    unpaired = paired_interval(ours - rng.permutation(theirs))
    assert paired.high - paired.low < 0.1 * (unpaired.high - unpaired.low)
    assert paired.low > 0  # and it sees what the other cannot
    assert unpaired.low < 0 < unpaired.high


@given(losses, st.floats(0.5, 0.99))
def test_test_and_interval_agree(differences, confidence):
    interval = paired_interval(differences, confidence)
    threshold = interval.mean - 1.0
    above = interval.low > threshold
    p = p_greater(differences, threshold)
    if abs(interval.low - threshold) > 1e-9:
        assert above == (p < (1 - confidence) / 2)


@given(losses, st.floats(-5, 5))
def test_the_two_sides_complement_each_other(differences, threshold):
    greater, less = p_greater(differences, threshold), p_less(differences, threshold)
    if len(set(differences)) > 1:
        assert greater + less == pytest.approx(1.0)
        assert p_greater(differences, threshold + 0.1) >= greater
    else:
        assert {greater, less} <= {0.0, 1.0}


@pytest.mark.parametrize(("value", "greater", "less"), [(0.1, 0.0, 1.0), (0.0, 1.0, 1.0), (-0.1, 1.0, 0.0)])
def test_equal_differences_have_no_width_and_no_doubt(value, greater, less):
    differences = [value] * 7  # 0.1 seven times does not sum to 0.7: rounding must not pass for a variance
    interval = paired_interval(differences)
    assert (interval.low, interval.mean, interval.high) == (value, value, value)
    assert (p_greater(differences), p_less(differences)) == (greater, less)


@pytest.mark.parametrize(("differences", "n"), [([], 0), ([0.1], 1), ([0.1, math.nan], 2)])
def test_what_cannot_be_tested_is_an_error_that_names_n(differences, n):
    for function in (paired_interval, p_greater, p_less):
        with pytest.raises(ValueError, match=f"n = {n}"):
            function(differences)


def test_arguments_outside_their_range_are_errors():
    for wrong in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="confidence"):
            paired_interval([1.0, 2.0], wrong)
        with pytest.raises(ValueError, match="alpha"):
            holm([0.1], wrong)
    with pytest.raises(ValueError, match=r"p_values\[1\]"):
        holm_adjusted([0.1, math.nan])


def test_holm_by_hand():
    # sorted .01 .02 .03 .04 times 4 3 2 1 = .04 .06 .06 .04, then the running maximum
    assert holm_adjusted([0.04, 0.01, 0.03, 0.02]) == pytest.approx((0.06, 0.04, 0.06, 0.06))
    assert holm([0.04, 0.01, 0.03, 0.02], 0.05) == (False, True, False, False)
    assert holm_adjusted([]) == ()


@pytest.mark.parametrize("shared", [0.0, 0.9])
def test_family_wise_error_of_holm_is_at_most_alpha(shared):
    rng = np.random.default_rng(2)
    runs, layers, n = 800, 6, 8
    common = rng.normal(size=(runs, 1, n))  # all layers share the sequences, so their gaps are correlated
    draws = math.sqrt(shared) * common + math.sqrt(1 - shared) * rng.normal(size=(runs, layers, n))
    values = [[p_greater(row) for row in run] for run in draws]
    corrected = np.mean([any(holm(run, 0.05)) for run in values])
    alone = np.mean([min(run) <= 0.05 for run in values])
    assert corrected <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / runs)
    assert alone > 0.08  # the control: without the correction the promise is broken
    if not shared:
        assert corrected > 0.02  # nor is it bought by never rejecting


@given(p_values, alphas)
def test_holm_never_rejects_more_than_no_correction_nor_less_than_bonferroni(values, alpha):
    for value, adjusted, rejected in zip(values, holm_adjusted(values), holm(values, alpha), strict=True):
        assert value <= adjusted <= 1.0
        assert adjusted <= min(1.0, len(values) * value)
        if rejected:
            assert value <= alpha
        elif len(values) * value <= alpha:
            pytest.fail("Bonferroni rejects and Holm does not")


@given(p_values.filter(bool), alphas, st.data())
def test_holm_is_monotone(values, alpha, data):
    adjusted = holm_adjusted(values)
    order = sorted(range(len(values)), key=values.__getitem__)
    assert [adjusted[i] for i in order] == sorted(adjusted)  # a smaller p stays the smaller
    position = data.draw(st.integers(0, len(values) - 1))
    smaller = list(values)
    smaller[position] = data.draw(st.floats(0.0, values[position]))
    for before, after in zip(holm(values, alpha), holm(smaller, alpha), strict=True):
        assert after or not before  # stronger evidence for one never loses another


@pytest.mark.parametrize("n", [32, 64])
def test_skewed_differences_are_held_as_often_on_either_side(n):
    """A few sequences bear most of such a change: Student's own interval misses it on one side far too often."""
    draws = 1.0 - np.random.default_rng(0).gamma(0.7, size=(3000, n))
    intervals = [paired_interval(row) for row in draws]
    above = np.mean([interval.low > 0.3 for interval in intervals])  # the mean is 1 − .7
    below = np.mean([interval.high < 0.3 for interval in intervals])
    assert max(above, below) < 0.055
    t = student_t_quantile(0.975, n - 1)
    plain = np.mean([i.mean - t * i.standard_error > 0.3 for i in intervals])
    assert above < 0.75 * plain
    assert np.mean([p_greater(row, 0.3) < 0.025 for row in draws]) == pytest.approx(above)


@given(losses, st.floats(0.5, 0.99))
def test_an_interval_holds_its_mean_and_turns_round_with_its_differences(differences, confidence):
    interval = paired_interval(differences, confidence)
    assert interval.low <= interval.mean <= interval.high
    turned = paired_interval([-d for d in differences], confidence)
    assert (turned.low, turned.high) == pytest.approx((-interval.high, -interval.low), abs=1e-9)
