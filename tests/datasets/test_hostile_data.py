"""Broken and hostile annotations and results: each gives one line that names the file, or is read rightly."""

import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from support.changes import anything, places, replace_somewhere

from dropblock_det.datasets.annotations import MAX_BOXES_PER_IMAGE
from dropblock_det.datasets.coco_dataset import CocoDataset
from dropblock_det.errors import InputError
from dropblock_det.tasks.detection.coco_eval import coco_evaluation, metrics_of

# --- The bytes of the annotations ---

RAW = {
    "empty": (b"", "not valid JSON"),
    "truncated": (b'{"images": [{"id": 1, "file_na', "not valid JSON"),
    "not JSON": (b"\xff\xd8\xff\xe0JFIF", "not valid JSON"),
    "Latin-1": ('{"images": [{"file_name": "é"}]}'.encode("latin-1"), "not valid JSON"),
    "deep nesting": (b'{"info": ' + b"[" * 200_000, "nested too deeply"),
    "deep nesting in an image": (b'{"images": [{"x": ' + b'{"a":' * 200_000, "nested too deeply"),
    "an integer of 10,000 digits": (b'{"images": [' + b"9" * 10_000 + b"]}", "out of range"),
    "null": (b"null", "Expected `object`, got `null`"),
    "a results file": (b"[]", "Expected `object`, got `array`"),
}


@pytest.mark.parametrize("name", RAW)
def test_annotation_bytes(name, content, write, line_of):
    annotations, images = write(content)
    raw, reason = RAW[name]
    annotations.write_bytes(raw)
    line = line_of(lambda: CocoDataset(annotations, images))
    assert str(annotations) in line
    assert reason in line


def test_missing_files_and_folders(content, write, line_of, tmp_path):
    annotations, images = write(content)
    for files, named, reason in (
        ((tmp_path / "none.json", images), tmp_path / "none.json", "no such file"),
        ((annotations, tmp_path / "none"), tmp_path / "none", "no such image folder"),
        ((annotations, annotations), annotations, "no such image folder"),
        ((images, images), images, "Is a directory"),
    ):
        line = line_of(lambda files=files: CocoDataset(*files))
        assert str(named) in line
        assert reason in line


def test_a_byte_order_mark_is_read(content, write):
    annotations, images = write(content)
    annotations.write_bytes(b"\xef\xbb\xbf" + annotations.read_bytes())
    assert len(CocoDataset(annotations, images)) == 3


# --- The records of the annotations: a path into the content, the value put there, and what the line says ---

DELETE = object()
BOX = ("annotations", 0, "bbox")
RECORDS = {
    "no images": (("images",), DELETE, "missing required field `images`"),
    "images is an object": (("images",), {}, "at `$.images`"),
    "images is empty": (("images",), [], "length >= 1 - at `$.images`"),
    "no annotations": (("annotations",), DELETE, "missing required field `annotations`"),
    "no categories": (("categories",), DELETE, "missing required field `categories`"),
    "categories is empty": (("categories",), [], "length >= 1 - at `$.categories`"),
    "an image is a string": (("images", 1), "a.png", "got `str` - at `$.images[1]`"),
    "an annotation is null": (("annotations", 1), None, "annotations[1]: Expected `object`, got `null`"),
    "an image id is a string": (("images", 0, "id"), "7", "got `str` - at `$.images[0].id`"),
    "an image id is true": (("images", 0, "id"), True, "got `bool` - at `$.images[0].id`"),
    "an image id is 1.0": (("images", 0, "id"), 1.0, "got `float` - at `$.images[0].id`"),
    "an image id is negative": (("images", 0, "id"), -7, ">= 0 - at `$.images[0].id`"),
    "an image id is 10^400": (("images", 0, "id"), 10**400, "<= 9007199254740992 - at `$.images[0].id`"),
    "an image has no id": (("images", 0, "id"), DELETE, "field `id` - at `$.images[0]`"),
    "two images have one id": (("images", 0, "id"), 3, "ids must differ"),
    "two categories have one id": (("categories", 0, "id"), 2, "ids must differ"),
    "two annotations have one id": (
        ("annotations", 1, "id"),
        5,
        "annotations[1]: its id is that of an earlier one",
    ),
    "width 0": (("images", 0, "width"), 0, ">= 1 - at `$.images[0].width`"),
    "height -5": (("images", 0, "height"), -5, ">= 1 - at `$.images[0].height`"),
    "width 10^30": (("images", 0, "width"), 10**30, "<= 100000 - at `$.images[0].width`"),
    "width is a string": (("images", 0, "width"), "40", "`$.images[0].width`"),
    "no height": (("images", 0, "height"), DELETE, "field `height` - at `$.images[0]`"),
    "no file_name": (("images", 0, "file_name"), DELETE, "field `file_name` - at `$.images[0]`"),
    "file_name is a number": (("images", 0, "file_name"), 7, "`$.images[0].file_name`"),
    "no bbox": (("annotations", 0, "bbox"), DELETE, "annotations[0]: Object missing required field `bbox`"),
    "a box is a string": (BOX, "1 2 3 4", "annotations[0]: Expected `array`, got `str` - at `$.bbox`"),
    "a box of three": (BOX, [1, 2, 3], "of length 4 - at `$.bbox`"),
    "a box of 100,000": (BOX, [1] * 100_000, "of length 4 - at `$.bbox`"),
    "a box with NaN": (BOX, [1, 2, float("nan"), 4], '"bbox": [1, 2, '),
    "a box with infinity": (BOX, [1, 2, float("inf"), 4], '"bbox": [1, 2, '),
    "a box with 10^400": (BOX, [1, 2, 10**400, 4], "annotations[0]: Number out of range - at `$.bbox[2]`"),
    "a box with a string": (BOX, [1, 2, "3", 4], "got `str` - at `$.bbox[2]`"),
    "a box with true": (BOX, [1, 2, True, 4], "got `bool` - at `$.bbox[2]`"),
    "a box of negative width": (BOX, [10, 2, -3, 4], 'annotations[0]: "bbox" has a negative'),
    "a box of negative height": (BOX, [10, 2, 3, -4], 'annotations[0]: "bbox" has a negative'),
    "an annotation of an unknown image": (
        ("annotations", 0, "image_id"),
        77,
        'annotations[0]: "image_id" is not in "images"',
    ),
    "an annotation whose image is a list": (
        ("annotations", 0, "image_id"),
        [7],
        "got `array` - at `$.image_id`",
    ),
    "an annotation of an unknown category": (
        ("annotations", 0, "category_id"),
        1,
        'annotations[0]: "category_id" is not in "categories"',
    ),
    "an annotation without category": (("annotations", 0, "category_id"), DELETE, "field `category_id`"),
    "iscrowd 2": (("annotations", 0, "iscrowd"), 2, "at `$.iscrowd`"),
    "iscrowd is a list": (("annotations", 0, "iscrowd"), [], "at `$.iscrowd`"),
    "area NaN": (("annotations", 0, "area"), float("nan"), '"area": '),
    "area is negative": (("annotations", 0, "area"), -1, 'annotations[0]: "area" must be'),
    "area is a string": (("annotations", 0, "area"), "61", "at `$.area`"),
    "a category without name": (("categories", 0, "name"), DELETE, "field `name` - at `$.categories[0]`"),
    "a category name with an escape sequence": (("categories", 0, "name"), "\x1b[2Jdog", '"name"'),
    "a category name of two lines": (("categories", 0, "name"), "dog\nerror: none", '"name"'),
}
NAMES = {
    "up": "../b.png",
    "up and down": "images/../../b.png",
    "absolute": "/etc/passwd",
    "a drive": "C:\\b.png",
    "back slashes": "..\\b.png",
    "a share": "\\\\host\\b.png",
    "the folder itself": ".",
    "empty": "",
    "NUL": "b.png\0.txt",
    "two lines": "b.png\nerror: none",
    "5,000 letters": "x" * 5000,
    "a lone surrogate": "\ud800.png",
}


def put(content, path, value):
    *parents, last = path
    for step in parents:
        content = content[step]
    if value is DELETE:
        del content[last]
    else:
        content[last] = value


@pytest.mark.parametrize("name", RECORDS)
def test_annotation_records(name, content, write, line_of):
    annotations, images = write(content)
    path, value, reason = RECORDS[name]
    put(content, path, value)
    annotations.write_text(json.dumps(content))
    line = line_of(lambda: CocoDataset(annotations, images))
    assert str(annotations) in line
    assert reason in line


@pytest.mark.parametrize("name", NAMES)
def test_file_names_that_leave_the_folder(name, content, write, line_of):
    annotations, images = write(content)
    content["images"][0]["file_name"] = NAMES[name]
    annotations.write_text(json.dumps(content))
    line = line_of(lambda: CocoDataset(annotations, images))
    assert str(annotations) in line
    assert "images[0]" in line or "ud800" in line
    assert "file_name" in line


def test_too_many_boxes_on_one_image(content, write, line_of):
    annotations, images = write(content | {"annotations": []})
    empty = annotations.read_text()

    def write_boxes(number):
        box = '{"id": %d, "image_id": 7, "category_id": 2, "bbox": [1, 2, 3, 4]}'
        boxes = ", ".join(box % n for n in range(number))
        annotations.write_text(empty.replace('"annotations": []', f'"annotations": [{boxes}]'))

    write_boxes(MAX_BOXES_PER_IMAGE + 1)
    assert f"image 7 has {MAX_BOXES_PER_IMAGE + 1} boxes" in line_of(lambda: CocoDataset(annotations, images))
    write_boxes(MAX_BOXES_PER_IMAGE)
    assert len(CocoDataset(annotations, images)[1][1]["boxes"]) == MAX_BOXES_PER_IMAGE


def test_what_is_odd_but_right_is_read(content, write):
    for annotation in content["annotations"]:  # as many tools write them
        del annotation["iscrowd"], annotation["area"]
    content["annotations"][0]["bbox"] = [-50, -50, 1e8, 1e8]  # cut to the image
    content["annotations"][1]["bbox"] = [39.95, 0, 0.2, 30]  # 0.05 pixels remain: dropped
    content["images"][2]["file_name"] = "naïve 图.png"
    annotations, images = write(content)
    dataset = CocoDataset(annotations, images)
    assert dataset[1][1]["boxes"].tolist() == [[0, 0, 40, 30], [0, 0, 40, 30]]
    assert dataset.dropped_boxes == 2
    assert dataset.annotations.index().loadAnns([3])[0]["area"] == 1200
    assert dataset[2][0].shape == (3, 8, 8)


# --- Whatever comes ---

UNTOUCHED = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@UNTOUCHED
@given(place=places, value=anything)
def test_any_change_of_the_annotations_is_named_or_read(place, value, content, write):
    annotations, images = write(content)
    changed = copy.deepcopy(content)
    replace_somewhere(changed, place, value)
    annotations.write_text(json.dumps(changed))
    fault = None
    try:
        dataset = CocoDataset(annotations, images)
        items = [dataset[index] for index in range(len(dataset))]
    except InputError as error:
        fault = str(error)
    if fault is not None:
        assert "\n" not in fault
        assert str(annotations) in fault or str(images) in fault
        return
    for image, target in items:
        boxes, labels = target["boxes"], target["labels"]
        assert boxes.isfinite().all()
        assert (boxes >= 0).all()
        assert (boxes[:, 2:] - boxes[:, :2] > 0.09).all()
        assert (boxes[:, 2:] <= torch.tensor([image.shape[2], image.shape[1]])).all()
        assert ((labels >= 1) & (labels <= 2)).all()
    figures = metrics_of(coco_evaluation(dataset.annotations.index(), [], dataset.ids))
    assert all(value == 0 or np.isnan(value) for value in figures.values())
