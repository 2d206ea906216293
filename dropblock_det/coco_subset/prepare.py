"""From nothing, or from a COCO on disk, to a folder with a subset of it.

The folder: ``annotations/instances_{train,val}2017.json``, ``{train,val}2017/*.jpg`` and ``manifest.json``.
All files are written under ``.partial`` and renamed when they are whole; the manifest comes last. So whatever
is there under its final name is right, and a second start does only what is missing.
"""

import contextlib
import os
import shutil
import stat
import zipfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

from dropblock_det.coco_subset.choose import SPLITS, Options, category_ids, choose, read_contents
from dropblock_det.coco_subset.collect import Report, Wanted, collect
from dropblock_det.coco_subset.download import Downloader, Network
from dropblock_det.coco_subset.extract import Image, extract, read_images
from dropblock_det.coco_subset.json_stream import Readable
from dropblock_det.coco_subset.manifest import Fetched, Manifest, Part, read_manifest
from dropblock_det.errors import InputError, disk_errors
from dropblock_det.files import sha256_of, write_bytes
from dropblock_det.locks import locked

MANIFEST = "manifest.json"

_LARGEST_JSON = 2 << 30  # bytes; train2017's has 0.45e9


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
                known = manifest.splits[split] if manifest else None
                target = out / annotations_file(split)
                if known and target.is_file() and sha256_of(target) == known.json_sha256:
                    with target.open("rb") as file:
                        chosen[split] = read_images(file, str(target))
                else:
                    full = _full_annotations(split, out, source, downloader, report)
                    chosen[split] = _cut(split, options, known, full, target, work, source is not None)
        hashes = {
            out / f"{split}2017" / image.file_name: image.sha256
            for split, part in (manifest.splits.items() if manifest else ())
            for image in part.images
        }
        for split, images in chosen.items():
            for name in _strangers(out, split, images)[:1]:
                raise InputError(
                    f"{out / name}: is not of this subset; choose another folder or remove the file"
                )
        wanted_images = [
            Wanted(image, path := out / f"{split}2017" / image.file_name, hashes.get(path))
            for split, images in chosen.items()
            for image in images
        ]
        fetched = collect(wanted_images, source, downloader, work, report)
        manifest = Manifest(
            1,
            options,
            {
                split: Part(
                    sha256_of(out / annotations_file(split)),
                    tuple(fetched[out / f"{split}2017" / image.file_name] for image in images),
                )
                for split, images in chosen.items()
            },
        )
        write_bytes(out / MANIFEST, manifest.dump())
    return manifest


def verify(out: Path, manifest: Manifest) -> list[str]:
    """Compares a folder with a manifest, byte for byte; without network.

    Returns:
        One line for each file that is missing, altered or too many; empty when it is the very same subset.
    """
    problems = []
    for split, part in manifest.splits.items():
        folder = out / f"{split}2017"
        expected = {out / annotations_file(split): part.json_sha256}
        expected |= {folder / image.file_name: image.sha256 for image in part.images}
        for path, sha256 in expected.items():
            if not path.is_file():
                problems.append(f"{path.relative_to(out)}: missing")
            elif sha256_of(path) != sha256:
                problems.append(f"{path.relative_to(out)}: altered")
        problems += [f"{name}: not in the manifest" for name in _strangers(out, split, part.images)]
    return problems


def _strangers(out: Path, split: str, images: Iterable[Image | Fetched]) -> list[str]:
    """What lies among a split's images and is none; not the hidden files that desktops leave everywhere."""
    folder = out / f"{split}2017"
    known = {image.file_name for image in images} | {"Thumbs.db", "desktop.ini"}
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    return [f"{folder.name}/{name}" for name in names if name not in known and not name.startswith(".")]


@contextlib.contextmanager
def _sole_use(out: Path) -> Iterator[Path]:
    """Locks ``out`` and gives a folder in it for half-written files, which is empty before and gone after.

    Where nothing came of it, an ``out`` that was made here is gone too.
    """
    made = not out.exists()
    work = out / ".partial"
    try:
        with locked(out / ".lock", out):
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            try:
                yield work
            finally:
                shutil.rmtree(work, ignore_errors=True)
    finally:
        if made:
            with contextlib.suppress(OSError):  # not empty
                out.rmdir()


class _Watched:
    """A file that reports how much of it was read."""

    def __init__(self, file: IO[bytes], report: Callable[[int], None]) -> None:
        self.file, self.report, self.done = file, report, 0

    def read(self, size: int, /) -> bytes:
        data = self.file.read(size)
        self.done += len(data)
        self.report(self.done)
        return data


class _FullFile(NamedTuple):
    """A full annotation file: what messages call it, and what opens it, as often as called."""

    name: str
    opened: Callable[[], contextlib.AbstractContextManager[Readable]]


@contextlib.contextmanager
def _opened(path: Path, member: str | None, on_read: Callable[[int], None]) -> Iterator[Readable]:
    """Opens a file, or a member of an archive; ``on_read`` gets the number of bytes read."""
    with contextlib.ExitStack() as stack:
        if member is None:
            file: IO[bytes] = stack.enter_context(path.open("rb"))
        else:
            file = stack.enter_context(stack.enter_context(zipfile.ZipFile(path)).open(member))
        yield _Watched(file, on_read)


def _full_annotations(
    split: str, out: Path, source: Path | None, downloader: Downloader, report: Report
) -> _FullFile:
    """Finds a split's full annotation file in ``source``, or fetches the archive that has it."""
    file = annotations_file(split)
    if source is not None:
        path, member, name = source / file, None, str(source / file)
        if not path.is_file():
            raise InputError(f"{path}: not there; --source takes the folder of a full COCO 2017")
        size = path.stat().st_size
    else:
        archive = downloader.network.annotations
        path = out.parent / Path(archive.path).name
        member, name = file, f"{path}/{file}"
        downloader.fetch_archive(archive, path, lambda done: report("annotations", done, archive.size))
        try:
            with zipfile.ZipFile(path) as zipped:
                info = zipped.getinfo(file)
        except (zipfile.BadZipFile, KeyError) as error:
            raise InputError(f"{path}: no archive with {file} in it") from error
        if stat.S_ISLNK(info.external_attr >> 16) or info.flag_bits & 1:
            raise InputError(f"{path}: {file} is a link or encrypted")
        size = info.file_size
    if size > _LARGEST_JSON:
        raise InputError(f"{name}: {size} bytes unpacked, more than {_LARGEST_JSON}; that is no COCO 2017")
    return _FullFile(
        name, partial(_opened, path, member, lambda done: report(f"reading {split}2017", done, size))
    )


def _cut(
    split: str,
    options: Options,
    known: Part | None,
    full: _FullFile,
    target: Path,
    work: Path,
    local: bool,
) -> list[Image]:
    """Chooses the images of a split, or takes a manifest's, and writes their annotations to ``target``."""
    name = full.name
    with full.opened() as file:
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
    with full.opened() as file:
        images_cut = extract(file, name, ids, keep, written, local)
    sha256 = sha256_of(written)
    if known and sha256 != known.json_sha256:
        raise InputError(f"{name}: gives another subset than the manifest; one of the two is no COCO 2017")
    if not known and target.exists() and sha256_of(target) != sha256:
        raise InputError(f"{target}: is not of this subset; choose another folder")
    target.parent.mkdir(exist_ok=True)
    written.replace(target)
    return images_cut
