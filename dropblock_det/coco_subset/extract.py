"""Cutting the records of chosen images out of a full annotation file, none of which is trusted."""

import json
import re
import tempfile
from array import array
from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from dropblock_det.coco_subset.records import (
    AnnotationRecord,
    CategoryRecord,
    ImageRecord,
    Readable,
    read_records,
)
from dropblock_det.errors import InputError

_LARGEST_SIDE, _MOST_PIXELS = 1 << 15, 1 << 24
# One plain path component: no separator, no leading dot, nothing a shell, Windows or a terminal trips over.
FILE_NAME = re.compile(r"[\w+-](?:[\w+. ()-]{0,198}[\w)])?", re.ASCII)
_URL = re.compile(r"[!-~]+")


@dataclass(frozen=True, slots=True)
class Image:
    """One chosen image: what is needed to fetch it and to check it. Sizes in pixels."""

    id: int
    file_name: str
    coco_url: str | None
    width: int
    height: int


def check_url(url: str) -> str:
    """Returns ``url`` when it is a plain http or https address.

    Raises:
        ValueError: It is not; the message has no name in it.
    """
    parts = urlsplit(url) if _URL.fullmatch(url) else None
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise ValueError(f"{url[:100]!r} is no plain http(s) address")
    _ = parts.port  # raises ValueError where it is no number
    return url


def _checked_image(record: ImageRecord, name: str, local: bool) -> Image:
    """An image record of an untrusted file: its name stays inside its folder, its address is http(s)."""
    width, height, url = record.width, record.height, record.coco_url or None
    if not FILE_NAME.fullmatch(record.file_name):
        raise InputError(
            f"{name}: image {record.id}: file_name {record.file_name[:100]!a} is no plain file name"
        )
    if min(width, height) < 1 or max(width, height) > _LARGEST_SIDE or width * height > _MOST_PIXELS:
        raise InputError(f"{name}: image {record.id}: {width}x{height} pixels is no reasonable size")
    if url is None and not local:
        raise InputError(f"{name}: image {record.id} has no coco_url; give the images with --source")
    try:
        return Image(record.id, record.file_name, url and check_url(url), width, height)
    except ValueError as error:
        raise InputError(f"{name}: image {record.id}: coco_url {error}") from error


def _dump(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


class _Sorted:
    """Records kept on disk as they come, written out in the order of their ids."""

    def __init__(self, folder: Path) -> None:
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed with the object)
        self.ids, self.starts = array("q"), array("q", [0])

    def add(self, identifier: int, entry: Any) -> None:
        self.ids.append(identifier)
        self.starts.append(self.starts[-1] + self.file.write(_dump(entry)))

    def write(self, target: IO[bytes], what: str) -> None:
        previous = None
        for index in sorted(range(len(self.ids)), key=self.ids.__getitem__):
            if self.ids[index] == previous:
                raise InputError(f"{what} id {previous} appears twice")
            target.write(b"[\n" if previous is None else b",\n")
            self.file.seek(self.starts[index])
            target.write(self.file.read(self.starts[index + 1] - self.starts[index]))
            previous = self.ids[index]
        target.write(b"[]" if previous is None else b"\n]")


def extract(
    file: Readable,
    name: str,
    ids: Collection[int],
    categories: frozenset[int],
    target: Path,
    local: bool = False,
) -> list[Image]:
    """Writes the annotation file of the chosen images: records as they were, in the order of their ids.

    Crowd regions, licences, info and all chosen categories are kept. The bytes depend on the records alone,
    not on their order or layout in ``file``, so that their SHA-256 names the subset.

    Args:
        file: Open full annotation file.
        name: What messages call it.
        ids: Image ids to keep.
        categories: Category ids to keep.
        target: File to write; a temporary file is made beside it.
        local: Whether the images are at hand, so that no address is needed.

    Returns:
        The images, ascending by id.

    Raises:
        InputError: An id is not in the file, a record repeats an id, or an image's file_name, coco_url or
            size is not acceptable.
    """
    wanted = frozenset(ids)
    head: dict[str, Any] = {}
    lists: dict[str, list[Any]] = {"categories": [], "licenses": []}
    images: list[Image] = []
    image_records, annotations = _Sorted(target.parent), _Sorted(target.parent)
    for record, entry in read_records(file, name):
        if isinstance(record, AnnotationRecord):
            if record.image_id in wanted and record.category_id in categories:
                annotations.add(record.id, entry)
        elif isinstance(record, ImageRecord):
            if record.id in wanted:
                images.append(_checked_image(record, name, local))
                image_records.add(record.id, entry)
        elif isinstance(record, CategoryRecord):
            if record.id in categories:
                lists["categories"].append(entry)
        elif record == "licenses":
            lists["licenses"].append(entry)
        elif record == "info":
            head["info"] = entry
    if len(images) < len(wanted):
        missing = min(wanted - {image.id for image in images})
        raise InputError(f"{name}: has no image with id {missing}; is it from another COCO?")
    images.sort(key=lambda image: image.id)
    for one, other in pairwise(images):
        if one.id == other.id:
            raise InputError(f"{name}: image id {one.id} appears twice")
    names = {image.file_name.lower(): image for image in images}  # some file systems ignore case
    if len(names) < len(images):
        double = next(image for image in images if names[image.file_name.lower()] is not image)
        raise InputError(f"{name}: two images are called {double.file_name}")
    head |= {key: sorted(entries, key=_dump_id) for key, entries in lists.items()}
    with target.open("wb") as out:
        out.write(b"{")
        for key in sorted(head):
            out.write(b'"%s":%s,\n' % (key.encode(), _dump(head[key])))
        out.write(b'"images":')
        image_records.write(out, f"{name}: image")
        out.write(b',\n"annotations":')
        annotations.write(out, f"{name}: annotation")
        out.write(b"}\n")
    return images


def _dump_id(entry: Any) -> tuple[int, bytes]:
    return (entry["id"] if isinstance(entry, dict) and type(entry.get("id")) is int else -1), _dump(entry)


def read_images(file: Readable, name: str) -> list[Image]:
    """The images of a file that :func:`extract` wrote, ascending by id."""
    return [
        _checked_image(record, name, local=True)
        for record, _ in read_records(file, name)
        if isinstance(record, ImageRecord)
    ]
