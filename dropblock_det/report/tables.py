"""Run records -> table: what the Markdown, the CSV, the JSON and the page are all made of."""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dropblock_det.report.statistics import FIGURES, Row, table_rows
from dropblock_det.report.words import answer, cell, interval, notes, verdict
from dropblock_det.runs.record_v1 import REFERENCE, Absent, Comparison


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


def build_report(runs: Comparison) -> Report:
    """Everything that the page, the Markdown, the CSV and the JSON show."""
    rows = table_rows(runs)
    answers = {name: answer(name, rows) for name, figure in FIGURES.items() if figure.compared}
    return Report(runs.base, runs.seeds, rows, runs.absent, answers, tuple(notes(runs)))


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
