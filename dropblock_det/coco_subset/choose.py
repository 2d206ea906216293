"""Choosing a subset of COCO: what the annotations hold, and which images to take.

The train annotations of COCO 2017 are 450 MB of text and several GB of Python objects, so nothing here holds
them whole: the functions go through the file record by record. Nothing here touches the network.
"""

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from dropblock_det.arguments import Natural, Seed, checked_arguments
from dropblock_det.coco_subset.records import (
    AnnotationRecord,
    CategoryRecord,
    ImageRecord,
    Readable,
    read_records,
)
from dropblock_det.errors import InputError

SPLITS = ("train", "val")


@dataclass(frozen=True)
class Options:
    """What decides the choice; the same options on the same annotations choose the same images.

    Attributes:
        train: Number of images from train2017.
        val: Number of images from val2017; 0 leaves the split out.
        seed: Decides which images.
        categories: Names of the categories to keep, or None for all. With a choice, only images with at least
            one box of these categories are taken, and only boxes of these categories are kept.
        min_per_category: The least number of train images with a box of each category.
    """

    train: Natural = 500
    val: Natural = 200
    seed: Seed = 0
    categories: tuple[str, ...] | None = None
    min_per_category: Natural = 1

    def __post_init__(self) -> None:
        checked_arguments(Options, vars(self))
        if self.train + self.val == 0:
            raise InputError("train=0, val=0: one of the two must have images")
        if self.categories is not None and not all(self.categories):
            raise InputError(f"categories={','.join(self.categories)!r}: holds an empty name")


@dataclass(frozen=True)
class Contents:
    """What an annotation file holds: category names by id, and the categories with a box in each image.

    Crowd regions do not count as boxes: training ignores them.
    """

    categories: dict[int, str]
    images: dict[int, frozenset[int]]


def read_contents(file: Readable, name: str) -> Contents:
    """Reads which categories have a box in which image; about 15 s for train2017 on one core.

    Raises:
        InputError: The file is damaged, repeats an image or a category, or names a category that it does not
            define.
    """
    categories: dict[int, str] = {}
    listed: set[int] = set()
    images: dict[int, frozenset[int]] = {}
    grown: dict[tuple[frozenset[int], int], frozenset[int]] = {}  # one frozenset per distinct combination
    for record, _ in read_records(file, name):
        if isinstance(record, AnnotationRecord):
            held = images.get(record.image_id, frozenset())
            if not record.iscrowd and record.category_id not in held:
                step = held, record.category_id
                images[record.image_id] = grown.setdefault(step, held | {record.category_id})
        elif isinstance(record, ImageRecord):
            if record.id in listed:
                raise InputError(f"{name}: image id {record.id} appears twice")
            listed.add(record.id)
        elif isinstance(record, CategoryRecord):
            if record.id in categories or record.name in categories.values():
                raise InputError(f"{name}: category {record.id}, {record.name!r}, appears twice")
            categories[record.id] = record.name
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
