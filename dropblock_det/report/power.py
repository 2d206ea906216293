"""What a comparison could have shown: the difference that it would have found four times in five."""

import functools
import math

import numpy as np

from dropblock_det.report.statistics import OWN_ALPHA, dunnett_quantile, t_quantile

POWER = 0.8
TRIALS = 20_000
VALUES = 2**23  # drawn at once, which is 64 MB
MOST_SEEDS = 1000


@functools.lru_cache(64)
def detectable_difference(settings: int, seeds: int) -> float:
    """The true difference that is shown with a chance of 80 %, in standard deviations of a single run.

    By simulation, since the pooled interval and the setting's own must both leave 0 out.

    Args:
        settings: that are pooled, the reference among them; at least 2.
        seeds: at least 2.
    """
    generator = np.random.default_rng(0)
    trials = min(TRIALS, max(500, VALUES // (settings * seeds)))
    runs = generator.standard_normal((trials, settings, seeds))
    differences = runs[:, 1] - runs[:, 0]
    residuals = (
        runs - runs.mean(1, keepdims=True) - runs.mean(2, keepdims=True) + runs.mean((1, 2), keepdims=True)
    )
    df = (seeds - 1) * (settings - 1)
    correlation = np.full((settings - 1, settings - 1), 0.5) + np.eye(settings - 1) / 2
    pooled = dunnett_quantile(correlation, df) * np.sqrt(2 * (residuals**2).sum((1, 2)) / df)
    own = t_quantile(OWN_ALPHA, seeds - 1) * differences.std(1, ddof=1)
    needed = np.maximum(pooled, own) / math.sqrt(seeds) - differences.mean(1)
    return float(np.quantile(needed, POWER))


@functools.lru_cache(64)
def seeds_for_half(settings: int, seeds: int) -> int | None:
    """How many seeds it takes to find half of what these seeds find; ``None``: more than anybody trains.

    Args:
        settings: as :func:`detectable_difference`.
        seeds: those that there are.
    """
    goal = detectable_difference(settings, seeds) / 2
    low, high = seeds, 2 * seeds
    while detectable_difference(settings, high) > goal:
        low, high = high, 2 * high
        if high > MOST_SEEDS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if detectable_difference(settings, middle) <= goal else (middle, high)
    return high
