"""Detections to COCO's twelve metrics, of all categories and of each, through pycocotools."""

import contextlib
import gc
import io
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from dropblock_det.datasets.annotations import coco_index
from dropblock_det.errors import InputError
from dropblock_det.tasks.evaluation import Outcomes
from dropblock_det.tasks.nonfinite import DIVERGED

COCO_METRICS = (
    "mAP",
    "AP50",
    "AP75",
    "AP_small",
    "AP_medium",
    "AP_large",
    "AR_1",
    "AR_10",
    "AR_100",
    "AR_small",
    "AR_medium",
    "AR_large",
)
ALL_AREAS, MOST_DETECTIONS = 0, -1  # places in pycocotools' arrays


def detections_to_coco(
    image_ids: Sequence[int], detections: Sequence[dict[str, Tensor]], categories: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Turns a torchvision detector's output into COCO's results format.

    Args:
        image_ids: COCO ids of the images.
        detections: One ``{"boxes": (n, 4) as x1, y1, x2, y2, "scores": (n,), "labels": (n,)}`` per image,
            on any device.
        categories: The ``{"label", "id", "name"}`` table that the model was trained with.

    Returns:
        ``{"image_id", "category_id", "bbox": [x, y, width, height], "score"}`` per detection, in order;
        those of label 0, the background that torchvision's detectors have a score for, are left out.

    Raises:
        InputError: A box or score isn't finite.
    """
    id_of = {category["label"]: category["id"] for category in categories}
    results = []
    for image_id, detection in zip(image_ids, detections, strict=True):
        boxes, scores = detection["boxes"].cpu().double(), detection["scores"].cpu().double()
        if not (boxes.isfinite().all() and scores.isfinite().all()):
            raise InputError(f"image {image_id}: the detections are not finite, {DIVERGED}")
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)
        for box, score, label in zip(
            boxes.tolist(), scores.tolist(), detection["labels"].tolist(), strict=True
        ):
            if label:
                results.append(
                    {"image_id": image_id, "category_id": id_of[label], "bbox": box, "score": score}
                )
    return results


def coco_evaluation(coco: COCO, results: Sequence[dict[str, Any]], image_ids: Sequence[int]) -> COCOeval:
    """Runs pycocotools' evaluation of box detections; areas and crowd regions are those of the annotations.

    Args:
        coco: The original annotations.
        results: Detections in COCO's results format; may be empty.
        image_ids: The images that count; all others are ignored.
    """
    # pycocotools writes into the records it is given, and stops at an empty list.
    detections = [
        {**result, "id": number, "area": result["bbox"][2] * result["bbox"][3], "iscrowd": 0}
        for number, result in enumerate(results, start=1)
    ]
    found = coco_index({"images": [], "categories": [], "annotations": detections})
    with contextlib.redirect_stdout(io.StringIO()), no_garbage_collection():
        evaluation = COCOeval(coco, found, "bbox")
        evaluation.params.imgIds = sorted(image_ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Keeps Python from looking for reference cycles again and again among millions of records.

    That took a sixth of the evaluation; pycocotools makes no cycles.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def metrics_of(evaluation: COCOeval) -> dict[str, float]:
    """Returns COCO's twelve metrics by name, from 0 to 1, in pycocotools' order.

    One for which there is no object, as ``AP_large`` where all are small, is NaN (pycocotools prints -1).
    """
    return {
        name: float(value) if value >= 0 else math.nan
        for name, value in zip(COCO_METRICS, evaluation.stats, strict=True)
    }


def category_names(evaluation: COCOeval) -> tuple[str, ...]:
    """Returns the names of the evaluated categories, in their order."""
    return tuple(found["name"] for found in evaluation.cocoGt.loadCats(evaluation.params.catIds))


def category_values(evaluation: COCOeval) -> dict[str, NDArray[np.float64]]:
    """Returns each category's ``AP``, ``AP50`` and ``AR`` (K,), as pycocotools gives them for it alone.

    A category without objects has NaN.
    """
    precision = evaluation.eval["precision"][:, :, :, ALL_AREAS, MOST_DETECTIONS]
    recall = evaluation.eval["recall"][:, :, ALL_AREAS, MOST_DETECTIONS]
    of = {"AP": precision, "AP50": precision[:1], "AR": recall}

    def value(array: Any, k: int) -> float:
        known = array[..., k][array[..., k] > -1]  # summed in pycocotools' order
        return float(np.mean(known)) if len(known) else np.nan

    categories = range(len(evaluation.params.catIds))
    return {name: np.array([value(array, k) for k in categories]) for name, array in of.items()}


def matched_images(evaluation: COCOeval) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yields what pycocotools matched, of objects of all sizes, and the positions of category and image."""
    params = evaluation.params
    images = len(params.imgIds)
    for k in range(len(params.catIds)):
        start = k * len(params.areaRng) * images
        for i, matched in enumerate(evaluation.evalImgs[start : start + images]):
            if matched is not None:  # else neither objects nor detections
                yield k, i, matched


def outcomes_of(evaluation: COCOeval) -> Outcomes:
    """Returns which detections pycocotools matched with an object, at every IoU threshold and all areas."""
    params = evaluation.params
    images, thresholds = len(params.imgIds), len(params.iouThrs)
    truths = np.zeros((images, len(params.catIds)), np.int32)
    image, category, score, hit, ignored = [], [], [], [], []
    for k, i, matched in matched_images(evaluation):
        truths[i, k] = np.count_nonzero(np.asarray(matched["gtIgnore"]) == 0)
        image.append(np.full(len(matched["dtIds"]), i, np.int32))
        category.append(np.full(len(matched["dtIds"]), k, np.int32))
        score.append(np.asarray(matched["dtScores"], np.float32))
        hit.append(matched["dtMatches"].T > 0)
        ignored.append(matched["dtIgnore"].T.astype(bool))

    def joined(parts: list[Any], empty: Any) -> Any:
        return np.concatenate([empty, *parts])

    no_rows = np.zeros((0, thresholds), bool)
    return Outcomes(
        columns={"mAP": tuple(range(thresholds)), "AP50": (0,), "AP75": (5,)},
        images=np.asarray(params.imgIds, np.int64),
        categories=category_names(evaluation),
        truths=truths,
        image=joined(image, np.zeros(0, np.int32)),
        category=joined(category, np.zeros(0, np.int32)),
        score=joined(score, np.zeros(0, np.float32)),
        hit=joined(hit, no_rows),
        ignored=joined(ignored, no_rows),
    )
