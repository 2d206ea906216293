"""The words of a report: what its numbers let one say, and what they do not show."""

import math
import re
from collections.abc import Sequence

from dropblock_det.comparison.gather import REFERENCE
from dropblock_det.errors import printable
from dropblock_det.report.power import seeds_for_half
from dropblock_det.report.resampling import ImageInterval, OtherImages
from dropblock_det.report.results import Evidence, SettingResult
from dropblock_det.report.statistics import Difference
from dropblock_det.tasks.metric import Metric


def markdown(text: str) -> str:
    """Escapes what Markdown, or the HTML inside it, would take for more than text."""
    special = r"[\\`*\[\]<>|#~$&!@]|(?<!\w)_|_(?!\w)|:(?=//)|(?<=www)\."
    return re.sub(special, r"\\\g<0>", printable(text))


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
    hits = difference.below if metric.better == "lower" else difference.above
    return f"{'better' if metric.better else 'higher'} in {hits} of {difference.pairs} seeds"


def interval(metric: Metric, difference: Difference | ImageInterval) -> str:
    """The difference and, where there is one, its interval."""
    ends = [end for end in (difference.low, difference.high) if end is not None]
    numbers = [n * metric.scale for n in (difference.mean, *ends)]
    form = f"+.{metric.digits}f"
    leaves_0_out = len(ends) == 2 and ends[0] * ends[1] > 0
    if leaves_0_out and any(float(f"{n:{form}}") == 0 for n in numbers):
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


def on_other_images(metric: Metric, images: OtherImages) -> str:
    """Which differences would survive other validation images, as far as resampling can tell."""
    found = images.metrics[metric.name]
    if not found:
        return ""
    firm = [
        f"{printable(name)} {interval(metric, i)}" for name, i in found.items() if i.low > 0 or i.high < 0
    ]
    parts = ["the difference would keep its sign for " + "; ".join(firm)] if firm else []
    if rest := len(found) - len(firm):
        parts.append(f"{rest} of {len(found)} differences might be 0 or have the other sign")
    title = printable(metric.title)
    return f"{title} on other images (these models, {images.images} images resampled): {'. '.join(parts)}."


def power(metric: Metric, evidence: Evidence, seeds: int) -> str:
    """What the comparison could have shown in a column, and what more seeds would add."""
    title = printable(metric.title)
    if evidence.detectable is None and evidence.left_out:
        return f"{title}: the settings' spreads differ too much to say what could have been shown."
    if evidence.detectable is None:
        return (
            f"{title}: it takes two seeds of {REFERENCE} and of another setting to say what could be shown."
        )
    found = evidence.detectable * metric.scale
    if not round(found, metric.digits):
        return f"{title}: the runs hardly differ in it, so this comparison says next to nothing about it."
    text = (
        f"{title}: with these {seeds} seeds a true difference of {found:.{metric.digits}f} would have been "
        "found four times in five"
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
