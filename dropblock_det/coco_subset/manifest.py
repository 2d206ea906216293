"""The manifest: what a subset is, exactly, to check a copy or build the very same one elsewhere."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dropblock_det.coco_subset.choose import FILE_NAME, SPLITS, Options
from dropblock_det.errors import InputError


@dataclass(frozen=True, slots=True)
class Fetched:
    """One image as it lies on disk: its name, size in bytes and SHA-256 digest."""

    id: int
    file_name: str
    size: int
    sha256: bytes


@dataclass(frozen=True)
class Part:
    """One split of a subset: the SHA-256 of its annotation file and its images, ascending by id."""

    json_sha256: str
    images: tuple[Fetched, ...]


@dataclass(frozen=True)
class Manifest:
    """What a subset is, exactly: enough to check a copy or to build the very same one elsewhere."""

    options: Options
    parts: Mapping[str, Part]

    def dump(self) -> bytes:
        """As JSON, one image per line; the same manifest gives the same bytes."""
        parts = {
            split: {
                "json_sha256": part.json_sha256,
                "images": [
                    {"id": i.id, "file_name": i.file_name, "bytes": i.size, "sha256": i.sha256.hex()}
                    for i in part.images
                ],
            }
            for split, part in self.parts.items()
        }
        text = json.dumps({"version": 1, "options": asdict(self.options), "splits": parts})
        return text.replace('{"id"', '\n{"id"').encode() + b"\n"


def read_manifest(path: Path) -> Manifest:
    """Reads and checks a manifest, which may come from anyone.

    Raises:
        InputError: The file is not there or is no manifest.
    """
    try:
        content = json.loads(path.read_bytes())
        if content["version"] != 1:
            raise ValueError(f"version {content['version']} is unknown")
        options = content["options"]
        _check_types(options, {"train": int, "val": int, "seed": int, "min_per_category": int})
        if options["categories"] is not None:
            options["categories"] = tuple(map(str, options["categories"]))
        parts = {}
        for split, part in content["splits"].items():
            if split not in SPLITS:
                raise ValueError(f"{split!r} is no split")
            _check_types(part, {"json_sha256": str, "images": list})
            for image in part["images"]:
                _check_types(image, {"id": int, "file_name": str, "bytes": int, "sha256": str})
                if not FILE_NAME.fullmatch(image["file_name"]):
                    raise ValueError(f"{image['file_name']!r} is no plain file name")
            ids = [image["id"] for image in part["images"]]
            if ids != sorted(set(ids)):
                raise ValueError("image ids repeat or are not in order")
            images = tuple(
                Fetched(i["id"], i["file_name"], i["bytes"], bytes.fromhex(i["sha256"]))
                for i in part["images"]
            )
            parts[split] = Part(part["json_sha256"], images)
        return Manifest(Options(**options), parts)
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no such manifest") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; give a manifest.json") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: no manifest of a subset: {error!r}") from error


def _check_types(record: Any, fields: Mapping[str, type]) -> None:
    for field, kind in fields.items():
        if type(record[field]) is not kind:
            raise ValueError(f"{field} has to be {kind.__name__}, not {record[field]!r}")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
