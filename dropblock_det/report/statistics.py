"""How far each setting is from the reference, and how sure that is, from a table of settings by seeds.

Runs with the same seed share initial weights and data order, so settings by seeds is a randomized block
design: value = setting + seed + error. All settings together measure the error, with (seeds - 1) x
(settings - 1) degrees of freedom where one setting's own differences have seeds - 1 only. With seven settings
and three seeds that makes the interval 2.98 standard errors wide to each side instead of 10.9, all
comparisons counted.

Pooling takes for granted that all settings have the same spread. Where one has five times that of the others,
pooling alone raises the chance of a false alarm from 5 % to 17 % (seven settings, three seeds). Two rules
bring it back to 5 %:

- A setting whose spread is clearly larger than that of the others (an F test for each, 1 % for all together)
  is left out of the pool and judged by its own differences, in a t interval widened for all comparisons
  (Bonferroni). From three seeds the test recognizes such a setting in two cases of three only, therefore:
- a difference counts as shown only where the setting's own t interval leaves 0 out, too. That one has 96 %,
  and with it the chance of a false alarm is 2.3 % where all spreads are the same and 5.0 % where one setting
  has five times that of the others; with five seeds 3.5 % and 5.0 %. Only where the reference itself is the
  one with five times the spread it is 8 % with three seeds, 4.5 % with five.

Not a bootstrap: from three seeds it can only reshuffle the three differences it has seen, so its interval is
far too narrow.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import fdtrc, stdtrit
from scipy.stats import multivariate_t

ALPHA = 0.05
OWN_ALPHA = 0.04
SPREAD_ALPHA = 0.01
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """A setting's difference from the reference.

    Attributes:
        pairs: seeds that both have.
        above: in how many of them the setting is above the reference.
        below: in how many it is below.
        mean: of ``setting - reference``; where runs are missing, by least squares from all that are there.
        low: lower end of the 95 % interval that counts all comparisons; ``None`` with one pair.
        high: its upper end.
        own: the 96 % t interval of this setting's pairs alone.
        pooled: the error is that of all settings; otherwise the spread of this one is far from the others'.
        shown: both intervals leave 0 out.
    """

    pairs: int
    above: int
    below: int
    mean: float
    low: float | None = None
    high: float | None = None
    own: tuple[float, float] | None = None
    pooled: bool = False
    shown: bool = False


@dataclass(frozen=True)
class Analysis:
    """What a table of settings by seeds says.

    Attributes:
        differences: of every row but the first; ``None`` where no seed is in both.
        sd: of a single run around setting and seed, over the pooled settings; ``None`` without a pool.
        pool: rows whose spread is pooled.
        left_out: rows whose spread is too large for it.
        correlation: of the seeds across the pooled settings: what pairing by seed takes out of the error.
    """

    differences: tuple[Difference | None, ...]
    sd: float | None
    pool: tuple[int, ...]
    left_out: tuple[int, ...]
    correlation: float | None


def analyse(table: Floats) -> Analysis:
    """Compares every row with the first.

    Args:
        table: (settings, seeds), the reference in row 0, NaN where there is no run.
    """
    pairs = [np.flatnonzero(~np.isnan(row) & ~np.isnan(table[0])) for row in table[1:]]
    judged = [number for number, seeds in enumerate(pairs, 1) if len(seeds) > 1]
    pool, left_out = _pool(table, [0, *judged]) if judged else ([], [])
    fit = _fit(table[pool]) if 0 in pool and len(pool) > 1 else None
    share = ALPHA / max(1, len(judged))
    pooled = dict(zip(pool[1:], _pooled_intervals(fit, share), strict=True)) if fit and fit.df else {}
    differences = tuple(
        _difference(table[number] - table[0], pooled.get(number), share) for number in range(1, len(table))
    )
    sd = math.sqrt(fit.rss / fit.df) if pooled and fit else None
    return Analysis(differences, sd, tuple(pool), tuple(left_out), _correlation(table[pool]))


def _difference(of_seeds: Floats, pooled: tuple[float, float] | None, share: float) -> Difference | None:
    """From a setting's paired differences, and its mean and half-width from the pool if it is in it."""
    own = of_seeds[~np.isnan(of_seeds)]
    pairs, above, below = len(own), int((own > 0).sum()), int((own < 0).sum())
    if not pairs:
        return None
    mean = float(own.mean())
    if pairs == 1:
        return Difference(pairs, above, below, mean)
    error = float(own.std(ddof=1)) / math.sqrt(pairs)
    half = t_quantile(OWN_ALPHA, pairs - 1) * error
    center, joint_half = pooled or (mean, t_quantile(share, pairs - 1) * error)
    return Difference(
        pairs,
        above,
        below,
        center,
        center - joint_half,
        center + joint_half,
        (mean - half, mean + half),
        pooled is not None,
        shown=0 < joint_half < abs(center) and 0 < half < abs(mean),  # without any spread nothing is shown
    )


@dataclass(frozen=True)
class _Fit:
    """The additive model's least squares fit to a table: differences from row 0, and the error."""

    differences: Floats
    covariance: Floats  # of the differences, for an error of 1
    rss: float
    df: int


def _fit(table: Floats) -> _Fit:
    rows, seeds = np.nonzero(~np.isnan(table))
    design = np.hstack([np.eye(len(table))[rows], np.eye(table.shape[1])[seeds]])
    values = table[rows, seeds]
    inverse = np.linalg.pinv(design)
    contrasts = (np.eye(len(table))[1:] - np.eye(len(table))[0]) @ inverse[: len(table)]
    residuals = values - design @ (inverse @ values)
    differences, rss = contrasts @ values, float(residuals @ residuals)
    # What is left of equal values by rounding is no difference and no error.
    size = float(values @ values)
    differences[differences**2 < 1e-24 * size] = 0.0
    rss = 0.0 if rss < 1e-24 * size else rss
    df = len(values) - round(float((design * inverse.T).sum()))  # the trace of a projection is its rank
    return _Fit(differences, contrasts @ contrasts.T, rss, df)


def _pool(table: Floats, rows: Sequence[int]) -> tuple[list[int], list[int]]:
    """The rows with about the same spread, and those whose spread is larger."""
    pool, left_out = list(rows), []
    while len(pool) > 2:
        whole = _fit(table[pool])
        tails = {}
        for row in pool:
            rest = _fit(table[[other for other in pool if other != row]])
            own_df, own = whole.df - rest.df, whole.rss - rest.rss
            if own_df > 0 and rest.df > 0 and own > 1e-9 * whole.rss:
                ratio = own / own_df / (rest.rss / rest.df) if rest.rss else math.inf
                tails[row] = float(fdtrc(own_df, rest.df, ratio))
        widest = min(tails, key=lambda row: tails[row], default=None)
        if widest is None or tails[widest] >= SPREAD_ALPHA / len(rows):
            break
        pool.remove(widest)
        left_out.append(widest)
    return pool, left_out


def _pooled_intervals(fit: _Fit, share: float) -> list[tuple[float, float]]:
    """Mean and half-width of each difference, jointly right with ``share`` of an error for each."""
    variances = fit.covariance.diagonal()
    correlation = fit.covariance / np.sqrt(np.outer(variances, variances))
    quantile = dunnett_quantile(correlation, fit.df, share * len(variances))
    errors = np.sqrt(variances * fit.rss / fit.df)
    return [(float(d), quantile * float(e)) for d, e in zip(fit.differences, errors, strict=True)]


def t_quantile(alpha: float, df: int) -> float:
    """The ``c`` with ``P(|T| < c) = 1 - alpha`` for Student's t."""
    return float(-stdtrit(df, alpha / 2))  # scipy.stats.t takes a hundred times as long


def dunnett_quantile(correlation: Floats, df: int, alpha: float = ALPHA) -> float:
    """The ``c`` with ``P(all |T_i| < c) = 1 - alpha`` for a multivariate Student's t, Dunnett's distribution.

    Args:
        correlation: (n, n), of the compared means; 1/2 everywhere where no run is missing.
        df: degrees of freedom of the common error.
        alpha: chance that one or more are outside.
    """
    return _dunnett_quantile(tuple(map(tuple, correlation.round(6).tolist())), df, alpha)


@functools.lru_cache(256)  # all columns of a report have the same design
def _dunnett_quantile(correlation: tuple[tuple[float, ...], ...], df: int, alpha: float) -> float:
    number = len(correlation)
    if number == 1:
        return t_quantile(alpha, df)

    def outside(c: float) -> float:
        ends = np.full(number, c)
        distribution = multivariate_t(shape=np.array(correlation), df=df, seed=0)
        return float(distribution.cdf(ends, lower_limit=-ends)) - (1 - alpha)

    # It lies between the quantile of one comparison and Bonferroni's of all.
    ends = t_quantile(alpha, df), t_quantile(alpha / number, df)
    return float(brentq(outside, 0.99 * ends[0], 1.01 * ends[1], xtol=1e-4))


def _correlation(table: Floats) -> float | None:
    """The intraclass correlation of the seeds in which no run is missing."""
    complete = table[:, ~np.isnan(table).any(axis=0)]
    settings, seeds = complete.shape
    if settings < 2 or seeds < 2 or not (fit := _fit(complete)).rss:
        return None
    of_seeds, error = settings * complete.mean(axis=0).var(ddof=1), fit.rss / fit.df
    return float((of_seeds - error) / (of_seeds + (settings - 1) * error))
