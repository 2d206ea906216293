"""Choosing a subset of COCO: what the annotations hold, which images to take, and cutting out their records.

The train annotations of COCO 2017 are 450 MB of text and several GB of Python objects, so nothing here holds
them whole: the functions go through the file record by record. Nothing here touches the network.
"""

import difflib
import hashlib
import json
import re
import tempfile
from array import array
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from dropblock_det.coco_subset.json_stream import Readable, read_entries
from dropblock_det.errors import InputError

SPLITS = ("train", "val")

_LARGEST_SIDE, _MOST_PIXELS = 1 << 15, 1 << 24
# One plain path component: no separator, no leading dot, nothing a shell, Windows or a terminal trips over.
FILE_NAME = re.compile(r"[\w+-](?:[\w+. ()-]{0,198}[\w)])?", re.ASCII)
_URL = re.compile(r"[!-~]+")


@dataclass(frozen=True)
class Options:
    """What decides the choice; the same options on the same annotations choose the same images.

    Attributes:
        train: Number of images from train2017.
        val: Number of images from val2017; 0 leaves the split out.
        seed: Any integer.
        categories: Names of the categories to keep, or None for all. With a choice, only images with at least
            one box of these categories are taken, and only boxes of these categories are kept.
        min_per_category: The least number of train images with a box of each category.
    """

    train: int = 500
    val: int = 200
    seed: int = 0
    categories: tuple[str, ...] | None = None
    min_per_category: int = 1

    def __post_init__(self) -> None:
        if self.train < 0 or self.val < 0 or self.train + self.val == 0:
            raise InputError(f"train={self.train}, val={self.val}: counts can't be negative, nor both 0")
        if self.min_per_category < 0:
            raise InputError(f"min_per_category={self.min_per_category}: must be 0 or more")
        if self.categories is not None and not all(self.categories):
            raise InputError(f"categories={','.join(self.categories)!r}: holds an empty name")


@dataclass(frozen=True, slots=True)
class Image:
    """One chosen image: what is needed to fetch it and to check it. Sizes in pixels."""

    id: int
    file_name: str
    coco_url: str
    width: int
    height: int


@dataclass(frozen=True)
class Contents:
    """What an annotation file holds: category names by id, and the categories with a box in each image.

    Crowd regions do not count as boxes: training ignores them.
    """

    categories: dict[int, str]
    images: dict[int, frozenset[int]]


def _integer(entry: Any, field: str, name: str) -> int:
    value = entry.get(field) if isinstance(entry, dict) else None
    if type(value) is not int:
        raise InputError(f"{name}: a record has no integer {field!r}: {json.dumps(entry)[:100]}")
    return value


def read_contents(file: Readable, name: str) -> Contents:
    """Reads which categories have a box in which image; about 10 s for train2017 on one core.

    Raises:
        InputError: The file is damaged, repeats an image or names a category that it does not define.
    """
    categories: dict[int, str] = {}
    listed: set[int] = set()
    images: dict[int, frozenset[int]] = {}
    grown: dict[tuple[frozenset[int], int], frozenset[int]] = {}  # one frozenset per distinct combination
    for key, entry in read_entries(file, name):
        if key == "annotations":
            if not isinstance(entry, dict) or not entry.get("iscrowd"):
                image, category = _integer(entry, "image_id", name), _integer(entry, "category_id", name)
                held = images.get(image, frozenset())
                if category not in held:
                    step = held, category
                    images[image] = grown.setdefault(step, held | {category})
        elif key == "images":
            image = _integer(entry, "id", name)
            if image in listed:
                raise InputError(f"{name}: image id {image} appears twice")
            listed.add(image)
        elif key == "categories":
            categories[_integer(entry, "id", name)] = str(entry.get("name"))
    if not listed or not categories:
        raise InputError(f"{name}: no COCO annotation file: it holds no images or no categories")
    unknown = frozenset().union(*grown.values()) - categories.keys()
    if unknown:
        raise InputError(f"{name}: annotations name category {min(unknown)}, which the file does not define")
    empty: frozenset[int] = frozenset()
    return Contents(categories, {image: images.get(image, empty) for image in listed})


def category_ids(categories: Mapping[int, str], names: Sequence[str] | None, file: str) -> frozenset[int]:
    """The ids of the categories called ``names``, all when None.

    Raises:
        InputError: A name is unknown; the message proposes a similar one.
    """
    if names is None:
        return frozenset(categories)
    by_name = {name: identifier for identifier, name in categories.items()}
    for name in names:
        if name not in by_name:
            near = difflib.get_close_matches(name, by_name, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(by_name))}"
            raise InputError(f"categories: {name!r} is not in {file}; {hint}")
    return frozenset(by_name[name] for name in names)


def choose(
    images: Mapping[int, frozenset[int]], count: int, seed: int, split: str, min_per_category: int = 0
) -> list[int]:
    """Chooses ``count`` images at random, the same ones everywhere and whatever the order of ``images``.

    Every image has a place in an order that depends on the seed, the split and its id alone: the SHA-256 of
    the three. The first ``count`` are taken, so that more images are the same and some more. Then, for each
    category that is short, the rarest first, images that have it replace the last that can be spared. All
    minima are met whenever ``count`` is at least the sum over categories of min(min_per_category, images that
    have it): if no image can be spared, each one is needed by a category that has no more than its minimum.

    Args:
        images: The categories in each image, by image id.
        count: How many images to choose.
        seed: Any integer.
        split: Name that goes into the order, so that splits are chosen independently.
        min_per_category: The least number of images wanted with each category in ``images``.

    Returns:
        The chosen ids, ascending.

    Raises:
        InputError: There are fewer than ``count`` images.
    """
    if count > len(images):
        raise InputError(
            f"{split}: {count} images asked, but only {len(images)} to choose from; ask for fewer"
        )
    places = {image: hashlib.sha256(f"{seed}/{split}/{image}".encode()).digest() for image in images}
    order = sorted(images, key=lambda image: (places[image], image))
    having: dict[int, list[int]] = {}
    for image in order:
        for category in images[image]:
            having.setdefault(category, []).append(image)
    chosen = dict.fromkeys(order[:count])
    added: dict[int, None] = {}  # what was put in for one category is the last to go for another
    held = {category: sum(image in chosen for image in where) for category, where in having.items()}
    wanted = {category: min(min_per_category, len(where)) for category, where in having.items()}

    def count_in(image: int, change: int) -> None:
        for category in images[image]:
            held[category] += change

    for category in sorted(having, key=lambda c: (len(having[c]), c)):
        candidates = [image for image in having[category] if image not in chosen and image not in added]
        # Of the images that would help, those that help most categories first, so that few are replaced.
        candidates.sort(key=lambda image: -sum(held[c] < wanted[c] for c in images[image]))
        for image in candidates:
            if held[category] >= wanted[category]:
                break
            count_in(image, 1)
            line = chain(reversed(chosen), added)
            spare = next((s for s in line if all(held[c] > wanted[c] for c in images[s])), None)
            if spare is None:
                count_in(image, -1)
                break
            del (chosen if spare in chosen else added)[spare]
            count_in(spare, -1)
            added[image] = None
    return sorted([*chosen, *added])


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


def _checked_image(entry: dict[str, Any], name: str) -> Image:
    """An image record of an untrusted file: its name stays inside its folder, its address is http(s)."""
    identifier = _integer(entry, "id", name)
    width, height = _integer(entry, "width", name), _integer(entry, "height", name)
    file_name, url = entry.get("file_name"), entry.get("coco_url")
    if not isinstance(file_name, str) or not FILE_NAME.fullmatch(file_name):
        raise InputError(
            f"{name}: image {identifier}: file_name {str(file_name)[:100]!r} is no plain file name"
        )
    if min(width, height) < 1 or max(width, height) > _LARGEST_SIDE or width * height > _MOST_PIXELS:
        raise InputError(f"{name}: image {identifier}: {width}x{height} pixels is no reasonable size")
    if not isinstance(url, str):
        raise InputError(f"{name}: image {identifier} has no coco_url")
    try:
        check_url(url)
    except ValueError as error:
        raise InputError(f"{name}: image {identifier}: coco_url {error}") from error
    return Image(identifier, file_name, url, width, height)


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
    file: Readable, name: str, ids: Collection[int], categories: frozenset[int], target: Path
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
    for key, entry in read_entries(file, name):
        if key == "annotations":
            if _integer(entry, "image_id", name) in wanted and entry.get("category_id") in categories:
                annotations.add(_integer(entry, "id", name), entry)
        elif key == "images":
            if _integer(entry, "id", name) in wanted:
                images.append(_checked_image(entry, name))
                image_records.add(entry["id"], entry)
        elif key == "categories":
            if _integer(entry, "id", name) in categories:
                lists[key].append(entry)
        elif key == "licenses":
            lists[key].append(entry)
        elif key == "info":
            head[key] = entry
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
    return [_checked_image(entry, name) for key, entry in read_entries(file, name) if key == "images"]
