"""Images and boxes of a COCO instances file. Loader processes import this file, and so no Lightning."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import to_dtype

from dropblock_det.datasets.annotations import Annotations, load_annotations
from dropblock_det.datasets.augment import Augmentation, draw
from dropblock_det.datasets.images import ImageCache, read_image
from dropblock_det.errors import InputError

Item = tuple[Tensor, dict[str, Any]]

MIN_SIDE = 0.1  # pixels; smaller sides can vanish in float32 when the detector resizes
FLIP = Augmentation()


class CocoDataset(Dataset[Item]):
    """The images and boxes of a COCO instances file.

    An item is ``(image, target)``: the image float32 (3, H, W) in [0, 1], the target ``{"boxes": float32
    (n, 4) as x1, y1, x2, y2 in pixels, "labels": int64 (n,) from 1, "image_id": int}``. Crowd regions are
    left out (evaluation still has them, in :attr:`annotations`), images without boxes are kept, boxes are
    cut to the image, and boxes with a side under 0.1 pixel are left out and counted in
    :attr:`dropped_boxes`.

    ``dataset[i]`` is the image as it is; ``dataset[i, draw_seed]`` the augmented one.

    Attributes:
        annotations: The original annotations; worker processes do not get them.
        categories: One ``{"label", "id", "name"}`` per category: labels 1..K in the order of the COCO ids.
        ids: Image ids, in the order of the items.
        dropped_boxes: Number of degenerate boxes left out.

    Args:
        annotations: The instances JSON.
        images: Folder of the images.
        augmentation: What to do to images that are asked for with a draw seed.
        subset: Number of images, drawn with ``seed``; None for all.
        seed: Seed of the subset.
        cache_mb: Keep up to this many MB of decoded images in memory.

    Raises:
        InputError: Folder, file, records or images are missing or wrong.
    """

    def __init__(
        self,
        annotations: str | Path,
        images: str | Path,
        augmentation: Augmentation = FLIP,
        subset: int | None = None,
        seed: int = 0,
        cache_mb: int = 0,
    ) -> None:
        self.folder = Path(images)
        if not self.folder.is_dir():
            raise InputError(f"{self.folder}: no such image folder; check the path")
        self.annotations = load_annotations(Path(annotations))
        self.categories = category_table(self.annotations)
        by_id = {image.id: image for image in self.annotations.images}
        self.ids = _choose(list(by_id), subset, seed)
        self.files = [by_id[image_id].file_name for image_id in self.ids]
        self.sizes = np.array([(by_id[image_id].height, by_id[image_id].width) for image_id in self.ids])
        for file in self.files:
            if not os.path.isfile(self.folder / file):
                raise InputError(f"{self.folder / file}: no such image{self._hint(file)}")
        self._index_boxes()
        self.pipeline = augmentation.pipeline()
        self.cache = ImageCache(self.sizes, cache_mb) if cache_mb else None

    def _hint(self, file: str) -> str:
        for name in os.listdir(self.folder):
            if name == file:
                return "; what has this name is no file, or a link that leads to none"
            if name.lower() == file.lower():
                return f"; the folder has {name!r}: upper and lower case differ"
        return "; check that the folder goes with the annotations"

    def _index_boxes(self) -> None:
        # Flat arrays rather than lists of lists: forked workers share them without copying.
        rows = self.annotations.rows
        rows = rows[np.isin(rows["image_id"], self.ids) & ~rows["iscrowd"]]
        owner = np.searchsorted(self.ids, rows["image_id"])
        order = np.argsort(owner, kind="stable")
        rows, owner = rows[order], owner[order]
        labels = np.searchsorted([category["id"] for category in self.categories], rows["category_id"]) + 1
        boxes = rows["bbox"].copy()
        boxes[:, 2:] += boxes[:, :2]
        boxes = boxes.clip(0, np.tile(self.sizes[owner][:, ::-1], 2))
        kept = (boxes[:, 2:] - boxes[:, :2] >= MIN_SIDE).all(axis=1)
        self.dropped_boxes = int((~kept).sum())
        self.boxes = torch.from_numpy(boxes[kept].astype(np.float32))
        self.labels = torch.from_numpy(labels[kept])
        self.offsets = np.searchsorted(owner[kept], np.arange(len(self.ids) + 1))

    def path(self, image_id: int) -> Path:
        """Returns the file of an image."""
        return self.folder / self.files[self.ids.index(image_id)]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, key: int | tuple[int, int]) -> Item:
        index, seed = key if isinstance(key, tuple) else (key, None)
        height, width = self.sizes[index].tolist()
        image = self.cache.get(index) if self.cache else None
        if image is None:
            image = read_image(self.folder / self.files[index], width, height)
            if self.cache:
                self.cache.put(index, image)
        here = slice(self.offsets[index], self.offsets[index + 1])
        boxes, labels = self.boxes[here].clone(), self.labels[here].clone()
        if seed is not None:
            image, boxes, labels = draw(self.pipeline, image, boxes, labels, seed)
        image = to_dtype(image, torch.float32, scale=True)
        return image, {"boxes": boxes, "labels": labels, "image_id": self.ids[index]}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "annotations"}


def category_table(annotations: Annotations) -> list[dict[str, Any]]:
    """Returns one ``{"label", "id", "name"}`` per category: labels 1..K in the order of the COCO ids."""
    return [
        {"label": label, "id": category.id, "name": category.name}
        for label, category in enumerate(annotations.categories, start=1)
    ]


def collate(items: list[Item]) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Returns (images, targets) as two lists, as torchvision's detectors take them."""
    return [image for image, _ in items], [target for _, target in items]


def _choose(ids: list[int], subset: int | None, seed: int) -> list[int]:
    if subset is None:
        return ids
    if not 1 <= subset <= len(ids):
        raise InputError(f"subset: got {subset}, the data set has {len(ids)} images; give 1 to {len(ids)}")
    chosen = np.random.default_rng(seed).choice(len(ids), subset, replace=False)
    return [ids[index] for index in np.sort(chosen)]
