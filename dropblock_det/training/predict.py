"""Predict: what a checkpoint's model sees on images, as a command and as a function for notebooks."""

import glob
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from dropblock_det.arguments import Count, Share
from dropblock_det.commands import PlainConsole
from dropblock_det.datasets.images import read_image
from dropblock_det.errors import InputError, printable
from dropblock_det.files import check_replaceable, write_figure, write_json
from dropblock_det.runs.checkpoints import load_checkpoint
from dropblock_det.runs.pictures import prediction_figure
from dropblock_det.tasks.detection.coco_eval import detections_to_coco
from dropblock_det.tasks.evaluation import Mark
from dropblock_det.tasks.module import TaskModule
from dropblock_det.training.evaluate import rebuilt
from dropblock_det.training.launch import refusals

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}  # a training's precisions


def load_model(checkpoint: Path | str, device: str = "auto") -> TaskModule:
    """Builds a checkpoint's model for :func:`predict`, in eval mode.

    Its categories, by label, are ``model.hparams["categories"]``.

    Args:
        checkpoint: A .ckpt file that a training wrote.
        device: As torch names it, such as ``cpu`` or ``cuda:1``; ``auto`` is an accelerator if there is one.

    Raises:
        InputError: A checkpoint that is not ours, or a device that is not there.
    """
    path = Path(checkpoint)
    if device == "auto":
        device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    try:
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # unknown, not there, meta
        reason = (str(error).splitlines() or ["not there"])[0][:200]
        raise InputError(f"--device {device}: {reason}; give cpu, cuda, cuda:1 or the like") from None
    return rebuilt(load_checkpoint(path), path).eval().to(device)


def predict(
    model: TaskModule, images: Sequence[Path | str | Tensor], score: float = 0.3, batch_size: int = 4
) -> list[dict[str, Tensor]]:
    """Returns what a model sees on images.

    Args:
        model: From :func:`load_model`.
        images: Files, or RGB images uint8 ``(3, H, W)``. An EXIF rotation isn't applied: boxes refer to the
            stored pixels.
        score: Predictions below it are left out. Those below the model's own ``score_thresh`` always are.
        batch_size: Images per forward.

    Returns:
        One ``{"scores": float32 (n,), "labels": int64 (n,)}`` per image, on the CPU; of a detector also
        ``"boxes"``: float32 ``(n, 4)`` as x1, y1, x2, y2 in pixels.

    Raises:
        InputError: A file is no image, or one that the model can't take.
    """
    found: list[dict[str, Tensor]] = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        read = [image if isinstance(image, Tensor) else read_image(Path(image)) for image in batch]
        found += _seen(model, [model.prepared(image) for image in read], score)
    return found


@refusals()
def predict_files(
    checkpoint: Path,
    images: list[str],
    output: Path = Path("predictions"),
    score: Share = 0.3,
    batch_size: Count = 4,
    device: str = "auto",
) -> list[Path]:
    """Predicts on images: a picture of each, and all predictions in COCO's results format.

    An image that can't be read is named and left out.

    Args:
        checkpoint: A .ckpt file that a training wrote.
        images: Image files, folders that are searched for them, patterns such as 'photos/**/*.jpg'.
        output: Folder for results.json and pictures/; nothing is written elsewhere.
        score: Predictions below it are left out; those below the model's own model.score_thresh always are.
        batch_size: Images per forward.
        device: cpu, cuda, cuda:1, ...; auto is an accelerator if there is one.

    Returns:
        The images that were left out.

    Raises:
        InputError: No images, a checkpoint that is not ours, a device that is not there.
    """
    pictures, results = output / "pictures", output / "results.json"
    root, files = _files(images, pictures)
    check_replaceable(results, checkpoint, *files)
    model = load_model(checkpoint, device)
    pictures.mkdir(parents=True, exist_ok=True)  # or fail before minutes are spent
    categories = model.hparams["categories"]
    names = {category["id"]: category["name"] for category in categories}
    rows: list[dict[str, Any]] = []
    broken: list[Path] = []

    def read(file: Path) -> tuple[Tensor, Tensor]:
        image = read_image(file)
        try:
            return image, model.prepared(image)
        except InputError as error:
            raise InputError(f"{file}: {error}") from None

    console = PlainConsole(stderr=True)
    starts = range(0, len(files), batch_size)
    with ThreadPoolExecutor() as pool:
        for start in track(starts, "predicting", console=console, disable=not console.is_terminal):
            reading = [(file, pool.submit(read, file)) for file in files[start : start + batch_size]]
            whole = []
            for image_id, (file, future) in enumerate(reading, start=start + 1):
                try:
                    whole.append((image_id, file, *future.result()))
                except InputError as error:
                    print(printable(f"skipped: {error}"), file=sys.stderr)
                    broken.append(file)
            seen = _seen(model, [prepared for *_, prepared in whole], score)
            for (image_id, file, image, _), prediction in zip(whole, seen, strict=True):
                name = file.relative_to(root)
                own = _results(image_id, prediction, categories)
                shown = str(name).encode("utf-8", "backslashreplace").decode()
                rows += [{"image_id": image_id, "file_name": shown, **row} for row in own]
                marks = [Mark(names[row["category_id"]], row.get("bbox"), row["score"]) for row in own]
                figure = prediction_figure(image.permute(1, 2, 0).numpy(), marks)
                write_figure(pictures / f"{name}.png", figure)
    write_json(results, rows)
    print(f"{len(files) - len(broken)} images, {len(rows)} predictions with a score of {score} or more")
    print(f"pictures    {pictures}\nresults     {results}")
    if broken:
        print(f"{len(broken)} of {len(files)} images were skipped", file=sys.stderr)
    return broken


def _seen(model: TaskModule, images: list[Tensor], score: float) -> list[dict[str, Tensor]]:
    if not images:
        return []
    dtype = AUTOCAST.get(model.precision)
    with torch.inference_mode(), torch.autocast(model.device.type, dtype, enabled=dtype is not None):
        found = model.predict_step([image.to(model.device) for image in images])
    return [{name: value[each["scores"] >= score].cpu() for name, value in each.items()} for each in found]


def _results(
    image_id: int, prediction: dict[str, Tensor], categories: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    if "boxes" in prediction:
        return detections_to_coco([image_id], [prediction], categories)
    ids = {category["label"]: category["id"] for category in categories}
    pairs = zip(prediction["labels"].tolist(), prediction["scores"].tolist(), strict=True)
    return [{"category_id": ids[label], "score": score} for label, score in pairs]


def _files(given: Sequence[str], pictures: Path) -> tuple[Path, list[Path]]:
    """Returns the images that were meant, each once, and the folder that they all are below.

    Raises:
        InputError: A name or pattern stands for no image.
    """
    ours = Path(os.path.abspath(pictures))  # those of an earlier start are no images
    parents: list[Path] = []
    files: dict[Path, None] = {}  # ordered
    for name in given:
        matches = [name] if os.path.lexists(name) else sorted(glob.glob(name, recursive=True))
        before = len(parents)
        for path in map(Path, map(os.path.abspath, matches)):
            found = _images_in(path) if path.is_dir() else [path]
            found = [file for file in found if ours not in file.parents]
            files |= dict.fromkeys(found)
            parents += [path if path.is_dir() else path.parent] * bool(found)
        if len(parents) == before:
            raise InputError(f"{name}: no such image, and no folder with images; check the name")
    return Path(os.path.commonpath(parents)), list(files)


def _images_in(folder: Path) -> list[Path]:
    """Returns what is named like an image below a folder, sorted, without what is hidden."""
    paths = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    return sorted(p for p in paths if not any(part.startswith(".") for part in p.relative_to(folder).parts))
