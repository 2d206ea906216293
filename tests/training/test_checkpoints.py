"""Checkpoints as a stranger or a failing disk makes them: evaluating them is one line."""

import math
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from dropblock_det.datasets.coco import CocoDataModule
from dropblock_det.errors import InputError
from dropblock_det.training.evaluate import _validation_data, evaluate


def foreign_pickle(run, tmp_path):
    # No exception: those are safe to load from torch 2.14 on.
    torch.save({"hyper_parameters": Path("code")}, tmp_path / "bad.ckpt")
    return "not a checkpoint that is safe to load"


def truncated(run, tmp_path):
    (tmp_path / "bad.ckpt").write_bytes((run / "checkpoints" / "best.ckpt").read_bytes()[:100_000])
    return "not a whole checkpoint"


def one_bit(run, tmp_path):
    content = bytearray((run / "checkpoints" / "best.ckpt").read_bytes())
    content[len(content) // 2] ^= 16
    (tmp_path / "bad.ckpt").write_bytes(content)
    return "not a whole checkpoint .*checksum"


def other_zip(run, tmp_path):
    with zipfile.ZipFile(tmp_path / "bad.ckpt", "w") as archive:
        archive.writestr("archive/data.pkl", b"cos\nsystem\n(S'true'\ntR.")
    return "not a checkpoint that is safe to load"


def bare_pickle(run, tmp_path):
    (tmp_path / "bad.ckpt").write_bytes(pickle.dumps({"state_dict": {}}))
    return "not a whole checkpoint"


def a_folder(run, tmp_path):
    (tmp_path / "bad.ckpt").mkdir()
    return "no such checkpoint"


def missing(run, tmp_path):
    return "no such checkpoint"


def other_sizes(run, tmp_path):
    content = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    key = next(iter(content["state_dict"]))
    content["state_dict"][key] = content["state_dict"][key][:1]
    torch.save(content, tmp_path / "bad.ckpt")
    return "its weights do not fit"


@pytest.mark.parametrize(
    "case",
    [
        foreign_pickle,
        truncated,
        one_bit,
        other_zip,
        bare_pickle,
        a_folder,
        missing,
        other_sizes,
    ],
    ids=lambda case: case.__name__,
)
def test_evaluating_a_bad_checkpoint(case, run, tmp_path):
    message = case(run, tmp_path)
    with pytest.raises(InputError, match=message) as error:
        evaluate(tmp_path / "bad.ckpt", accelerator="cpu")
    assert "bad.ckpt" in str(error.value)
    assert "\n" not in str(error.value)


CATEGORIES = [{"label": 1, "id": 3, "name": "cat"}]
CONTENT = {
    "hyper_parameters": {"categories": CATEGORIES, "min_size": 64, "max_size": 64},
    "validation_data": {"root": "", "val_annotations": "annotations/instances_val2017.json"},
    "state_dict": {},
}
REMOVED = object()
ODD = {
    "no hyperparameters": ("hyper_parameters", REMOVED, "missing required field `hyper_parameters`"),
    "hyperparameters that are none": ("hyper_parameters", None, "Expected `object`, got `null`"),
    "a list of hyperparameters": ("hyper_parameters", [1], "Expected `object`, got `array`"),
    "no categories": ("hyper_parameters.categories", REMOVED, "missing required field `categories`"),
    "an empty list of categories": ("hyper_parameters.categories", [], "Expected `array` of length >= 1"),
    "a category in one word": ("hyper_parameters.categories", ["cat"], "Expected `object`, got `str`"),
    "a category's number half a character": (
        "hyper_parameters.categories", [{"label": "\ud800", "id": 3, "name": "cat"}], "surrogates not allowed"
    ),
    "a size half a character": ("hyper_parameters.min_size", "\ud800", "surrogates not allowed"),
    "a category without a name": ("hyper_parameters.categories", [{"label": 1, "id": 3}], "field `name`"),
    "a category's number in letters": (
        "hyper_parameters.categories", [{"label": "1", "id": 3, "name": "cat"}], "Expected `int`, got `str`"
    ),
    "a size in letters": ("hyper_parameters.min_size", "64", "min_size: got '64'"),
    "no size": ("hyper_parameters.min_size", 0, "min_size: got 0"),
    "a NaN": ("hyper_parameters.score_thresh", math.nan, "score_thresh: got nan"),
    "a huge number": ("hyper_parameters.detections_per_img", 2**70, "detections_per_img: got 1180591620717"),
    "anchors in lists": ("hyper_parameters.anchor_sizes", [[8], [16]], "anchor_sizes: got [[8], [16]]"),
    "a foreign argument": ("hyper_parameters.depth", 101, "depth: there is no such argument"),
    "unknown weights": ("hyper_parameters.weights", "os.system", "weights: "),
    "no validation data": ("validation_data", REMOVED, "missing required field `validation_data`"),
    "validation data in a list": ("validation_data", [], "Expected `object`, got `array`"),
    "no root": ("validation_data.root", REMOVED, "validation_data: "),
    "a root in figures": ("validation_data.root", 5, "root: got 5"),
    "a root with a NUL": ("validation_data.root", "a\0b", "a\\x00b"),
    "a subset below one": ("validation_data.val_subset", -1, "subset: got -1"),
    "a foreign argument of the data": ("validation_data.train", 1, "train: there is no such argument"),
    "another task": ("task", "music", "task"),
    "a task in figures": ("task", 5, "Expected `str`, got `int`"),
    "no weights": ("state_dict", REMOVED, "missing required field `state_dict`"),
    "a list of weights": ("state_dict", [], "Expected `object`, got `array`"),
    "weights in words": ("state_dict", {"a": "b"}, "Expected `Tensor`, got `str`"),
    "weights of another model": ("state_dict", {"a": torch.zeros(1)}, "its weights do not fit the model"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_evaluating_an_odd_checkpoint(name, coco, tmp_path, line_of):
    where, value, message = ODD[name]
    content = {part: dict(values) for part, values in CONTENT.items()}
    content["validation_data"]["root"] = str(coco)
    *path, key = where.split(".")
    target = content[path[0]] if path else content
    target[key] = value
    if value is REMOVED:
        del target[key]
    torch.save(content, tmp_path / "odd.ckpt")
    assert message in line_of(lambda: evaluate(tmp_path / "odd.ckpt", accelerator="cpu"))


def test_evaluating_weights_that_are_no_numbers(run, tmp_path, line_of):
    content = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    next(iter(content["state_dict"].values())).fill_(math.nan)
    torch.save({key: content[key] for key in CONTENT}, tmp_path / "bad.ckpt")
    line = line_of(lambda: evaluate(tmp_path / "bad.ckpt", accelerator="cpu"))
    assert "bad.ckpt: its weights are not finite numbers" in line


def test_the_subset_of_the_validation_counts_for_its_own_data_alone(coco):
    """Of other data all images count, also where there are fewer."""
    data = CocoDataModule(str(coco), val_subset=1)
    content = {"hyper_parameters": {"categories": data.val_categories}}
    content["validation_data"] = data.validation_arguments()
    own, other = ({}, {"root": str(coco)})
    lengths = [len(_validation_data(content, Path("x"), given).val_dataset) for given in (own, other)]
    assert lengths == [1, 2]


def test_evaluating_on_other_categories(run, coco):
    data = {"data": coco, "images": "val2017", "annotations": "annotations/instances_val2017.json"}
    with pytest.raises(InputError, match=r"trained on 5 categories \(disk, .*has 1 categories \(cat\)"):
        evaluate(run / "checkpoints" / "best.ckpt", **data, accelerator="cpu")
