"""A closer look at an evaluation, as CSV files and one page."""

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dropblock_det.errors import InputError, printable
from dropblock_det.files import write_text
from dropblock_det.report.html import data_uri, render
from dropblock_det.tasks.breakdown import Breakdown, Confusion, Curves, Example, Table
from dropblock_det.tasks.metric import Metric

PAGE = "report.html"
FILES = (PAGE, "categories.csv", "errors.csv", "confusion.csv", "curves.csv", "images.csv")
KIND = "dropblock_det breakdown"
PAIRS = 12  # of the most frequent confusions
SHOWN = 100  # categories of which the confusion is drawn
PANELS = (0.5, 0.75)  # IoUs of which curves are drawn, beside the mean over all


def check_folder(folder: Path) -> None:
    """Refuses a folder that holds anything else than an earlier breakdown.

    Raises:
        InputError: With what it holds.
    """
    if not folder.is_dir():
        if folder.exists() or folder.is_symlink():
            raise InputError(f"{folder}: not a folder; give the report another name")
        return
    half = tuple(f".{name}." for name in FILES)  # of a killed process
    whole = [path for path in sorted(folder.iterdir()) if not path.name.startswith(half)]
    for path in whole:
        if path.name not in FILES or path.is_symlink() or not path.is_file():
            raise InputError(f"{folder}: holds {path.name!r}, no part of such a report; give another folder")
    page = folder / PAGE
    if whole and not (page in whole and KIND in page.read_text(errors="replace")[:1000]):
        raise InputError(f"{folder}: what it holds is no such report; give another folder")


def write_breakdown(folder: Path, breakdown: Breakdown, about: str, lead: str) -> Path:
    """Writes a breakdown into a folder, in place of an earlier one.

    Args:
        folder: Checked by :func:`check_folder`.
        breakdown: What is shown.
        about: What was evaluated.
        lead: On what.

    Returns:
        The page.
    """
    files = {PAGE: render_breakdown(breakdown, about, lead)}
    tables = {"categories": breakdown.categories, "errors": breakdown.errors, "images": breakdown.images}
    files |= {f"{name}.csv": _csv(_rows(table)) for name, table in tables.items() if table}
    files["confusion.csv"] = _csv(_confusion_rows(breakdown.confusion))
    if breakdown.curves:
        files["curves.csv"] = _csv(_curve_rows(breakdown.curves))
    for name, text in files.items():  # the page first: by it the folder is known as ours
        write_text(folder / name, text)
    for name in {*FILES} - {*files}:  # an earlier one's, of another task
        (folder / name).unlink(missing_ok=True)
    return folder / PAGE


def _csv(rows: Iterable[Iterable[Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerows([_text(cell) if isinstance(cell, str) else cell for cell in row] for row in rows)
    return out.getvalue()


def _text(cell: str) -> str:
    """For a spreadsheet, which would take a name that begins with one of these for a formula."""
    return f"'{printable(cell)}" if cell[:1] in ("=", "+", "-", "@") else printable(cell)


def _rows(table: Table) -> Iterator[tuple[Any, ...]]:
    yield tuple(column.name for column in table.columns)
    yield from table.rows
    if table.total:
        yield table.total


def _confusion_rows(confusion: Confusion) -> Iterator[tuple[Any, ...]]:
    background, missed = ([name] for name in confusion.nothing) if confusion.nothing else ([], [])
    yield "", *confusion.categories, *missed
    for name, row in zip((*confusion.categories, *background), confusion.counts.tolist(), strict=True):
        yield name, *row


def _curve_rows(curves: Curves) -> Iterator[tuple[Any, ...]]:
    yield "category", "iou", "recall", "precision", "score"
    for k, name in enumerate(curves.categories):
        for t, iou in enumerate(curves.thresholds.tolist()):
            points = (curves.recall, curves.precision[t, :, k], curves.scores[t, :, k])
            if not np.isnan(points[1]).any():  # no objects, no curve
                yield from (
                    (name, round(iou, 2), *point)
                    for point in zip(*map(np.ndarray.tolist, points), strict=True)
                )


def render_breakdown(breakdown: Breakdown, about: str, lead: str) -> str:
    """Fills the template: tables and words stand in the HTML, the drawings are made by its scripts."""
    looks, confusion = _looks(breakdown), breakdown.confusion
    drawn = _confusion(confusion)
    curves = _curves(breakdown.curves) if breakdown.curves else None
    return render(
        "breakdown.html",
        ("chart", "pictures", "breakdown"),
        {
            "looks": looks,
            "curves": curves,
            "confusion": drawn,
            "examples": [[heading, [*map(_example, found)]] for heading, found in breakdown.examples.items()],
        },
        kind=KIND,
        title="What does it get wrong?",
        about=printable(about),
        lead=printable(lead),
        breakdown=breakdown,
        looks=looks,
        curves=curves,
        cell=_cell,
        text=printable,
        pairs=confusion.most()[:PAIRS],
        left_out=drawn["left_out"],
        meanings={
            column.title: column.meaning
            for table in (breakdown.categories, breakdown.errors, breakdown.images)
            for column in (table.columns if table else ())
            if column.meaning
        },
    )


def _looks(breakdown: Breakdown) -> dict[str, int]:
    """A number for each way to draw: 0 for what is right, one each for all else."""
    looks: dict[str, int] = {}
    for part in (part for parts in breakdown.parts.values() for part in parts):
        looks.setdefault(part.name, 0 if part.right else max(looks.values(), default=0) + 1)
    return looks


def _cell(metric: Metric, value: Any) -> str:
    return printable(value) if isinstance(value, str) else metric.format(value)


def _confusion(confusion: Confusion) -> dict[str, Any]:
    """Of the categories that occur, those that are confused most often; the CSV file has all."""
    size, counts = len(confusion.categories), confusion.counts
    others = counts[:size, :size] * ~np.eye(size, dtype=bool)
    seen = np.flatnonzero(counts.sum(0)[:size] + counts.sum(1)[:size])
    often = np.argsort(-(others.sum(0) + others.sum(1))[seen], kind="stable")
    shown = seen[np.sort(often[:SHOWN])]
    axis = [*shown, *([size] if confusion.nothing else [])]
    part = counts[np.ix_(axis, axis)]
    return {
        "categories": [printable(confusion.categories[k]) for k in shown],
        "left_out": len(seen) - len(shown),
        "nothing": confusion.nothing,
        "totals": counts[axis].sum(1).tolist(),
        "cells": [(int(r), int(c), int(part[r, c])) for r, c in zip(*np.nonzero(part), strict=True)],
    }


def _curves(curves: Curves) -> dict[str, Any] | None:
    """The mean over the categories first, then each; of each the panels' IoUs and the mean over all."""
    known = ~np.isnan(curves.precision).any((0, 1))
    if not known.any():
        return None
    precision = curves.precision[:, :, known]
    precision = np.concatenate([precision.mean(2, keepdims=True), precision], 2)
    chosen = {f"IoU {iou:.2f}": precision[np.isclose(curves.thresholds, iou)].mean(0) for iou in PANELS}
    chosen["mean, IoU 0.50 to 0.95"] = precision.mean(0)
    return {
        "names": ["all categories", *(printable(curves.categories[k]) for k in np.flatnonzero(known))],
        "recall": curves.recall.round(2).tolist(),
        "lines": {name: of.T.round(4).tolist() for name, of in chosen.items()},
    }


def _example(example: Example) -> dict[str, Any]:
    kind = "png" if example.picture.startswith(b"\x89PNG") else "jpeg"
    marks = [
        {
            "kind": name,
            "category": printable(mark.category),
            "bbox": mark.bbox and [round(side, 1) for side in mark.bbox],
            "score": mark.score if mark.score is None else round(mark.score, 3),
        }
        for name, found in example.marks.items()
        for mark in found
    ]
    return {
        "title": printable(example.title),
        "note": printable(example.note),
        "width": example.width,
        "height": example.height,
        "src": data_uri(example.picture, kind),
        "marks": marks,
    }
