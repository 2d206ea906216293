"""What must be said with the numbers of a report, so that nobody reads more from them than they show."""

from collections.abc import Mapping
from typing import Any

from dropblock_det.comparison.gather import Comparison
from dropblock_det.comparison.plan import REFERENCE
from dropblock_det.errors import printable
from dropblock_det.report.columns import LOSS, VAL_LOSS, Column
from dropblock_det.report.results import Evidence, compared_settings


def notes(
    comparison: Comparison, columns: Mapping[str, Column], evidence: Mapping[str, Evidence], resampled: bool
) -> list[str]:
    """Returns the notes, the most important first."""
    lines = []
    if comparison.absent:
        total = len(comparison.settings) * len(comparison.seeds)
        lines.append(
            f"{len(comparison.absent)} of {total} runs have no result; their list says why. Differences are "
            "estimated from the others by least squares."
        )
    lines += _overfitting(comparison)
    if comparison.late_seeds:
        late = ", ".join(map(str, comparison.late_seeds))
        lines.append(
            f"Careful: seeds {late} were added when there were results to look at. Adding seeds until a "
            "difference shows finds one sooner or later, also where there is none."
        )
    lines += _left_out(columns, evidence)
    compared = len(compared_settings(comparison))
    lines += [
        f"Intervals are 95 % intervals of the difference from {REFERENCE} with the same seed. Their error is "
        f"that of all settings together, and they count all {compared} comparisons of a column (Dunnett): if "
        "no setting did anything, one or more would leave 0 out in one comparison of twenty. There are many "
        "columns, so go by the first.",
        "A difference counts as shown where that interval and the setting's own t interval (96 %, from its "
        "own seeds alone) both leave 0 out.",
        _what_varies(comparison),
        "The last epoch leads. A best epoch is chosen on the same validation images that judge it, which "
        "flatters all settings a little.",
        f"The learning rate and the other settings of the base config serve {REFERENCE}; a regularizer might "
        "do better with others, such as a longer training.",
        f"The training loss is measured with the regularizer on, {VAL_LOSS} with it off. That alone raises "
        f"{LOSS} and narrows the gap ({VAL_LOSS} - {LOSS}), so a smaller gap is not by itself better "
        "generalization.",
    ]
    if resampled:
        lines.append(
            "An interval for other images keeps the trained models and resamples the validation images, for "
            f"a setting and {REFERENCE} alike. It counts neither the seeds nor the number of comparisons."
        )
    return lines + _inconsistencies(comparison)


def _overfitting(comparison: Comparison) -> list[str]:
    turned = [
        min(losses) < losses[-1]
        for record in comparison.records
        if record.setting == REFERENCE and (losses := [value for _, value in record.values(VAL_LOSS)])
    ]
    if not turned or all(turned):
        return []
    return [
        f"{REFERENCE} was still improving at its last epoch in {turned.count(False)} of {len(turned)} runs "
        f"(its {VAL_LOSS} did not turn up). A regularizer is a remedy for overfitting: at this budget there "
        "may be nothing to remedy."
    ]


def _left_out(columns: Mapping[str, Column], evidence: Mapping[str, Evidence]) -> list[str]:
    where: dict[str, list[str]] = {}
    for name, behind in evidence.items():
        for setting in behind.left_out:
            where.setdefault(setting, []).append(printable(columns[name].metric.title))
    return [
        f"{printable(setting)} varies far more between seeds than the other settings in {', '.join(titles)}: "
        + (
            "every setting is judged by its own differences there."
            if setting == REFERENCE
            else "there it is judged by its own differences, and the error of the others is without it."
        )
        for setting, titles in where.items()
    ]


def _what_varies(comparison: Comparison) -> str:
    """What the intervals allow for: other seeds alone, or other training images too."""
    hashes = {seed: {r.data_hash for r in comparison.records if r.seed == seed} for seed in comparison.seeds}
    each_its_own = all(len(found) == 1 for found in hashes.values() if found)
    if each_its_own and len(set().union(*hashes.values())) > 1:
        return (
            "Each seed drew a training subset of its own, the same for all settings: the intervals say what "
            "other seeds and other training images would give."
        )
    return (
        "All runs trained on the same images: the intervals say what other seeds would give, not what other "
        "images would."
    )


def learned_little(comparison: Comparison, columns: Mapping[str, Column]) -> dict[str, str]:
    """Returns a warning for each column whose models are hardly better than untrained ones."""
    warnings = {}
    for metric in comparison.metrics:
        best = columns[f"best_{metric.name}"].of
        values = [value for record in comparison.records if (value := best(record)) is not None]
        if values and metric.little is not None and max(values) < metric.little:
            warnings[metric.name] = warnings[f"best_{metric.name}"] = (
                f"No run reached {printable(metric.title)} {metric.little}: these models learned next to "
                "nothing yet, and what a regularizer changes in them says nothing about trained ones."
            )
    return warnings


def _inconsistencies(comparison: Comparison) -> list[str]:
    """Whatever makes the runs less comparable than they look."""
    records = comparison.records
    seen: dict[str, set[Any]] = {
        "different numbers of epochs": {len(r.epochs) for r in records},
        "different versions of the libraries": {tuple(sorted(r.versions.items())) for r in records},
        "different hardware, so times and memory do not compare": {
            str(r.hardware.get("device")) for r in records
        },
    }
    lines = [f"Careful: the runs have {label}." for label, values in seen.items() if len(values) > 1]
    if comparison.vary_subset and len(comparison.seeds) > 1 and len({r.data_hash for r in records}) == 1:
        lines.append("Careful: each seed was to draw its own training subset, but all have the same data.")
    for seed in comparison.seeds:
        own = [r for r in records if r.seed == seed]
        if len({r.init_hash for r in own if r.init_hash}) > 1:
            lines.append(
                f"Careful: runs with seed {seed} started from different weights: their pairing means little."
            )
        if len({r.data_hash for r in own}) > 1:
            lines.append(f"Careful: runs with seed {seed} have different data (data_hash).")
    return lines + _same_start(comparison)


def _same_start(comparison: Comparison) -> list[str]:
    """Seeds that should differ and do not: no runs of their own."""
    started: dict[tuple[str, str], list[int]] = {}
    for record in comparison.records:
        if record.init_hash:
            started.setdefault((record.setting, record.init_hash), []).append(record.seed)
    return [
        f"Careful: seeds {', '.join(map(str, seeds))} of {printable(setting)} started from the same weights. "
        "From published weights that is as it should be; otherwise they are no independent runs."
        for (setting, _), seeds in started.items()
        if len(seeds) > 1
    ]
