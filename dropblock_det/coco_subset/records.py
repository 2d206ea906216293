"""The records of a COCO annotation file of any size, one by one, each checked."""

import json
from collections.abc import Iterator
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from dropblock_det.coco_subset.json_stream import Readable, read_entries
from dropblock_det.errors import InputError

Id = Annotated[int, Meta(ge=0, le=2**53)]  # exact in every JSON reader
Pixels = Annotated[float, Meta(ge=-1e9, le=1e9)]
Length = Annotated[float, Meta(ge=0, le=1e9)]


class ImageRecord(msgspec.Struct):
    """An image. ``license`` is whatever the file has."""

    id: Id
    file_name: str
    width: int
    height: int
    coco_url: str | None = None
    license: Any = None


class AnnotationRecord(msgspec.Struct):
    """A box, or a crowd region; x, y, width and height in pixels. Without an area, that of the box counts."""

    id: Id
    image_id: Id
    category_id: Id
    bbox: tuple[Pixels, Pixels, Length, Length]
    iscrowd: bool | Annotated[int, Meta(ge=0, le=1)] = 0
    area: Annotated[float, Meta(ge=0, le=1e18)] | None = None


class CategoryRecord(msgspec.Struct):
    """A category."""

    id: Id
    name: str

    def __post_init__(self) -> None:
        if not self.name.isprintable() or not self.name:
            raise ValueError(f"name {self.name[:100]!a} is not a line of text")


class LicenseRecord(msgspec.Struct):
    """A licence, where it has the shape that COCO's have."""

    id: int | str
    name: str


KINDS = {"images": ImageRecord, "annotations": AnnotationRecord, "categories": CategoryRecord}
Record = ImageRecord | AnnotationRecord | CategoryRecord


def read_records(file: Readable, name: str) -> Iterator[tuple[Record | str, Any]]:
    """Goes through an annotation file.

    Args:
        file: Open binary file.
        name: What messages call it.

    Yields:
        ``(record, entry)`` for images, annotations and categories, ``(key, entry)`` for everything else:
        ``entry`` is what the file has.

    Raises:
        InputError: It is no annotation file, or a record is not what it should be.
    """
    for key, entry in read_entries(file, name):
        if key not in KINDS:
            yield key, entry
            continue
        try:
            record: Record = msgspec.convert(entry, KINDS[key])
        except ValueError as error:  # msgspec's, or the UnicodeError of a lone surrogate
            raise InputError(f"{name}: {key}: {error}: {json.dumps(entry)[:100]}") from None
        yield record, entry
