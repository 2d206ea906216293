"""The words of a report: what its numbers let one say, and what they do not show."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dropblock_det.comparison.gather import REFERENCE, Comparison
from dropblock_det.errors import printable
from dropblock_det.report.columns import LOSS, VAL_LOSS, Column
from dropblock_det.report.results import SettingResult, compared_settings
from dropblock_det.report.statistics import CONFIDENCE, Difference
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
    """What a paired difference lets one say, and no more. ``*``: only while counted alone."""
    if difference is None:
        return "no pair with the same seed"
    if difference.low is None:
        return "one seed: no interval"
    if not difference.shown:
        return "no difference shown"
    direction = "lower" if difference.mean < 0 else "higher"
    judged = "" if metric.better is None else ": better" if direction == metric.better else ": worse"
    return direction + judged + ("" if difference.shown_jointly else " *")


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
                f"{s} {interval(metric, d)}{'' if d.shown_jointly else ' *'}"
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


def notes(comparison: Comparison, columns: Mapping[str, Column]) -> list[str]:
    """What must be said with the table, so that nobody reads more from it than it shows."""
    lines = []
    if comparison.absent:
        total = len(comparison.settings) * len(comparison.seeds)
        lines.append(f"{len(comparison.absent)} of {total} runs have no result; their list says why.")
    turned = [
        min(losses) < losses[-1]
        for record in comparison.records
        if record.setting == REFERENCE and (losses := [value for _, value in record.values(VAL_LOSS)])
    ]
    if turned and not all(turned):
        lines.append(
            f"{REFERENCE} was still improving at its last epoch in {turned.count(False)} of {len(turned)} "
            f"runs (its {VAL_LOSS} did not turn up). A regularizer is a remedy for overfitting: at this "
            "budget there may be nothing to remedy."
        )
    lines += _learned_little(comparison, columns)
    compared = len(compared_settings(comparison))
    if compared > 1:
        chance = 100 * min(1.0, compared * (1 - CONFIDENCE))
        lines.append(
            f"{compared} settings are compared with {REFERENCE}. If none of them did anything, each 95 % "
            "interval would still leave 0 out once in twenty times, one or more of them with a chance of up "
            f"to {chance:.0f} %, and that for every column. A star marks a difference that is no longer "
            "shown by the wider interval that counts them all (Bonferroni)."
        )
    lines += [
        "Intervals are 95 % Student t intervals of the paired differences (setting - none, same seed: same "
        "initial weights, same data order). They say what other seeds would give, not what other images "
        "would. Two seeds leave the interval 12.7 standard errors wide to each side, three 4.3: only large "
        "effects show.",
        "A best epoch is chosen on the same validation images that judge it: all settings gain from that a "
        "little, so the last epoch is the one to go by.",
        f"The training loss is measured with the regularizer on, {VAL_LOSS} with it off. That alone raises "
        f"{LOSS} and narrows the gap ({VAL_LOSS} - {LOSS}), so a smaller gap is not by itself better "
        "generalization.",
    ]
    return lines + _inconsistencies(comparison)


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
        "different data (data_hash)": {r.data_hash for r in records},
        "different numbers of epochs": {len(r.epochs) for r in records},
        "different versions of the libraries": {tuple(sorted(r.versions.items())) for r in records},
        "different hardware, so times and memory do not compare": {
            str(r.hardware.get("device")) for r in records
        },
    }
    lines = [f"Careful: the runs have {label}." for label, values in seen.items() if len(values) > 1]
    for seed in comparison.seeds:
        if len({r.init_hash for r in records if r.seed == seed and r.init_hash}) > 1:
            lines.append(
                f"Careful: runs with seed {seed} started from different weights: their pairing means little."
            )
    return lines
