"""Run records -> table: what the Markdown, the CSV, the JSON and the page are all made of."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dropblock_det.comparison.gather import REFERENCE, Absent, Comparison
from dropblock_det.report.columns import Column, columns
from dropblock_det.report.notes import learned_little, notes
from dropblock_det.report.resampling import OtherImages
from dropblock_det.report.results import SettingResult, setting_results
from dropblock_det.report.words import (
    answer,
    in_seeds,
    interval,
    markdown,
    on_other_images,
    pairing,
    power,
    verdict,
)
from dropblock_det.tasks.metric import Metric


@dataclass(frozen=True)
class Report:
    """The whole table, and what must be said with it.

    Attributes:
        base: the base config's name.
        headline: the name of the column that answers first; empty while no run is finished.
        seeds: in rising order.
        columns: by name, in the order of the table.
        results: a setting each, the reference first.
        absent: the runs without a result.
        answers: one honest sentence for each compared column, the headline's first.
        power: for each of them, what the comparison could have shown, or why it could show nothing.
        pairing: for each of them, whether pairing by seed helps.
        images: what resampling the validation images says, if the runs wrote their outcomes.
        notes: what must be said with the numbers.
        last: the last epochs that are averaged.
    """

    base: str
    headline: str
    seeds: tuple[int, ...]
    columns: dict[str, Column]
    results: tuple[SettingResult, ...]
    absent: tuple[Absent, ...]
    answers: dict[str, str]
    power: dict[str, str]
    pairing: dict[str, str]
    images: OtherImages | None
    notes: tuple[str, ...]
    last: int = 1

    @property
    def last_epochs(self) -> str:
        """The averaged epochs, in words."""
        return "last epoch" if self.last == 1 else f"last {self.last} epochs"

    @property
    def leading(self) -> list[str]:
        """The columns that a terminal has room for: the headline, then the other judged metrics."""
        judged = [n for n, c in self.columns.items() if c.epoch == "last" and c.metric.better is not None]
        return sorted(judged, key=lambda name: name != self.headline)

    def on_other_images(self, name: str) -> str:
        """A sentence on a column; empty where nothing was resampled."""
        known = self.images is not None and name in self.images.metrics
        return on_other_images(self.columns[name].metric, self.images) if known and self.images else ""

    def to_dict(self) -> dict[str, Any]:
        """What ``report.json`` holds."""
        return {
            "base": self.base,
            "headline": self.headline,
            "seeds": self.seeds,
            "columns": [column.metric for column in self.columns.values()],
            "results": self.results,
            "absent": self.absent,
            "answers": self.answers,
            "power": self.power,
            "pairing": self.pairing,
            "images": self.images,
            "notes": self.notes,
        }


def build_report(comparison: Comparison, last: int = 1, images: OtherImages | None = None) -> Report:
    """Everything that the page, the Markdown, the CSV and the JSON show.

    Args:
        comparison: the records.
        last: the last epochs that are averaged.
        images: what resampling the validation images says.
    """
    headline_first = sorted(comparison.metrics, key=lambda metric: metric.name != comparison.headline)
    found = columns(headline_first, last)
    results, evidence = setting_results(comparison, found)
    compared = [name for name, column in found.items() if column.metric.compared]
    compared.sort(
        key=lambda name: (
            name != comparison.headline,
            found[name].epoch != "last",
            found[name].metric.better is None,
        )
    )
    return Report(
        comparison.base,
        comparison.headline,
        comparison.seeds,
        found,
        results,
        comparison.absent,
        {name: answer(found[name].metric, results) for name in compared},
        {n: power(found[n].metric, evidence[n], evidence[n].seeds) for n in compared if n in evidence}
        | learned_little(comparison, found),
        {n: pairing(found[n].metric, evidence[n]) for n in compared if n in evidence},
        images,
        tuple(notes(comparison, found, evidence, images is not None)),
        last,
    )


def to_markdown(report: Report) -> str:
    """The report for a README or a terminal."""
    metrics = [column.metric for column in report.columns.values()]
    compared = [metric for metric in metrics if metric.compared]

    def difference(result: SettingResult, metric: Metric) -> str:
        found = result.cells[metric.name].difference
        words = verdict(metric, found)
        return f"{interval(metric, found)} {words}; {in_seeds(metric, found)}" if found else words

    lines = [f"# Did it help? {markdown(report.base)}", ""]
    lines += [f"- {markdown(report.answers[name])}" for name in report.leading]
    lines += ["", "What this comparison could have shown:", ""]
    lines += [f"- {markdown(report.power[name])}" for name in report.leading if name in report.power]
    if resampled := [text for name in report.leading if (text := report.on_other_images(name))]:
        lines += ["", *(f"- {markdown(text)}" for text in resampled)]
    lines += ["", "## Mean ± standard deviation over seeds", ""]
    lines += _table(
        ["setting", "seeds", *(metric.title for metric in metrics)],
        [
            [
                result.setting,
                str(len(result.finished)),
                *(
                    m.format((cell := result.cells[m.name]).mean, cell.sd if m.compared else None)
                    for m in metrics
                ),
            ]
            for result in report.results
        ],
    )
    lines += ["", f"## Difference from {REFERENCE}, with its 95 % interval", ""]
    lines += _table(
        ["setting", *(metric.title for metric in compared)],
        [
            [result.setting, *(difference(result, metric) for metric in compared)]
            for result in report.results
            if result.setting != REFERENCE
        ],
    )
    lines += _categories(report)
    if report.absent:
        lines += ["", "## Runs without a result", ""]
        rows = [[absent.setting, str(absent.seed), absent.status, absent.reason] for absent in report.absent]
        lines += _table(["setting", "seed", "", "why"], rows)
    lines += ["", "## How to read it", "", *(f"- {markdown(note)}" for note in report.notes)]
    lines += ["", *(f"- **{markdown(metric.title)}**: {markdown(metric.meaning)}" for metric in metrics), ""]
    return "\n".join(lines)


def _categories(report: Report) -> list[str]:
    if report.images is None or not report.images.categories:
        return []
    metric = report.columns[report.headline].metric
    settings = [result.setting for result in report.results if result.setting != REFERENCE]
    title = f"## {markdown(metric.title)} by category: difference from {REFERENCE}, 95 % interval over images"
    rows = []
    for name, found in report.images.categories.items():
        differences = (interval(metric, found[s]) if s in found else "-" for s in settings)
        rows.append([name, str(report.images.objects[name]), *differences])
    return ["", title, "", *_table(["category", "objects", *settings], rows)]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    escaped = [[markdown(text) for text in row] for row in (header, *rows)]
    return ["| " + " | ".join(row) + " |" for row in (escaped[0], ["---"] * len(header), *escaped[1:])]


def to_csv(report: Report) -> str:
    """One line per setting and column, unrounded, for a spreadsheet or a plotting script."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    header = ["seeds", "mean", "sd", "pairs", "above", "difference", "low", "high", "own_low", "own_high"]
    header += ["pooled", "verdict", "images_low", "images_high"]
    writer.writerow(["setting", "column", *header])
    for result in report.results:
        for name, cell in result.cells.items():
            line: list[Any] = [result.setting, name, len(cell.values), cell.mean, cell.sd]
            if (d := cell.difference) is None:
                line += [None] * 9
            else:
                words = verdict(report.columns[name].metric, d)
                line += [d.pairs, d.above, d.mean, d.low, d.high, *(d.own or (None, None)), d.pooled, words]
            images = report.images.metrics.get(name, {}).get(result.setting) if report.images else None
            writer.writerow([*line, *((images.low, images.high) if images else (None, None))])
    return out.getvalue()
