"""Validation images to look at: the truth and the best detections of a few."""

from collections.abc import Sequence
from typing import Any

from pycocotools.coco import COCO

from dropblock_det.datasets.coco import CocoDataset
from dropblock_det.tasks.evaluation import Mark, Sample

IMAGES = 8
DETECTIONS = 50


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
                predicted=tuple(mark(result) for result in best[:DETECTIONS]),
                file=str(dataset.path(image_id).resolve()),
            )
        )
    return tuple(samples)
