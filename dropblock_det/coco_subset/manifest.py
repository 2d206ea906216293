"""The manifest: what a subset is, exactly, to check a copy or build the very same one elsewhere."""

import json
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from dropblock_det.coco_subset.choose import SPLITS, Options
from dropblock_det.coco_subset.extract import FILE_NAME
from dropblock_det.coco_subset.records import Id
from dropblock_det.files import read_json

Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class Fetched(msgspec.Struct, frozen=True, gc=False):
    """One image as it lies on disk: its name, size in bytes and SHA-256."""

    id: Id
    file_name: Annotated[str, Meta(pattern=f"^{FILE_NAME.pattern}\\Z")]
    bytes: Annotated[int, Meta(ge=0)]
    sha256: Sha256


class Part(msgspec.Struct, frozen=True):
    """One split of a subset: the SHA-256 of its annotation file and its images, ascending by id."""

    json_sha256: Sha256
    images: tuple[Fetched, ...]

    def __post_init__(self) -> None:
        ids = [image.id for image in self.images]
        if ids != sorted(set(ids)):
            raise ValueError("image ids repeat or are not in order")


class Manifest(msgspec.Struct, frozen=True):
    """What a subset is, exactly: enough to check a copy or to build the very same one elsewhere."""

    version: Literal[1]
    options: Options
    splits: dict[str, Part]

    def __post_init__(self) -> None:
        due = {split: count for split in SPLITS if (count := getattr(self.options, split))}
        held = {split: len(part.images) for split, part in self.splits.items()}
        if held != due:
            raise ValueError(f"it has the images {held}, its options ask for {due}")

    def dump(self) -> bytes:
        """As JSON, one image per line; the same manifest gives the same bytes."""
        text = json.dumps(msgspec.to_builtins(self))
        return text.replace('{"id"', '\n{"id"').encode() + b"\n"


def read_manifest(path: Path) -> Manifest:
    """Reads and checks a manifest, which may come from anyone.

    Raises:
        InputError: The file is not there or is no manifest.
    """
    manifest: Manifest = read_json(path, Manifest)
    return manifest
