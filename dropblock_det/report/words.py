"""The words of a report: what its numbers let one say, and what they do not show."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dropblock_det.comparison.gather import REFERENCE, Comparison
from dropblock_det.errors import printable
from dropblock_det.report.columns import LOSS, VAL_LOSS, Column
from dropblock_det.report.power import seeds_for_half
from dropblock_det.report.results import Evidence, SettingResult, compared_settings
from dropblock_det.report.statistics import Difference
from dropblock_det.tasks.metric import Metric


def markdown(text: str) -> str:
    """Escapes what Markdown, or the HTML inside it, would take for more than text."""
    special = r"[\\`*\[\]<>|#~$&!@]|(?<!\w)_|_(?!\w)|:(?=//)|(?<=www)\."
    return re.sub(special, r"\\\g<0>", printable(text))


def number(metric: Metric, value: float | None, sd: float | None = None) -> str:
    """A value as the tables print it: scaled, rounded, ``-`` where there is none."""
    if value is None:
        return "-"
    text = f"{value * metric.scale:.{metric.digits}f}"
    return text if sd is None else f"{text} ± {sd * metric.scale:.{metric.digits}f}"


def verdict(metric: Metric, difference: Difference | None) -> str:
    """What a difference lets one say, and no more."""
    if difference is None:
        return "no pair with the same seed"
    if difference.low is None:
        return "one seed: no interval"
    if not difference.shown:
        return "no difference shown"
    direction = "lower" if difference.mean < 0 else "higher"
    judged = "" if metric.better is None else ": better" if direction == metric.better else ": worse"
    return direction + judged


def in_seeds(metric: Metric, difference: Difference) -> str:
    """In how many of its seeds a setting is better, or higher where neither direction is."""
    hits = difference.pairs - difference.above if metric.better == "lower" else difference.above
    return f"{'better' if metric.better else 'higher'} in {hits} of {difference.pairs} seeds"


def interval(metric: Metric, difference: Difference) -> str:
    """The difference and, where there is one, its interval."""
    ends = [end for end in (difference.low, difference.high) if end is not None]
    numbers = [n * metric.scale for n in (difference.mean, *ends)]
    form = f"+.{metric.digits}f"
    if difference.shown and any(float(f"{n:{form}}") == 0 for n in numbers):
        form = "+.1e"  # an end that leaves 0 out must not be printed as 0
    mean, *limits = (f"{n:{form}}" for n in numbers)
    return f"{mean} ({' to '.join(limits)})" if limits else mean


def answer(metric: Metric, results: Sequence[SettingResult]) -> str:
    """One sentence or two: which settings differ from the reference in a column, and what is not known."""
    others = {r.setting: r.cells[metric.name].difference for r in results if r.setting != REFERENCE}
    differences = {printable(setting): d for setting, d in others.items() if d is not None}
    title = printable(metric.title)
    if not differences:
        return (
            f"{title}: nothing to compare yet; it takes a finished run of {REFERENCE} and of another setting "
            "with the same seed."
        )
    if all(d.low is None for d in differences.values()):
        return (
            f"{title}: one seed per setting, so there is no interval and no setting can be called better "
            f"or worse; differences between single runs are noise until shown otherwise."
        )
    parts = []
    directions = [("lower", -1), ("higher", 1)]
    for word, sign in reversed(directions) if metric.better == "higher" else directions:
        hits = {s: d for s, d in differences.items() if d.shown and d.mean * sign > 0}
        if hits:
            judged = "" if metric.better is None else " (better)" if metric.better == word else " (worse)"
            listed = "; ".join(
                f"{s} {interval(metric, d)}"
                for s, d in sorted(hits.items(), key=lambda item: item[1].mean * -sign)
            )
            parts.append(f"{word} than {REFERENCE}{judged}: {listed}")
    undecided = sum(d.low is not None and not d.shown for d in differences.values())
    if undecided:
        parts.append(f"no difference shown for {undecided} of {len(differences)} settings")
    single = sum(d.low is None for d in differences.values())
    if single:
        parts.append(f"no interval for {single} with one seed")
    return (
        f"{title}: "
        + ". ".join(part[0].upper() + part[1:] if i else part for i, part in enumerate(parts))
        + "."
    )


def power(metric: Metric, evidence: Evidence, seeds: int) -> str:
    """What the comparison could have shown in a column, and what more seeds would add."""
    title = printable(metric.title)
    if evidence.detectable is None:
        return (
            f"{title}: it takes two seeds of {REFERENCE} and of another setting to say what could be shown."
        )
    found = evidence.detectable * metric.scale
    digits = metric.digits if round(found, metric.digits) else metric.digits + 4
    text = (
        f"{title}: with these {seeds} seeds a true difference of {found:.{digits}f} would have been found "
        "four times in five"
    )
    more = seeds_for_half(evidence.settings, seeds)
    return f"{text}; half of it would take {more} seeds." if more else f"{text}."


def pairing(metric: Metric, evidence: Evidence) -> str:
    """Whether comparing runs of the same seed makes the comparison sharper."""
    title, correlation = printable(metric.title), evidence.correlation
    if correlation is None:
        return f"{title}: too few runs to say whether pairing by seed helps."
    if correlation < 0.1:
        return (
            f"{title}: runs with the same seed are no more alike than others (correlation "
            f"{correlation:.2f}), so pairing by seed does not help here."
        )
    return (
        f"{title}: runs with the same seed are alike (correlation {correlation:.2f}), and pairing by "
        f"seed makes the intervals {math.sqrt(1 - correlation):.2f} times as wide as they would be."
    )


def notes(
    comparison: Comparison, columns: Mapping[str, Column], evidence: Mapping[str, Evidence]
) -> list[str]:
    """What must be said with the table, so that nobody reads more from it than it shows."""
    lines = []
    if comparison.absent:
        total = len(comparison.settings) * len(comparison.seeds)
        lines.append(
            f"{len(comparison.absent)} of {total} runs have no result; their list says why. Differences are "
            "estimated from the others by least squares."
        )
    lines += _overfitting(comparison)
    lines += _learned_little(comparison, columns)
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
    """Of what the intervals speak."""
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


def _learned_little(comparison: Comparison, columns: Mapping[str, Column]) -> list[str]:
    lines = []
    for metric in comparison.metrics:
        best = columns[f"best_{metric.name}"].of
        values = [value for record in comparison.records if (value := best(record)) is not None]
        if values and metric.little is not None and max(values) < metric.little:
            lines.append(
                f"No run reached {printable(metric.title)} {metric.little}: these models learned next to "
                "nothing yet, and what a regularizer changes in them says nothing about trained ones."
            )
    return lines


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
        f"Careful: seeds {', '.join(map(str, seeds))} of {printable(setting)} started from the same weights: "
        "these are no independent runs, and the intervals are too narrow."
        for (setting, _), seeds in started.items()
        if len(seeds) > 1
    ]
