"""A comparison's report, and its page."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from dropblock_det.comparison.gather import REFERENCE, Comparison, gather
from dropblock_det.comparison.plan import run_folder
from dropblock_det.files import write_figure, write_json, write_text
from dropblock_det.report.columns import BEST_GAP, GAP, LOSS, VAL_LOSS
from dropblock_det.report.figure import report_figure
from dropblock_det.report.html import data_uri, render
from dropblock_det.report.resampling import other_images
from dropblock_det.report.results import SettingResult
from dropblock_det.report.tables import Report, build_report, to_csv, to_markdown
from dropblock_det.report.words import in_seeds, interval, verdict
from dropblock_det.runs.outcomes import read_outcomes
from dropblock_det.tasks.evaluation import Outcomes

SCRIPTS = ("settings", "chart", "pictures", "answer", "curves", "gaps", "samples", "start")


def write_report(root: Path, output: Path, last: int = 1) -> Report:
    """Rebuilds the report of the comparison in ``root`` from its records alone.

    Writes ``report.html``, ``report.md``, ``report.png`` (for a README), ``report.csv`` (the unrounded table)
    and ``report.json`` (the table and every epoch of every run).

    Args:
        root: the comparison's folder.
        output: the folder to write to.
        last: how many of the last epochs are averaged.

    Raises:
        InputError: ``root`` is not a comparison's folder, or a record is damaged.
    """
    comparison = gather(root)
    # Outcomes are of the very last epoch.
    images = other_images(_outcomes(comparison)) if last == 1 else None
    report = build_report(comparison, last, images)
    write_text(output / "report.html", render_page(comparison, report))
    write_text(output / "report.md", to_markdown(report) + "\n![curves and differences](report.png)\n")
    write_figure(output / "report.png", report_figure(comparison, report))
    write_text(output / "report.csv", to_csv(report))
    records = [asdict(record) | {"samples": ()} for record in comparison.records]
    write_json(output / "report.json", report.to_dict() | {"records": records})
    return report


def _outcomes(comparison: Comparison) -> dict[str, dict[int, Outcomes]]:
    """The runs' outcomes, where they wrote them, by setting and seed."""
    found: dict[str, dict[int, Outcomes]] = {}
    for record in comparison.records:
        folder = run_folder(comparison.root, record.setting, record.seed)
        if (outcomes := read_outcomes(folder)) is not None:
            found.setdefault(record.setting, {})[record.seed] = outcomes
    return found


def render_page(comparison: Comparison, report: Report) -> str:
    """Fills the template: the table and every word stand in the HTML, the drawings are made by its scripts.

    Args:
        comparison: what the curves and samples are drawn from; thumbnails are in its folder ``images``.
        report: the table.
    """
    metrics = [column.metric for column in report.columns.values()]
    return render(
        "comparison.html",
        SCRIPTS,
        _data(comparison, report),
        kind="comparison",
        title="Did it help?",
        about=report.base,
        report=report,
        reference=REFERENCE,
        total=len(comparison.settings) * len(comparison.seeds),
        lead=_lead(comparison, report),
        first_answer=next(iter(report.answers.values()), "No run is finished yet."),
        others=[result.setting for result in report.results if result.setting != REFERENCE],
        image_interval=lambda found: interval(report.columns[report.headline].metric, found),
        first_power=next(iter(report.power.values()), ""),
        last=report.last_epochs,
        headings=[
            ("setting", "name of the setting's file"),
            ("seeds", "finished runs"),
            *((metric.title, metric.meaning) for metric in metrics),
        ],
        cells=lambda result: _cells(report, result),
        provenance=_provenance(comparison),
    )


def _lead(comparison: Comparison, report: Report) -> str:
    seeds, settings = len(comparison.seeds), len(comparison.settings)
    late = ", ".join(map(str, comparison.late_seeds))
    later = f" ({late} added after looking)" if late else ""
    lead = (
        f"{settings} settings, {seeds} seed{'s' * (seeds != 1)}{later}, "
        f"{len(comparison.records)} of {settings * seeds} runs finished."
    )
    if comparison.records and not any(note.startswith("Careful") for note in report.notes):
        lead += " Same seed, same initial weights, same data order: only the regularizer differs."
    return lead


def _cells(report: Report, result: SettingResult) -> list[dict[str, str]]:
    """What the table shows of a setting."""
    cells = []
    for name, column in report.columns.items():
        cell, metric = result.cells[name], column.metric
        compared = result.setting != REFERENCE and metric.compared
        words = verdict(metric, cell.difference) if compared else ""
        cells.append(
            {
                "value": "" if cell.mean is None else repr(cell.mean),
                "shown": metric.format(cell.mean, cell.sd if metric.compared else None),
                "interval": interval(metric, cell.difference) if cell.difference else "",
                "verdict": words,
                "kind": "better" if ": better" in words else "worse" if ": worse" in words else "",
            }
        )
    return cells


def _provenance(comparison: Comparison) -> dict[str, list[str]]:
    records = comparison.records
    items = {
        "hardware": [", ".join(f"{k} {v}" for k, v in record.hardware.items()) for record in records],
        "versions": [", ".join(f"{k} {v}" for k, v in record.versions.items()) for record in records],
        "data": [record.data_hash or "not recorded" for record in records],
        "seeds": [", ".join(map(str, comparison.seeds))],
    }
    return {name: sorted(set(values)) or ["-"] for name, values in items.items()}


def _data(comparison: Comparison, report: Report) -> dict[str, Any]:
    """What the scripts draw."""
    images: dict[str, dict[str, Any]] = {}
    curves: dict[str, dict[str, Any]] = {}
    predicted: dict[str, dict[str, Any]] = {}
    metrics = [metric.name for metric in comparison.metrics]
    for record in comparison.records:
        seed = str(record.seed)
        curves.setdefault(record.setting, {})[seed] = {
            name: [(epoch, float(f"{value:.6g}")) for epoch, value in record.values(name)] for name in metrics
        }
        predicted.setdefault(record.setting, {})[seed] = {
            sample.id: [_rounded(asdict(mark)) for mark in sample.predicted] for sample in record.samples
        }
        for sample in record.samples:
            if sample.id not in images:
                images[sample.id] = asdict(sample) | {
                    "predicted": None,
                    "file": None,
                    "src": _thumbnail(comparison, sample.id),
                }
    return {
        "reference": REFERENCE,
        "headline": report.headline,
        "last": report.last_epochs,
        "metrics": metrics,
        "losses": [name for name in (LOSS, VAL_LOSS) if name in report.columns],
        "gaps": [name for name in (GAP, BEST_GAP) if name in report.columns],
        "results": [
            asdict(result) | {"words": {name: _words(report, result, name) for name in report.answers}}
            for result in report.results
        ],
        "answers": report.answers,
        "power": report.power,
        "pairing": report.pairing,
        "images_words": {name: report.on_other_images(name) for name in report.answers},
        "other_images": asdict(report.images)["metrics"] if report.images else {},
        "columns": {
            name: asdict(column.metric) | {"epoch": column.epoch} for name, column in report.columns.items()
        },
        "curves": curves,
        "images": list(images.values()),
        "predicted": predicted,
    }


def _words(report: Report, result: SettingResult, name: str) -> dict[str, str]:
    metric, difference = report.columns[name].metric, result.cells[name].difference
    seeds = in_seeds(metric, difference) if difference else ""
    return {"verdict": verdict(metric, difference), "seeds": seeds}


def _thumbnail(comparison: Comparison, sample_id: str) -> str | None:
    path = comparison.root / "images" / f"{sample_id}.jpg"
    return data_uri(path.read_bytes(), "jpeg") if path.is_file() else None


def _rounded(mark: dict[str, Any]) -> dict[str, Any]:
    """To what a thumbnail can show; it keeps the page small."""
    bbox, score = mark["bbox"], mark["score"]
    return mark | {
        "bbox": bbox and [round(v, 1) for v in bbox],
        "score": None if score is None else round(score, 3),
    }
