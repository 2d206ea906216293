import math
import random

import pytest

from dropblock_det.report.statistics import paired_difference


def test_the_interval_covers_95_percent():
    """20,000 sets of three seeds: the share that covers the truth is 0.95 +- 3 standard errors (0.0046)."""
    noise = random.Random(0)
    trials, covered = 20_000, 0
    for _ in range(trials):
        # The seed's own level is large and shared: only the pairing makes the interval this narrow.
        level = {seed: noise.gauss(0, 10) for seed in range(3)}
        reference = {seed: level[seed] + noise.gauss(0, 1) for seed in level}
        values = {seed: level[seed] + 0.5 + noise.gauss(0, 1) for seed in level}
        difference = paired_difference(values, reference)
        covered += difference.low <= 0.5 <= difference.high
    assert abs(covered / trials - 0.95) < 3 * math.sqrt(0.95 * 0.05 / trials)


def test_paired_difference_by_hand():
    difference = paired_difference(
        {0: 1.0, 1: 2.0, 2: 4.0, 9: 100.0}, {0: 0.5, 1: 1.0, 2: 2.5, 8: -100.0}, comparisons=6
    )
    assert difference.seeds == 3  # seeds in one of the two only are left out
    assert difference.mean == pytest.approx(1.0)
    half = 4.302653 * 0.5 / math.sqrt(3)
    assert (difference.low, difference.high) == pytest.approx((1 - half, 1 + half), rel=1e-6)
    assert not difference.shown
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
