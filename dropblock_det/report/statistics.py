"""The numbers of a report: each run's figures, means and spreads over seeds, paired differences.

All are pure functions. The interval is Student's t on the paired differences ``setting - none`` of runs with
the same seed (same initialization, same data order), not a bootstrap: with two or three seeds a bootstrap can
only reshuffle the two or three differences it has seen, so its interval is far too narrow.
"""

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dropblock_det.runs.record_v1 import REFERENCE, Comparison, Record

CONFIDENCE = 0.95


def t_quantile(confidence: float, df: int) -> float:
    """The ``t`` with ``P(|T| < t) = confidence`` for Student's t with ``df`` degrees of freedom.

    The finite series for whole ``df`` (Abramowitz and Stegun, 26.7.3 and 26.7.4), inverted by bisection.

    Raises:
        ValueError: ``confidence`` outside (0, 1) or ``df`` below 1.
    """
    if not 0 < confidence < 1 or df < 1:
        raise ValueError(f"confidence must be in (0, 1) and df at least 1, got {confidence} and {df}")

    def covered(theta: float) -> float:  # P(|T| < sqrt(df) * tan(theta))
        cos = math.cos(theta)
        odd = df % 2
        term = cos if odd else 1.0
        total = 0.0
        for k in range(odd, df - 1, 2):  # powers of cos: odd, odd + 2, ..., df - 2
            total += term
            term *= cos * cos * (k + 1) / (k + 2)
        return 2 / math.pi * (theta + math.sin(theta) * total) if odd else math.sin(theta) * total

    low, high = 0.0, math.pi / 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if covered(middle) < confidence else (low, middle)
    return math.sqrt(df) * math.tan(low)


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
        values: seed -> figure of the setting.
        reference: seed -> figure of the reference.
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
    half = t_quantile(CONFIDENCE, len(pairs) - 1) * error
    joint_half = t_quantile(1 - (1 - CONFIDENCE) / comparisons, len(pairs) - 1) * error
    return Difference(len(pairs), mean, mean - half, mean + half, abs(mean) > half, abs(mean) > joint_half)


def _extreme(name: str, choose: Callable[[list[float]], float]) -> Callable[[Record], float | None]:
    def figure(record: Record) -> float | None:
        values = [v for v in (getattr(epoch, name) for epoch in record.epochs) if v is not None]
        return choose(values) if values else None

    return figure


def _gap(record: Record) -> float | None:
    """``val_loss - loss`` at the epoch with the lowest val_loss."""
    both = [(e.val_loss, e.loss) for e in record.epochs if e.val_loss is not None and e.loss is not None]
    return min(both)[0] - min(both)[1] if both else None


def _final_gap(record: Record) -> float | None:
    last = record.epochs[-1] if record.epochs else None
    return None if last is None or last.val_loss is None or last.loss is None else last.val_loss - last.loss


def _wall(record: Record) -> float | None:
    times = [epoch.wall_s for epoch in record.epochs]
    return math.fsum(t for t in times if t is not None) if times and None not in times else None


def _drop_share(record: Record) -> float | None:
    return (record.drop_share or {}).get("realised")


@dataclass(frozen=True)
class Figure:
    """One column: how it is read from a record, and which direction is better (``None``: neither)."""

    title: str
    of: Callable[[Record], float | None]
    better: str | None = None  # "lower" or "higher"
    compared: bool = True  # with the reference
    digits: int = 4
    scale: float = 1.0
    meaning: str = ""


FIGURES: dict[str, Figure] = {
    "loss": Figure("loss", _extreme("loss", min), meaning="lowest training loss of any epoch"),
    "val_loss": Figure("val_loss", _extreme("val_loss", min), "lower", meaning="lowest validation loss"),
    "mAP": Figure("mAP", _extreme("mAP", max), "higher", meaning="best COCO mAP (IoU 0.50 to 0.95)"),
    "AP50": Figure("AP50", _extreme("AP50", max), "higher", meaning="best AP at IoU 0.50"),
    "AP75": Figure("AP75", _extreme("AP75", max), "higher", meaning="best AP at IoU 0.75"),
    "gap": Figure("gap", _gap, meaning="val_loss - loss at the epoch with the lowest val_loss"),
    "final_gap": Figure("final gap", _final_gap, meaning="val_loss - loss at the last epoch"),
    "wall_s": Figure("time, min", _wall, None, False, 1, 1 / 60, "training and validation"),
    "images_per_s": Figure("images/s", lambda r: r.images_per_s, None, False, 1, 1, "while training"),
    "peak_memory": Figure(
        "memory, GiB",
        lambda r: r.peak_memory_bytes,
        None,
        False,
        2,
        2**-30,
        "peak: GPU allocator, or process",
    ),
    "drop_share": Figure(
        "dropped", _drop_share, None, False, 3, 1, "share of elements really dropped, over the whole run"
    ),
}


@dataclass(frozen=True)
class Summary:
    """One figure of one setting over its seeds."""

    values: dict[int, float]
    mean: float | None
    sd: float | None  # None with fewer than two seeds
    difference: Difference | None


@dataclass(frozen=True)
class Row:
    """One setting."""

    setting: str
    finished: tuple[int, ...]  # seeds
    figures: dict[str, Summary]


def compared_settings(runs: Comparison) -> list[str]:
    """The settings with a finished run, but for the reference."""
    with_records = {record.setting for record in runs.records} - {REFERENCE}
    return [setting for setting in runs.settings if setting in with_records]


def table_rows(runs: Comparison) -> tuple[Row, ...]:
    """One row per setting, the reference first: each figure over the seeds, and its paired difference."""
    values = {
        setting: {name: _by_seed(runs, setting, figure) for name, figure in FIGURES.items()}
        for setting in runs.settings
    }
    reference, comparisons = values.get(REFERENCE, {}), max(1, len(compared_settings(runs)))

    def summary(setting: str, name: str) -> Summary:
        own = values[setting][name]
        paired = setting != REFERENCE and FIGURES[name].compared
        return Summary(
            own,
            statistics.fmean(own.values()) if own else None,
            statistics.stdev(own.values()) if len(own) > 1 else None,
            paired_difference(own, reference.get(name, {}), comparisons) if paired else None,
        )

    return tuple(
        Row(
            setting,
            tuple(record.seed for record in runs.records if record.setting == setting),
            {name: summary(setting, name) for name in FIGURES},
        )
        for setting in runs.settings
    )


def _by_seed(runs: Comparison, setting: str, figure: Figure) -> dict[int, float]:
    own = [record for record in runs.records if record.setting == setting]
    return {record.seed: value for record in own if (value := figure.of(record)) is not None}
