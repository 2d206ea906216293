"""A run's checkpoints: written whole, loaded safely, the best and the last two kept."""

import os
import shutil
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import msgspec
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from msgspec import Meta

from dropblock_det.errors import InputError
from dropblock_det.files import whole_file
from dropblock_det.runs.folder import best_checkpoint, check_whole, last_checkpoints
from dropblock_det.runs.recorder import RunRecord

KEPT = 2  # of the last epochs: one to resume from, and one more in case it is damaged


class _Category(TypedDict):
    label: int
    id: int
    name: str


class _HyperParameters(TypedDict):
    categories: Annotated[list[_Category], Meta(min_length=1)]


class _Regularizer(TypedDict):
    """The rest is the arguments of :func:`~dropblock_det.layers.make_regularizer`."""

    name: str
    sites: dict[str, float]


class _Content(TypedDict):
    """What of a checkpoint is read here; the rest is Lightning's and the arguments of classes."""

    hyper_parameters: _HyperParameters
    validation_data: dict[str, Any]
    state_dict: dict[str, torch.Tensor]
    task: NotRequired[str]
    precision: NotRequired[str]
    regularizers: NotRequired[list[_Regularizer]]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its final name, flushes it to the disk, renames it. Reads ours alone."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Saves ``checkpoint``; a kill at any moment leaves the old file or the new one, whole."""
        with whole_file(Path(path)) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: Any, *_: Any, **__: Any) -> dict[str, Any]:
        """As :func:`load_checkpoint`, whatever Lightning asks for."""
        return load_checkpoint(Path(path))


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
    try:
        msgspec.convert(checkpoint, _Content)
    except ValueError as error:  # msgspec's, or the UnicodeError of a lone surrogate
        raise InputError(
            f"{path}: not a checkpoint of dropblock_det ({error}); give one that a training wrote"
        ) from None
    return checkpoint


class Checkpoints(Checkpoint):
    """Saves each epoch, and keeps the last two and the best.

    Which epoch is the best, the record knows, and it moves and resumes with the run. (Lightning's
    ModelCheckpoint forgets the best score when the folder's name changes, and leaves what an interrupted
    run had saved.)

    Args:
        recorder: the run's record; best is the headline's best epoch there.
    """

    def __init__(self, recorder: RunRecord) -> None:
        self.recorder = recorder

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called after every other callback, the recorder among them."""
        folder = self.recorder.folder
        saved = folder / "checkpoints" / ".last.ckpt"
        trainer.save_checkpoint(saved)
        if not trainer.is_global_zero:
            return
        record = self.recorder.record()
        best = record.best(record.headline)
        if best is None or best["epoch"] == trainer.current_epoch:
            _give_content(saved, best_checkpoint(folder))
        # Last of all: a run killed before this line does the epoch again, and decides again.
        newest = saved.replace(folder / "checkpoints" / f"last-{trainer.current_epoch:05d}.ckpt")
        kept = [path for path in last_checkpoints(folder) if path <= newest][:KEPT]
        for path in last_checkpoints(folder):
            if path not in kept:
                path.unlink()


def _give_content(source: Path, target: Path) -> None:
    """Makes ``target`` the same file as ``source``, or a copy where the disk knows no hard links."""
    link = target.with_name(f".{target.name}.link")
    link.unlink(missing_ok=True)
    try:
        os.link(source, link)
    except OSError:
        with whole_file(target) as file, source.open("rb") as content:
            shutil.copyfileobj(content, file)
    else:
        link.replace(target)
