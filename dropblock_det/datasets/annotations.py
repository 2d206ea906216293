"""COCO's instances files: every record checked, the boxes in arrays.

The training annotations of COCO 2017 are 860,001 records: over 1 GB as dictionaries, 60 MB as arrays. Only
those of the validation images are ever made into pycocotools' index.
"""

import contextlib
import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from reprlib import repr as short
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import numpy as np

from dropblock_det.errors import InputError
from dropblock_det.files import read_json

if TYPE_CHECKING:
    from pycocotools.coco import COCO

MAX_BOXES_PER_IMAGE = 10_000  # each is compared with about 200,000 anchors, which then takes 8 GB
MAX_SIDE = 100_000  # pixels
MAX_ID = 2**53  # exact in every JSON reader

Id = Annotated[int, msgspec.Meta(ge=0, le=MAX_ID)]
Side = Annotated[int, msgspec.Meta(ge=1, le=MAX_SIDE)]
_PLAIN_NAME = re.compile(r"\w[\w-]*(\.\w+)*", re.ASCII)  # most are: the full check takes ten times as long


class Image(msgspec.Struct, frozen=True, gc=False):
    """An image's record. Sizes in pixels; the file's name is relative to the image folder."""

    id: Id
    file_name: Annotated[str, msgspec.Meta(max_length=1000)]
    width: Side
    height: Side

    def __post_init__(self) -> None:
        if not _PLAIN_NAME.fullmatch(self.file_name):
            _check_inside(self.file_name)


class Category(msgspec.Struct, frozen=True):
    """A category's record."""

    id: Id
    name: str

    def __post_init__(self) -> None:
        if not self.name.isprintable() or not self.name:
            raise ValueError(f'"name" {short(self.name)} is not a line of text')


class _Annotation(msgspec.Struct, gc=False):
    id: Id
    image_id: Id
    category_id: Id
    bbox: tuple[float, float, float, float]
    iscrowd: bool | Annotated[int, msgspec.Meta(ge=0, le=1)] = 0
    area: float | None = None

    def __post_init__(self) -> None:
        if self.area is None:
            self.area = self.bbox[2] * self.bbox[3]


_ROW = np.dtype(
    [
        ("id", "i8"),
        ("image_id", "i8"),
        ("category_id", "i8"),
        ("bbox", "f8", 4),
        ("iscrowd", "?"),
        ("area", "f8"),
    ]
)


class _Instances(msgspec.Struct):
    images: Annotated[list[Image], msgspec.Meta(min_length=1)]
    categories: Annotated[list[Category], msgspec.Meta(min_length=1)]
    annotations: list[msgspec.Raw]  # decoded one by one: together they would take 0.3 GB


@dataclass(frozen=True, eq=False)
class Annotations:
    """What an instances file holds.

    Attributes:
        images: Ascending by id.
        categories: Ascending by id.
        rows: Structured array (n,), an element for each annotation, in the file's order: ``id``,
            ``image_id``, ``category_id``, ``bbox`` (x, y, width, height in pixels), ``iscrowd``, ``area``
            (square pixels).
    """

    images: list[Image]
    categories: list[Category]
    rows: np.ndarray

    def index(self) -> "COCO":
        """Returns pycocotools' index of it.

        Annotations are numbered anew from 1, as pycocotools takes a match with the annotation 0 for no match.
        """
        fields = ("image_id", "category_id", "bbox", "area")
        columns = zip(
            self.rows["iscrowd"].astype(int).tolist(), *(self.rows[f].tolist() for f in fields), strict=True
        )
        return coco_index(
            {
                "images": msgspec.to_builtins(self.images),
                "categories": msgspec.to_builtins(self.categories),
                "annotations": [
                    {"id": number, "iscrowd": crowd, **dict(zip(fields, values, strict=True))}
                    for number, (crowd, *values) in enumerate(columns, start=1)
                ],
            }
        )


def load_annotations(path: Path) -> Annotations:
    """Reads a COCO instances file and checks all that training and evaluation rely on.

    ``segmentation`` is left out, as boxes alone are used. A missing ``iscrowd`` is 0, a missing ``area`` is
    width times height.

    Raises:
        InputError: The first fault found, with the record that has it.
    """
    content = read_json(path, _Instances)
    rows = np.fromiter(_decoded(path, content.annotations), _ROW, len(content.annotations))
    annotations = Annotations(
        _by_id(path, "images", content.images), _by_id(path, "categories", content.categories), rows
    )
    _check(path, annotations)
    return annotations


def _decoded(path: Path, records: list[msgspec.Raw]) -> Iterator[tuple[Any, ...]]:
    decode = msgspec.json.Decoder(_Annotation).decode
    for position, record in enumerate(records):
        try:
            yield msgspec.structs.astuple(decode(record))
        except msgspec.ValidationError as error:
            raise InputError(f"{path}: annotations[{position}]: {error}; mend the record") from None


def _check(path: Path, annotations: Annotations) -> None:
    rows, images = annotations.rows, np.array([image.id for image in annotations.images])
    sides, area = rows["bbox"][:, 2:], rows["area"]
    faults = {
        "its id is that of an earlier one too; ids must differ": _repeated(rows["id"]),
        '"image_id" is not in "images"': ~np.isin(rows["image_id"], images),
        '"category_id" is not in "categories"': ~np.isin(
            rows["category_id"], [category.id for category in annotations.categories]
        ),
        '"bbox" must hold numbers of pixels up to 1e9': ~(np.abs(rows["bbox"]) <= 1e9).all(axis=1),
        '"bbox" has a negative width or height (is it [x1, y1, x2, y2]?)': (sides < 0).any(axis=1),
        '"area" must be a number of pixels, 0 or more': ~((area >= 0) & (area <= 1e18)),
    }
    for fault, wrong in faults.items():
        if wrong.any():
            raise InputError(f"{path}: annotations[{wrong.argmax()}]: {fault}; mend the record")
    counts = np.bincount(np.searchsorted(images, rows["image_id"]), minlength=1)
    if (most := counts.max()) > MAX_BOXES_PER_IMAGE:
        raise InputError(
            f"{path}: image {images[counts.argmax()]} has {most} boxes, over {MAX_BOXES_PER_IMAGE}; "
            "cut it into tiles"
        )


def _by_id(path: Path, key: str, records: list[Any]) -> list[Any]:
    repeated = _repeated(np.array([record.id for record in records]))
    if repeated.any():
        position = repeated.argmax()
        raise InputError(
            f"{path}: {key}[{position}]: id {records[position].id} is an earlier one's too; ids must differ"
        )
    return sorted(records, key=lambda record: record.id)


def _repeated(ids: np.ndarray) -> np.ndarray:
    """Whether an earlier element is the same: bool (n,)."""
    repeated = np.ones(len(ids), dtype=bool)
    repeated[np.unique(ids, return_index=True)[1]] = False
    return repeated


def _check_inside(name: str) -> None:
    """Raises ValueError unless ``name`` is a path that stays inside the folder it is relative to."""
    inside = PureWindowsPath(name)  # knows both kinds of slash, and drives
    if inside.anchor or ".." in inside.parts or not inside.parts:
        raise ValueError(f'"file_name" {short(name)} leaves the image folder; give a path inside it')
    if any(character < " " for character in name):
        raise ValueError(f'"file_name" {short(name)} can\'t be the name of a file')
    os.fsencode(name)  # a UnicodeEncodeError is a ValueError


def coco_index(content: dict[str, Any]) -> "COCO":
    """Returns pycocotools' index of a content that is already in memory, without its printing."""
    from pycocotools.coco import COCO

    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco
