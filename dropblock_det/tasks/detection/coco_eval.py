"""Detections to the twelve COCO figures, through pycocotools."""

import contextlib
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from dropblock_det.datasets.annotations import box_fault, coco_index, is_number, short
from dropblock_det.errors import InputError
from dropblock_det.files import read_json

FIGURES = (
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
        boxes, scores = detection["boxes"].double().cpu(), detection["scores"].double().cpu()
        if not (boxes.isfinite().all() and scores.isfinite().all()):
            raise InputError(
                f"image {image_id}: the detections are not finite, the model has diverged; lower model.lr or "
                "take an earlier checkpoint"
            )
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)
        for box, score, label in zip(
            boxes.tolist(), scores.tolist(), detection["labels"].tolist(), strict=True
        ):
            if label:
                results.append(
                    {"image_id": image_id, "category_id": id_of[label], "bbox": box, "score": score}
                )
    return results


def coco_figures(coco: COCO, results: Sequence[dict[str, Any]], image_ids: Sequence[int]) -> dict[str, float]:
    """Computes the twelve COCO figures of box detections.

    Areas and crowd regions are those of the original annotations. A figure for which there is no object, such
    as ``AP_large`` where all are small, is NaN (pycocotools prints -1).

    Args:
        coco: The original annotations.
        results: Detections in COCO's results format; may be empty.
        image_ids: The images that count; all others are ignored.

    Returns:
        Figure by name, from 0 to 1, in pycocotools' order.
    """
    # pycocotools writes into the records it is given, and stops at an empty list.
    detections = [
        {**result, "id": number, "area": result["bbox"][2] * result["bbox"][3], "iscrowd": 0}
        for number, result in enumerate(results, start=1)
    ]
    found = coco_index({"images": [], "categories": [], "annotations": detections})
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(coco, found, "bbox")
        evaluation.params.imgIds = sorted(image_ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {
        name: float(value) if value >= 0 else math.nan
        for name, value in zip(FIGURES, evaluation.stats, strict=True)
    }


def load_results(path: Path, coco: COCO) -> list[dict[str, Any]]:
    """Reads detections in COCO's results format and checks them.

    Args:
        path: A JSON list of ``{"image_id", "category_id", "bbox": [x, y, width, height], "score"}``.
        coco: The annotations that the detections belong to.

    Raises:
        InputError: The first fault found, with the record that has it.
    """
    results = read_json(path)
    if not isinstance(results, list):
        raise InputError(f"{path}: holds a {type(results).__name__}, not a list; give COCO results")
    for position, result in enumerate(results):
        if fault := _result_fault(result, coco):
            raise InputError(f"{path}: record {position} {fault}")
    return results


def _result_fault(result: Any, coco: COCO) -> str | None:
    if not isinstance(result, dict):
        return f"is {short(result)}, not an object"
    for key, known in (("image_id", coco.imgs), ("category_id", coco.cats)):
        if type(result.get(key)) is not int or result[key] not in known:
            return f'has "{key}" {short(result.get(key))}, which the annotations don\'t have'
    if not is_number(result.get("score")):
        return f'has "score" {short(result.get("score"))}; it must be a finite number'
    return box_fault(result.get("bbox"))
