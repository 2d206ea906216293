"""The pictures of a run: detections on validation images, and the curves of loss and mAP."""

from collections.abc import Sequence
from typing import Any

import matplotlib.ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

# Okabe and Ito's palette: told apart by colour-blind readers too.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"


def detections_figure(samples: Sequence[dict[str, Any]], min_score: float = 0.3) -> Figure:
    """Draws validation images with their ground truth (dashed) and the detections (solid, with scores).

    Args:
        samples: As in a run's ``val_detections.json``.
        min_score: Detections below this score are left out of the picture.
    """
    columns = min(4, len(samples))
    rows = -(-len(samples) // columns)
    figure = Figure(figsize=(3.6 * columns, 3.6 * rows + 0.5), layout="constrained")
    for axes, sample in zip(figure.subplots(rows, columns, squeeze=False).flat, samples, strict=False):
        with Image.open(sample["file"]) as image:
            axes.imshow(image.convert("RGB"))
        for box in sample["ground_truth"]:
            _box(axes, box["bbox"], GREEN, "--", box["category"], below=True)
        for box in sample["detections"]:
            if box["score"] >= min_score:
                _box(axes, box["bbox"], ORANGE, "-", f"{box['category']} {box['score']:.2f}")
        axes.set_title(f"image {sample['image_id']}", fontsize=9, color=GREY)
    for axes in figure.axes:
        axes.axis("off")
    figure.suptitle(
        f"dashed: ground truth, solid: detections with a score of {min_score} or more", fontsize=10
    )
    return figure


def _box(axes: Axes, bbox: Sequence[float], color: str, style: str, text: str, below: bool = False) -> None:
    x, y, width, height = bbox
    axes.add_patch(
        Rectangle((x, y), width, height, fill=False, edgecolor=color, linestyle=style, linewidth=1.6)
    )
    axes.text(
        x,
        y + height if below else y,
        text,
        fontsize=6.5,
        color="white",
        va="top" if below else "bottom",
        clip_on=True,
        bbox={"facecolor": color, "edgecolor": "none", "pad": 0.8, "alpha": 0.85},
    )


def curves_figure(epochs: Sequence[dict[str, Any]]) -> Figure:
    """Draws loss and val_loss, and mAP, AP50 and AP75, over the epochs of a run's ``summary.json``."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    losses, precision = figure.subplots(1, 2)
    for axes, names in ((losses, ("loss", "val_loss")), (precision, ("mAP", "AP50", "AP75"))):
        for name, color in zip(names, (BLUE, ORANGE, GREEN), strict=False):
            points = [(epoch["epoch"] + 1, epoch[name]) for epoch in epochs if epoch[name] is not None]
            if points:
                axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=3, label=name)
                axes.annotate(
                    name, points[-1], xytext=(6, 0), textcoords="offset points", color=color, va="center"
                )
        axes.set_xlabel("epoch")
        axes.set_ylim(bottom=0)
        axes.margins(x=0.12)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    losses.set_title("loss", loc="left")
    precision.set_title("average precision (validation)", loc="left")
    return figure
