"""From nothing, or from a COCO on disk, to a folder with a subset of it.

The folder: ``annotations/instances_{train,val}2017.json``, ``{train,val}2017/*.jpg`` and ``manifest.json``.
All files are written under ``.partial`` and renamed when they are whole; the manifest comes last. So whatever
is there under its final name is right, and a second start does only what is missing.
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import os
import shutil
import stat
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import PIL.Image

from dropblock_det.coco_subset.choose import (
    SPLITS,
    Image,
    Options,
    category_ids,
    choose,
    extract,
    read_contents,
    read_images,
)
from dropblock_det.coco_subset.download import Downloader, FetchError, Network, for_each
from dropblock_det.coco_subset.json_stream import Readable
from dropblock_det.coco_subset.manifest import Fetched, Manifest, Part, read_manifest, sha256_of
from dropblock_det.errors import InputError, disk_errors

MANIFEST = "manifest.json"

_LARGEST_JSON = 2 << 30  # bytes; train2017's has 0.45e9
_MOST_FAILURES = 10  # images; more than that is no accident, and asking on would only annoy the server

Report = Callable[[str, int, int], None]
"""What is called as the work goes on: ``report(what, done, total)``."""


def annotations_file(split: str) -> str:
    """Where COCO keeps the boxes of ``train`` or ``val``, relative to its folder."""
    return f"annotations/instances_{split}2017.json"


def prepare(
    out: Path,
    wanted: Options | Manifest,
    source: Path | None = None,
    network: Network | None = None,
    report: Report = lambda what, done, total: None,
) -> Manifest:
    """Makes the subset ``wanted`` in ``out``, or completes and mends it where it is there in part.

    The annotation archive is kept beside ``out``, for the next subset. With ``source`` nothing is downloaded
    and images are hard links where the file system allows, else copies.

    Args:
        out: Folder to make.
        wanted: Options to choose by, or the manifest of a subset to build again.
        source: A COCO on disk: ``annotations/``, ``train2017/``, ``val2017/``; images also in ``images/``.
        network: How to reach the server, None for the official one.
        report: Called as the work goes on.

    Returns:
        The manifest of what is there now.

    Raises:
        InputError: It can't be made; one line that says what to do. What is there already stays.
    """
    network = network or Network()
    with disk_errors(out), _sole_use(out) as work, Downloader(network) as downloader:
        manifest = wanted if isinstance(wanted, Manifest) else None
        options = wanted if isinstance(wanted, Options) else wanted.options
        if (out / MANIFEST).exists():
            there = read_manifest(out / MANIFEST)
            if there.options != options or (manifest and manifest != there):
                raise InputError(f"{out}: holds another subset, {there.options}; choose another folder")
            manifest = there
        chosen: dict[str, list[Image]] = {}
        for split in SPLITS:
            if getattr(options, split):
                known = manifest.parts[split] if manifest else None
                target = out / annotations_file(split)
                if known and target.is_file() and sha256_of(target) == known.json_sha256:
                    with target.open("rb") as file:
                        chosen[split] = read_images(file, str(target))
                else:
                    with _annotations(split, out, source, downloader, report) as opened:
                        chosen[split] = _cut(split, options, known, opened, target, work)
        parts = _collect(out, chosen, manifest, source, downloader, work, report)
        manifest = Manifest(options, parts)
        (work / MANIFEST).write_bytes(manifest.dump())
        (work / MANIFEST).replace(out / MANIFEST)
    return manifest


def verify(out: Path, manifest: Manifest) -> list[str]:
    """Compares a folder with a manifest, byte for byte; without network.

    Returns:
        One line for each file that is missing, altered or too many; empty when it is the very same subset.
    """
    problems = []
    with disk_errors(out):
        for split, part in manifest.parts.items():
            expected = {annotations_file(split): part.json_sha256}
            expected |= {f"{split}2017/{image.file_name}": image.sha256.hex() for image in part.images}
            for name, sha256 in expected.items():
                if not (out / name).is_file():
                    problems.append(f"{name}: missing")
                elif sha256_of(out / name) != sha256:
                    problems.append(f"{name}: altered")
            problems += [f"{name}: not in the manifest" for name in _strangers(out, split, part.images)]
    return problems


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


@contextlib.contextmanager
def _sole_use(out: Path) -> Iterator[Path]:
    """Locks ``out`` and gives a folder in it for half-written files, which is empty before and gone after.

    Where nothing came of it, an ``out`` that was made here is gone too.
    """
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    work = out / ".partial"
    folder = os.open(out, os.O_RDONLY)  # a lock on it ends with the process, however that ends
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{out}: another process is working on it; wait for it to end") from error
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)
            if made:
                with contextlib.suppress(OSError):  # not empty
                    out.rmdir()
    finally:
        os.close(folder)


class _Watched:
    """A file that reports how much of it was read."""

    def __init__(self, file: IO[bytes], report: Callable[[int], None]) -> None:
        self.file, self.report, self.done = file, report, 0

    def read(self, size: int, /) -> bytes:
        data = self.file.read(size)
        self.done += len(data)
        self.report(self.done)
        return data


Opener = Callable[[], contextlib.AbstractContextManager[tuple[Readable, str]]]
"""Opens a full annotation file, as often as called: ``(file, what messages call it)``."""


@contextlib.contextmanager
def _annotations(
    split: str, out: Path, source: Path | None, downloader: Downloader, report: Report
) -> Iterator[Opener]:
    member = annotations_file(split)
    with contextlib.ExitStack() as stack:
        open_it: Callable[[], IO[bytes]]
        if source is not None:
            path = source / member
            if not path.is_file():
                raise InputError(f"{path}: not there; --source takes the folder of a full COCO 2017")
            size, open_it, name = path.stat().st_size, lambda: path.open("rb"), str(path)
        else:
            archive = downloader.network.annotations
            path = out.parent / Path(archive.path).name
            downloader.fetch_archive(archive, path, lambda done: report("annotations", done, archive.size))
            try:
                zipped = stack.enter_context(zipfile.ZipFile(path))
                info = zipped.getinfo(member)
            except (zipfile.BadZipFile, KeyError) as error:
                raise InputError(f"{path}: no archive with {member} in it") from error
            if stat.S_ISLNK(info.external_attr >> 16) or info.flag_bits & 1:
                raise InputError(f"{path}: {member} is a link or encrypted")
            size, open_it, name = info.file_size, lambda: zipped.open(info), f"{path}/{member}"
        if size > _LARGEST_JSON:
            raise InputError(
                f"{name}: {size} bytes unpacked, more than {_LARGEST_JSON}; that is no COCO 2017"
            )

        @contextlib.contextmanager
        def opened() -> Iterator[tuple[Readable, str]]:
            with open_it() as file:
                yield _Watched(file, lambda done: report(f"reading {split}2017", done, size)), name

        yield opened


def _cut(
    split: str, options: Options, known: Part | None, opened: Opener, target: Path, work: Path
) -> list[Image]:
    """Chooses the images of a split, or takes a manifest's, and writes their annotations to ``target``."""
    with opened() as (file, name):
        contents = read_contents(file, name)
    keep = category_ids(contents.categories, options.categories, name)
    if known:
        ids = [image.id for image in known.images]
    else:
        images = contents.images
        if options.categories is not None:
            images = {image: held & keep for image, held in images.items() if held & keep}
        minimum = options.min_per_category if split == "train" else 0
        ids = choose(images, getattr(options, split), options.seed, f"{split}2017", minimum)
    del contents
    written = work / target.name
    with opened() as (file, name):
        images_cut = extract(file, name, ids, keep, written)
    sha256 = sha256_of(written)
    if known and sha256 != known.json_sha256:
        raise InputError(f"{name}: gives another subset than the manifest; one of the two is no COCO 2017")
    if not known and target.exists() and sha256_of(target) != sha256:
        raise InputError(f"{target}: is not of this subset; choose another folder")
    target.parent.mkdir(exist_ok=True)
    written.replace(target)
    return images_cut


def _strangers(out: Path, split: str, images: "list[Image] | tuple[Fetched, ...]") -> list[str]:
    folder = out / f"{split}2017"
    known = {image.file_name for image in images}
    return (
        sorted(f"{folder.name}/{name}" for name in os.listdir(folder) if name not in known)
        if folder.is_dir()
        else []
    )


def _collect(
    out: Path,
    chosen: dict[str, list[Image]],
    manifest: Manifest | None,
    source: Path | None,
    downloader: Downloader,
    work: Path,
    report: Report,
) -> dict[str, Part]:
    """Brings every chosen image to its place, many at a time."""
    for split, images in chosen.items():
        (out / f"{split}2017").mkdir(exist_ok=True)
        for name in _strangers(out, split, images)[:1]:
            raise InputError(f"{out / name}: is not of this subset; choose another folder or remove the file")
    known = {
        (split, image.id): image.sha256
        for split, part in (manifest.parts.items() if manifest else ())
        for image in part.images
    }
    found: dict[tuple[str, int], Fetched] = {}
    failures: list[str] = []
    decoding = threading.BoundedSemaphore(os.cpu_count() or 1)  # bounds the memory for decoded pixels
    jobs = [(split, image) for split, images in chosen.items() for image in images]

    def bring(job: tuple[str, Image]) -> None:
        split, image = job
        place = out / f"{split}2017" / image.file_name
        sha256 = b""

        def accept(data: bytes) -> None:
            nonlocal sha256
            sha256 = hashlib.sha256(data).digest()
            if known.get((split, image.id), sha256) != sha256:
                raise ValueError("its SHA-256 is not the manifest's")
            with decoding:
                check_image(data, image)

        try:
            size = _intact(place, accept, downloader.network.largest_image)
            if size is None and source is not None:
                size = _link(source, place, accept, work / f"{split}-{image.file_name}", downloader.network)
            elif size is None:
                data = downloader.fetch(downloader.network.address(image.coco_url), accept)
                (work / f"{split}-{image.file_name}").write_bytes(data)
                (work / f"{split}-{image.file_name}").replace(place)
                size = len(data)
        except FetchError as error:
            if not downloader.stop.is_set():
                failures.append(f"{image.file_name} ({error})")
                if len(failures) >= _MOST_FAILURES:
                    downloader.stop.set()
            return
        found[split, image.id] = Fetched(image.id, image.file_name, size, sha256)
        report("images", len(found), len(jobs))

    for_each(jobs, bring, downloader.network.connections, downloader.stop)
    if failures:
        more = ", stopped there" if downloader.stop.is_set() else ""
        raise InputError(
            f"{out}: {len(jobs) - len(found)} of {len(jobs)} images missing{more}: {', '.join(failures)}; "
            f"start again to fetch what is missing"
        )
    return {
        split: Part(sha256_of(out / annotations_file(split)), tuple(found[split, i.id] for i in images))
        for split, images in chosen.items()
    }


def _intact(place: Path, accept: Callable[[bytes], None], largest: int) -> int | None:
    """The size of an image that is there and acceptable, else None."""
    if not place.is_file() or place.stat().st_size > largest:
        return None
    data = place.read_bytes()
    try:
        accept(data)
    except ValueError:
        return None  # half or altered: it is replaced
    return len(data)


def _link(source: Path, place: Path, accept: Callable[[bytes], None], written: Path, network: Network) -> int:
    """Takes an image from a COCO on disk."""
    below = Path(place.parent.name, place.name)
    path = next((p for p in (source / below, source / "images" / below) if p.is_file()), None)
    if path is None:
        raise FetchError(f"not in {source}")
    if path.stat().st_size > network.largest_image:
        raise FetchError(f"{path}: more than {network.largest_image} bytes")
    data = path.read_bytes()
    try:
        accept(data)
    except ValueError as error:
        raise FetchError(f"{path}: {error}") from error
    try:
        os.link(path.resolve(), written)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
            raise
        written.write_bytes(data)
    written.replace(place)
    return len(data)
