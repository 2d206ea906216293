"""A closer look at a classifier: by class, what it takes for what, and where it is sure and wrong."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from dropblock_det.datasets.classification import InMemory
from dropblock_det.tasks.breakdown import Breakdown, Confusion, Example, Part, Table, encoded, share
from dropblock_det.tasks.evaluation import Mark
from dropblock_det.tasks.metric import Metric

EXAMPLES = 24
VALUES = (Metric("accuracy", "accuracy", "higher", meaning="share of the images given their own class"),)
CLASSES = (
    Metric("class", "class"),
    Metric("images", "images", digits=0, meaning="of the class"),
    Metric("given", "given", digits=0, meaning="images that are given the class"),
    Metric("accuracy", "accuracy", "higher", meaning="share of the class's images that are given it"),
    Metric("precision", "precision", "higher", meaning="share of the images given the class that are of it"),
)
IMAGES = (
    Metric("image", "image"),
    Metric("class", "class"),
    Metric("given", "given"),
    Metric("score", "score", meaning="probability of the class that is given"),
    Metric("right", "right", digits=0, meaning="1 or 0"),
)
CONFUSION = "Rows are an image's own class, columns the one that it is given."


def classification_breakdown(
    dataset: InMemory, predictions: Sequence[dict[str, Any]], names: Sequence[str]
) -> Breakdown:
    """Looks closer at a classifier's predictions.

    Args:
        dataset: The validated images.
        predictions: Of each image: ``image_id``, ``label``, the class ``predicted`` and its ``score``.
        names: The classes' names, by label.
    """
    rows = sorted(predictions, key=lambda prediction: prediction["image_id"])
    labels, given = (np.array([row[key] for row in rows], int) for key in ("label", "predicted"))
    counts = np.zeros((len(names), len(names)), int)
    np.add.at(counts, (labels, given), 1)
    own, right = counts.sum(1), int(counts.trace())
    classes = [
        (name, int(own[k]), int(of), *(float(hits / n) if n else None for n in (own[k], of)))
        for k, (name, of, hits) in enumerate(zip(names, counts.sum(0), counts.diagonal(), strict=True))
    ]
    confusion = Confusion(tuple(names), counts, CONFUSION)
    by_accuracy = sorted((row[3], row[0]) for row in classes if row[3] is not None)
    answer = [f"It gives {share(right, len(rows), 'images')} their own class."]
    if len(by_accuracy) > 1:
        (low, worst), (high, best) = by_accuracy[0], by_accuracy[-1]
        answer.append(f"Highest accuracy: {best} ({high:.3f}); lowest: {worst} ({low:.3f}).")
    accuracy = right / len(rows)
    return Breakdown(
        answer=(*answer, *confusion.words()),
        values=tuple((metric, accuracy) for metric in VALUES),
        parts={
            "images": (
                Part("right", right, "given their own class", True),
                Part("wrong", len(rows) - right, "given another one"),
            )
        },
        categories=Table(CLASSES, tuple(classes), ("all", len(rows), len(rows), accuracy, accuracy)),
        confusion=confusion,
        images=Table(
            IMAGES,
            tuple(
                (row["image_id"], names[label], names[seen], row["score"], int(label == seen))
                for row, label, seen in zip(rows, labels, given, strict=True)
            ),
        ),
        examples={"wrong, the surest first": _surest_errors(dataset, rows, names)},
        notes=("The score is the probability that softmax gives the class.",),
    )


def _surest_errors(
    dataset: InMemory, rows: Sequence[dict[str, Any]], names: Sequence[str]
) -> tuple[Example, ...]:
    wrong = sorted((row for row in rows if row["label"] != row["predicted"]), key=lambda row: -row["score"])
    place = {number: index for index, number in enumerate(dataset.ids.tolist())}

    def example(row: dict[str, Any]) -> Example:
        image: Tensor = dataset.images[place[row["image_id"]]]
        pixels = image.expand(3, -1, -1).permute(1, 2, 0).numpy()
        height, width, _ = pixels.shape
        truth, seen = names[row["label"]], names[row["predicted"]]
        marks: dict[str, tuple[Mark, ...]] = {
            "right": (Mark(truth),),
            "wrong": (Mark(seen, score=row["score"]),),
        }
        note = f"{truth} taken for {seen} ({row['score']:.3f})"
        return Example(f"image {row['image_id']}", note, width, height, encoded(pixels), marks)

    return tuple(map(example, wrong[:EXAMPLES]))
