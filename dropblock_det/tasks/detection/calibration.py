"""How far scores can be trusted: calibration, and how well an uncertainty separates right from wrong."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.cocoeval import COCOeval
from scipy.stats import rankdata

from dropblock_det.tasks.detection.coco_eval import coco_evaluation, matched_images, metrics_of, outcomes_of

Floats = NDArray[np.float64]

UNCERTAINTIES = {
    "1 - share found": lambda result: 1 - result["found_share"],
    "corner spread": lambda result: result["corner_spread"],
    "1 - mean score": lambda result: 1 - result["score"],
}
"""What is read from a merged result; ``None`` where one sample alone found the object."""


@dataclass(frozen=True)
class Reliability:
    """Detections by score, in bins of equal width from 0 to 1.

    Attributes:
        counts: (bins,) how many.
        scores: (bins,) their mean score, NaN in an empty bin.
        precision: (bins,) the share of them that is right, likewise.
    """

    counts: NDArray[np.int64]
    scores: Floats
    precision: Floats

    @property
    def error(self) -> float:
        """Expected calibration error: the mean of |precision - mean score| over the detections."""
        filled = self.counts > 0
        gaps = np.abs(self.precision - self.scores)[filled]
        return float(np.average(gaps, weights=self.counts[filled])) if filled.any() else float("nan")


def reliability(scores: Any, right: Any, bins: int = 10) -> Reliability:
    """Sorts detections into bins by score.

    Args:
        scores: (n,) from 0 to 1; on an edge, in the bin above it, and 1 in the last one.
        right: (n,) bool.
        bins: How many.
    """
    scores, right = np.asarray(scores, float), np.asarray(right, bool)
    place = np.minimum((scores * bins).astype(int), bins - 1)
    counts = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        return Reliability(
            counts,
            np.bincount(place, scores, bins) / counts,
            np.bincount(place, right, bins) / counts,
        )


def auroc(uncertainty: Any, right: Any) -> float:
    """Returns how likely a wrong detection is more uncertain than a right one; a tie counts half.

    Args:
        uncertainty: (n,) finite.
        right: (n,) bool.

    Returns:
        From 0 to 1, the area under the ROC curve; 0.5 is chance. NaN where all are right or all wrong.
    """
    right = np.asarray(right, bool)
    wrong, others = int((~right).sum()), int(right.sum())
    if not wrong or not others:
        return float("nan")
    ranks = rankdata(np.asarray(uncertainty, float))
    return float((ranks[~right].sum() - wrong * (wrong + 1) / 2) / (wrong * others))


def right_at_50(evaluation: COCOeval, results: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], bool]]:
    """Returns detections and whether pycocotools matched them with an object at an IoU of 0.5.

    Those are left out that it ignores: in a crowd region, or beyond the best 100 of a category in an image.

    Args:
        evaluation: What :func:`~dropblock_det.tasks.detection.coco_eval.coco_evaluation` made of them.
        results: The detections.
    """
    outcomes = outcomes_of(evaluation)
    numbers = [number for _, _, matched in matched_images(evaluation) for number in matched["dtIds"]]
    return [
        (results[number - 1], bool(hit))
        for number, hit, ignored in zip(numbers, outcomes.hit[:, 0], outcomes.ignored[:, 0], strict=True)
        if not ignored
    ]


def compare_with_single_pass(
    coco: Any, image_ids: list[int], single: list[dict[str, Any]], merged: list[dict[str, Any]]
) -> tuple[dict[str, dict[str, float]], dict[str, float], dict[str, Reliability]]:
    """Compares the merged detections with those of the single deterministic pass.

    Args:
        coco: The annotations.
        image_ids: The validated images.
        single: Detections in COCO's format.
        merged: Likewise, with ``found_share`` and ``corner_spread``.

    Returns:
        Quantity -> its value for ``single`` and ``merged``; uncertainty -> its AUROC; and the reliability of
        both.
    """
    compared: dict[str, dict[str, float]] = {}
    bins, rows = {}, []
    for name, results in (("single", single), ("merged", merged)):
        evaluation = coco_evaluation(coco, results, image_ids)
        rows = right_at_50(evaluation, results)
        bins[name] = reliability([result["score"] for result, _ in rows], [right for _, right in rows])
        metrics = metrics_of(evaluation)
        values = {"mAP": metrics["mAP"], "AP50": metrics["AP50"], "calibration error": bins[name].error}
        for quantity, value in {**values, "detections": float(len(results))}.items():
            compared.setdefault(quantity, {})[name] = value
    areas = {}
    for name, of in UNCERTAINTIES.items():
        known = [(of(result), right) for result, right in rows if of(result) is not None]
        areas[name] = auroc([value for value, _ in known], [right for _, right in known])
    return compared, areas, bins
