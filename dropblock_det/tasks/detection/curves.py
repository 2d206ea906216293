"""Figures of single categories and precision-recall curves, read from pycocotools' own arrays."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.cocoeval import COCOeval

from dropblock_det.tasks.breakdown import Curves

ALL_AREAS, MOST_DETECTIONS = 0, -1


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


def precision_recall(evaluation: COCOeval) -> Curves:
    """Returns the curves behind the APs, for objects of all sizes."""
    precision, scores = (
        evaluation.eval[name][:, :, :, ALL_AREAS, MOST_DETECTIONS] for name in ("precision", "scores")
    )
    return Curves(
        category_names(evaluation),
        evaluation.params.iouThrs,
        evaluation.params.recThrs,
        np.where(precision > -1, precision, np.nan),
        np.where(scores > -1, scores, np.nan),
    )
