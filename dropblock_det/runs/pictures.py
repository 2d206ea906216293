"""The pictures of a run, drawn from its record: its metrics' curves, and what it sees on a few images."""

from collections.abc import Sequence

import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image

from dropblock_det.files import DPI
from dropblock_det.runs.record import Record
from dropblock_det.tasks.evaluation import Mark, Sample
from dropblock_det.tasks.metric import LOSSES

# Okabe and Ito's palette: colour-blind readers tell these apart too.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
NAME_HEIGHT = 0.12  # inches, of what is written at a box
SAMPLE_INCHES = 3.6  # the longer side of a validation image
MIN_SIDE, MAX_SIDE = 480, 2000  # pixels of the longer side, so that names can be read, and files stay small
PALETTE = (BLUE, ORANGE, GREEN, "#CC79A7", "#56B4E9", "#E69F00")


def samples_figure(samples: Sequence[Sample], min_score: float = 0.3) -> Figure:
    """Draws validation images with the truth and what the model sees there.

    Args:
        samples: At least one; their files are there.
        min_score: Boxes below this score are left out of the picture.
    """
    columns = min(4, len(samples))
    rows = -(-len(samples) // columns)
    figure = Figure(figsize=(SAMPLE_INCHES * columns, SAMPLE_INCHES * rows + 0.5), layout="constrained")
    for axes, sample in zip(figure.subplots(rows, columns, squeeze=False).flat, samples, strict=False):
        with Image.open(sample.file or "") as image:
            axes.imshow(image.convert("RGB"))
            name_height = NAME_HEIGHT * max(image.size) / SAMPLE_INCHES
        if sample.kind == "boxes":
            for mark in sample.truth:
                _box(axes, mark, GREEN, "--", name_height, below=True)
            for mark in sample.predicted:
                if (mark.score or 0) >= min_score:
                    _box(axes, mark, ORANGE, "-", name_height)
            title = f"image {sample.id}"
        else:
            title = " / ".join(_words(mark) for mark in (*sample.truth[:1], *sample.predicted[:1]))
        axes.set_title(title, fontsize=9, color=GREY, parse_math=False)
    for axes in figure.axes:
        axes.axis("off")
    if any(sample.kind == "boxes" for sample in samples):
        words = f"dashed: ground truth, solid: detections with a score of {min_score} or more"
    else:
        words = "ground truth / prediction"
    figure.suptitle(words, fontsize=10)
    return figure


def prediction_figure(image: NDArray[np.uint8], marks: Sequence[Mark]) -> Figure:
    """Draws what a model sees on an image, in the image's own size unless that is very small or large.

    Args:
        image: RGB ``(H, W, 3)``.
        marks: The best first; those without a box are written into a corner.
    """
    height, width = image.shape[:2]
    longest = max(height, width)
    inches = min(max(longest, MIN_SIDE), MAX_SIDE) / DPI
    figure = Figure(figsize=(max(inches * width / longest, 0.1), max(inches * height / longest, 0.1)))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(image, extent=(0, width, height, 0), aspect="auto")
    axes.axis("off")
    for mark in reversed(marks):  # the best on top
        _box(axes, mark, ORANGE, "-", NAME_HEIGHT * longest / inches)
    axes.set(xlim=(0, width), ylim=(height, 0))
    return figure


def _words(mark: Mark) -> str:
    return mark.category if mark.score is None else f"{mark.category} {mark.score:.2f}"


def _box(axes: Axes, mark: Mark, color: str, style: str, name_height: float, below: bool = False) -> None:
    """Draws a box with its name, which stays inside the image: ``name_height`` is in the image's pixels."""
    x, y, width, height = mark.bbox or (0, 0, 0, 0)
    right, bottom = axes.get_xlim()[1], axes.get_ylim()[0]
    leftward = mark.bbox is not None and x > 0.6 * right
    axes.add_patch(
        Rectangle((x, y), width, height, fill=False, edgecolor=color, linestyle=style, linewidth=1.6)
    )
    axes.text(
        min(x + width, right) if leftward else x,
        min(y + height, bottom - name_height) if below else max(y, name_height),
        _words(mark),
        fontsize=6.5,
        color="white",
        ha="right" if leftward else "left",
        va="top" if below else "bottom",
        clip_on=True,
        parse_math=False,
        bbox={"facecolor": color, "edgecolor": "none", "pad": 0.8, "alpha": 0.85},
    )


def curves_figure(record: Record) -> Figure:
    """Draws the losses, and beside them the task's own metrics, over the epochs."""
    losses = {metric.name for metric in LOSSES}
    panels = {
        "loss": [metric for metric in record.metrics if metric.name in losses],
        record.task: [metric for metric in record.metrics if metric.name not in losses],
    }
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    for axes, (title, metrics) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for metric, color in zip(metrics, PALETTE, strict=False):
            points = [(epoch + 1, value) for epoch, value in record.values(metric.name)]
            if points:
                axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=3)
                axes.annotate(
                    metric.title,
                    points[-1],
                    xytext=(6, 0),
                    textcoords="offset points",
                    color=color,
                    va="center",
                    parse_math=False,
                )
        axes.set_title(title, loc="left")
        axes.set_xlabel("epoch")
        axes.set_ylim(bottom=0)
        axes.margins(x=0.12)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
