"""Small images with one label each, decoded once and kept in memory: CIFAR-10, MNIST, folders of classes.

A batch is cut from one tensor by the indices of its images: no worker process, no call per image.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets import CIFAR10, MNIST, ImageFolder
from torchvision.transforms.v2.functional import resize

from dropblock_det.arguments import Count, Natural, Seed, Side, checked_arguments
from dropblock_det.datasets.images import read_image
from dropblock_det.datasets.sampling import ValBatches, epoch_order
from dropblock_det.errors import InputError

MAX_BYTES = 8 * 2**30  # decoded


class Labelled(NamedTuple):
    """Images with labels.

    Attributes:
        images: uint8 ``(N, C, H, W)``.
        labels: int64 ``(N,)``, from 0.
        names: of the classes, by label.
        ids: int64 ``(N,)``, the images' numbers in the whole data set.
    """

    images: Tensor
    labels: Tensor
    names: tuple[str, ...]
    ids: Tensor


class Draw(NamedTuple):
    """Images of a batch, and how each is augmented: mirrored or not, moved by rows and columns."""

    indices: Tensor
    flips: Tensor | None = None
    shifts: Tensor | None = None


Batch = tuple[Tensor, Tensor, list[int]]
"""Images uint8 ``(B, C, H, W)``, labels int64 ``(B,)``, and the images' numbers."""


Choose = Callable[[int], Tensor]
"""From the number of images there are: the numbers of those that are wanted, int64."""


def load_cifar10(root: Path, train: bool, download: bool, size: int | None, choose: Choose) -> Labelled:
    """CIFAR-10 from its own files, as torchvision fetches and checks them."""
    data = CIFAR10(str(root), train=train, download=download)
    ids = choose(len(data.targets))
    images = torch.from_numpy(data.data)[ids].permute(0, 3, 1, 2).contiguous()
    return Labelled(resized(images, size, root), torch.tensor(data.targets)[ids], tuple(data.classes), ids)


def load_mnist(root: Path, train: bool, download: bool, size: int | None, choose: Choose) -> Labelled:
    """MNIST from its own files, as torchvision fetches them; unlike CIFAR-10's it does not check them."""
    try:
        data = MNIST(str(root), train=train, download=download)
    except (AssertionError, ValueError, TypeError, IndexError) as error:  # whatever broken bytes lead it to
        raise RuntimeError(f"its files are damaged ({error})") from None
    images, labels = data.data, data.targets
    if images.shape != (len(labels), 28, 28) or not len(labels) or labels.max() >= len(data.classes):
        raise RuntimeError("its files are damaged (images and labels do not fit)")
    ids = choose(len(labels))
    return Labelled(resized(images[ids].unsqueeze(1), size, root), labels[ids], tuple(data.classes), ids)


def load_folder(root: Path, train: bool, download: bool, size: int | None, choose: Choose) -> Labelled:
    """``root/train/CLASS/*`` and ``root/test/CLASS/*``, resized to ``size`` pixels a side if given."""
    folder = root / ("train" if train else "test")
    data = ImageFolder(str(folder))
    _check_classes(folder, data)
    ids = choose(len(data.targets))
    images: Tensor | None = None
    for number, file in enumerate(data.samples[index][0] for index in ids.tolist()):
        image = read_image(Path(file))
        shape = image.shape if size is None else (3, size, size)
        if images is None:
            check_memory(root, (len(ids), *shape))
            images = torch.empty((len(ids), *shape), dtype=torch.uint8)
        if shape != images.shape[1:]:
            found, first = pixels(shape), pixels(images.shape[1:])
            raise InputError(f"{file}: {found} pixels, the first image has {first}; give a data.size for all")
        images[number] = resized(image, size, root)
    assert images is not None  # ImageFolder raises where there is no image
    return Labelled(images, torch.tensor(data.targets)[ids], tuple(data.classes), ids)


def resized(images: Tensor, size: int | None, root: Path) -> Tensor:
    """uint8 ``(..., H, W)`` as ``(..., size, size)``; as they are where ``size`` is None."""
    if size is None or images.shape[-2:] == (size, size):
        return images
    check_memory(root, (*images.shape[:-2], size, size))
    return resize(images, [size, size], antialias=True)


def pixels(shape: Sequence[int]) -> str:
    """``(C, H, W)`` in words, such as ``32x24``: width first."""
    return f"{shape[2]}x{shape[1]}"


def check_memory(root: Path, shape: tuple[int, ...]) -> None:
    """Raises :class:`InputError` where decoded images would not fit."""
    if math.prod(shape) > MAX_BYTES:
        raise InputError(f"{root}: takes more than {MAX_BYTES >> 30} GiB decoded; give a smaller data.size")


def _check_classes(folder: Path, data: ImageFolder) -> None:
    if len(data.classes) < 2:
        raise InputError(f"{folder}: has one class, {data.classes[0]!r}; a classifier takes two or more")
    for name in data.classes:
        if any("\ud800" <= letter <= "\udfff" for letter in name):
            raise InputError(f"{folder}: the class {name!r} has a name that is not UTF-8; rename the folder")
    folders = {Path(file).parent for file, _ in data.samples}
    if len({path.resolve() for path in folders}) < len(folders):
        raise InputError(f"{folder}: links lead to the same images more than once; remove them")


SOURCES: dict[str, Callable[[Path, bool, bool, int | None, Choose], Labelled]] = {
    "cifar10": load_cifar10,
    "mnist": load_mnist,
    "folder": load_folder,
}
"""Name -> ``(root, train or test, download, size, choose) -> images``."""


class InMemory(Dataset[Batch]):
    """A whole data set as one tensor; an item is a batch."""

    def __init__(self, data: Labelled) -> None:
        self.images, self.labels, self.names, self.ids = data

    @property
    def categories(self) -> list[dict[str, Any]]:
        """One ``{"label", "id", "name"}`` per class; plain, so that it can travel in a checkpoint."""
        return [{"label": number, "id": number, "name": name} for number, name in enumerate(self.names)]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, draw: Draw) -> Batch:
        images = self.images[draw.indices]
        if draw.flips is not None:
            images = torch.where(draw.flips[:, None, None, None], images.flip(3), images)
        if draw.shifts is not None:
            images = shifted(images, draw.shifts)
        return images, self.labels[draw.indices], self.ids[draw.indices].tolist()


def shifted(images: Tensor, shifts: Tensor) -> Tensor:
    """Moves each image by ``shifts`` (B, 2) rows and columns; what comes in from outside is 0."""
    n, channels, height, width = images.shape
    shifts = shifts.clamp(-max(height, width), max(height, width))  # further away there is nothing either
    reach = int(shifts.abs().max())
    padded = torch.nn.functional.pad(images, [reach] * 4)
    rows = torch.arange(height) + reach - shifts[:, :1]
    columns = torch.arange(width) + reach - shifts[:, 1:]
    image, channel = torch.arange(n)[:, None, None, None], torch.arange(channels)[:, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


class TrainBatches(Sampler[Draw]):
    """One process's batches of a shuffled epoch; order and augmentation depend on (seed, epoch) alone.

    Args:
        size: number of images.
        batch_size: images per batch.
        seed: any integer from 0.
        flip: mirror half of the images.
        shift: move each image by up to this many pixels.
        rank: number of this process.
        world_size: number of processes.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        flip: bool,
        shift: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.size, self.batch_size, self.seed, self.flip, self.shift = size, batch_size, seed, flip, shift
        self.rank, self.world_size, self.epoch = rank, world_size, 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next iteration yields; Lightning calls it before each."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.size // (self.world_size * self.batch_size))

    def __iter__(self) -> Iterator[Draw]:
        order = epoch_order(self.size, self.seed, self.epoch, self.rank, self.world_size)
        random = np.random.default_rng((self.seed, self.epoch, 1))
        flips = torch.from_numpy(random.random(self.size) < 0.5)
        shifts = torch.from_numpy(random.integers(-self.shift, self.shift + 1, (self.size, 2)))
        for indices in torch.from_numpy(order).split(self.batch_size):
            yield Draw(
                indices,
                flips[indices] if self.flip else None,
                shifts[indices] if self.shift else None,
            )


class AllBatches(Sampler[Draw]):
    """The batches of :class:`ValBatches`: every image exactly once over all processes."""

    def __init__(self, batches: ValBatches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Draw]:
        for batch in self.batches:
            yield Draw(torch.tensor(batch, dtype=torch.int64))


class ClassificationDataModule(LightningDataModule):
    """Small labelled images, held in memory.

    Args:
        root: Folder of the data set.
        source: ``cifar10`` or ``mnist`` in the files of their authors, or ``folder``:
            ``root/train/CLASS/*`` and ``root/test/CLASS/*``.
        download: Fetch ``cifar10`` or ``mnist`` where they are not there yet.
        size: Pixels per side that images are resized to; null leaves them as they are, all of one size.
        batch_size: Images per batch and process.
        flip: Mirror half of the training images.
        shift: Move each training image by up to this many pixels.
        train_subset: Number of training images, drawn with ``subset_seed``; null for all.
        val_subset: Number of test images, drawn with ``subset_seed``; null for all.
        subset_seed: Seed of the subsets alone, so that runs with other seeds see the same images.
        train_subset_seed: Seed of the training subset where it is another than ``subset_seed``.
        seed: Seed of the order of training images and of their augmentation.
    """

    def __init__(
        self,
        root: str,
        source: Literal["cifar10", "mnist", "folder"] = "folder",
        download: bool = False,
        size: Side | None = None,
        batch_size: Count = 256,
        flip: bool = False,
        shift: Natural = 0,
        train_subset: Count | None = None,
        val_subset: Count | None = None,
        subset_seed: Seed = 0,
        train_subset_seed: Seed | None = None,
        seed: Seed = 0,
    ) -> None:
        super().__init__()
        given = {"source": source, "size": size, "batch_size": batch_size, "shift": shift, "seed": seed}
        given |= {"train_subset": train_subset, "val_subset": val_subset, "subset_seed": subset_seed}
        given |= {"train_subset_seed": train_subset_seed}
        checked_arguments(ClassificationDataModule, given, "data.")
        self.root, self.source, self.download, self.size = Path(root), source, download, size
        self.batch_size, self.flip, self.shift, self.seed = batch_size, flip, shift, seed
        self.train_subset, self.val_subset, self.subset_seed = train_subset, val_subset, subset_seed
        self.train_subset_seed = subset_seed if train_subset_seed is None else train_subset_seed

    @cached_property
    def train_dataset(self) -> InMemory:
        """The training images, read when first asked for."""
        return self._load(True, self.train_subset, self.train_subset_seed)

    @cached_property
    def val_dataset(self) -> InMemory:
        """The test images, read when first asked for."""
        return self._load(False, self.val_subset, self.subset_seed)

    def _load(self, train: bool, subset: int | None, seed: int) -> InMemory:
        def choose(size: int) -> Tensor:
            if subset is None:
                return torch.arange(size)
            if subset > size:
                name = f"data.{'train' if train else 'val'}_subset"
                raise InputError(f"{name}: got {subset}, the data set has {size} images; give 1 to {size}")
            order = np.random.default_rng(seed).permutation(size)
            return torch.from_numpy(np.sort(order[:subset]))

        try:
            return InMemory(SOURCES[self.source](self.root, train, self.download, self.size, choose))
        except (RuntimeError, FileNotFoundError) as error:  # torchvision's words for missing or altered files
            reason = " ".join(str(error).split())[:200]
            hint = "" if self.source == "folder" else ", or set data.download=true"
            raise InputError(
                f"{self.root}: no {self.source} data set: {reason}; check data.root{hint}"
            ) from None

    @property
    def categories(self) -> list[dict[str, Any]]:
        """Those of the training images."""
        return self.train_dataset.categories

    @property
    def val_categories(self) -> list[dict[str, Any]]:
        """Those of the test images."""
        return self.val_dataset.categories

    @property
    def val_files(self) -> list[Path]:
        """The files that must not be written to while they are evaluated on."""
        return [path for path in self.root.rglob("*") if path.is_file()]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images."""
        channels, height, width = self.train_dataset.images.shape[1:]
        return channels, height, width

    def data_hash(self) -> str:
        """Returns a SHA-256 of the chosen images and labels; equal means the same data."""
        digest = hashlib.sha256()
        for dataset in (self.train_dataset, self.val_dataset):
            for tensor in (dataset.images, dataset.labels):
                digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    def validation_arguments(self) -> dict[str, Any]:
        """Returns this class's arguments that give the same test images; plain, for a checkpoint."""
        names = ("source", "size", "batch_size", "val_subset", "subset_seed")
        return {"root": str(self.root)} | {name: getattr(self, name) for name in names}

    def setup(self, stage: str) -> None:
        """Reads what the stage needs: for ``fit`` both parts, of the same classes and one size of images."""
        if stage != "fit":
            return
        if getattr(self.trainer, "overfit_batches", 0):
            raise InputError("trainer.overfit_batches: not for images in memory; give data.train_subset")
        if self.categories != self.val_categories:
            raise InputError(f"{self.root}: train and test have other classes; give both the same folders")
        if (shape := self.val_dataset.images.shape[1:]) != self.image_shape:
            found, first = pixels(shape), pixels(self.image_shape)
            raise InputError(
                f"{self.root}: the test images have {found} pixels, those of the training {first}; give a "
                "data.size for all"
            )

    def train_dataloader(self) -> DataLoader[Batch]:
        """Cuts shuffled, augmented batches."""
        size, place = len(self.train_dataset), self._place()
        batches = TrainBatches(size, self.batch_size, self.seed, self.flip, self.shift, *place)
        return self._loader(self.train_dataset, batches)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Cuts every test image once over all processes, whose last batch can be empty."""
        batches = ValBatches(len(self.val_dataset), self.batch_size, *self._place())
        return self._loader(self.val_dataset, AllBatches(batches))

    def _loader(self, dataset: InMemory, batches: Sampler[Draw]) -> DataLoader[Batch]:
        return DataLoader(dataset, sampler=batches, batch_size=None, collate_fn=tuple)

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
