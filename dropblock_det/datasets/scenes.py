"""The embedded default: generated scenes, written in COCO's format and read by the same loader."""

import json
import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from msgspec import Meta
from PIL import Image

from dropblock_det.arguments import Seed, checked_arguments
from dropblock_det.datasets.coco import CocoDataModule
from dropblock_det.errors import InputError, disk_errors
from dropblock_det.files import read_json, write_json

SIZE = 128  # pixels per side
VERSION = 2  # of the drawing: part of the folder's name
Size = Annotated[int, Meta(ge=1, le=1_000_000)]  # scenes; these take 18 GB
MAX_OBJECTS = 6
SIDES = (24, 30, 38, 48, 60, 76)  # pixels
MIN_VISIBLE = 0.5  # share of an object that later ones leave visible

# One name per shape, and the colour around which its objects vary.
CLASSES = {
    "disk": (215, 60, 50),
    "square": (60, 95, 215),
    "triangle": (235, 200, 50),
    "ring": (60, 190, 90),
    "cross": (200, 80, 200),
}
COLORS = np.array(list(CLASSES.values()))

# Directions with integer coordinates on the circle of radius 65: drawing needs no rounding, and every
# machine gets the same pixels.
RADIUS = 65
DIRECTIONS = [
    (s * a, t * b)
    for x, y in ((65, 0), (63, 16), (60, 25), (56, 33), (52, 39))
    for a, b in ((x, y), (y, x))
    for s in (1, -1)
    for t in (1, -1)
]


def shape_mask(name: str, side: int, direction: tuple[int, int]) -> np.ndarray:
    """Draws a shape.

    Args:
        name: One of :data:`CLASSES`.
        side: Diameter of the circle around it, in pixels.
        direction: Where its first axis points: one of :data:`DIRECTIONS`.

    Returns:
        bool array (side, side).
    """
    row, column = np.mgrid[0:side, 0:side] * 2 - (side - 1)  # half pixels from the centre
    distance = row * row + column * column
    disk = distance <= side * side
    a, b = direction
    u, v = np.abs(column * a + row * b), row * a - column * b  # along the axes, times RADIUS
    reach = side * RADIUS
    if name == "disk":
        return disk
    if name == "ring":
        return disk & (4 * distance >= side * side)
    if name == "square":
        return 2 * np.maximum(u, np.abs(v)) ** 2 <= reach * reach
    if name == "triangle":  # equilateral: tip at v = -reach, base at reach / 2; 4/7 is near tan(30 degrees)
        return (2 * v <= reach) & (7 * u <= 4 * (v + reach))
    if name == "cross":
        return disk & (4 * np.minimum(u, np.abs(v)) <= reach)
    raise AssertionError(name)


def draw_background(rng: np.random.Generator) -> np.ndarray:
    """Draws coloured clouds, thin lines in the objects' own colours, and grain: int (SIZE, SIZE, 3)."""
    cells = 4
    shape = (cells + 1, cells + 1)
    corners = rng.integers(50, 190, (*shape, 1)) + rng.integers(-30, 31, (*shape, 3))
    step = SIZE // cells
    cell, offset = np.divmod(np.arange(SIZE), step)
    weight = offset[:, None, None]
    rows = corners[cell] * (step - weight) + corners[cell + 1] * weight
    weight = offset[None, :, None]
    pixels = (rows[:, cell] * (step - weight) + rows[:, cell + 1] * weight) // step**2
    row, column = np.mgrid[0:SIZE, 0:SIZE]
    for _ in range(rng.integers(1, 5)):
        a, b = DIRECTIONS[rng.integers(len(DIRECTIONS))]
        at_row, at_column = rng.integers(0, SIZE, 2).tolist()
        width = int(rng.integers(1, 4))
        line = np.abs((row - at_row) * a - (column - at_column) * b) <= width * RADIUS // 2
        pixels[line] = COLORS[rng.integers(len(COLORS))]
    return pixels + rng.integers(-14, 15, (SIZE, SIZE, 1))


def draw_scene(rng: np.random.Generator) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """Draws one scene.

    Objects lie over one another, their colours vary around their class', one in ten has another class'
    colour, and their surface is shaded and striped. One scene in sixteen has no object.

    Returns:
        The picture, uint8 (SIZE, SIZE, 3), and per object its class' number from 0 and the bool mask
        (SIZE, SIZE) of what is visible of it.
    """
    pixels = draw_background(rng)
    objects: list[tuple[int, np.ndarray]] = []
    wanted = 0 if rng.integers(16) == 0 else int(rng.integers(1, MAX_OBJECTS + 1))
    for _ in range(wanted):
        label, side = int(rng.integers(len(CLASSES))), int(rng.choice(SIDES))
        shape = shape_mask(list(CLASSES)[label], side, DIRECTIONS[rng.integers(len(DIRECTIONS))])
        top, left = rng.integers(0, SIZE - side + 1, 2).tolist()
        window = (slice(top, top + side), slice(left, left + side))
        mask = np.zeros((SIZE, SIZE), dtype=bool)
        mask[window] = shape
        if any((other & ~mask).sum() < MIN_VISIBLE * other.sum() for _, other in objects):
            continue
        color = COLORS[label if rng.integers(10) else rng.integers(len(COLORS))] + rng.integers(-35, 36, 3)
        ramp = np.arange(side)
        shade = 70 + 50 * ramp // side - 18 * (ramp // int(rng.integers(3, 7)) % 2)  # percent
        surface = color * (shade[:, None, None] if rng.integers(2) else shade[None, :, None]) // 100
        pixels[window] = np.where(shape[:, :, None], surface, pixels[window])
        objects = [(number, other & ~mask) for number, other in objects]
        objects.append((label, mask))
    return np.clip(pixels, 0, 255).astype(np.uint8), objects


def write_scenes(folder: Path, train_size: int, val_size: int, seed: int) -> None:
    """Writes the scenes to ``folder``, whole or not at all; does nothing where they already are.

    Raises:
        InputError: ``folder`` holds something else; it is never overwritten, as a run may be reading it.
    """
    manifest = {"scenes": VERSION, "train": train_size, "val": val_size, "seed": seed}
    with disk_errors(folder):
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
                new = Path(temporary, "new")
                for part, (name, size) in enumerate((("train", train_size), ("val", val_size))):
                    _write_part(new, name, size, (seed, part), manifest)
                write_json(new / "manifest.json", manifest)
                try:
                    new.rename(folder)
                except OSError:
                    if not folder.exists():  # else another process was faster
                        raise
    if not (folder / "manifest.json").is_file() or read_json(folder / "manifest.json") != manifest:
        raise InputError(
            f"{folder}: holds something else than these scenes; move it or give another data.root"
        )


def _write_part(root: Path, name: str, size: int, seed: tuple[int, int], info: dict[str, Any]) -> None:
    (root / name).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(1, size + 1):
        pixels, objects = draw_scene(np.random.default_rng((*seed, number)))
        file = f"{number:06d}.png"
        Image.fromarray(pixels).save(root / name / file)
        images.append({"id": number, "file_name": file, "width": SIZE, "height": SIZE})
        for label, mask in objects:
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            top, left = int(rows[0]), int(columns[0])
            box = [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": label + 1,
                    "bbox": box,
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES, start=1)]
    content = {"info": info, "images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / f"{name}.json").write_text(json.dumps(content))


class ScenesDataModule(CocoDataModule):
    """Generated scenes: five shapes at several sizes, over one another, on clouds and lines.

    They are written in COCO's format on first use, to a folder in ``root`` whose name says what it holds:
    runs with other sizes or seeds leave it alone.

    Args:
        root: Folder of the scenes' folders.
        train_size: Number of training scenes.
        val_size: Number of validation scenes.
        scenes_seed: Seed of the scenes themselves.
        train_subset_seed: Seed of the training subset alone.
        **loading: As :class:`CocoDataModule`.
    """

    def __init__(
        self,
        root: str = "data/scenes",
        train_size: Size = 512,
        val_size: Size = 128,
        scenes_seed: Seed = 0,
        train_subset_seed: Seed = 0,
        **loading: Any,
    ) -> None:
        numbers = {"train_size": train_size, "val_size": val_size, "scenes_seed": scenes_seed}
        checked_arguments(ScenesDataModule, numbers, "data.")
        super().__init__(
            os.path.join(root, f"train{train_size}_val{val_size}_seed{scenes_seed}_v{VERSION}"),
            train_images="train",
            train_annotations="annotations/train.json",
            val_images="val",
            val_annotations="annotations/val.json",
            train_subset_seed=train_subset_seed,
            **loading,
        )
        self.train_size, self.val_size, self.scenes_seed = train_size, val_size, scenes_seed

    @property
    def categories(self) -> list[dict[str, Any]]:
        """One ``{"label", "id", "name"}`` per shape; known before the scenes are written."""
        return [{"label": number, "id": number, "name": name} for number, name in enumerate(CLASSES, start=1)]

    def prepare_data(self) -> None:
        """Writes the scenes where they are not there yet."""
        write_scenes(self.root, self.train_size, self.val_size, self.scenes_seed)
