"""The words of a report: what its numbers let one say, and what they do not show."""

from collections.abc import Sequence
from typing import Any

from dropblock_det.report.statistics import CONFIDENCE, FIGURES, Difference, Row, compared_settings
from dropblock_det.runs.record_v1 import REFERENCE, Comparison

LITTLE = 0.01  # mAP


def cell(name: str, value: float | None, sd: float | None = None) -> str:
    """A figure as the tables print it: scaled, rounded, ``-`` where there is none."""
    if value is None:
        return "-"
    figure = FIGURES[name]
    text = f"{value * figure.scale:.{figure.digits}f}"
    return text if sd is None else f"{text} ± {sd * figure.scale:.{figure.digits}f}"


def verdict(name: str, difference: Difference | None) -> str:
    """What a paired difference lets one say, and no more. ``*``: only while counted alone."""
    if difference is None:
        return "no pair with the same seed"
    if difference.low is None:
        return "one seed: no interval"
    if not difference.shown:
        return "no difference shown"
    direction = "lower" if difference.mean < 0 else "higher"
    better = FIGURES[name].better
    judged = "" if better is None else ": better" if direction == better else ": worse"
    return direction + judged + ("" if difference.shown_jointly else " *")


def interval(name: str, difference: Difference) -> str:
    """The difference and, where there is one, its interval."""
    numbers = [n for n in (difference.mean, difference.low, difference.high) if n is not None]
    form = f"+.{FIGURES[name].digits}f"
    if difference.shown and any(float(f"{n:{form}}") == 0 for n in numbers):
        form = "+.1e"  # an end that leaves 0 out must not be printed as 0
    mean, *ends = (f"{n:{form}}" for n in numbers)
    return f"{mean} [{', '.join(ends)}]" if ends else mean


def answer(name: str, rows: Sequence[Row]) -> str:
    """One sentence or two: which settings differ from the reference in this figure, and what is not known."""
    others = {r.setting: r.figures[name].difference for r in rows if r.setting != REFERENCE}
    differences = {setting: d for setting, d in others.items() if d is not None}
    title = FIGURES[name].title
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
    for word, sign in reversed(directions) if FIGURES[name].better == "higher" else directions:
        hits = {s: d for s, d in differences.items() if d.shown and d.mean * sign > 0}
        if hits:
            better = FIGURES[name].better
            judged = "" if better is None else " (better)" if better == word else " (worse)"
            listed = "; ".join(
                f"{s} {interval(name, d)}{'' if d.shown_jointly else ' *'}"
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


def notes(runs: Comparison) -> list[str]:
    """What must be said with the table, so that nobody reads more from it than it shows."""
    said = []
    if runs.absent:
        total = len(runs.settings) * len(runs.seeds)
        said.append(f"{len(runs.absent)} of {total} runs have no result; their list says why.")
    turned = [
        min(losses) < losses[-1]
        for r in runs.records
        if r.setting == REFERENCE and (losses := [e.val_loss for e in r.epochs if e.val_loss is not None])
    ]
    if turned and not all(turned):
        said.append(
            f"{REFERENCE} was still improving at its last epoch in {turned.count(False)} of {len(turned)} "
            "runs (its val_loss did not turn up). A regularizer is a remedy for overfitting: at this budget "
            "there may be nothing to remedy."
        )
    best = [mAP for record in runs.records if (mAP := FIGURES["mAP"].of(record)) is not None]
    if best and max(best) < LITTLE:
        said.append(
            f"No run reached a mAP of {LITTLE}: these detectors find next to nothing yet, and what a "
            "regularizer changes in them says nothing about trained ones."
        )
    compared = len(compared_settings(runs))
    if compared > 1:
        chance = 100 * min(1.0, compared * (1 - CONFIDENCE))
        said.append(
            f"{compared} settings are compared with {REFERENCE}. If none of them did anything, each 95 % "
            "interval would still leave 0 out once in twenty times, one or more of them with a chance of up "
            f"to {chance:.0f} %, and that for every column. A star marks a difference that is no longer "
            "shown by the wider interval that counts them all (Bonferroni)."
        )
    said += [
        "Intervals are 95 % Student t intervals of the paired differences (setting - none, same seed: same "
        "initial weights, same data order). They say what other seeds would give, not what other images "
        "would. Two seeds leave the interval 12.7 standard errors wide to each side, three 4.3: only large "
        "effects show.",
        "Each figure is its run's best epoch, chosen on the same validation images: all settings gain from "
        "that a little, so compare them with each other, not with other tables.",
        "The training loss is measured with the regularizer on, val_loss with it off. That alone raises "
        "loss and narrows the gap (val_loss - loss), so a smaller gap is not by itself better "
        "generalization.",
    ]
    return said + _inconsistencies(runs)


def _inconsistencies(runs: Comparison) -> list[str]:
    """Whatever makes the runs less comparable than they look."""
    seen: dict[str, set[Any]] = {
        "different data (data_hash)": {r.data_hash for r in runs.records},
        "different numbers of epochs": {len(r.epochs) for r in runs.records},
        "different versions of the libraries": {tuple(sorted(r.versions.items())) for r in runs.records},
        "different hardware, so times and memory do not compare": {
            str(r.hardware.get("device")) for r in runs.records
        },
    }
    said = [f"Careful: the runs have {label}." for label, values in seen.items() if len(values) > 1]
    for seed in runs.seeds:
        if len({r.init_hash for r in runs.records if r.seed == seed and r.init_hash}) > 1:
            said.append(
                f"Careful: runs with seed {seed} started from different weights: their pairing means little."
            )
    return said
