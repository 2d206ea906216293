import contextlib
import copy
import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dropblock_det.datasets.annotations import coco_index, load_annotations
from dropblock_det.errors import InputError
from dropblock_det.tasks.detection.coco_eval import (
    COCO_METRICS,
    coco_evaluation,
    detections_to_coco,
    metrics_of,
    outcomes_of,
)

CATEGORIES = [{"label": 1, "id": 2, "name": "bicycle"}, {"label": 2, "id": 18, "name": "dog"}]


def coco_metrics(coco, results, image_ids):
    return metrics_of(coco_evaluation(coco, results, image_ids))


def pycocotools_figures(annotations, results, image_ids=None):
    """What pycocotools itself gives, by the calls of its own demo."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(annotations)
        evaluation = COCOeval(truth, truth.loadRes(copy.deepcopy(results)), "bbox")
        if image_ids is not None:
            evaluation.params.imgIds = image_ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def test_background_is_no_detection():
    found = {"boxes": torch.tensor([[0.0, 0, 4, 4]] * 3), "scores": torch.tensor([0.9, 0.8, 0.7])}
    results = detections_to_coco([7], [{**found, "labels": torch.tensor([0, 2, 1])}], CATEGORIES)
    assert [(result["category_id"], round(result["score"], 3)) for result in results] == [(18, 0.8), (2, 0.7)]


def noisy(coco, seed, keep=0.8):
    """Detections made from the truth: shifted, some missing, some of another category, some invented."""
    rng = np.random.default_rng(seed)
    categories = sorted(coco.cats)
    results = []
    for image in coco.dataset["images"]:
        boxes = [a["bbox"] for a in coco.imgToAnns[image["id"]] if rng.random() < keep]
        classes = [a["category_id"] for a in coco.imgToAnns[image["id"]]]
        for box, category in zip(boxes, classes, strict=False):
            x, y, w, h = (np.array(box) + rng.normal(0, 0.08, 4) * max(box[2:])).tolist()
            if rng.random() < 0.1:
                category = int(rng.choice(categories))
            results.append(
                {
                    "image_id": image["id"],
                    "category_id": category,
                    "bbox": [x, y, max(w, 1), max(h, 1)],
                    "score": rng.random(),
                }
            )
    return results


def test_equals_pycocotools(content, write):
    del content["annotations"][3]  # the id 0, which pycocotools takes for no match
    annotations, _ = write(content)
    coco = load_annotations(annotations).index()
    results = noisy(coco, 0, keep=1)
    expected = pycocotools_figures(str(annotations), results)
    got = coco_metrics(coco, results, list(coco.imgs))
    assert list(got) == list(COCO_METRICS)
    for value, theirs in zip(got.values(), expected, strict=True):
        assert value == theirs or (math.isnan(value) and theirs == -1)


def test_equals_pycocotools_on_real_annotations(real_coco):
    annotations = real_coco / "annotations" / "instances_val2017.json"
    coco = load_annotations(annotations).index()
    results = noisy(coco, 1)
    image_ids = sorted(coco.imgs)[::2]
    expected = pycocotools_figures(str(annotations), results, image_ids)
    got = coco_metrics(coco, results, image_ids)
    assert 0.1 < got["mAP"] < 0.9
    np.testing.assert_allclose(list(got.values()), expected, rtol=0, atol=1e-9)


def perfect(coco):
    keys = ("image_id", "category_id", "bbox")
    annotations = [a for a in coco.anns.values() if not a["iscrowd"] and a["area"]]
    return [{key: a[key] for key in keys} | {"score": 0.9} for a in annotations]


def test_perfect_detections_reach_one_even_of_annotation_0(content, write):
    coco = load_annotations(write(content)[0]).index()
    coco.dataset["annotations"] = [a for a in coco.dataset["annotations"] if a["bbox"][2]]
    figures = coco_metrics(coco_index(coco.dataset), perfect(coco), list(coco.imgs))
    assert figures["mAP"] == pytest.approx(1, abs=1e-9)
    assert figures["AR_100"] == 1
    assert math.isnan(figures["AP_large"])  # there is no large object


def test_crowds_are_ignored_not_missed_nor_false(content, write):
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] == 7]
    coco = load_annotations(write(content)[0]).index()
    inside = {"image_id": 7, "category_id": 2, "bbox": [2, 20, 10, 8], "score": 0.99}
    assert coco_metrics(coco, [inside, *perfect(coco)], [7])["mAP"] == pytest.approx(1, abs=1e-9)
    elsewhere = inside | {"category_id": 18}  # no crowd of dogs there: a false positive
    assert coco_metrics(coco, [elsewhere, *perfect(coco)], [7])["mAP"] < 0.8


def test_areas_are_the_original_ones(content, write):
    content["annotations"] = content["annotations"][:1]
    content["annotations"][0] |= {"bbox": [0, 0, 40, 30], "area": 1000}  # 1200 as a box, small by its mask
    coco = load_annotations(write(content)[0]).index()
    figures = coco_metrics(coco, perfect(coco), [7])
    assert figures["AP_small"] == pytest.approx(1, abs=1e-9)
    assert math.isnan(figures["AP_medium"])


def test_no_detections_is_zero(content, write, capsys):
    coco = load_annotations(write(content)[0]).index()
    figures = coco_metrics(coco, [], list(coco.imgs))
    assert figures["mAP"] == figures["AP50"] == figures["AR_100"] == 0
    assert capsys.readouterr().out == ""


def test_no_objects_is_nan(content, write):
    content["annotations"] = []
    coco = load_annotations(write(content)[0]).index()
    results = [{"image_id": 7, "category_id": 2, "bbox": [1, 1, 5, 5], "score": 0.5}]
    for found in ([], results):
        assert all(math.isnan(value) for value in coco_metrics(coco, found, [7]).values())


def test_images_outside_the_choice_do_not_count(content, write):
    coco = load_annotations(write(content)[0]).index()
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] == 7]
    alone = load_annotations(write(content)[0]).index()
    results = [*perfect(coco), {"image_id": 3, "category_id": 18, "bbox": [0, 0, 5, 5], "score": 1.0}]
    np.testing.assert_equal(coco_metrics(coco, results, [7]), coco_metrics(alone, perfect(alone), [7]))


def test_the_caller_keeps_its_records(content, write):
    coco = load_annotations(write(content)[0]).index()
    results = perfect(coco)
    before = copy.deepcopy(results)
    coco_metrics(coco, results, [7])
    assert results == before


def test_detections_to_coco():
    detections = [
        {
            "boxes": torch.tensor([[1.5, 2.0, 4.0, 8.0], [0.0, 0.0, 1.0, 1.0]]),
            "scores": torch.tensor([0.75, 0.5], dtype=torch.float16),
            "labels": torch.tensor([2, 1]),
        },
        {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    assert detections_to_coco([7, 3], detections, CATEGORIES) == [
        {"image_id": 7, "category_id": 18, "bbox": [1.5, 2.0, 2.5, 6.0], "score": 0.75},
        {"image_id": 7, "category_id": 2, "bbox": [0.0, 0.0, 1.0, 1.0], "score": 0.5},
    ]
    for key in ("boxes", "scores"):
        broken = {**detections[0], key: detections[0][key].clone().fill_(math.nan)}
        with pytest.raises(InputError, match=r"image 7.*not finite"):
            detections_to_coco([7], [broken], CATEGORIES)


numbers = st.floats(0, 60, allow_nan=False, width=32)
boxes = st.lists(numbers, min_size=4, max_size=4)


@settings(max_examples=60, deadline=None)
@given(
    truth=st.lists(
        st.tuples(st.sampled_from([3, 7, 9]), st.sampled_from([2, 18]), boxes, st.booleans()), max_size=8
    ),
    found=st.lists(
        st.tuples(
            st.sampled_from([3, 7, 9]), st.sampled_from([2, 18]), boxes, st.sampled_from([0.1, 0.5, 0.9])
        ),
        min_size=1,
        max_size=8,
    ),
)
def test_any_detections_give_pycocotools_figures(truth, found):
    annotations = [
        {"id": n, "image_id": i, "category_id": c, "bbox": b, "area": b[2] * b[3], "iscrowd": int(crowd)}
        for n, (i, c, b, crowd) in enumerate(truth, start=1)
    ]
    content = {
        "images": [{"id": i} for i in (3, 7, 9)],
        "categories": [{"id": c} for c in (2, 18)],
        "annotations": annotations,
    }
    results = [{"image_id": i, "category_id": c, "bbox": b, "score": s} for i, c, b, s in found]
    got = coco_metrics(coco_index(content), results, [3, 7, 9])
    with contextlib.redirect_stdout(io.StringIO()):
        coco = coco_index(content)
        evaluation = COCOeval(coco, coco.loadRes(copy.deepcopy(results)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    expected = [math.nan if value == -1 else value for value in evaluation.stats]
    np.testing.assert_allclose(list(got.values()), expected, rtol=0, atol=1e-9)
    assert all(math.isnan(value) or 0 <= value <= 1 for value in got.values())


def average_precision(outcomes, name, times):
    """COCO's, from the outcomes alone, with each image as often as ``times`` says; slow and plain."""
    values = []
    for k in range(len(outcomes.categories)):
        objects = (outcomes.truths[:, k] * times).sum()
        rows = np.flatnonzero(outcomes.category == k)
        rows = rows[np.argsort(-outcomes.score[rows], kind="stable")]
        weights = times[outcomes.image[rows]]
        for column in outcomes.columns[name] if objects else ():
            counts = weights * ~outcomes.ignored[rows, column]
            right = np.cumsum(counts * outcomes.hit[rows, column])
            wrong = np.cumsum(counts * ~outcomes.hit[rows, column])
            precision = right / np.maximum(right + wrong, 1)
            precision = np.maximum.accumulate(precision[::-1])[::-1]
            places = np.searchsorted(right / objects, np.linspace(0, 1, 101), side="left")
            values.append(np.append(precision, 0)[places].mean())
    return np.mean(values)


def several_times(coco, results, times):
    """The annotations and detections with each image as often as ``times`` says, under other ids."""
    images, annotations, found = [], [], []
    for image, number in zip(sorted(coco.imgs), times, strict=True):
        for _ in range(number):
            new = len(images)
            images.append({**coco.imgs[image], "id": new})
            annotations += [{**a, "image_id": new} for a in coco.imgToAnns[image]]
            found += [{**r, "image_id": new} for r in results if r["image_id"] == image]
    annotations = [{**a, "id": number} for number, a in enumerate(annotations, start=1)]
    content = {"images": images, "categories": coco.dataset["categories"], "annotations": annotations}
    return coco_index(content), found


def test_outcomes_give_the_metrics_of_resampled_images(real_coco):
    """Exactly those that pycocotools gives for these images."""
    coco = load_annotations(real_coco / "annotations" / "instances_val2017.json").index()
    results = noisy(coco, 2)
    outcomes = outcomes_of(coco_evaluation(coco, results, list(coco.imgs)))
    assert outcomes.images.tolist() == sorted(coco.imgs)
    rng = np.random.default_rng(0)
    for times in (
        np.ones(len(coco.imgs), int),
        *rng.multinomial(len(coco.imgs), [1 / len(coco.imgs)] * len(coco.imgs), 2),
    ):
        resampled, found = several_times(coco, results, times)
        expected = coco_metrics(resampled, found, list(resampled.imgs))
        for name in ("mAP", "AP50", "AP75"):
            assert average_precision(outcomes, name, times) == pytest.approx(expected[name], abs=1e-12)


def test_outcomes_of_nothing(content, write):
    coco = load_annotations(write(content)[0]).index()
    outcomes = outcomes_of(coco_evaluation(coco, [], [7, 3]))
    assert outcomes.images.tolist() == [3, 7]
    assert outcomes.categories == ("bicycle", "dog")
    assert outcomes.truths.tolist() == [[2, 0], [1, 1]]  # the crowd is no object to find
    assert outcomes.hit.shape == outcomes.ignored.shape == (0, 10)
    assert outcomes.image.shape == outcomes.category.shape == outcomes.score.shape == (0,)
