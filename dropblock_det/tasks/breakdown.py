"""Where a model is right and where it is wrong: what a task finds out, and a page shows."""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dropblock_det.tasks.evaluation import Mark
from dropblock_det.tasks.metric import Metric

PICTURE = 480  # pixels of the longer side


@dataclass(frozen=True)
class Part:
    """A part of what was judged.

    Attributes:
        name: the same in all places where it means the same.
        count: how many.
        meaning: its definition, half a sentence.
        right: whether it is what one wants.
    """

    name: str
    count: int
    meaning: str
    right: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of text and numbers.

    Attributes:
        columns: what is in each; the first names the row.
        rows: a text, a number, or ``None`` where there is none, for each column.
        total: a row for the whole.
    """

    columns: tuple[Metric, ...]
    rows: tuple[tuple[Any, ...], ...]
    total: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class Confusion:
    """What was taken for what.

    Attributes:
        categories: names of the rows (the truth) and of the columns (the predictions).
        counts: int64 (K, K), or (K + 1, K + 1) with predictions of nothing and objects without a prediction.
        meaning: how it is counted.
        nothing: names of that last row and of that last column.
    """

    categories: tuple[str, ...]
    counts: NDArray[np.int64]
    meaning: str
    nothing: tuple[str, str] | None = None

    def most(self) -> list[tuple[str, str, int]]:
        """Returns truth, prediction and count of the pairs of categories, the most frequent first."""
        size = len(self.categories)
        counts = self.counts[:size, :size] * ~np.eye(size, dtype=bool)
        order = np.argsort(-counts, axis=None, kind="stable")[: np.count_nonzero(counts)]
        return [
            (self.categories[row], self.categories[column], int(counts[row, column]))
            for row, column in zip(*np.unravel_index(order, counts.shape), strict=True)
        ]

    def words(self) -> tuple[str, ...]:
        """Returns a sentence on the most frequent pair, if there is one."""
        return tuple(
            f"Most often confused: {truth} is taken for {prediction}, {count:,} time{'s' * (count > 1)}."
            for truth, prediction, count in self.most()[:1]
        )


@dataclass(frozen=True)
class Curves:
    """Precision over recall, by category.

    Attributes:
        categories: K names.
        thresholds: T IoUs from which on a detection is right.
        recall: (R,) from 0 to 1.
        precision: (T, R, K); NaN where the category has no objects.
        scores: (T, R, K) the score at which it is reached, likewise.
    """

    categories: tuple[str, ...]
    thresholds: NDArray[np.float64]
    recall: NDArray[np.float64]
    precision: NDArray[np.float64]
    scores: NDArray[np.float64]


@dataclass(frozen=True)
class Example:
    """An image to look at.

    Attributes:
        title: which it is.
        note: what the model made of it.
        width: of the original, in pixels.
        height: likewise.
        picture: a PNG or JPEG file of it, perhaps smaller.
        marks: name of a :class:`Part` -> what belongs to it here. Marks without a score are the truth.
    """

    title: str
    note: str
    width: int
    height: int
    picture: bytes
    marks: dict[str, tuple[Mark, ...]]


@dataclass(frozen=True)
class Breakdown:
    """A closer look at predictions on a whole validation set.

    Attributes:
        answer: sentences, the most important first.
        values: the metrics over all images.
        parts: what was judged -> its parts, which add up to all of it.
        categories: the metrics of each category.
        errors: what became of each category's objects and predictions; ``None`` where the confusion shows it.
        confusion: what was taken for what.
        curves: ``None`` where there is no score to vary.
        images: what the model made of each image.
        examples: heading -> images to look at.
        notes: how it was counted.
    """

    answer: tuple[str, ...]
    values: tuple[tuple[Metric, float], ...]
    parts: dict[str, tuple[Part, ...]]
    categories: Table
    confusion: Confusion
    images: Table
    examples: dict[str, tuple[Example, ...]]
    notes: tuple[str, ...]
    errors: Table | None = None
    curves: Curves | None = None


def encoded(pixels: NDArray[np.uint8]) -> bytes:
    """Returns an image as a file for a page: a small one as it is, a large one shrunk.

    Args:
        pixels: (H, W, 3) RGB.
    """
    image = Image.fromarray(pixels)
    small = max(image.size) <= PICTURE // 2
    image.thumbnail((PICTURE, PICTURE))
    buffer = io.BytesIO()
    image.save(buffer, **({"format": "PNG"} if small else {"format": "JPEG", "quality": 80}))
    return buffer.getvalue()


def share(part: int, whole: int, of: str) -> str:
    """Returns a part of a whole in words, such as ``3 of 4 images (75.0 %)``."""
    return f"{part:,} of {whole:,} {of} ({100 * part / whole:.1f} %)" if whole else f"none of 0 {of}"
