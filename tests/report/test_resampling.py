import time

import numpy as np
import pytest

from dropblock_det.datasets.annotations import coco_index
from dropblock_det.report.resampling import average_precisions, draws, other_images
from dropblock_det.tasks.classification.module import outcomes_of as classified
from dropblock_det.tasks.detection.coco_eval import coco_evaluation, metrics_of, outcomes_of

CATEGORIES = [{"id": 10 * k, "name": f"class {k}"} for k in range(1, 4)]
SIZE = 400


def scene(images, seed=0, each=4, crowds=True, shares=(0.6, 0.35, 0.05)):
    """Annotations and detections of a middling detector: misses, shifted boxes, boxes on nothing, crowds."""
    noise = np.random.default_rng(seed)
    annotations, results = [], []
    for image in range(1, images + 1):
        for _ in range(noise.integers(0, 2 * each)):
            x, y = noise.uniform(0, SIZE - 120, 2)
            box = [x, y, *noise.uniform(20, 110, 2)]
            category = CATEGORIES[noise.choice(3, p=shares)]["id"]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": category,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": int(crowds and noise.random() < 0.1),
                }
            )
            if noise.random() < 0.7:
                shifted = [v + noise.normal(0, 5) for v in box]
                results.append((image, category, shifted, noise.beta(5, 2)))
        for _ in range(noise.integers(0, each)):
            box = [*noise.uniform(0, 300, 2), *noise.uniform(20, 90, 2)]
            results.append((image, CATEGORIES[noise.integers(3)]["id"], box, noise.beta(2, 4)))
    return annotations, results


def evaluated(annotations, results, ids, copies=None):
    """pycocotools on the images, each as often as ``copies`` says."""
    copies = dict.fromkeys(ids, 1) if copies is None else copies
    new = [(image, 1000 * image + copy) for image in ids for copy in range(copies[image])]
    images = [{"id": copy, "width": SIZE, "height": SIZE} for _, copy in new]
    copied = [a | {"image_id": copy} for image, copy in new for a in annotations if a["image_id"] == image]
    numbered = [a | {"id": n} for n, a in enumerate(copied, 1)]
    coco = coco_index({"images": images, "categories": CATEGORIES, "annotations": numbered})
    found = [
        {"image_id": copy, "category_id": category, "bbox": box, "score": float(np.float32(score))}
        for image, copy in new
        for of, category, box, score in results
        if of == image
    ]
    return coco_evaluation(coco, found, [copy for _, copy in new])


def metric_values(outcomes, weights):
    precisions = average_precisions(outcomes, weights)
    return {
        name: np.nanmean(np.mean(precisions[:, list(ways)], axis=1), axis=1)
        for name, ways in outcomes.columns.items()
    }


@pytest.mark.parametrize("crowds", [True, False])
def test_every_image_once_is_what_pycocotools_says(crowds):
    evaluation = evaluated(*scene(40, crowds=crowds), range(1, 41))
    outcomes = outcomes_of(evaluation)
    assert outcomes.ignored.any() == crowds
    expected = metrics_of(evaluation)
    for name, values in metric_values(outcomes, np.ones((1, 40))).items():
        assert expected[name] > 0.1
        assert values[0] == pytest.approx(expected[name], rel=1e-14)


def test_repeated_images_are_what_pycocotools_says_of_copies():
    ids = range(1, 26)
    annotations, results = scene(25, seed=3)
    outcomes = outcomes_of(evaluated(annotations, results, ids))
    weights = draws(25, 6)
    values = metric_values(outcomes, weights)
    for number, row in enumerate(weights):
        copies = dict(zip(ids, row.astype(int), strict=True))
        expected = metrics_of(evaluated(annotations, results, ids, copies))
        for name in values:
            assert values[name][number] == pytest.approx(expected[name], rel=1e-13)
    assert len({*values["mAP"].round(6)}) == 7  # they are different draws


def test_a_category_that_was_not_drawn_does_not_count():
    ids = range(1, 26)
    annotations, results = scene(25, seed=3)
    without = dict.fromkeys(ids, 1)
    for annotation in annotations:
        if annotation["category_id"] == 30:
            without[annotation["image_id"]] = 0
    outcomes = outcomes_of(evaluated(annotations, results, ids))
    weights = np.array([[without[image] for image in ids]], float)
    precisions = average_precisions(outcomes, weights)
    assert np.isnan(precisions[0, :, 2]).all()
    expected = metrics_of(evaluated(annotations, results, ids, without))
    assert metric_values(outcomes, weights)["AP50"][0] == pytest.approx(expected["AP50"], rel=1e-13)


def test_nothing_found_is_an_average_precision_of_0():
    annotations, _ = scene(5)
    outcomes = outcomes_of(evaluated(annotations, [], range(1, 6)))
    assert metric_values(outcomes, np.ones((1, 5)))["mAP"][0] == 0


def test_settings_are_compared_on_the_same_draws():
    """Two detectors that differ in one image of 60: an interval of each alone would be ten times as wide."""
    annotations, results = scene(60, crowds=False)
    better = [r for r in results if r[0] != 1 or r[3] > 0.4]
    ids = range(1, 61)
    of = {
        name: outcomes_of(evaluated(annotations, found, ids))
        for name, found in (("none", results), ("x", better))
    }
    answer = other_images({name: {0: outcomes, 1: outcomes} for name, outcomes in of.items()}, 300)
    interval = answer.metrics["mAP"]["x"]
    alone = metric_values(of["none"], draws(60, 300))["mAP"][1:]
    assert interval.low <= interval.mean <= interval.high
    assert interval.high - interval.low < 0.3 * (np.quantile(alone, 0.975) - np.quantile(alone, 0.025))
    assert answer.images == 60
    assert [*answer.categories] == ["class 1", "class 2"]  # the third has too few objects
    assert answer.objects["class 1"] == of["none"].truths[:, 0].sum()
    equal = other_images({"none": {0: of["none"]}, "y": {0: of["none"]}}, 50)
    assert equal.metrics["mAP"]["y"] == equal.categories["class 1"]["y"]
    assert (equal.metrics["mAP"]["y"].low, equal.metrics["mAP"]["y"].high) == (0, 0)


def test_accuracy_is_the_share_of_drawn_images_that_are_right():
    noise = np.random.default_rng(0)
    labels = noise.integers(0, 3, 150)
    found = {}
    for name, skill in (("none", 0.6), ("x", 0.8)):
        predicted = np.where(noise.random(150) < skill, labels, (labels + 1) % 3)
        pairs = zip(labels.tolist(), predicted.tolist(), strict=True)
        found[name] = [
            {"image_id": 150 - n, "label": a, "predicted": b, "score": 0.5} for n, (a, b) in enumerate(pairs)
        ]
    outcomes = {name: {0: classified(rows, ["a", "b", "c"])} for name, rows in found.items()}
    answer = other_images(outcomes, 500)
    right = {
        name: np.array([row["label"] == row["predicted"] for row in rows[::-1]])
        for name, rows in found.items()
    }
    differences = draws(150, 500)[1:] @ (right["x"].astype(float) - right["none"]) / 150
    interval = answer.metrics["accuracy"]["x"]
    assert interval.mean == pytest.approx(right["x"].mean() - right["none"].mean())
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(differences, [0.025, 0.975])))
    of_a = labels[::-1] == 0
    by_hand = right["x"][of_a].mean() - right["none"][of_a].mean()
    assert answer.categories["a"]["x"].mean == pytest.approx(by_hand)


def test_what_cannot_be_compared_is_not():
    annotations, results = scene(16)
    some = outcomes_of(evaluated(annotations, results, range(1, 16)))
    others = outcomes_of(evaluated(annotations, results, range(2, 17)))
    assert other_images({"none": {0: some}, "x": {0: others}}, 30) is None
    assert other_images({"x": {0: some}}, 30) is None
    assert other_images({}, 30) is None
    assert other_images({"none": {0: some}, "x": {0: some}}, 10) is None  # too few draws for an interval
    nothing = outcomes_of(evaluated([], [], [1, 2]))
    assert other_images({"none": {0: nothing}, "x": {0: nothing}}, 30) is None
    few = outcomes_of(evaluated(annotations, results, range(1, 6)))
    assert other_images({"none": {0: few}, "x": {0: few}}, 30) is None
    assert other_images({"none": {0: some}, "x": {1: some}}, 30).metrics["mAP"] == {}


@pytest.mark.slow
def test_the_interval_covers_what_other_images_would_say():
    """150 validations of 60 images each: 95 %, less 3 standard errors and the 2 % that a bootstrap lacks."""
    ids = range(1, 61)
    intervals = []
    for seed in range(150):
        annotations, results = scene(60, seed=100 + seed, crowds=False, each=3, shares=(0.6, 0.4, 0))
        worse = [result for number, result in enumerate(results) if number % 5]
        found = {"none": results, "x": worse}
        of = {name: {0: outcomes_of(evaluated(annotations, some, ids))} for name, some in found.items()}
        intervals.append(other_images(of, 200).metrics["AP50"]["x"])
    truth = np.mean([interval.mean for interval in intervals])
    covered = np.mean([interval.low <= truth <= interval.high for interval in intervals])
    assert covered > 0.95 - 0.053 - 0.02
    zero = np.mean([interval.low <= 0 <= interval.high for interval in intervals])
    assert zero < 0.5  # it is no catch-all: a detector that misses every fifth object is seen


@pytest.mark.slow
def test_200_images_and_21_runs_take_less_than_a_minute():
    annotations, results = scene(200, each=8)
    noise = np.random.default_rng(0)
    clutter = [
        (i, 10 * noise.integers(1, 4), [*noise.uniform(0, 300, 2), 50, 50], noise.beta(1, 9))
        for i in range(1, 201)
        for _ in range(80)
    ]
    outcomes = outcomes_of(evaluated(annotations, results + clutter, range(1, 201)))
    assert len(outcomes.score) > 15_000
    runs = {name: dict.fromkeys(range(3), outcomes) for name in ("none", *"abcdef")}
    start = time.process_time()
    other_images(runs)
    taken = time.process_time() - start
    print(f"{taken:.1f} s")
    assert taken < 60
