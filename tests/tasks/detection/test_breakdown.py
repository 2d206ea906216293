"""A closer look at detections: pycocotools' figures by category, and what is wrong, counted by hand."""

import contextlib
import io

import numpy as np
import pytest
from PIL import Image
from pycocotools.cocoeval import COCOeval

from dropblock_det.datasets.annotations import coco_index
from dropblock_det.tasks.detection.breakdown import NO_SCORE, detection_breakdown
from dropblock_det.tasks.detection.coco_eval import category_values, coco_evaluation, metrics_of
from dropblock_det.tasks.detection.curves import precision_recall
from dropblock_det.tasks.detection.errors import (
    DETECTIONS,
    OBJECTS,
    best_score,
    errors_from,
    f1_of,
    matches_of,
)

CAT, DOG = 3, 5


class Images:
    """As much of a data set as is looked at."""

    def __init__(self, folder, ids):
        self.folder, self.ids = folder, ids

    def path(self, image_id):
        path = self.folder / f"{image_id}.png"
        Image.new("RGB", (100, 100), (image_id, 0, 0)).save(path)
        return path


def index_of(objects, images=4, names=("cat", "dog")):
    """Objects are (image, category, box, crowd)."""
    return coco_index(
        {
            "images": [
                {"id": n, "file_name": f"{n}.png", "width": 100, "height": 100} for n in range(1, images + 1)
            ],
            "categories": [{"id": id, "name": name} for id, name in zip((CAT, DOG), names, strict=True)],
            "annotations": [
                {
                    "id": n,
                    "image_id": image,
                    "category_id": category,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": crowd,
                }
                for n, (image, category, box, crowd) in enumerate(objects, 1)
            ],
        }
    )


def results_of(detections):
    keys = ("image_id", "category_id", "bbox", "score")
    return [dict(zip(keys, row, strict=True)) for row in detections]


OBJECTS_BY_HAND = [
    (1, CAT, [0, 0, 10, 10], 0),  # found
    (1, DOG, [50, 50, 10, 10], 0),  # taken for a cat
    (1, CAT, [80, 0, 10, 10], 0),  # found in the wrong place
    (1, DOG, [0, 80, 20, 20], 1),
    (2, DOG, [0, 0, 10, 10], 0),  # missed
]
BY_HAND = [
    ((1, CAT, [0, 0, 10, 10], 0.9), "right"),
    ((1, CAT, [0, 0, 10, 9], 0.8), "double"),
    ((1, CAT, [50, 50, 10, 10], 0.7), "wrong class"),
    ((1, CAT, [80, 0, 10, 4], 0.6), "wrong place"),
    ((1, DOG, [30, 30, 5, 5], 0.5), "background"),
    ((4, CAT, [30, 30, 5, 5], 0.4), "background"),
    ((1, DOG, [80, 0, 10, 4], 0.3), "background"),  # wrong in class and place
    ((1, DOG, [5, 85, 5, 5], 0.95), None),  # in the crowd
    ((1, CAT, [80, 0, 10, 10], 0.05), "below the score"),
]


@pytest.fixture(scope="module")
def matches():
    coco = index_of(OBJECTS_BY_HAND)
    return matches_of(coco_evaluation(coco, results_of(row for row, _ in BY_HAND), [1, 2, 3, 4]))


def test_kinds_of_errors_by_hand(matches):
    errors = errors_from(matches, 0.1, 2)
    kinds = {row[3]: kind for row, kind in BY_HAND if kind in DETECTIONS}
    scores = errors.detections["score"].tolist()
    assert scores == [0.9, 0.8, 0.7, 0.6, 0.5, 0.3, 0.4]  # image by image, the highest first
    found = zip(scores, errors.kinds.tolist(), strict=True)
    assert {score: list(DETECTIONS)[kind] for score, kind in found} == kinds
    states = [list(OBJECTS)[state] for state in errors.states]
    assert states == ["found", "wrong class or place", "wrong class or place", "missed"]
    assert errors.objects["category"].tolist() == [0, 0, 1, 1]  # in an image by category


def test_the_confusion_by_hand(matches):
    assert errors_from(matches, 0.1, 2).confusion.tolist() == [
        [1, 0, 1],  # the other cat's box has too low an IoU
        [1, 0, 1],
        [3, 2, 0],
    ]


def test_an_object_is_confused_once_and_with_the_highest_score():
    objects = [(1, DOG, [0, 0, 10, 10], 0), (1, DOG, [2, 0, 10, 10], 0)]
    first = (1, CAT, [0, 0, 10, 10], 0.5)
    detections = [(1, CAT, [1, 0, 10, 10], 0.4), first, (1, CAT, [0, 0, 10, 9], 0.3)]
    evaluation = coco_evaluation(index_of(objects), results_of(detections), [1])
    errors = errors_from(matches_of(evaluation), 0, 2)
    assert errors.confusion.tolist() == [[0, 0, 0], [2, 0, 0], [1, 0, 0]]
    assert errors.counts("category", 2)["wrong class"].tolist() == [3, 0]


def test_a_lower_score_counts_more(matches):
    errors = errors_from(matches, 0.05, 2)
    assert errors.counts("category", 2)["found"].tolist() == [2, 0]
    assert errors.confusion[0].tolist() == [2, 0, 0]


def test_f1_of_images_by_hand(matches):
    counts = errors_from(matches, 0.1, 2).counts("image", 4)
    np.testing.assert_array_equal(f1_of(counts), [2 / 9, 0, np.nan, 0])
    assert counts["detections"].tolist() == [6, 0, 0, 1]


def test_the_best_score_by_hand(matches):
    assert best_score(matches) == 0.9  # 0.4, then 2 of 6, ... and 4 of 12 with all


def scattered(seed, images=12):
    """A middling detector: misses, wrong classes, shifted boxes, doubles, boxes on nothing, crowds."""
    noise = np.random.default_rng(seed)
    objects, detections = [], []
    for image in range(1, images + 1):
        for _ in range(noise.integers(0, 6)):
            box = [*noise.uniform(0, 70, 2), *noise.uniform(5, 30, 2)]
            category = int(noise.choice([CAT, DOG], p=[0.7, 0.3]))
            objects.append((image, category, box, int(noise.random() < 0.1)))
            for _ in range(noise.integers(0, 3)):
                seen = category if noise.random() < 0.8 else CAT + DOG - category
                shifted = [v + noise.normal(0, 2) for v in box]
                score = float(np.float32(noise.beta(3, 2)))
                detections.append((image, seen, [*shifted[:2], *np.abs(shifted[2:])], score))
        detections.append((image, DOG, [*noise.uniform(0, 60, 2), 20, 20], float(noise.beta(2, 4))))
    return index_of(objects, images), results_of(detections)


@pytest.mark.parametrize("seed", range(5))
def test_the_best_score_has_the_highest_f1(seed):
    coco, results = scattered(seed)
    matches = matches_of(coco_evaluation(coco, results, sorted(coco.imgs)))

    def f1(score):
        kept = matches.detections[matches.detections["score"] >= score]
        return 2 * kept["right"].sum() / (len(kept) + len(matches.objects))

    of_all = [f1(score / 1000) for score in range(1000)]
    assert best_score(matches) == max(score / 1000 for score in range(1000) if of_all[score] == max(of_all))


def alone(coco, results, category):
    """What pycocotools says of a category, by its own calls."""
    evaluation = coco_evaluation(coco, results, sorted(coco.imgs))
    with contextlib.redirect_stdout(io.StringIO()):
        found = COCOeval(coco, evaluation.cocoDt, "bbox")
        found.params.catIds = [category]
        found.evaluate()
        found.accumulate()
        found.summarize()
    return found.stats[[0, 1, 8]].tolist()


@pytest.mark.parametrize("seed", range(3))
def test_figures_by_category_are_pycocotools_to_the_last_bit(seed):
    coco, results = scattered(seed, 40)
    values = category_values(coco_evaluation(coco, results, sorted(coco.imgs)))
    for k, category in enumerate((CAT, DOG)):
        assert [values[name][k] for name in ("AP", "AP50", "AR")] == alone(coco, results, category)


def test_the_curves_are_those_behind_the_figures():
    coco, results = scattered(0, 40)
    evaluation = coco_evaluation(coco, results, sorted(coco.imgs))
    curves, values = precision_recall(evaluation), category_values(evaluation)
    assert curves.precision.shape == curves.scores.shape == (10, 101, 2)
    np.testing.assert_allclose(curves.precision.mean((0, 1)), values["AP"], rtol=1e-12)
    np.testing.assert_allclose(curves.precision[0].mean(0), values["AP50"], rtol=1e-12)
    np.testing.assert_array_equal(curves.precision, evaluation.eval["precision"][..., 0, 2])


def test_the_parts_add_up(tmp_path):
    coco, results = scattered(1)
    found = detection_breakdown(coco, Images(tmp_path, sorted(coco.imgs)), results)
    metrics = metrics_of(coco_evaluation(coco, results, sorted(coco.imgs)))
    assert [value for _, value in found.values] == [metrics[name] for name in ("mAP", "AP50", "AR_100")]
    assert found.categories.total[4:7] == tuple(value for _, value in found.values)
    objects, detections = (sum(part.count for part in parts) for parts in found.parts.values())
    assert (objects, detections) == (found.categories.total[1], found.categories.total[3])
    assert objects == sum(not a["iscrowd"] for a in coco.anns.values())
    assert found.confusion.counts[:2].sum() == objects
    assert found.confusion.counts[:, :2].sum() == detections
    assert found.confusion.counts[:2, :2].trace() == found.parts["objects"][0].count
    for table in (found.errors, found.images):
        assert table.total is None or table.total[1] == objects
        for n, column in enumerate(table.columns):
            if table.total and n:
                assert sum(row[n] for row in table.rows) == table.total[n], column.name
    of_images = [sum(row[n] for row in found.images.rows) for n in range(3, len(found.images.columns))]
    assert of_images == list(found.errors.total[1:])


def test_the_best_and_the_worst_images(tmp_path):
    coco, results = scattered(2)
    found = detection_breakdown(coco, Images(tmp_path, sorted(coco.imgs)), results, score=0.3)
    f1 = {row[1]: row[2] for row in found.images.rows if row[2] is not None}
    shown = {name: [f1[example.title] for example in images] for name, images in found.examples.items()}
    assert shown["worst"] == sorted(f1.values())[: len(shown["worst"])]
    assert shown["best"] == sorted(f1.values())[::-1][: len(shown["best"])]
    assert len(shown["worst"]) + len(shown["best"]) == len(f1) >= 10
    row = {column.name: found.images.rows[0][n] for n, column in enumerate(found.images.columns)}
    (example,) = [e for images in found.examples.values() for e in images if e.title == "1.png"]
    assert {name: len(marks) for name, marks in example.marks.items()} == {n: row[n] for n in example.marks}
    assert Image.open(io.BytesIO(example.picture)).getpixel((0, 0)) == (1, 0, 0)


BOX = [0, 0, 10, 10]


@pytest.mark.parametrize(
    ("objects", "detections", "answer", "shown"),
    [
        ([], [], "It finds none of 0 objects, and none of 0 detections are right.", 0),
        ([], [(1, CAT, BOX, 0.9)], "It finds none of 0 objects, and 0 of 1 detections (0.0 %) are right.", 1),
        ([(1, CAT, BOX, 0)], [], "It finds 0 of 1 objects (0.0 %), and none of 0 detections are right.", 1),
        ([(1, CAT, BOX, 1)], [(1, CAT, BOX, 0.9)], "It finds none of 0 objects, and none of 0 detections", 0),
        ([(1, CAT, BOX, 0)], [(1, CAT, BOX, 0.9)], "It finds 1 of 1 objects (100.0 %), and 1 of 1 detect", 1),
    ],
)
def test_next_to_nothing(objects, detections, answer, shown, tmp_path):
    found = detection_breakdown(index_of(objects, 1), Images(tmp_path, [1]), results_of(detections))
    assert found.answer[0].startswith(answer)
    assert (f"{NO_SCORE} or more, as none is right" in found.answer[1]) == ("and 1 of 1" not in answer)
    assert {name: len(images) for name, images in found.examples.items()} == {"worst": 0, "best": shown}
    dogs = found.categories.rows[1]
    assert dogs == ("dog", 0, 0, 0, None, None, None, None, None)
