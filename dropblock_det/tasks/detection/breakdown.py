"""A closer look at detections: by category, by kind of error, image by image."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dropblock_det.datasets.coco_dataset import CocoDataset
from dropblock_det.tasks.breakdown import Breakdown, Confusion, Part, Table, share
from dropblock_det.tasks.detection.coco_eval import (
    category_names,
    category_values,
    coco_evaluation,
    metrics_of,
)
from dropblock_det.tasks.detection.curves import precision_recall
from dropblock_det.tasks.detection.errors import (
    DETECTIONS,
    OBJECTS,
    Errors,
    best_score,
    errors_from,
    f1_of,
    matches_of,
)
from dropblock_det.tasks.detection.samples import best_and_worst
from dropblock_det.tasks.metric import Metric

NO_SCORE = 0.5  # where no detection is right, no score is better than another

VALUES = (
    Metric("mAP", "mAP", "higher", meaning="mean of AP over the categories"),
    Metric("AP50", "AP50", "higher", meaning="mean of AP50 over the categories"),
    Metric("AR_100", "AR", "higher", meaning="mean of AR over the categories"),
)
OBJECT_COUNT = Metric("objects", "objects", digits=0, meaning="without crowd regions")
DETECTION_COUNT = Metric("detections", "detections", digits=0, meaning="with the score or a higher one")
COUNTED = (
    OBJECT_COUNT,
    *(Metric(name, name, digits=0, meaning=meaning) for name, meaning in OBJECTS.items()),
    DETECTION_COUNT,
    *(Metric(name, name, digits=0, meaning=meaning) for name, meaning in DETECTIONS.items()),
)
CATEGORY = Metric("category", "category")
CATEGORIES = (
    CATEGORY,
    OBJECT_COUNT,
    Metric("images", "images", digits=0, meaning="with an object of the category"),
    DETECTION_COUNT,
    Metric("AP", "AP", "higher", meaning="COCO's average precision, the mean over IoU 0.50 to 0.95"),
    Metric("AP50", "AP50", "higher", meaning="average precision at IoU 0.50"),
    Metric("AR", "AR", "higher", meaning="COCO's average recall, with up to 100 detections in an image"),
    Metric("precision", "precision", "higher", meaning="share of the counted detections that is right"),
    Metric("recall", "recall", "higher", meaning="share of the objects that these find"),
)
AP = [column.name for column in CATEGORIES].index("AP")
IMAGES = (
    Metric("image", "image"),
    Metric("file", "file"),
    Metric("F1", "F1", "higher", meaning="2 right / (objects + detections), where there are any"),
    *COUNTED,
)
CONFUSION = (
    "Rows are what it is, columns what it is taken for. The diagonal has the right detections. Of the "
    "others, the one with the highest score takes the object of another category with the highest IoU, "
    "from 0.5 on, and so forth; each object counts once."
)
NOTES = (
    "AP, AP50, AR and the curves are pycocotools' own: all scores, a category's best 100 detections "
    "in an image, objects of all sizes, crowd regions ignored.",
    "All else counts the detections from one score on. Which are right is pycocotools' word, too: it matches "
    "a detection with an object of its category from an IoU of 0.5 on, the highest score first.",
    "The kinds of errors are much as in TIDE (Bolya et al. 2020). A detection of which several are true is "
    "double before wrong class before wrong place. One near an object of another category (IoU 0.1 to 0.5), "
    "wrong in class and place, is background here.",
    "An image's F1 is 2 right / (objects + detections).",
)


def detection_breakdown(
    coco: COCO,
    dataset: CocoDataset,
    results: Sequence[dict[str, Any]],
    score: float | None = None,
) -> Breakdown:
    """Looks closer at detections.

    Args:
        coco: The original annotations.
        dataset: The validated images.
        results: Detections in COCO's results format.
        score: Detections are counted from this score on; by default from the one with the highest F1.
    """
    evaluation = coco_evaluation(coco, results, dataset.ids)
    names, matches = category_names(evaluation), matches_of(evaluation)
    best = best_score(matches)
    if score is None:
        score, why = (NO_SCORE, "as none is right") if best is None else (best, "where F1 is highest")
    else:
        why = "as asked"
    errors = errors_from(matches, score, len(names))
    by_category = errors.counts("category", len(names))
    by_image = errors.counts("image", len(evaluation.params.imgIds))
    categories = _categories(evaluation, errors, by_category)
    confusion = Confusion(names, errors.confusion, CONFUSION, ("background", "missed"))
    values, ids = metrics_of(evaluation), [int(number) for number in evaluation.params.imgIds]
    totals = {name: int(counts.sum()) for name, counts in by_category.items()}
    return Breakdown(
        answer=(*_answer(totals, score, why, categories), *confusion.words()),
        values=tuple((metric, values[metric.name]) for metric in VALUES),
        parts={
            "objects": _parts(OBJECTS, totals),
            f"detections with a score of {score:g} or more": _parts(DETECTIONS, totals),
        },
        categories=categories,
        errors=Table(
            (CATEGORY, *COUNTED),
            tuple(zip(names, *(by_category[of.name].tolist() for of in COUNTED), strict=True)),
            ("all", *(totals[of.name] for of in COUNTED)),
        ),
        confusion=confusion,
        curves=precision_recall(evaluation),
        images=Table(
            IMAGES,
            tuple(
                zip(
                    ids,
                    (coco.imgs[image_id]["file_name"] for image_id in ids),
                    _cells(f1_of(by_image)),
                    *(by_image[of.name].tolist() for of in COUNTED),
                    strict=True,
                )
            ),
        ),
        examples=best_and_worst(dataset, evaluation, errors, by_image),
        notes=NOTES,
    )


def _parts(meanings: dict[str, str], totals: dict[str, int]) -> tuple[Part, ...]:
    right = next(iter(meanings))
    return tuple(Part(name, totals[name], meaning, name == right) for name, meaning in meanings.items())


def _cells(values: NDArray[Any]) -> list[Any]:
    return [None if math.isnan(value) else value for value in values.tolist()]


def _categories(evaluation: COCOeval, errors: Errors, counts: dict[str, NDArray[np.int64]]) -> Table:
    names, values, means = category_names(evaluation), category_values(evaluation), metrics_of(evaluation)
    with_objects = np.unique(errors.objects[["category", "image"]])["category"]
    images = np.bincount(with_objects, minlength=len(names))
    totals = {name: np.append(of, of.sum()) for name, of in counts.items()}
    with np.errstate(invalid="ignore"):
        precision, recall = totals["right"] / totals["detections"], totals["found"] / totals["objects"]
    columns = (
        totals["objects"],
        np.append(images, len(np.unique(errors.objects["image"]))),
        totals["detections"],
        *(np.append(values[name], means[mean.name]) for name, mean in zip(values, VALUES, strict=True)),
        precision,
        recall,
    )
    *rows, total = zip((*names, "all"), *map(_cells, columns), strict=True)
    return Table(CATEGORIES, tuple(rows), total)


def _answer(totals: dict[str, int], score: float, why: str, categories: Table) -> tuple[str, ...]:
    lines = [
        f"It finds {share(totals['found'], totals['objects'], 'objects')}, and "
        f"{share(totals['right'], totals['detections'], 'detections')} are right.",
        f"Counted are detections with a score of {score:g} or more, {why}.",
    ]
    by_ap = sorted((row[AP], row[0]) for row in categories.rows if row[AP] is not None)
    if len(by_ap) > 1:
        (low, worst), (high, best) = by_ap[0], by_ap[-1]
        lines.append(f"Highest AP: {best} ({high:.3f}); lowest: {worst} ({low:.3f}).")
    return tuple(lines)
