"""Several samples merged into detections with an uncertainty, and the figures on it."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from support.detectors import batch, small
from torch import nn

from dropblock_det import DropBlock2d, regularize_
from dropblock_det.datasets.annotations import coco_index
from dropblock_det.errors import InputError
from dropblock_det.tasks.detection import mc_detections, uncertainty
from dropblock_det.tasks.detection.calibration import auroc, reliability, right_at_50
from dropblock_det.tasks.detection.coco_eval import coco_evaluation
from dropblock_det.tasks.detection.uncertainty import merge_samples

NAN = math.nan


def sample(*rows):
    """Of (x1, y1, x2, y2, label, score)."""
    table = torch.tensor(rows).reshape(-1, 6)
    return {"boxes": table[:, :4], "labels": table[:, 4].long(), "scores": table[:, 5]}


def assert_merged(merged, **expected):
    for name, values in expected.items():
        found = merged[name].double()
        torch.testing.assert_close(found, torch.tensor(values).double(), equal_nan=True, rtol=0, atol=1e-6)


def test_merging_by_hand():
    merged = merge_samples(
        [
            sample((0, 0, 10, 10, 1, 0.9), (50, 50, 60, 60, 1, 0.3)),
            sample((0, 0, 10, 12, 1, 0.6), (0, 0, 10, 10, 2, 0.4)),  # the second of another class
            sample((0, 0, 10, 14, 1, 0.6), (100, 0, 110, 10, 2, 0.8)),
            sample(),
        ]
    )
    # Of the first object y2 is 10, 12 and 14, variance 4; over four coordinates the mean is 1.
    assert_merged(
        merged,
        boxes=[[0, 0, 10, 12], [100, 0, 110, 10], [0, 0, 10, 10], [50, 50, 60, 60]],
        labels=[1, 2, 2, 1],
        scores=[2.1 / 4, 0.8 / 4, 0.4 / 4, 0.3 / 4],
        found_shares=[0.75, 0.25, 0.25, 0.25],
        corner_spreads=[1, NAN, NAN, NAN],
    )


def test_of_a_sample_only_the_detection_that_overlaps_most_is_the_object():
    far, near = (0, 0, 10, 16, 1, 0.8), (0, 0, 10, 11, 1, 0.2)
    merged = merge_samples([sample((0, 0, 10, 10, 1, 0.9)), sample(far, near)])
    assert_merged(merged, scores=[0.55, 0.4], boxes=[[0, 0, 10, 10.5], [0, 0, 10, 16]], found_shares=[1, 0.5])


@pytest.mark.parametrize(("iou", "objects"), [(0.5, 1), (0.51, 2)])
def test_the_overlap_from_which_two_are_one(iou, objects):
    samples = [sample((0, 0, 10, 10, 1, 0.9)), sample((0, 0, 10, 20, 1, 0.8))]
    assert len(merge_samples(samples, iou)["scores"]) == objects


def test_merging_next_to_nothing():
    assert {name: tuple(v.shape) for name, v in merge_samples([sample(), sample()]).items()} == {
        **dict.fromkeys(("labels", "scores", "found_shares", "corner_spreads"), (0,)),
        "boxes": (0, 4),
    }
    flat, other = sample((3, 3, 3, 9, 1, 0.5)), sample((3, 3, 3, 8, 1, 0.3))  # without area
    assert_merged(merge_samples([flat, flat]), found_shares=[1], scores=[0.5], corner_spreads=[0])
    assert_merged(merge_samples([flat, other]), found_shares=[0.5, 0.5], scores=[0.25, 0.15])
    assert_merged(merge_samples([flat]), found_shares=[1], corner_spreads=[NAN])


def regularized(make=lambda: DropBlock2d(0.1, 3), at="paper", name="retinanet_resnet50_fpn"):
    model = small(name, score_thresh=0.01, detections_per_img=30)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.train().momentum = 1
    with torch.no_grad():
        model(batch()[0])  # or what an untrained SSDlite gives would hardly depend on the image
    for norm in norms:
        norm.eval()
    return model, regularize_(model, make, at=at)


def same(some, others):
    return all(
        torch.equal(a[name].nan_to_num(-1), b[name].nan_to_num(-1))
        for a, b in zip(some, others, strict=True)
        for name in a
    )


@pytest.mark.parametrize(
    ("name", "make", "at"),
    [
        ("retinanet_resnet50_fpn", lambda: DropBlock2d(0.1, 3), "paper"),
        ("fasterrcnn_resnet50_fpn", lambda: nn.Dropout2d(0.3), "paper"),
        ("ssdlite320_mobilenet_v3_large", lambda: nn.Dropout(0.3), "stage4"),
    ],
)
def test_the_seed_decides_and_nothing_else_changes(name, make, at):
    model, _ = regularized(make, at, name)
    images, _ = batch()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modules, modes = dict(model.named_modules()), [m.training for m in model.modules()]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = mc_detections(model, images, samples=3, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    assert same(mc_detections(model, images, samples=3, seed=5), first)
    assert not same(mc_detections(model, images, samples=3, seed=6), first)
    assert any((of_image["found_shares"] < 1).any() for of_image in first)
    assert all(((of["found_shares"] * 3).round() >= 1).all() for of in first)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert dict(model.named_modules()) == modules
    assert [m.training for m in model.modules()] == modes


def test_with_p_0_all_samples_are_the_deterministic_pass():
    model, _ = regularized()
    images, _ = batch()
    for one, merged in zip(model(images), mc_detections(model, images, samples=3, p=0), strict=True):
        assert (merged["found_shares"] == 1).all()
        assert (merged["corner_spreads"] == 0).all()
        torch.testing.assert_close(merged["boxes"], one["boxes"])
        torch.testing.assert_close(merged["scores"], one["scores"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("at", "runs"),
    [
        ("paper", {"conv1": 1, "layer1": 1, "layer2": 1, "layer3": 3, "layer4": 3}),
        ("stage4", {"layer3": 1, "layer4": 3}),
        ("fpn", {"conv1": 1, "layer4": 1}),
        (["backbone.body.bn1"], {"conv1": 1, "layer1": 3}),
        (["backbone.body.conv1"], {"conv1": 3, "layer1": 3}),
    ],
)
def test_layers_before_the_first_regularized_one_run_once(at, runs, monkeypatch):
    model, _ = regularized(at=at)
    images, _ = batch()
    calls = dict.fromkeys(runs, 0)

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    hooks = [model.backbone.body[name].register_forward_hook(count(name)) for name in runs]
    once = mc_detections(model, images, samples=3)
    assert calls == runs
    for hook in hooks:
        hook.remove()
    monkeypatch.setattr(uncertainty, "BackboneWithFPN", None)  # now it is none of torchvision's own
    assert same(mc_detections(model, images, samples=3), once)


def test_an_exception_leaves_the_model_as_it_was(monkeypatch):
    model, handle = regularized()
    images, _ = batch()
    modules = dict(model.named_modules())
    state = torch.get_rng_state()
    model.head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        mc_detections(model, images, samples=2, p=0.5)
    assert dict(model.named_modules()) == modules
    regularizers = [model.get_submodule(site).regularizer for site in handle.sites]
    assert {(r.p, r.training) for r in regularizers} == {(0.1, False)}
    assert torch.equal(torch.get_rng_state(), state)


def test_faults_of_the_caller():
    model, handle = regularized()
    images, _ = batch()
    for wrong, message in (({"samples": 0}, "samples"), ({"p": 2}, "p must"), ({"iou": 0}, "iou")):
        with pytest.raises(InputError, match=message):
            mc_detections(model, images, **{"samples": 1, **wrong})
    handle.remove()
    with pytest.raises(InputError, match="nothing in RetinaNet is regularized"):
        mc_detections(model, images)


def test_reliability_by_hand():
    of = reliability([0.05, 0.15, 0.15, 0.9, 1.0], [False, True, False, True, True])
    assert of.counts.tolist() == [1, 2, 0, 0, 0, 0, 0, 0, 0, 2]
    np.testing.assert_allclose(of.scores, [0.05, 0.15, *[NAN] * 7, 0.95])
    np.testing.assert_allclose(of.precision, [0, 0.5, *[NAN] * 7, 1])
    assert of.error == pytest.approx((1 * 0.05 + 2 * 0.35 + 2 * 0.05) / 5)
    assert math.isnan(reliability([], []).error)


def test_calibrated_scores_have_no_error():
    rng = np.random.default_rng(0)
    scores = rng.random(100_000)
    right = rng.random(100_000) < scores
    assert reliability(scores, right).error < 0.01  # by chance 0.0034, of which 10 bins are a mean
    assert reliability(scores, right & (rng.random(100_000) < 0.9)).error == pytest.approx(0.05, abs=0.004)


@pytest.mark.parametrize(
    ("uncertainty", "right", "expected"),
    [
        ([0.1, 0.2, 0.8, 0.9], [True, True, False, False], 1),
        ([0.1, 0.2, 0.8, 0.9], [False, False, True, True], 0),
        ([0.1, 0.4, 0.3, 0.9], [True, True, False, False], 0.75),  # of four pairs one is the wrong way
        ([0.5, 0.5, 0.9], [True, False, False], 0.75),  # a tie counts half
        ([0.5, 0.7], [True, True], NAN),
    ],
)
def test_auroc_by_hand(uncertainty, right, expected):
    assert auroc(uncertainty, right) == pytest.approx(expected, nan_ok=True)


def test_right_detections_are_those_that_pycocotools_matches():
    content = {
        "images": [{"id": 1}, {"id": 2}],
        "categories": [{"id": 3, "name": "cat"}, {"id": 5, "name": "dog"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 3, "bbox": [0, 0, 10, 10], "area": 100, "iscrowd": 0},
            {"id": 2, "image_id": 2, "category_id": 5, "bbox": [0, 0, 30, 30], "area": 900, "iscrowd": 1},
        ],
    }
    keys = ("image_id", "category_id", "bbox", "score")
    rows = [
        ((2, 5, [5, 5, 10, 10], 0.9), None),  # in the crowd: neither right nor wrong
        ((1, 3, [0, 0, 10, 4], 0.8), False),  # IoU 0.4
        ((1, 3, [0, 0, 10, 9], 0.7), True),
        ((1, 3, [0, 0, 10, 10], 0.6), False),  # the object has been found
        ((1, 5, [0, 0, 10, 10], 0.9), False),  # no dog
    ]
    results = [dict(zip(keys, values, strict=True)) for values, _ in rows]
    judged = right_at_50(coco_evaluation(coco_index(content), results, [1, 2]), results)
    expected = {id(result): right for result, (_, right) in zip(results, rows, strict=True)}
    assert {id(result): right for result, right in judged} == {
        key: right for key, right in expected.items() if right is not None
    }


@pytest.fixture
def checkpoint(run):
    return run / "checkpoints" / "best.ckpt"


def test_evaluate_with_samples(checkpoint, tmp_path, capsys):
    from dropblock_det.training.evaluate import evaluate

    one = evaluate(checkpoint, accelerator="cpu")
    capsys.readouterr()
    options = {"accelerator": "cpu", "samples": 3}
    values = evaluate(checkpoint, results=tmp_path / "a.json", **options)
    printed = capsys.readouterr().out
    assert {name: values[name] for name in one} == pytest.approx(one, abs=0, nan_ok=True)
    assert values["mAP/single"] == pytest.approx(one["mAP"])
    for words in (
        "mAP",
        "calibration error",
        "3 samples merged",
        "1 - share found",
        "corner spread",
        "AUROC",
    ):
        assert words in printed
    results = json.loads((tmp_path / "a.json").read_text())
    assert len(results) == values["detections/merged"] > 0
    for result in results:
        assert {"image_id", "category_id", "bbox", "score"} < result.keys()
        assert round(result["found_share"] * 3) in (1, 2, 3)
        assert (result["corner_spread"] is None) == (round(result["found_share"] * 3) == 1)
    assert any(result["corner_spread"] for result in results)
    assert (tmp_path / "reliability.png").read_bytes().startswith(b"\x89PNG")
    again = evaluate(checkpoint, results=tmp_path / "b.json", diagram=tmp_path / "b.png", **options)
    assert again == pytest.approx(values, nan_ok=True)
    assert (tmp_path / "b.json").read_bytes() == (tmp_path / "a.json").read_bytes()
    evaluate(checkpoint, results=tmp_path / "c.json", seed=1, **options)
    assert (tmp_path / "c.json").read_bytes() != (tmp_path / "a.json").read_bytes()


def test_a_checkpoint_notes_the_regularizer(checkpoint):
    (noted,) = torch.load(checkpoint, weights_only=True)["regularizers"]
    assert (noted["name"], noted["p"], noted["block_size"]) == ("dropblock", 0.1, 3)
    assert set(noted["sites"].values()) == {1.0}
    assert all(site.startswith("detector.backbone.") for site in noted["sites"])


@pytest.mark.parametrize(
    ("regularizers", "options", "message"),
    [
        ([], {}, "trained without a regularizer"),
        (None, {}, "trained without a regularizer"),
        ([{"name": "Mine", "sites": {}}], {}, "trained with Mine, which a checkpoint does not hold"),
        ([{"name": "dropout", "p": 0.1, "sites": {"no.such": 1.0}}], {}, "its model has no no.such"),
        ([{"name": "dropout", "p": 7, "sites": {"detector.head": 1.0}}], {}, "p must be"),
        ([{"name": "dropout", "q": 7, "sites": {}}], {}, "q: there is no such argument"),
        ([{"name": "dropout"}], {}, "missing required field `sites`"),
        ("same", {"devices": 2}, "--samples: for detectors, on one device"),
        ("same", {"results": Path("x"), "diagram": Path("x")}, "for the results and the diagram alike"),
        ("same", {"samples": None, "diagram": "x.png"}, "--diagram: drawn from samples"),
    ],
)
def test_samples_that_cannot_be_drawn(regularizers, options, message, checkpoint, tmp_path, line_of):
    from dropblock_det.training.evaluate import evaluate

    content = torch.load(checkpoint, weights_only=True)
    if regularizers is None:
        del content["regularizers"]
    elif regularizers != "same":
        content["regularizers"] = regularizers
    torch.save(content, tmp_path / "other.ckpt")
    options = {"samples": 2, "accelerator": "cpu", **options}
    assert message in line_of(lambda: evaluate(tmp_path / "other.ckpt", **options))
    assert [file.name for file in tmp_path.iterdir()] == ["other.ckpt"]


def test_no_samples_at_all(line_of):
    from dropblock_det.commands import command
    from dropblock_det.training.evaluate import evaluate

    assert "samples: got 0" in line_of(lambda: command(evaluate, ["x.ckpt", "--samples", "0"], "evaluate"))
