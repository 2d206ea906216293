"""The report as one HTML page that needs nothing else: no server, no network, no fonts, no libraries."""

import base64
import html
import json
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from dropblock_det.files import write_figure, write_json, write_text
from dropblock_det.report.figure import report_figure
from dropblock_det.report.statistics import FIGURES, Row
from dropblock_det.report.tables import Report, build_report, to_csv, to_markdown
from dropblock_det.report.words import cell, interval, verdict
from dropblock_det.runs.record_v1 import REFERENCE, Comparison, read_comparison


def write_report(root: Path, output: Path) -> Report:
    """Rebuilds the report of the comparison in ``root`` from its records alone.

    Writes ``report.html``, ``report.md``, ``report.png`` (for a README), ``report.csv`` (the unrounded table)
    and ``report.json`` (the table and every epoch of every run).

    Raises:
        InputError: ``root`` is not a comparison's folder, or a record is damaged.
    """
    runs = read_comparison(root)
    report = build_report(runs)
    write_text(output / "report.html", render_page(runs, report))
    write_text(output / "report.md", to_markdown(report) + "\n![curves and differences](report.png)\n")
    write_figure(output / "report.png", report_figure(runs, report))
    write_text(output / "report.csv", to_csv(report))
    records = [record.to_dict() | {"detections": None} for record in runs.records]
    write_json(output / "report.json", report.to_dict() | {"records": records})
    return report


def render_page(runs: Comparison, report: Report) -> str:
    """Fills the template: the table and every word stand in the HTML, the drawings are made by its script.

    Args:
        runs: what the curves and pictures are drawn from; thumbnails are read from ``runs.root/images``.
        report: the table.
    """
    page = resources.files("dropblock_det.report")
    part = {name: (page / f"page.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    finished = len(runs.records)
    total = len(runs.settings) * len(runs.seeds)
    lead = (
        f"{len(runs.settings)} settings, {len(runs.seeds)} seed{'s' * (len(runs.seeds) != 1)}, "
        f"{finished} of {total} runs finished."
    )
    if runs.records and not any(note.startswith("Careful") for note in report.notes):
        lead += " Same seed, same initial weights, same data order: only the regularizer differs."
    absent = "".join(
        f"<tr><td>{_e(a.setting)}</td><td>{a.seed}</td><td>{_e(a.status)}</td><td class='why'>"
        f"{_e(a.reason)}</td></tr>\n"
        for a in report.absent
    )
    return Template(part["html"]).substitute(
        title=_e(report.base),
        lead=_e(lead),
        css=part["css"],
        js=part["js"],
        first_answer=_e(report.answers["val_loss"]),
        absent_banner=(
            f'<p class="banner">{len(report.absent)} of {total} runs have no result. '
            '<a href="#absent">Which, and why</a></p>'
            if absent
            else ""
        ),
        absent_section=(
            '<section id="absent"><h2>Runs without a result</h2><div class="scroll"><table>'
            "<thead><tr><th>setting</th><th>seed</th><th>state</th><th class='why'>why</th></tr></thead>"
            f"<tbody>{absent}</tbody></table></div></section>"
            if absent
            else ""
        ),
        table=_table(report),
        notes="\n".join(f"<li>{_e(note)}</li>" for note in report.notes),
        meanings="\n".join(f"<dt>{_e(f.title)}</dt><dd>{_e(f.meaning)}</dd>" for f in FIGURES.values()),
        provenance=_provenance(runs),
        data=_embed(_data(runs, report)),
    )


def _e(text: object) -> str:
    return html.escape(str(text))


def _embed(data: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _table(report: Report) -> str:
    def heading(title: str, meaning: str) -> str:
        return f'<th scope="col"><button type="button" title="{_e(meaning)}">{_e(title)}</button></th>'

    def line(row: Row) -> str:
        name = _e(row.setting)
        cells = [
            f'<td data-value="{name}"><i class="swatch" data-swatch="{name}"></i>{name}</td>',
            f'<td data-value="{len(row.finished)}">{len(row.finished)}</td>',
        ]
        for key, figure in FIGURES.items():
            summary = row.figures[key]
            shown = _e(cell(key, summary.mean, summary.sd if figure.compared else None))
            if row.setting != REFERENCE and figure.compared:
                said = verdict(key, summary.difference)
                kind = "better" if ": better" in said else "worse" if ": worse" in said else ""
                text = f"{interval(key, summary.difference)}<br>{said}" if summary.difference else said
                shown += f'<small class="{kind}">{text}</small>'
            cells.append(
                f'<td data-value="{"" if summary.mean is None else repr(summary.mean)}">{shown}</td>'
            )
        return f"<tr>{''.join(cells)}</tr>"

    head = heading("setting", "name of the setting's file") + heading("seeds", "finished runs")
    head += "".join(heading(figure.title, figure.meaning) for figure in FIGURES.values())
    body = "\n".join(line(row) for row in report.rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"


def _provenance(runs: Comparison) -> str:
    def distinct(values: list[str]) -> str:
        return "<br>".join(_e(v) for v in sorted(set(values))) or "-"

    items = {
        "hardware": [", ".join(f"{k} {v}" for k, v in r.hardware.items()) for r in runs.records],
        "versions": [", ".join(f"{k} {v}" for k, v in r.versions.items()) for r in runs.records],
        "data": [r.data_hash or "not recorded" for r in runs.records],
        "seeds": [", ".join(map(str, runs.seeds))],
    }
    return "\n".join(f"<dt>{name}</dt><dd>{distinct(values)}</dd>" for name, values in items.items())


def _data(runs: Comparison, report: Report) -> dict[str, Any]:
    images: dict[str, dict[str, Any]] = {}
    for record in runs.records:
        for shown in record.detections:
            key = str(shown["image_id"])
            if key not in images:
                images[key] = {
                    "id": key,
                    "width": shown["width"],
                    "height": shown["height"],
                    "ground_truth": shown["ground_truth"],
                    "src": _thumbnail(runs, key),
                }
    curves: dict[str, dict[str, Any]] = {}
    detections: dict[str, dict[str, Any]] = {}
    for record in runs.records:
        curves.setdefault(record.setting, {})[str(record.seed)] = [asdict(epoch) for epoch in record.epochs]
        detections.setdefault(record.setting, {})[str(record.seed)] = {
            str(shown["image_id"]): [_rounded(d) for d in shown["detections"]] for shown in record.detections
        }
    return {
        "reference": REFERENCE,
        "rows": [
            asdict(row) | {"verdicts": {name: verdict(name, s.difference) for name, s in row.figures.items()}}
            for row in report.rows
        ],
        "answers": report.answers,
        "figures": {
            name: {"title": f.title, "better": f.better, "digits": f.digits} for name, f in FIGURES.items()
        },
        "curves": curves,
        "images": list(images.values()),
        "detections": detections,
    }


def _thumbnail(runs: Comparison, image_id: str) -> str | None:
    path = runs.root / "images" / f"{image_id}.jpg"
    return "data:image/jpeg;base64," + base64.b64encode(path.read_bytes()).decode() if path.exists() else None


def _rounded(detection: dict[str, Any]) -> dict[str, Any]:
    """To what a thumbnail can show; it keeps the page small."""
    box = [round(v, 1) for v in detection["bbox"]]
    return {"bbox": box, "category": detection["category"], "score": round(detection["score"], 3)}
