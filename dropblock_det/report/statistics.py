"""Differences over seeds, and how sure they are.

All are pure functions. The interval is Student's t on the paired differences ``setting - none`` of runs with
the same seed (same initialization, same data order), not a bootstrap: with two or three seeds a bootstrap can
only reshuffle the two or three differences it has seen, so its interval is far too narrow.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from scipy.stats import t

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """A paired difference from the reference.

    Attributes:
        seeds: pairs of runs it rests on.
        mean: mean of ``setting - none`` over them.
        low: lower end of the 95 % t interval; ``None`` with one pair.
        high: upper end.
        shown: the interval leaves 0 out.
        shown_jointly: it still does when widened (Bonferroni) for all the settings compared.
    """

    seeds: int
    mean: float
    low: float | None
    high: float | None
    shown: bool
    shown_jointly: bool


def paired_difference(
    values: Mapping[int, float], reference: Mapping[int, float], comparisons: int = 1
) -> Difference | None:
    """Compares runs with the same seed.

    Args:
        values: seed -> value of the setting.
        reference: seed -> value of the reference.
        comparisons: how many settings are compared with the reference, for ``shown_jointly``.

    Returns:
        ``None`` where no seed is in both.
    """
    pairs = [values[seed] - reference[seed] for seed in sorted(values.keys() & reference.keys())]
    if not pairs:
        return None
    mean = statistics.fmean(pairs)
    if len(pairs) == 1:
        return Difference(1, mean, None, None, False, False)
    error = statistics.stdev(pairs) / math.sqrt(len(pairs))
    half = _t_quantile(CONFIDENCE, len(pairs) - 1) * error
    joint_half = _t_quantile(1 - (1 - CONFIDENCE) / comparisons, len(pairs) - 1) * error
    return Difference(len(pairs), mean, mean - half, mean + half, abs(mean) > half, abs(mean) > joint_half)


def _t_quantile(confidence: float, df: int) -> float:
    return float(t.ppf((1 + confidence) / 2, df))
