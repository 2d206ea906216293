"""What a training shows in the terminal: what it does, how long it takes, and what came of it."""

import contextlib
import logging
import re
import sys
import time
import warnings
from collections.abc import Iterator, Sized
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich.table import Table

from dropblock_det.callbacks import Regularize
from dropblock_det.commands import PlainConsole, started_as
from dropblock_det.runs.folder import best_checkpoint, goes_on
from dropblock_det.runs.record import read_record
from dropblock_det.runs.recorder import RunRecord

# Lightning's messages about itself and other products, and its and torch's about our own default numbers
# where the data or the machine are small. None is about the user's data or settings.
NOISE = (
    "💡 Tip",
    "`weights_only` was not set",
    "`isinstance\\(treespec, LeafSpec\\)` is deprecated",
    "Checkpoint directory .* exists and is not empty",
    "Experiment logs directory .* exists and is not empty",
    "Loading `train_dataloader` to estimate",
    "(GPU|TPU|HPU) available: ",
    "Using (bfloat16|16bit) Automatic Mixed Precision",
    "Seed set to ",
    "`Trainer.fit` stopped: `max_epochs",
    "This DataLoader will create .* worker processes in total",
    "The number of training batches .* is smaller than the logging interval",
)
STEPS, SECONDS = 20, 10  # after the first step: whichever comes first is enough to say how long it will take


@contextlib.contextmanager
def calm(verbose: bool = False) -> Iterator[None]:
    """Keeps :data:`NOISE` out of the terminal, and nothing else.

    Args:
        verbose: Let it through.
    """
    if verbose:
        yield
        return

    def wanted(record: logging.LogRecord) -> bool:
        return not re.match("|".join(NOISE), record.getMessage())

    names = ("lightning", "lightning.pytorch", "lightning.fabric", "")
    handlers = {handler for name in names for handler in logging.getLogger(name).handlers}
    with warnings.catch_warnings():
        for message in NOISE:
            warnings.filterwarnings("ignore", message)
        for handler in handlers:
            handler.addFilter(wanted)
        try:
            yield
        finally:
            for handler in handlers:
                handler.removeFilter(wanted)


def shows_a_bar(wanted: bool | None) -> bool:
    """Returns whether there is a progress bar: in a terminal, unless the trainer's setting says no."""
    return wanted is not False and sys.stdout.isatty()


class Bar(RichProgressBar):
    """Lightning's, with values that are on the host: it shows none for which it would wait for the device."""

    def get_metrics(self, trainer: Trainer, pl_module: Any) -> dict[str, Any]:
        """Adds the loss of the step before."""
        shown = {"loss": pl_module.seen_loss} if trainer.training and pl_module.seen_loss is not None else {}
        for name in ("data_wait_s", "skipped_steps"):
            if (value := trainer.callback_metrics.get(name)) is not None:
                shown[name] = value.item()
        lightnings = super().get_metrics(trainer, pl_module)
        lightnings.pop("v_num", None)  # of a logger's folder; what is left has to fit into the line
        return lightnings | shown

    def _get_train_description(self, current_epoch: int) -> str:
        """Counts epochs from 1, as all else that we print does."""
        last = self.trainer.max_epochs or -1
        words = f"Epoch {current_epoch + 1}{f'/{last}' if last > 0 else ''}"
        return words.ljust(len(self.validation_description))  # else the columns move


class Story(Callback):
    """Prints what is trained on what, then how long it will take, and a line per epoch where no bar shows it.

    Args:
        recorder: The run's record, a callback before this one.
        lines: Print the line per epoch.
    """

    def __init__(self, recorder: RunRecord, lines: bool) -> None:
        self.recorder, self.lines = recorder, lines
        self._steps = -1  # without the first, which also warms up
        self._start = 0.0
        self._estimated = False

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Prints what is trained, on what, and where the results go."""
        if not trainer.is_global_zero:
            return
        name = pl_module.hparams.get("name", type(pl_module).__name__)
        parameters = sum(p.numel() for p in pl_module.parameters()) / 1e6
        root = getattr(trainer.datamodule, "root", None)  # type: ignore[attr-defined]
        images = _amount(trainer.train_dataloader) + (f" of {root}" if root else "")
        first, last = trainer.current_epoch + 1, trainer.max_epochs
        until = f"epochs {first} to {last}" if last and last > 0 else f"up to step {trainer.max_steps}"
        device = torch.cuda.get_device_name() if pl_module.device.type == "cuda" else pl_module.device.type
        processes = f"{trainer.world_size} processes on " if trainer.world_size > 1 else ""
        _print(
            f"Training {name} ({parameters:.1f} million parameters; {_regularizers(trainer)}) on {images}, "
            f"{trainer.num_training_batches} batches an epoch, validating on "
            f"{_amount(trainer.val_dataloaders)}; {until}, {processes}{device}, in {trainer.precision}."
        )
        folder = self.recorder.folder
        _print(f"Results go to {folder}. After Ctrl-C, {goes_on(folder)}.")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Prints once how long the training will take."""
        now = time.perf_counter()
        self._steps += 1
        if self._steps == 0:
            self._start = now
        taken = now - self._start
        if self._estimated or self._steps < 1 or (self._steps < STEPS and taken < SECONDS):
            return
        self._estimated = True
        left = float(trainer.estimated_stepping_batches) - trainer.global_step
        if trainer.is_global_zero and 0 < left < float("inf"):
            seconds = left * trainer.accumulate_grad_batches * taken / self._steps
            _print(f"The training steps will take about {duration(seconds)}, validation comes on top.")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Prints the epoch's line, and sets aside the time of the validation."""
        self._estimated = True  # from here on the epochs' lines show it
        if not (self.lines and trainer.is_global_zero):
            return
        epoch = self.recorder.epochs[-1]
        number, last = (epoch["epoch"] or 0) + 1, trainer.max_epochs or -1
        values = [f"{metric.title} {metric.format(epoch.get(metric.name))}" for metric in pl_module.metrics]
        times = [duration(epoch["wall_s"] or 0)]
        if last > number:
            times.append(f"about {duration((last - number) * (epoch['wall_s'] or 0))} left")
        _print("  ".join([f"epoch {number}{f'/{last}' if last > 0 else ''}", *values, ", ".join(times)]))


def duration(seconds: float) -> str:
    """Returns a time in the unit in which it is a small number."""
    for limit, size, unit in ((90, 1, "s"), (90 * 60, 60, "min")):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 3600:.1f} h"


def print_result(folder: Path) -> None:
    """Prints the best and the last epoch of a run, its files, and how to evaluate it."""
    record = read_record(folder)
    assert record is not None
    table = Table(title=str(folder))
    for column in ("epoch", *(metric.title for metric in record.metrics)):
        table.add_column(column, justify="right")
    best = record.best(record.headline)
    for name, epoch in (("best", best), ("last", record.epochs[-1])):
        if epoch:
            values = (metric.format(epoch.get(metric.name)) for metric in record.metrics)
            table.add_row(f"{name} ({(epoch['epoch'] or 0) + 1})", *values)
    console = PlainConsole()
    console.print(table)
    console.print(f"pictures    {folder}/samples.png, {folder}/curves.png")
    checkpoint = best_checkpoint(folder)
    if checkpoint.exists():  # people remove what takes hundreds of MB
        console.print(f"checkpoint  {checkpoint}")
        console.print(f"evaluate    {started_as('evaluate')} {checkpoint}")
        console.print(f"predict     {started_as('predict')} {checkpoint} IMAGES")


def _regularizers(trainer: Trainer) -> str:
    parts = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Regularize) and callback.handle is not None:
            p = "" if callback.p is None else f" with p {callback.p:g}"
            parts.append(f"{callback.name}{p} at {len(callback.handle.sites)} sites")
    return " and ".join(parts) or "no regularizer"


def _amount(loader: Any) -> str:
    dataset = getattr(loader, "dataset", None)
    return f"{len(dataset)} images" if isinstance(dataset, Sized) else "batches of a loader"


def _print(line: str) -> None:
    PlainConsole().print(line)  # flushed: a log shows it at once
