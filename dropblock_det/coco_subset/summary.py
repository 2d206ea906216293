"""What a subset holds: counts per category and size class, and a picture of them."""

import contextlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from dropblock_det.coco_subset.records import (
    AnnotationRecord,
    CategoryRecord,
    ImageRecord,
    LicenseRecord,
    read_records,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZES = ("small", "medium", "large")


@dataclass
class Summary:
    """Counts over one annotation file; crowd regions are counted apart, never as boxes.

    Attributes:
        images: Number of images.
        empty: Number of images without a box.
        crowds: Number of crowd regions.
        boxes: Boxes by (category name, size class), by COCO's classes: area under 32², under 96².
        images_with: Images by category name; every category is a key.
        licenses: Images by licence name.
    """

    images: int = 0
    empty: int = 0
    crowds: int = 0
    boxes: Counter[tuple[str, str]] = field(default_factory=Counter)
    images_with: dict[str, int] = field(default_factory=dict)
    licenses: Counter[str] = field(default_factory=Counter)

    def of_category(self, name: str) -> int:
        """Boxes of a category, of all sizes."""
        return sum(self.boxes[name, size] for size in SIZES)


def summarize(path: Path) -> Summary:
    """Counts what an annotation file of :func:`~dropblock_det.coco_subset.extract.extract` holds."""
    summary = Summary()
    names: dict[int, str] = {}
    license_names: dict[int | str, str] = {}
    licenses: Counter[Any] = Counter()
    boxes: Counter[tuple[int, str]] = Counter()
    pairs: set[tuple[int, int]] = set()
    with path.open("rb") as file:
        for record, entry in read_records(file, str(path)):
            if isinstance(record, ImageRecord):
                summary.images += 1
                licenses[record.license if isinstance(record.license, int | str) else None] += 1
            elif isinstance(record, AnnotationRecord) and record.iscrowd:
                summary.crowds += 1
            elif isinstance(record, AnnotationRecord):
                area = record.bbox[2] * record.bbox[3] if record.area is None else record.area
                boxes[record.category_id, _size_class(area)] += 1
                pairs.add((record.category_id, record.image_id))
            elif isinstance(record, CategoryRecord):
                names[record.id] = record.name
            elif record == "licenses":
                with contextlib.suppress(msgspec.ValidationError):  # other programs put odd things there
                    license = msgspec.convert(entry, LicenseRecord)
                    license_names[license.id] = license.name
    with_category = Counter(category for category, _ in pairs)
    summary.empty = summary.images - len({image for _, image in pairs})
    summary.boxes = Counter({(names[category], size): count for (category, size), count in boxes.items()})
    summary.images_with = {name: with_category[category] for category, name in names.items()}
    for key, count in licenses.items():
        summary.licenses[license_names.get(key, "unknown")] += count
    return summary


def _size_class(area: float) -> str:
    return "small" if area < 32**2 else "medium" if area < 96**2 else "large"


def class_figure(summaries: Mapping[str, Summary]) -> "Figure":
    """Draws the number of boxes of each category, one panel for each split.

    Args:
        summaries: By split name; the categories are ordered by the first one's counts.
    """
    from matplotlib.figure import Figure

    first = next(iter(summaries.values()))
    names = sorted(first.images_with, key=lambda name: (first.of_category(name), name))
    figure = Figure(figsize=(4.5 * len(summaries), 1.2 + 0.16 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(summaries), sharey=True, squeeze=False)[0]
    for axes, (split, summary) in zip(panels, summaries.items(), strict=True):
        counts = [summary.of_category(name) for name in names]
        bars = axes.barh(range(len(names)), counts, color="#4292c6")
        # A name may hold what matplotlib reads as mathematics, and be longer than the picture.
        axes.set_yticks(range(len(names)), [name[:40] for name in names], parse_math=False)
        axes.bar_label(bars, fontsize=6, padding=2)
        # A logarithm keeps a class with one box visible beside thousands of persons; linear below 1, for 0.
        axes.set_xscale("symlog", linthresh=1)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set_xlim(0, max(10, *counts) * 3)
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.set_title(f"{split}: {summary.images} images, {sum(counts)} boxes", fontsize=10)
        axes.set_xlabel("boxes (logarithmic)", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(axis="x", alpha=0.3)
    return figure
