"""Run records -> table: means, spreads, paired differences with intervals, and what they do not show.

The statistics are pure functions of numbers. The interval is Student's t on the paired differences
``setting - none`` of runs with the same seed (same initialization, same data order), not a bootstrap:
with two or three seeds a bootstrap can only reshuffle the two or three differences it has seen, so its
interval never reaches past them and is far too narrow.
"""

import csv
import io
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dropblock_det.records import REFERENCE, Absent, Comparison, Record

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


# --- the figures of one record -----------------------------------------------------------------


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
        1 / 2**30,
        "peak: GPU allocator, or process",
    ),
    "drop_share": Figure(
        "dropped",
        lambda r: (r.drop_share or {}).get("realised"),
        None,
        False,
        3,
        1,
        "share of elements really dropped, over the whole run",
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


@dataclass(frozen=True)
class Report:
    """The whole table, and what must be said with it."""

    base: str
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]
    absent: tuple[Absent, ...]
    answers: dict[str, str]  # figure -> one honest sentence
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def _summary(values: dict[int, float], reference: dict[int, float] | None, comparisons: int) -> Summary:
    return Summary(
        values,
        statistics.fmean(values.values()) if values else None,
        statistics.stdev(values.values()) if len(values) > 1 else None,
        None if reference is None else paired_difference(values, reference, comparisons),
    )


def build_report(runs: Comparison) -> Report:
    """Everything that the page, the Markdown, the CSV and the JSON show."""
    values = {
        setting: {
            name: {
                r.seed: v for r in runs.records if r.setting == setting and (v := figure.of(r)) is not None
            }
            for name, figure in FIGURES.items()
        }
        for setting in runs.settings
    }
    compared = sum(
        any(r.setting == setting for r in runs.records) for setting in runs.settings if setting != REFERENCE
    )
    rows = tuple(
        Row(
            setting,
            tuple(r.seed for r in runs.records if r.setting == setting),
            {
                name: _summary(
                    values[setting][name],
                    values.get(REFERENCE, {}).get(name, {})
                    if setting != REFERENCE and figure.compared
                    else None,
                    max(1, compared),
                )
                for name, figure in FIGURES.items()
            },
        )
        for setting in runs.settings
    )
    answers = {name: _answer(name, rows) for name, figure in FIGURES.items() if figure.compared}
    return Report(runs.base, runs.seeds, rows, runs.absent, answers, tuple(_notes(runs, compared)))


# --- words -------------------------------------------------------------------------------------


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
    digits = FIGURES[name].digits
    mean = f"{difference.mean:+.{digits}f}"
    if difference.low is None or difference.high is None:
        return mean
    return f"{mean} [{difference.low:+.{digits}f}, {difference.high:+.{digits}f}]"


def _answer(name: str, rows: Sequence[Row]) -> str:
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


def _notes(runs: Comparison, compared: int) -> list[str]:
    notes = []
    if runs.absent:
        total = len(runs.settings) * len(runs.seeds)
        notes.append(f"{len(runs.absent)} of {total} runs have no result; their list says why.")
    turned = [
        min(losses) < losses[-1]
        for r in runs.records
        if r.setting == REFERENCE and (losses := [e.val_loss for e in r.epochs if e.val_loss is not None])
    ]
    if turned and not all(turned):
        notes.append(
            f"{REFERENCE} was still improving at its last epoch in {turned.count(False)} of {len(turned)} "
            "runs (its val_loss did not turn up). A regularizer is a remedy for overfitting: at this budget "
            "there may be nothing to remedy."
        )
    if compared > 1:
        chance = 100 * min(1.0, compared * (1 - CONFIDENCE))
        notes.append(
            f"{compared} settings are compared with {REFERENCE}. If none of them did anything, each 95 % "
            "interval would still leave 0 out once in twenty times, one or more of them with a chance of up "
            f"to {chance:.0f} %, and that for every column. A star marks a difference that is no longer "
            "shown by the wider interval that counts them all (Bonferroni)."
        )
    notes += [
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
    return notes + _inconsistencies(runs)


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
    notes = [f"Careful: the runs have {label}." for label, values in seen.items() if len(values) > 1]
    for seed in runs.seeds:
        if len({r.init_hash for r in runs.records if r.seed == seed and r.init_hash}) > 1:
            notes.append(
                f"Careful: runs with seed {seed} started from different weights: their pairing means little."
            )
    return notes


# --- files -------------------------------------------------------------------------------------


def cell(name: str, value: float | None, sd: float | None = None) -> str:
    """A figure as the tables print it: scaled, rounded, ``-`` where there is none."""
    if value is None:
        return "-"
    figure = FIGURES[name]
    text = f"{value * figure.scale:.{figure.digits}f}"
    return text if sd is None else f"{text} ± {sd * figure.scale:.{figure.digits}f}"


def to_markdown(report: Report) -> str:
    """The report for a README or a terminal."""
    compared = [name for name, figure in FIGURES.items() if figure.compared]

    def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
        return [
            "| " + " | ".join(line) + " |"
            for line in (
                header,
                ["---"] * len(header),
                *[[c.replace("|", "\\|") for c in line] for line in lines],
            )
        ]

    text = [
        f"# Did it help? {report.base}",
        "",
        *[f"- {report.answers[n]}" for n in ("val_loss", "mAP", "AP50", "AP75")],
        "",
    ]
    text += ["## Mean ± standard deviation over seeds", ""]
    text += table(
        ["setting", "seeds", *(figure.title for figure in FIGURES.values())],
        [
            [
                row.setting,
                str(len(row.finished)),
                *(
                    cell(n, row.figures[n].mean, row.figures[n].sd if FIGURES[n].compared else None)
                    for n in FIGURES
                ),
            ]
            for row in report.rows
        ],
    )
    text += ["", f"## Difference from {REFERENCE}, with its 95 % interval", ""]
    text += table(
        ["setting", *(FIGURES[n].title for n in compared)],
        [
            [
                row.setting,
                *(
                    f"{interval(n, d)} {verdict(n, d)}" if (d := row.figures[n].difference) else verdict(n, d)
                    for n in compared
                ),
            ]
            for row in report.rows
            if row.setting != REFERENCE
        ],
    )
    if report.absent:
        text += ["", "## Runs without a result", ""]
        text += table(
            ["setting", "seed", "", "why"],
            [[a.setting, str(a.seed), a.status, a.reason] for a in report.absent],
        )
    text += ["", "## How to read it", "", *[f"- {note}" for note in report.notes]]
    text += ["", *[f"- **{f.title}**: {f.meaning}" for f in FIGURES.values()], ""]
    return "\n".join(text)


def to_csv(report: Report) -> str:
    """One line per setting and figure, unrounded, for a spreadsheet or a plotting script."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    columns = ["seeds", "mean", "sd", "pairs", "difference", "low", "high", "verdict", "shown_jointly"]
    writer.writerow(["setting", "figure", *columns])
    for row in report.rows:
        for name, summary in row.figures.items():
            line: list[Any] = [row.setting, name, len(summary.values), summary.mean, summary.sd]
            if (d := summary.difference) is None:
                line += [None] * 6
            else:
                line += [d.seeds, d.mean, d.low, d.high, verdict(name, d), d.shown_jointly]
            writer.writerow(line)
    return out.getvalue()
