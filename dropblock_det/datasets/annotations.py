"""Reading and checking the JSON of COCO: annotations here, detections in evaluation.py."""

import contextlib
import io
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path, PureWindowsPath
from reprlib import repr as short
from typing import Any

from pycocotools.coco import COCO

from dropblock_det.errors import InputError
from dropblock_det.files import read_json

MAX_BOXES_PER_IMAGE = (
    10_000  # a detector compares every box with each of ~200,000 anchors: 8 GB at this number
)
MAX_SIDE = 100_000  # pixels
MAX_ID = 2**53  # exact in every JSON reader


def load_annotations(path: Path) -> COCO:
    """Reads a COCO instances file and checks all that training and evaluation rely on.

    ``segmentation`` is left out, as boxes alone are used. A missing ``iscrowd`` is 0, a missing ``area`` is
    width times height. Annotations are numbered anew from 1, as pycocotools takes a match with the
    annotation 0 for no match.

    Returns:
        pycocotools' index of the file.

    Raises:
        InputError: The first fault found, with the record that has it.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not an object; give an instances file")
    for key in ("images", "categories", "annotations"):
        if not isinstance(content.get(key), list):
            raise InputError(f'{path}: has no list "{key}"; give a COCO instances file')
        if key != "annotations" and not content[key]:
            raise InputError(f'{path}: "{key}" is empty; a data set needs at least one')
    images, categories, annotations = content["images"], content["categories"], content["annotations"]
    _check(path, "images", images, _image_fault)
    _check(path, "categories", categories, _category_fault)
    image_ids = {image["id"] for image in images}
    category_ids = {category["id"] for category in categories}
    _check(path, "annotations", annotations, lambda a: _annotation_fault(a, image_ids, category_ids))

    for image_id, number in Counter(annotation["image_id"] for annotation in annotations).most_common(1):
        if number > MAX_BOXES_PER_IMAGE:
            raise InputError(
                f"{path}: image {image_id} has {number} boxes, over {MAX_BOXES_PER_IMAGE}; cut it into tiles"
            )
    for number, annotation in enumerate(annotations, start=1):
        annotation.pop("segmentation", None)
        annotation.setdefault("iscrowd", 0)
        annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])
        annotation["id"] = number
    return coco_index(content)


def coco_index(content: dict[str, Any]) -> COCO:
    """Returns pycocotools' index of a content that is already in memory, without its printing."""
    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def is_number(value: Any, low: float = -1e9, high: float = 1e9) -> bool:
    """Whether ``value`` is a real number in the range; NaN, infinity and booleans are not."""
    return type(value) in (int, float) and low <= value <= high


def is_id(value: Any) -> bool:
    """Whether ``value`` is a whole number that can be an id."""
    return type(value) is int and 0 <= value <= MAX_ID


def box_fault(box: Any) -> str | None:
    """Says what is wrong with an ``[x, y, width, height]`` box, if anything."""
    if not isinstance(box, list) or len(box) != 4:
        return f'has "bbox" {short(box)}; it must be [x, y, width, height]'
    if not all(map(is_number, box)):
        return f'has "bbox" {short(box)}; it must hold finite numbers of pixels'
    if box[2] < 0 or box[3] < 0:
        return f'has "bbox" {short(box)}; width and height can\'t be negative (is it [x1, y1, x2, y2]?)'
    return None


def _check(
    path: Path, key: str, records: list[Any], fault_of: Callable[[dict[str, Any]], str | None]
) -> None:
    seen = set()
    for position, record in enumerate(records):
        if not isinstance(record, dict):
            fault: str | None = f"is {short(record)}, not an object"
        elif not is_id(record.get("id")):
            fault = f'has "id" {short(record.get("id"))}; it must be a whole number from 0 to 2^53'
        elif record["id"] in seen:
            fault = f'has "id" {record["id"]}, which an earlier one has too; ids must differ'
        else:
            seen.add(record["id"])
            fault = fault_of(record)
        if fault:
            raise InputError(f"{path}: {key}[{position}] {fault}")


def _image_fault(image: dict[str, Any]) -> str | None:
    for key in ("width", "height"):
        if type(image.get(key)) is not int or not 1 <= image[key] <= MAX_SIDE:
            return f'has "{key}" {short(image.get(key))}; it must be a number of pixels from 1 to {MAX_SIDE}'
    name = image.get("file_name")
    if not isinstance(name, str) or len(name) > 1000 or any(character < " " for character in name):
        return f'has "file_name" {short(name)}; it must be a path inside the image folder'
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return f'has "file_name" {short(name)}, which can\'t be the name of a file'
    inside = PureWindowsPath(name)  # knows both kinds of slash, and drives
    if inside.anchor or ".." in inside.parts or not inside.parts:
        return f'has "file_name" {short(name)}, which leaves the image folder; give a path inside it'
    return None


def _category_fault(category: dict[str, Any]) -> str | None:
    name = category.get("name")
    if not isinstance(name, str) or not name.isprintable() or not name:
        return f'has "name" {short(name)}; it must be a line of text'
    return None


def _annotation_fault(annotation: dict[str, Any], image_ids: set[int], category_ids: set[int]) -> str | None:
    image, category = annotation.get("image_id"), annotation.get("category_id")
    if not is_id(image) or image not in image_ids:
        return f'has "image_id" {short(image)}, which is not in "images"'
    if not is_id(category) or category not in category_ids:
        return f'has "category_id" {short(category)}, which is not in "categories"'
    if annotation.get("iscrowd", 0) not in (0, 1):
        return f'has "iscrowd" {short(annotation["iscrowd"])}; it must be 0 or 1'
    if "area" in annotation and not is_number(annotation["area"], low=0, high=1e18):
        return f'has "area" {short(annotation["area"])}; it must be a number of pixels, 0 or more'
    return box_fault(annotation.get("bbox"))
