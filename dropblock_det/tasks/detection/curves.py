"""Precision-recall curves, read from pycocotools' own arrays."""

import numpy as np
from pycocotools.cocoeval import COCOeval

from dropblock_det.tasks.breakdown import Curves
from dropblock_det.tasks.detection.coco_eval import ALL_AREAS, MOST_DETECTIONS, category_names


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
