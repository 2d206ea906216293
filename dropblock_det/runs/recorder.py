"""A run's folder: its checkpoints, its resolved config, and the record of its epochs.

::

    config.yaml            every setting, resolved
    checkpoints/           best.ckpt, and the last two epochs' (last-NNNNN.ckpt)
    logs/version_N/        metrics.csv and TensorBoard events; a resumed run opens the next N
    summary.json           one entry per epoch, and what the run ran on
    val_detections.json    detections on a few validation images
    curves.png, detections.png
"""

import hashlib
import math
import os
import platform
import resource
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from dropblock_det.errors import InputError
from dropblock_det.files import read_json, read_yaml, whole_file, write_figure, write_json
from dropblock_det.tasks.detection.pictures import curves_figure, detections_figure

SHOWN_IMAGES = 8
SHOWN_DETECTIONS = 50


def checkpoint_callbacks(folder: Path) -> list[ModelCheckpoint]:
    """Returns the two that write ``best.ckpt`` (highest mAP) and the last two epochs' checkpoints."""
    common: dict[str, Any] = {"dirpath": folder / "checkpoints", "enable_version_counter": False}
    common |= {"mode": "max", "save_on_train_epoch_end": True, "auto_insert_metric_name": False}
    return [
        ModelCheckpoint(filename="best", monitor="mAP", **common),
        ModelCheckpoint(filename="last-{epoch:05d}", monitor="epoch", save_top_k=2, **common),
    ]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its final name, flushes it to the disk, renames it. Reads ours alone."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Saves ``checkpoint``; a kill at any moment leaves the old file or the new one, whole."""
        with whole_file(Path(path)) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: Any, *_: Any, **__: Any) -> dict[str, Any]:
        """As :func:`load_checkpoint`, whatever Lightning asks for."""
        return load_checkpoint(Path(path))


def check_whole(path: Path) -> None:
    """Reads a checkpoint through and compares the checksums that torch.save wrote; torch.load does not.

    Raises:
        InputError: No such file, or not the bytes that were written.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint; give a .ckpt file that tools/train.py wrote")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, ValueError, EOFError, NotImplementedError, zlib.error, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not a whole checkpoint ({error})") from None
    if damaged is not None:
        raise InputError(f"{path}: not a whole checkpoint ({damaged} has another checksum)")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Loads a checkpoint of ours with ``weights_only=True``, on the CPU.

    Raises:
        InputError: No such file, not a whole checkpoint, one that holds foreign objects, or not ours.
    """
    check_whole(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the broken bytes lead it to
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{path}: not a checkpoint that is safe to load ({reason[:120]})") from None
    ours = isinstance(checkpoint, dict) and "categories" in checkpoint.get("hyper_parameters", {})
    if not ours or "state_dict" not in checkpoint:
        raise InputError(f"{path}: not a checkpoint of dropblock_det; give one that tools/train.py wrote")
    return checkpoint


def newest_checkpoint(folder: Path) -> Path | None:
    """Returns the last epoch's whole checkpoint in a run's folder; a broken one is named and skipped."""
    for path in sorted((folder / "checkpoints").glob("last-*.ckpt"), reverse=True):
        try:
            check_whole(path)
        except InputError as error:
            print(f"skipped: {error}", file=sys.stderr)
        else:
            return path
    return None


def read_config(folder: Path) -> dict[str, Any]:
    """Reads the settings that the run in a folder was started with.

    Raises:
        InputError: There is no run, or its settings can't be read.
    """
    path = folder / "config.yaml"
    if not path.exists():
        raise InputError(f"{path}: no such file, so {folder} has no run to resume")
    return read_yaml(path)


def config_differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yields a line for each setting in which two resolved configs differ."""
    for key in sorted(old.keys() | new.keys()):
        mine, other = old.get(key), new.get(key)
        if isinstance(mine, Mapping) and isinstance(other, Mapping):
            yield from config_differences(mine, other, f"{prefix}{key}.")
        elif mine != other:
            yield f"{prefix}{key}: {mine!r} before, {other!r} now"


def check_same_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuses to resume a run with other settings than those it was started with.

    Raises:
        InputError: With the differences.
    """
    here = {"output": None}  # the folder may have moved
    differences = list(config_differences({**read_config(folder), **here}, {**config, **here}))
    if differences:
        raise InputError(
            f"{folder} holds a run with other settings ({'; '.join(differences)[:400]}); "
            "keep those, or give another --output"
        )


class RunRecord(Callback):
    """Keeps one entry per epoch, in the checkpoint too, and writes ``summary.json`` after each.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.epochs: list[dict[str, Any]] = []
        self._images = 0
        self._wait_s = self._validation_s = 0.0
        self._epoch_start = self._validation_start = self._batch_end = 0.0
        self._init_hash = ""

    def state_dict(self) -> dict[str, Any]:
        """The epochs so far: a resumed run goes on with the same list."""
        return {"epochs": self.epochs, "init_hash": self._init_hash}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back what :meth:`state_dict` gave."""
        self.epochs, self._init_hash = state_dict["epochs"], state_dict["init_hash"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hashes the weights that the run starts from."""
        digest = hashlib.sha256()
        for name, value in pl_module.state_dict().items():
            digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
        self._init_hash = digest.hexdigest()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the epoch's clocks."""
        self._images, self._wait_s, self._validation_s = 0, 0.0, 0.0
        self._epoch_start = self._batch_end = time.perf_counter()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Logs how long this step waited for its data, in seconds."""
        wait = time.perf_counter() - self._batch_end
        self._wait_s += wait
        self._images += len(batch[0]) * trainer.world_size
        pl_module.log("data_wait_s", wait, prog_bar=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs float16's loss scale, which falls at an overflow, and starts the wait for the next batch."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            pl_module.log("loss_scale", scaler.get_scale())
        self._batch_end = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the validation's clock."""
        self._validation_start = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the validation's time, and writes the few images that people look at."""
        if trainer.sanity_checking:
            return
        self._validation_s += time.perf_counter() - self._validation_start
        if trainer.is_global_zero:
            samples = shown_detections(trainer.datamodule, pl_module.detections)  # type: ignore[attr-defined, arg-type]
            write_json(self.folder / "val_detections.json", samples)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds the epoch's entry and rewrites ``summary.json``."""
        now = time.perf_counter()
        metrics = {name: _finite(value) for name, value in trainer.callback_metrics.items()}
        train_s = now - self._epoch_start - self._validation_s
        self.epochs.append(
            {
                "epoch": trainer.current_epoch,
                "step": trainer.global_step,
                "loss": metrics.get("loss_epoch"),
                **{
                    name: metrics.get(name) for name in ("val_loss", "mAP", "AP50", "AP75", "p", "drop_share")
                },
                "images_per_s": self._images / train_s,
                "data_wait_share": self._wait_s / train_s,
                "wall_s": now - self._epoch_start,
            }
        )
        if trainer.is_global_zero:
            self._write(trainer, pl_module, finished=False)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Marks the run finished and draws its pictures."""
        if not trainer.is_global_zero or trainer.interrupted:
            return
        write_figure(self.folder / "curves.png", curves_figure(self.epochs))
        samples = read_json(self.folder / "val_detections.json")
        write_figure(self.folder / "detections.png", detections_figure(samples))
        self._write(trainer, pl_module, finished=True)

    def _write(self, trainer: Trainer, pl_module: LightningModule, finished: bool) -> None:
        measured = [epoch for epoch in self.epochs if epoch["drop_share"] is not None]
        on_gpu = pl_module.device.type == "cuda"
        summary = {
            "finished": finished,
            "max_epochs": trainer.max_epochs,
            "epochs": self.epochs,
            "images_per_s": _mean(epoch["images_per_s"] for epoch in self.epochs),
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else _peak_resident_bytes(),
            "drop_share": {
                "asked": _mean(epoch["p"] for epoch in measured),
                "realised": _mean(epoch["drop_share"] for epoch in measured),
            }
            if measured
            else None,
            "trainable_parameters": sum(p.numel() for p in pl_module.parameters() if p.requires_grad),
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("torch", "torchvision", "lightning", "dropblock_det")},
            },
            "hardware": {
                "device": torch.cuda.get_device_name() if on_gpu else pl_module.device.type,
                "cpu": platform.processor() or platform.machine(),
                "cores": os.cpu_count(),
                "processes": trainer.world_size,
            },
            "data_hash": trainer.datamodule.data_hash(),  # type: ignore[attr-defined]
            "init_hash": self._init_hash,
        }
        write_json(self.folder / "summary.json", summary)


def shown_detections(datamodule: Any, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns ground truth and best detections of a few validation images, always the same ones."""
    coco = datamodule.val_coco
    names = {category["id"]: category["name"] for category in coco.dataset["categories"]}
    validated = sorted(datamodule.val_dataset.ids)
    with_boxes = [image_id for image_id in validated if coco.imgToAnns[image_id]] or validated
    samples = []
    for image_id in with_boxes[:SHOWN_IMAGES]:
        info = coco.imgs[image_id]
        best = sorted((r for r in results if r["image_id"] == image_id), key=lambda r: -r["score"])
        samples.append(
            {
                "image_id": image_id,
                "file": str(datamodule.val_dataset.path(image_id).resolve()),
                "width": info["width"],
                "height": info["height"],
                "ground_truth": [
                    {"bbox": a["bbox"], "category": names[a["category_id"]]} for a in coco.imgToAnns[image_id]
                ],
                "detections": [
                    {"bbox": r["bbox"], "category": names[r["category_id"]], "score": r["score"]}
                    for r in best[:SHOWN_DETECTIONS]
                ],
            }
        )
    return samples


def is_finished(folder: Path) -> bool:
    """Returns whether the folder holds a run that came to its end."""
    return (folder / "summary.json").is_file() and bool(read_summary(folder)["finished"])


def read_summary(folder: Path) -> dict[str, Any]:
    """Reads a run's ``summary.json``.

    Raises:
        InputError: It is missing, or not what a run writes.
    """
    summary = read_json(folder / "summary.json")
    if not isinstance(summary, dict) or not {"finished", "epochs"} <= summary.keys():
        raise InputError(f"{folder}/summary.json: not the record of a run; remove it to go on with the run")
    return summary


def _finite(value: Any) -> float | None:
    value = float(value)
    return value if math.isfinite(value) else None


def _mean(values: Iterator[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


def _peak_resident_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
