"""What is wrong with detections: kinds of errors much as TIDE has them (Bolya et al. 2020), and confusions.

What is right is pycocotools' word: a detection that it matches with an object at an IoU of 0.5.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask
from pycocotools.cocoeval import COCOeval

from dropblock_det.tasks.detection.coco_eval import matched_images

HIT, NEAR = 0.5, 0.1  # IoU from which on a box is that of an object, or is at least meant for it
DETECTIONS = {
    "right": "matched with an object of its category (IoU 0.5 or more)",
    "wrong class": "on an object of another category (IoU 0.5 or more)",
    "wrong place": "near an object of its category (IoU 0.1 to 0.5)",
    "double": "on an object of its category that one with a higher score has found",
    "background": "nowhere near an object of its category, and on none of another",
}
OBJECTS = {
    "found": "by a right detection",
    "wrong class or place": "not found, but such a detection is meant for it",
    "missed": "no detection is meant for it",
}
RIGHT, WRONG_CLASS, WRONG_PLACE, DOUBLE, BACKGROUND = range(5)
FOUND, MISTAKEN, MISSED = range(3)

_DETECTION = np.dtype(
    [("image", "i8"), ("category", "i8"), ("bbox", "f8", 4), ("score", "f8"), ("right", "?")]
)
_OBJECT = np.dtype([("image", "i8"), ("category", "i8"), ("bbox", "f8", 4), ("score", "f8")])


@dataclass(frozen=True)
class Matches:
    """Detections and objects, without those that pycocotools ignores, as in a crowd.

    ``image`` and ``category`` are positions among the evaluation's, ``bbox`` is x, y, width, height.

    Attributes:
        detections: structured (n,): ``image``, ``category``, ``bbox``, ``score`` and whether it is ``right``;
            image by image, those of an image from the highest score down.
        objects: structured (m,): ``image``, ``category``, ``bbox`` and the ``score`` of the right detection
            on it, NaN where there is none; image by image.
    """

    detections: np.ndarray
    objects: np.ndarray


@dataclass(frozen=True)
class Errors:
    """What became of the detections from a score on, and of all objects.

    Attributes:
        detections: as in :class:`Matches`, those with the score.
        kinds: (n,) position in ``DETECTIONS``.
        objects: as in :class:`Matches`.
        states: (m,) position in ``OBJECTS``.
        confusion: int64 (K + 1, K + 1), rows are the objects' categories, columns the detections'. Right
            detections are on the diagonal. Of what is left, the detection with the highest score takes the
            object of another category with the highest IoU from 0.5 on, and so forth, each object once. The
            last row has the other detections, the last column the other objects.
    """

    detections: np.ndarray
    kinds: NDArray[np.int64]
    objects: np.ndarray
    states: NDArray[np.int64]
    confusion: NDArray[np.int64]

    def counts(self, of: str, size: int) -> dict[str, NDArray[np.int64]]:
        """Counts by ``image`` or ``category``.

        Args:
            of: Which of them.
            size: How many there are.

        Returns:
            ``objects``, ``detections`` and all of ``OBJECTS`` and ``DETECTIONS``: (size,) each.
        """
        counts = {}
        for whole, records, judged, names in (
            ("objects", self.objects, self.states, OBJECTS),
            ("detections", self.detections, self.kinds, DETECTIONS),
        ):
            counts[whole] = np.bincount(records[of], minlength=size)
            for number, name in enumerate(names):
                counts[name] = np.bincount(records[of][judged == number], minlength=size)
        return counts


def f1_of(counts: dict[str, NDArray[np.int64]]) -> NDArray[np.float64]:
    """Returns 2 right / (objects + detections), NaN where there are neither."""
    with np.errstate(invalid="ignore"):
        return 2 * counts["right"] / (counts["objects"] + counts["detections"])


def matches_of(evaluation: COCOeval) -> Matches:
    """Reads what pycocotools matched at an IoU of 0.5."""
    detections, objects = [], []
    boxes, truths = evaluation.cocoDt.anns, evaluation.cocoGt.anns
    for k, i, matched in matched_images(evaluation):
        right, ignored = matched["dtMatches"][0] > 0, matched["dtIgnore"][0]
        for number, hit, skip in zip(matched["dtIds"], right, ignored, strict=True):
            if not skip:
                detections.append((i, k, boxes[number]["bbox"], boxes[number]["score"], hit))
        for number, finder, skip in zip(
            matched["gtIds"], matched["gtMatches"][0], matched["gtIgnore"], strict=True
        ):
            if not skip:
                score = boxes[int(finder)]["score"] if finder else np.nan
                objects.append((i, k, truths[number]["bbox"], score))
    found, present = np.array(detections, _DETECTION), np.array(objects, _OBJECT)
    return Matches(
        found[np.lexsort((-found["score"], found["image"]))],
        present[np.argsort(present["image"], kind="stable")],
    )


def best_score(matches: Matches) -> float | None:
    """Returns the score, of 0.000 to 0.999, from which on the detections have the highest F1.

    Returns:
        The highest such score; ``None`` where no detection is right.
    """
    order = np.argsort(matches.detections["score"])
    scores, right = matches.detections["score"][order], matches.detections["right"][order]
    steps = np.arange(1000) / 1000
    left_out = np.searchsorted(scores, steps)
    hits = right.sum() - np.concatenate([[0], np.cumsum(right)])[left_out]
    if not hits.any():
        return None
    f1 = 2 * hits / (len(scores) - left_out + len(matches.objects))
    return float(steps[np.flatnonzero(f1 == f1.max())[-1]])


def errors_from(matches: Matches, score: float, categories: int) -> Errors:
    """Judges the detections with at least this score.

    Args:
        matches: By :func:`matches_of`.
        score: Detections below it don't count.
        categories: How many there are.
    """
    detections, objects = matches.detections, matches.objects
    detections = detections[detections["score"] >= score]
    kinds, states = np.zeros(len(detections), int), np.zeros(len(objects), int)
    confusion = np.zeros((categories + 1, categories + 1), int)
    for here, there in _by_image(detections, objects):
        found, present = detections[here], objects[there]
        iou = np.zeros((len(found), len(present)))
        if iou.size:
            iou[:] = mask.iou(found["bbox"].copy(), present["bbox"].copy(), [0] * len(present))
        own = found["category"][:, None] == present["category"]
        is_found = present["score"] >= score
        kinds[here] = _kinds(iou, own, found["right"])
        states[there] = _states(iou, own, kinds[here], is_found)
        _confuse(confusion, iou, found, present, is_found)
    return Errors(detections, kinds, objects, states, confusion)


def _by_image(detections: np.ndarray, objects: np.ndarray) -> Iterator[tuple[slice, slice]]:
    images = np.union1d(detections["image"], objects["image"])
    ends = [
        (np.searchsorted(of["image"], images), np.searchsorted(of["image"], images, "right"))
        for of in (detections, objects)
    ]
    for (a, b), (c, d) in zip(*(zip(*pair, strict=True) for pair in ends), strict=True):
        yield slice(a, b), slice(c, d)


def _kinds(iou: np.ndarray, own: np.ndarray, right: np.ndarray) -> np.ndarray:
    """An image's detections judged, from IoUs (n, m) with its objects and which are of the same category."""
    same, other = ((iou * pairs).max(1, initial=0) for pairs in (own, ~own))
    judged = {RIGHT: right, DOUBLE: same >= HIT, WRONG_CLASS: other >= HIT, WRONG_PLACE: same >= NEAR}
    return np.select(list(judged.values()), list(judged), BACKGROUND)


def _states(iou: np.ndarray, own: np.ndarray, kinds: np.ndarray, found: np.ndarray) -> np.ndarray:
    mistaken = np.zeros(len(found), bool)
    for kind, pairs in ((WRONG_CLASS, ~own), (WRONG_PLACE, own)):
        if (rows := kinds == kind).any():
            mistaken[(iou * pairs)[rows].argmax(1)] = True
    return np.select([found, mistaken], [FOUND, MISTAKEN], MISSED)


def _confuse(
    confusion: np.ndarray, iou: np.ndarray, found: np.ndarray, present: np.ndarray, is_found: np.ndarray
) -> None:
    free = ~is_found
    for number, detection in enumerate(found):
        row = detection["category"] if detection["right"] else -1
        near = iou[number] * free
        # A free object of its own category would have been matched with it.
        if row < 0 and near.max(initial=0) >= HIT:
            taken = near.argmax()
            free[taken], row = False, present["category"][taken]
        confusion[row, detection["category"]] += 1
    np.add.at(confusion[:, -1], present["category"][free], 1)
