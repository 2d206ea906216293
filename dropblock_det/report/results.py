"""What every setting reached in every column, and its difference from the reference."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from dropblock_det.comparison.gather import REFERENCE, Comparison
from dropblock_det.report.columns import Column
from dropblock_det.report.statistics import Difference, paired_difference


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


def compared_settings(comparison: Comparison) -> list[str]:
    """The settings with a finished run, but for the reference."""
    with_records = {record.setting for record in comparison.records} - {REFERENCE}
    return [setting for setting in comparison.settings if setting in with_records]


def setting_results(comparison: Comparison, columns: Mapping[str, Column]) -> tuple[SettingResult, ...]:
    """One result per setting, the reference first."""
    values = {
        setting: {name: _by_seed(comparison, setting, column) for name, column in columns.items()}
        for setting in comparison.settings
    }
    reference, comparisons = values.get(REFERENCE, {}), max(1, len(compared_settings(comparison)))

    def cell(setting: str, name: str) -> Cell:
        own = values[setting][name]
        paired = setting != REFERENCE and columns[name].metric.compared
        return Cell(
            own,
            statistics.fmean(own.values()) if own else None,
            statistics.stdev(own.values()) if len(own) > 1 else None,
            paired_difference(own, reference.get(name, {}), comparisons) if paired else None,
        )

    return tuple(
        SettingResult(
            setting,
            tuple(record.seed for record in comparison.records if record.setting == setting),
            {name: cell(setting, name) for name in columns},
        )
        for setting in comparison.settings
    )


def _by_seed(comparison: Comparison, setting: str, column: Column) -> dict[int, float]:
    own = [record for record in comparison.records if record.setting == setting]
    return {record.seed: value for record in own if (value := column.of(record)) is not None}
