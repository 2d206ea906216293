"""What every setting reached in every column, and its difference from the reference."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dropblock_det.comparison.gather import REFERENCE, Comparison
from dropblock_det.report.columns import Column
from dropblock_det.report.power import detectable_difference
from dropblock_det.report.statistics import Analysis, Difference, Floats, analyse


@dataclass(frozen=True)
class Cell:
    """One column of one setting.

    Attributes:
        values: by seed.
        mean: over the seeds; ``None`` where there is no value.
        sd: standard deviation over the seeds; ``None`` with fewer than two.
        difference: from the reference; ``None`` for the reference itself, and where nothing can be paired.
    """

    values: dict[int, float]
    mean: float | None
    sd: float | None
    difference: Difference | None


@dataclass(frozen=True)
class SettingResult:
    """One setting: the seeds with a finished run, and its cell of every column."""

    setting: str
    finished: tuple[int, ...]
    cells: dict[str, Cell]


@dataclass(frozen=True)
class Evidence:
    """What stands behind all differences of a column.

    Attributes:
        seeds: of the pair of settings that has the fewest in common.
        settings: whose spread is pooled, the reference among them.
        left_out: settings whose spread is too large for it.
        detectable: the true difference that would have been shown with a chance of 80 %; ``None`` where that
            can't be said.
        correlation: of the seeds across the settings.
    """

    seeds: int
    settings: int
    left_out: tuple[str, ...]
    detectable: float | None
    correlation: float | None


def compared_settings(comparison: Comparison) -> list[str]:
    """The settings with a finished run, but for the reference."""
    with_records = {record.setting for record in comparison.records} - {REFERENCE}
    return [setting for setting in comparison.settings if setting in with_records]


def setting_results(
    comparison: Comparison, columns: Mapping[str, Column]
) -> tuple[tuple[SettingResult, ...], dict[str, Evidence]]:
    """One result per setting, the reference first, and what stands behind each compared column."""
    settings = comparison.settings
    values = {
        name: {setting: _by_seed(comparison, setting, column) for setting in settings}
        for name, column in columns.items()
    }
    analyses = {
        name: analyse(_table(values[name], settings, comparison.seeds))
        for name, column in columns.items()
        if column.metric.compared and settings and settings[0] == REFERENCE
    }

    def cell(number: int, name: str) -> Cell:
        own = values[name][settings[number]]
        return Cell(
            own,
            statistics.fmean(own.values()) if own else None,
            statistics.stdev(own.values()) if len(own) > 1 else None,
            analyses[name].differences[number - 1] if number and name in analyses else None,
        )

    results = tuple(
        SettingResult(
            setting,
            tuple(record.seed for record in comparison.records if record.setting == setting),
            {name: cell(number, name) for name in columns},
        )
        for number, setting in enumerate(settings)
    )
    return results, {name: _evidence(analysis, settings) for name, analysis in analyses.items()}


def _by_seed(comparison: Comparison, setting: str, column: Column) -> dict[int, float]:
    own = [record for record in comparison.records if record.setting == setting]
    return {record.seed: value for record in own if (value := column.of(record)) is not None}


def _table(
    values: Mapping[str, Mapping[int, float]], settings: tuple[str, ...], seeds: tuple[int, ...]
) -> Floats:
    return np.array([[values[setting].get(seed, np.nan) for seed in seeds] for setting in settings], float)


def _evidence(analysis: Analysis, settings: tuple[str, ...]) -> Evidence:
    pairs = [d.pairs for d in analysis.differences if d and d.pooled]
    detectable = None
    if analysis.sd is not None and pairs:
        detectable = analysis.sd * detectable_difference(len(analysis.pool), min(pairs))
    left_out = tuple(settings[row] for row in analysis.left_out)
    return Evidence(min(pairs, default=0), len(analysis.pool), left_out, detectable, analysis.correlation)
