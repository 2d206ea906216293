import math
import statistics

import numpy as np
import pytest

from dropblock_det.report.power import detectable_difference, seeds_for_half
from dropblock_det.report.statistics import analyse, dunnett_quantile

NAN = math.nan


def equal_correlation(number):
    return np.full((number, number), 0.5) + np.eye(number) / 2


@pytest.mark.parametrize(
    ("comparisons", "df", "expected"),
    # The printed two-sided 5 % table (Dunnett 1964), for groups of equal size, and the issue's own figures.
    [(1, 10, 2.23), (2, 10, 2.57), (3, 20, 2.54), (4, 12, 2.81), (5, 30, 2.66), (6, 12, 2.98), (6, 24, 2.76)],
)
def test_the_joint_quantile_is_dunnetts(comparisons, df, expected):
    assert dunnett_quantile(equal_correlation(comparisons), df) == pytest.approx(expected, abs=0.011)


def test_the_joint_quantile_lies_between_one_comparison_and_bonferroni():
    assert dunnett_quantile(equal_correlation(1), 2) == pytest.approx(4.3027, abs=1e-4)
    assert dunnett_quantile(np.eye(3), 1000) == pytest.approx(
        2.39, abs=0.01
    )  # independent: nearly Bonferroni
    nearly_one = np.full((3, 3), 0.99) + np.eye(3) / 100
    assert dunnett_quantile(nearly_one, 1000) == pytest.approx(2.04, abs=0.03)


def test_a_small_table_by_hand():
    """none 1 2 3, a 2 4 4, b 0 1 4: residuals against setting and seed means give 8/3 over 4 degrees."""
    analysis = analyse(np.array([[1.0, 2, 3], [2, 4, 4], [0, 1, 4]]))
    table = np.array([[1.0, 2, 3], [2, 4, 4], [0, 1, 4]])
    residuals = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    variance = (residuals**2).sum() / 4
    assert variance == pytest.approx(8 / 3 / 4, abs=1e-12)
    a, b = analysis.differences
    assert analysis.sd == pytest.approx(math.sqrt(variance))
    assert (a.mean, b.mean) == pytest.approx((4 / 3, -1 / 3))
    half = 3.3065 * math.sqrt(2 * variance / 3)  # Dunnett's for two comparisons and 4 degrees of freedom
    assert (a.low, a.high) == pytest.approx((4 / 3 - half, 4 / 3 + half), rel=1e-3)
    own = 4.8487 * statistics.stdev([1, 2, 1]) / math.sqrt(3)  # Student's, 96 %, 2 degrees of freedom
    assert a.own == pytest.approx((4 / 3 - own, 4 / 3 + own), rel=1e-4)
    assert (a.pairs, a.above, b.above) == (3, 3, 1)
    assert not a.shown


def test_half_widths_in_standard_errors_are_the_designs():
    values = np.random.default_rng(3)
    for seeds, expected in ((3, 2.98), (5, 2.76)):
        analysis = analyse(values.normal(size=(7, seeds)))
        assert not analysis.left_out
        for difference in analysis.differences:
            error = analysis.sd * math.sqrt(2 / seeds)
            assert (difference.high - difference.low) / 2 / error == pytest.approx(expected, abs=0.01)


def test_one_setting_is_the_paired_t_interval():
    """With a single comparison the pooled error is that of the pairs: scipy's own paired test agrees."""
    table = np.array([[0.30, 0.32, 0.29, 0.35], [0.33, 0.34, 0.33, 0.36]])
    (difference,) = analyse(table).differences
    pairs = table[1] - table[0]
    half = 3.182446 * pairs.std(ddof=1) / 2
    assert (difference.low, difference.high) == pytest.approx((pairs.mean() - half, pairs.mean() + half))


def test_missing_runs_are_estimated_by_least_squares():
    """Seed 2 of a is missing and seed 2 is high: a mean over what is there would blame a for it."""
    table = np.array([[1.0, 2, 9], [2, 3, NAN], [3, 4, 11]])
    a, b = analyse(table + np.array([[0, 0, 0], [0.01, -0.01, 0], [-0.01, 0.01, 0.02]])).differences
    assert (a.pairs, b.pairs) == (2, 3)
    assert a.mean == pytest.approx(1, abs=0.02)
    assert b.mean == pytest.approx(2, abs=0.02)
    assert b.high - b.low < a.high - a.low  # more runs, a narrower interval


def test_what_cannot_be_judged_is_not():
    none, one, both = analyse(
        np.array([[1.0, NAN, 2], [NAN, 3, NAN], [2, NAN, NAN], [2, 4, 3.5]])
    ).differences
    assert none is None
    assert (one.pairs, one.mean, one.low, one.own, one.shown) == (1, 1.0, None, None, False)
    assert both.low < 1.25 < both.high
    same = analyse(np.array([[1.0, 1], [2, 2]])).differences[0]  # no spread: copies, not evidence
    assert not same.shown


def test_runs_that_are_alike_have_no_difference():
    """Whatever rounding leaves; and neither is above the other."""
    values = np.random.default_rng(0).normal(0.3, 0.1, 4)
    values = np.stack([values, values, values + np.array([0, 1e-3, 2e-3, -1e-3])])
    same, other = analyse(values).differences
    assert (same.mean, same.above, same.below, same.shown) == (0.0, 0, 0, False)
    assert (other.above, other.below) == (2, 1)


def test_a_setting_with_a_spread_of_its_own_is_left_out_and_does_not_hide_the_others():
    values = np.random.default_rng(0).normal(size=(7, 5))
    values[2] += 6
    calm = analyse(values)
    assert calm.left_out == ()
    values[1] *= 40
    wild = analyse(values)
    assert wild.left_out == (1,)
    assert not wild.differences[0].pooled
    assert not wild.differences[0].shown
    assert wild.differences[1].pooled
    assert wild.differences[1].shown
    assert wild.sd == pytest.approx(calm.sd, rel=0.4)


def test_a_wild_reference_leaves_everybody_to_himself():
    values = np.random.default_rng(0).normal(size=(7, 5))
    values[0] *= 40
    analysis = analyse(values)
    assert analysis.left_out == (0,)
    assert analysis.sd is None
    assert not any(difference.pooled for difference in analysis.differences)


def test_the_correlation_of_seeds():
    values = np.random.default_rng(0)
    table = values.normal(size=(7, 80)) + 2 * values.normal(size=80)
    assert analyse(table).correlation == pytest.approx(0.8, abs=0.09)  # 4 / (4 + 1)
    assert analyse(values.normal(size=(7, 80))).correlation == pytest.approx(0, abs=0.07)


def false_alarms(trials, settings, seeds, spread=1.0, odd=1, seed=0):
    """Shares of comparisons without any effect in which something is shown, and in which an interval errs."""
    values = np.random.default_rng(seed)
    shown = errs = 0
    for _ in range(trials):
        table = values.normal(size=(settings, seeds)) + 10 * values.normal(size=seeds)  # seeds differ a lot
        table[odd] += (spread - 1) * values.normal(size=seeds) if spread > 1 else 0
        differences = analyse(table).differences
        shown += any(d.shown for d in differences)
        errs += any(d.low > 0 or d.high < 0 for d in differences)
    return shown / trials, errs / trials


def test_joint_intervals_err_in_one_comparison_of_twenty():
    """1,200 comparisons without an effect: 5 % within 3 standard errors (1.9 %), false alarms no more."""
    shown, errs = false_alarms(1200, 4, 3)
    assert abs(errs - 0.05) < 3 * math.sqrt(0.05 * 0.95 / 1200)
    assert shown <= errs


def test_one_setting_with_five_times_the_spread_raises_no_false_alarms():
    """800 comparisons: at most 5 % and 3 standard errors (2.3 %). Pooling alone gives 14 % here."""
    shown, _ = false_alarms(800, 5, 3, spread=5)
    assert shown < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 800)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize(("spread", "most"), [(1, 0.05), (5, 0.055)])
def test_false_alarms_of_seven_settings(seeds, spread, most):
    """8,000 comparisons: a standard error is 0.24 %."""
    shown, errs = false_alarms(8000, 7, seeds, spread)
    assert shown < most + 3 * 0.0024
    if spread == 1:
        assert abs(errs - 0.05) < 3 * 0.0024 + 0.003  # the F test errs in 1 % of the comparisons


def test_the_difference_that_would_be_found_is_found_four_times_in_five():
    """1,000 comparisons with that very difference: 80 % within 3 standard errors (3.8 %)."""
    values = np.random.default_rng(5)
    effect = detectable_difference(5, 4)
    shown = 0
    for _ in range(1000):
        table = values.normal(size=(5, 4))
        table[2] += effect
        shown += analyse(table).differences[1].shown
    assert abs(shown / 1000 - 0.8) < 3 * math.sqrt(0.8 * 0.2 / 1000)


def test_seeds_for_half_the_difference():
    seeds = seeds_for_half(7, 3)
    assert detectable_difference(7, seeds) <= detectable_difference(7, 3) / 2
    assert detectable_difference(7, seeds - 1) > detectable_difference(7, 3) / 2
    assert seeds_for_half(7, 20) == pytest.approx(80, rel=0.1)  # many seeds: four times as many
