"""Bringing the chosen images to their places, many at a time: from the server, or from a COCO on disk."""

import errno
import hashlib
import io
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import PIL.Image

from dropblock_det.coco_subset.connections import FetchError
from dropblock_det.coco_subset.download import Downloader, for_each
from dropblock_det.coco_subset.extract import Image
from dropblock_det.coco_subset.manifest import Fetched
from dropblock_det.errors import InputError

_MOST_FAILURES = 10  # images; more than that is no accident, and asking on would only annoy the server

Report = Callable[[str, int, int], None]
"""What is called as the work goes on: ``report(what, done, total)``."""


@dataclass(frozen=True)
class Wanted:
    """An image, where it belongs, and its SHA-256 where a manifest has it."""

    image: Image
    path: Path
    sha256: str | None


def collect(
    wanted: Sequence[Wanted], source: Path | None, downloader: Downloader, work: Path, report: Report
) -> dict[Path, Fetched]:
    """Brings every image to its place; one that is there and right is left alone.

    Images are not forced to the disk one by one, which would take longer than fetching them: what a power cut
    spoils is found by the checks of the next start.

    Args:
        wanted: The images.
        source: A COCO on disk to take them from, None to fetch them.
        downloader: What fetches them.
        work: Folder for half-written files, on the same file system.
        report: Called as the work goes on.

    Returns:
        What is there, by its path.

    Raises:
        InputError: Some can't be had; the others are there.
    """
    for folder in {one.path.parent for one in wanted}:
        folder.mkdir(exist_ok=True)
    found: dict[Path, Fetched] = {}
    failures: list[str] = []
    decoding = threading.BoundedSemaphore(os.cpu_count() or 1)  # bounds the memory for decoded pixels

    def bring(one: Wanted) -> None:
        try:
            data = _brought(
                one, source, downloader, work / f"{one.path.parent.name}-{one.path.name}", decoding
            )
        except FetchError as error:
            if not downloader.stop.is_set():
                failures.append(f"{one.path.name} ({error})")
                if len(failures) >= _MOST_FAILURES:
                    downloader.stop.set()
            return
        found[one.path] = Fetched(one.image.id, one.path.name, len(data), _sha256(data))
        report("images", len(found), len(wanted))

    for_each(wanted, bring, downloader.network.connections, downloader.stop)
    if failures:
        more = ", stopped there" if downloader.stop.is_set() else ""
        raise InputError(
            f"{wanted[0].path.parents[1]}: {len(wanted) - len(found)} of {len(wanted)} images missing{more}: "
            f"{', '.join(failures)}; start again to fetch what is missing"
        )
    return found


def _brought(
    one: Wanted, source: Path | None, downloader: Downloader, written: Path, decoding: threading.Semaphore
) -> bytes:
    """Brings one image to its place and returns it; it is written to ``written`` first."""

    def accept(data: bytes) -> None:
        if one.sha256 not in (None, _sha256(data)):
            raise ValueError("its SHA-256 is not the manifest's")
        with decoding:
            check_image(data, one.image)

    largest = downloader.network.largest_image
    if one.path.is_file() and one.path.stat().st_size <= largest:
        data = one.path.read_bytes()
        try:
            accept(data)
            return data
        except ValueError:
            pass  # half or altered: it is replaced
    if source is not None:
        path = _in_source(source, one.path, largest)
        data = path.read_bytes()
        try:
            accept(data)
        except ValueError as error:
            raise FetchError(f"{path}: {error}") from error
        _link_or_write(path, data, written)
    elif one.image.coco_url is None:
        raise FetchError("it has no coco_url; give --source")
    else:
        data = downloader.fetch(downloader.network.address(one.image.coco_url), accept)
        written.write_bytes(data)
    written.replace(one.path)
    return data


def _in_source(source: Path, place: Path, largest: int) -> Path:
    """Where a COCO on disk has an image."""
    below = Path(place.parent.name, place.name)
    path = next((p for p in (source / below, source / "images" / below) if p.is_file()), None)
    if path is None:
        raise FetchError(f"not in {source}")
    if path.stat().st_size > largest:
        raise FetchError(f"{path}: more than {largest} bytes")
    return path


def _link_or_write(path: Path, data: bytes, written: Path) -> None:
    try:
        os.link(path.resolve(), written)
    except OSError as error:
        # Another file system, or one that knows no such links.
        if error.errno not in (
            *(errno.EXDEV, errno.EPERM, errno.EMLINK),
            *(errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS),
        ):
            raise
        written.write_bytes(data)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def check_image(data: bytes, image: Image) -> None:
    """Raises ValueError, with the reason, unless ``data`` is a JPEG or PNG of the size the JSON says."""
    wanted = image.width, image.height
    try:
        with PIL.Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as decoded:
            size = decoded.size
            if size == wanted:
                decoded.load()
    except PIL.UnidentifiedImageError as error:
        raise ValueError(f"these {len(data)} bytes are no JPEG or PNG image") from error
    except Exception as error:  # hostile bytes raise nearly anything: SyntaxError, struct.error, OSError, ...
        raise ValueError(f"it does not decode: {error}") from error
    if size != wanted:
        raise ValueError(f"it has {size[0]}x{size[1]} pixels, the annotations say {wanted[0]}x{wanted[1]}")
