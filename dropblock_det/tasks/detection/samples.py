"""Validation images to look at: always the same few, and the best and the worst."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dropblock_det.datasets.coco_dataset import CocoDataset
from dropblock_det.datasets.images import read_image
from dropblock_det.tasks.breakdown import Example, encoded
from dropblock_det.tasks.detection.coco_eval import category_names
from dropblock_det.tasks.detection.errors import DETECTIONS, OBJECTS, Errors, f1_of
from dropblock_det.tasks.evaluation import Mark, Sample

IMAGES = 8
BOXES = 50


def box_samples(coco: COCO, dataset: CocoDataset, results: Sequence[dict[str, Any]]) -> tuple[Sample, ...]:
    """Takes the first images that have boxes, always the same ones.

    Args:
        coco: The original annotations.
        dataset: The validated images.
        results: Detections in COCO's results format.
    """
    names = {category["id"]: category["name"] for category in coco.dataset["categories"]}

    def mark(record: dict[str, Any]) -> Mark:
        return Mark(names[record["category_id"]], tuple(record["bbox"]), record.get("score"))

    with_boxes = [image_id for image_id in dataset.ids if coco.imgToAnns[image_id]] or dataset.ids
    samples = []
    for image_id in with_boxes[:IMAGES]:
        best = sorted((r for r in results if r["image_id"] == image_id), key=lambda r: -r["score"])
        samples.append(
            Sample(
                id=str(image_id),
                kind="boxes",
                width=coco.imgs[image_id]["width"],
                height=coco.imgs[image_id]["height"],
                truth=tuple(mark(annotation) for annotation in coco.imgToAnns[image_id]),
                predicted=tuple(mark(result) for result in best[:BOXES]),
                file=str(dataset.path(image_id).resolve()),
            )
        )
    return tuple(samples)


def best_and_worst(
    dataset: CocoDataset, evaluation: COCOeval, errors: Errors, counts: dict[str, NDArray[np.int64]]
) -> dict[str, tuple[Example, ...]]:
    """Returns the images with the lowest and with the highest F1; of equal ones those with the most to see.

    Args:
        dataset: The validated images.
        evaluation: By pycocotools.
        errors: Of its detections.
        counts: Of these, by image.
    """
    f1 = f1_of(counts)
    errors_of = counts["objects"] + counts["detections"] - 2 * counts["right"]
    order = np.lexsort((counts["right"] - errors_of, f1))[: np.count_nonzero(~np.isnan(f1))]  # NaN comes last
    half = len(order) // 2
    chosen = {"worst": order[:half][:IMAGES], "best": order[half:][::-1][:IMAGES]}

    def example(i: int) -> Example:
        image_id = evaluation.params.imgIds[i]
        height, width, _ = (pixels := read_image(dataset.path(image_id)).permute(1, 2, 0).numpy()).shape
        found, wrong = counts["found"][i], counts["detections"][i] - counts["right"][i]
        note = f"F1 {f1[i]:.2f}: {found} of {counts['objects'][i]} found, {wrong} wrong"
        marks = _marks(i, category_names(evaluation), errors)
        return Example(str(dataset.path(image_id).name), note, width, height, encoded(pixels), marks)

    return {name: tuple(map(example, images.tolist())) for name, images in chosen.items()}


def _marks(image: int, names: Sequence[str], errors: Errors) -> dict[str, tuple[Mark, ...]]:
    marks = {}
    for records, judged, kinds in (
        (errors.objects, errors.states, OBJECTS),
        (errors.detections, errors.kinds, DETECTIONS),
    ):
        for number, kind in enumerate(kinds):
            rows = records[(records["image"] == image) & (judged == number)]
            scores = rows["score"].tolist() if kinds is DETECTIONS else [None] * len(rows)
            marks[kind] = tuple(
                Mark(names[category], tuple(box), score)
                for category, box, score in zip(rows["category"], rows["bbox"].tolist(), scores, strict=True)
            )
    return marks
