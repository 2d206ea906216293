"""COCO folders as a Lightning data module."""

import hashlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from dropblock_det.arguments import Count, Natural, Seed, Workers, checked_arguments
from dropblock_det.commands import started_as
from dropblock_det.datasets.augment import Augmentation
from dropblock_det.datasets.coco_dataset import FLIP, CocoDataset, Item, collate
from dropblock_det.datasets.sampling import TrainSampler, ValBatches
from dropblock_det.errors import InputError

if TYPE_CHECKING:
    from pycocotools.coco import COCO


class CocoDataModule(LightningDataModule):
    """Training and validation images from folders in COCO's layout.

    Its samplers share the images out among processes themselves: run the trainer with
    ``use_distributed_sampler=False``.

    Args:
        root: Folder of the data set; the other paths are relative to it.
        train_images: Folder of the training images.
        train_annotations: Instances JSON of the training images.
        val_images: Folder of the validation images.
        val_annotations: Instances JSON of the validation images.
        batch_size: Images per batch and process.
        num_workers: Worker processes that load images, per process; 0 loads in the process itself.
        augmentation: Augmentation of the training images.
        train_subset: Number of training images, drawn with ``subset_seed``; null for all.
        val_subset: Number of validation images, drawn with ``subset_seed``; null for all.
        subset_seed: Seed of the subsets alone, so that runs with other seeds see the same images.
        train_subset_seed: Seed of the training subset where it is another than ``subset_seed``.
        seed: Seed of the order of training images and of their augmentation.
        cache_mb: Keep up to this many MB (per process) of decoded training images in memory; 0 is off.
    """

    def __init__(
        self,
        root: str,
        train_images: str = "train2017",
        train_annotations: str = "annotations/instances_train2017.json",
        val_images: str = "val2017",
        val_annotations: str = "annotations/instances_val2017.json",
        batch_size: Count = 8,
        num_workers: Workers = 2,
        augmentation: Augmentation = FLIP,
        train_subset: Count | None = None,
        val_subset: Count | None = None,
        subset_seed: Seed = 0,
        train_subset_seed: Seed | None = None,
        seed: Seed = 0,
        cache_mb: Natural = 0,
    ) -> None:
        super().__init__()
        given: dict[str, Any] = {"train_subset": train_subset, "val_subset": val_subset}
        given |= {"subset_seed": subset_seed, "train_subset_seed": train_subset_seed, "seed": seed}
        given |= {"batch_size": batch_size, "num_workers": num_workers, "cache_mb": cache_mb}
        checked_arguments(CocoDataModule, given, "data.")
        self.root = Path(root)
        self.train_images, self.train_annotations = self.root / train_images, self.root / train_annotations
        self.val_images, self.val_annotations = self.root / val_images, self.root / val_annotations
        self.batch_size, self.num_workers, self.seed, self.cache_mb = batch_size, num_workers, seed, cache_mb
        self.augmentation = augmentation
        self.train_subset, self.val_subset, self.subset_seed = train_subset, val_subset, subset_seed
        self.train_subset_seed = subset_seed if train_subset_seed is None else train_subset_seed

    @cached_property
    def train_dataset(self) -> CocoDataset:
        """The training images, read when first asked for."""
        self._check_root()
        dataset = CocoDataset(
            self.train_annotations,
            self.train_images,
            self.augmentation,
            subset=self.train_subset,
            seed=self.train_subset_seed,
            cache_mb=self.cache_mb,
        )
        del dataset.annotations  # 100 MB for all of COCO, and only validation needs them
        return dataset

    @cached_property
    def val_dataset(self) -> CocoDataset:
        """The validation images, read when first asked for."""
        self._check_root()
        return CocoDataset(
            self.val_annotations, self.val_images, subset=self.val_subset, seed=self.subset_seed
        )

    @property
    def val_categories(self) -> list[dict[str, Any]]:
        """As :attr:`categories`, of the validation annotations."""
        return self.val_dataset.categories

    @property
    def val_files(self) -> list[Path]:
        """The files that must not be written to while they are evaluated on."""
        return [self.val_annotations, *(self.val_images / file for file in self.val_dataset.files)]

    @cached_property
    def val_coco(self) -> "COCO":
        """The index that pycocotools makes of the original validation annotations, for evaluation."""
        return self.val_dataset.annotations.index()

    @property
    def categories(self) -> list[dict[str, Any]]:
        """One ``{"label", "id", "name"}`` per category; plain, so that it can travel in a checkpoint."""
        return self.train_dataset.categories

    def data_hash(self) -> str:
        """Returns a SHA-256 of the annotations and of the choice of images; equal means the same data."""
        digest = hashlib.sha256()
        for file, dataset in (
            (self.train_annotations, self.train_dataset),
            (self.val_annotations, self.val_dataset),
        ):
            with file.open("rb") as opened:
                while piece := opened.read(1 << 20):
                    digest.update(piece)
            digest.update(repr(dataset.ids).encode())
        return digest.hexdigest()

    def _check_root(self) -> None:
        if not self.root.is_dir():
            raise InputError(
                f"{self.root}: no such folder; give data.root a COCO folder, or get a subset of COCO 2017: "
                f"{started_as('prepare-coco')} --train 500 --val 200 --seed 0 --out {self.root}"
            )

    def validation_arguments(self) -> dict[str, Any]:
        """Returns this class's arguments that give the same validation images; plain, for a checkpoint."""
        return {
            "root": str(self.root),
            "val_images": self._from_root(self.val_images),
            "val_annotations": self._from_root(self.val_annotations),
            "val_subset": self.val_subset,
            "subset_seed": self.subset_seed,
            "batch_size": self.batch_size,
            "num_workers": 0,
        }

    def _from_root(self, path: Path) -> str:
        return str(path.relative_to(self.root) if path.is_relative_to(self.root) else path.absolute())

    def setup(self, stage: str) -> None:
        """Reads what the stage needs: for ``fit`` both parts, which must have the same categories."""
        if stage == "fit" and self.train_dataset.categories != self.val_dataset.categories:
            raise InputError(
                f"{self.val_annotations}: its categories are not those of {self.train_annotations}; "
                "both files must list the same ids and names"
            )

    def train_dataloader(self) -> DataLoader[Item]:
        """Loads shuffled, augmented batches."""
        rank, world_size = self._place()
        sampler = TrainSampler(len(self.train_dataset), self.seed, rank, world_size)
        return self._loader(self.train_dataset, sampler=sampler, batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader[Item]:
        """Loads every validation image once over all processes, whose last batch can be empty."""
        batches = ValBatches(len(self.val_dataset), self.batch_size, *self._place())
        return self._loader(self.val_dataset, batch_sampler=batches)

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _loader(self, dataset: CocoDataset, **order: Any) -> DataLoader[Item]:
        return _OneLineErrors(
            dataset,
            collate_fn=collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            **order,
        )


class _OneLineErrors(DataLoader[Item]):
    """Gives an InputError from a worker as it was raised; torch puts the worker's traceback before it."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        try:
            yield from super().__iter__()
        except InputError as error:
            raise InputError(str(error).strip().rpartition(f"{InputError.__name__}: ")[2]) from None
