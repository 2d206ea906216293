"""The callback that writes a run's record, an entry per epoch, and draws its pictures at the end."""

import hashlib
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, Trainer

from dropblock_det.errors import InputError
from dropblock_det.files import write_figure
from dropblock_det.runs.folder import CONFIG_NAME, read_config
from dropblock_det.runs.outcomes import write_outcomes
from dropblock_det.runs.pictures import curves_figure, samples_figure
from dropblock_det.runs.record import Epoch, Record, finite, read_record, write_record
from dropblock_det.tasks.evaluation import Sample


class RunRecord(Callback):
    """Keeps an entry per epoch of a TaskModule, in the checkpoint too, and writes ``record.json`` after each.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.epochs: list[Epoch] = []
        self._samples: tuple[Sample, ...] = ()
        self._facts: dict[str, Any] = {}  # of the record: what stays the same over the run
        self._init_hash = self._data_hash = ""
        self._measured: Epoch = {}  # by this epoch's validation
        self._images = 0
        self._wait_s = self._validation_s = 0.0
        self._epoch_start = self._validation_start = self._batch_end = 0.0

    def state_dict(self) -> dict[str, Any]:
        """The epochs so far: a resumed run goes on with the same list."""
        return {"epochs": self.epochs, "init_hash": self._init_hash, "data_hash": self._data_hash}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back what :meth:`state_dict` gave."""
        self.epochs, self._init_hash = state_dict["epochs"], state_dict["init_hash"]
        self._data_hash = state_dict.get("data_hash", "")  # older versions kept none

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Hashes the weights that the run starts from."""
        digest = hashlib.sha256()
        for name, value in pl_module.state_dict().items():
            plain = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(name.encode() + plain.numpy().tobytes())
        self._init_hash = digest.hexdigest()

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Refuses to go on with other data, and notes what stays the same over the run.

        Raises:
            InputError: The annotations, or the choice of images, changed since the run was started.
        """
        data_hash = trainer.datamodule.data_hash()  # type: ignore[attr-defined]
        if self._data_hash and self._data_hash != data_hash:
            raise InputError(
                f"{self.folder}: the annotations or the choice of images have changed since the run was "
                "started; bring them back, or give another --output"
            )
        self._data_hash = data_hash
        if previous := read_record(self.folder):
            self._samples = previous.samples
        on_gpu = pl_module.device.type == "cuda"
        packages = ("torch", "torchvision", "lightning", "dropblock_det")
        self._facts = {
            "task": pl_module.task,
            "metrics": pl_module.metrics,
            "headline": pl_module.headline,
            "max_epochs": trainer.max_epochs if (trainer.max_epochs or -1) > 0 else None,
            "seed": int(os.environ.get("PL_GLOBAL_SEED", 0)),
            "config": read_config(self.folder) if (self.folder / CONFIG_NAME).exists() else {},
            "trainable_parameters": sum(p.numel() for p in pl_module.parameters() if p.requires_grad),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
            "hardware": {
                "device": torch.cuda.get_device_name() if on_gpu else pl_module.device.type,
                "cpu": platform.processor() or platform.machine(),
                "cores": os.cpu_count(),
                "processes": trainer.world_size,
            },
            "data_hash": self._data_hash,
            "init_hash": self._init_hash,
        }

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Starts the epoch's clocks."""
        self._images, self._wait_s, self._validation_s, self._measured = 0, 0.0, 0.0, {}
        self._epoch_start = self._batch_end = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Logs how long this step waited for its data, in seconds."""
        wait = time.perf_counter() - self._batch_end
        self._wait_s += wait
        self._images += len(pl_module.image_ids(batch)) * trainer.world_size
        pl_module.log("data_wait_s", torch.tensor(wait))  # on the host, as all that the host knows

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs float16's loss scale, which falls at an overflow, and starts the wait for the next batch."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            pl_module.log("loss_scale", torch.tensor(scaler.get_scale()))
        self._batch_end = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Starts the validation's clock."""
        self._validation_start = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Takes the validation's time, its metrics, and what it leaves to look at."""
        if trainer.sanity_checking:
            return
        self._validation_s += time.perf_counter() - self._validation_start
        names = {metric.name for metric in pl_module.metrics}
        self._measured = {
            name: finite(float(value)) for name, value in trainer.callback_metrics.items() if name in names
        }
        if pl_module.evaluation is not None:
            self._samples = pl_module.evaluation.samples
            if pl_module.evaluation.outcomes is not None:
                write_outcomes(self.folder, pl_module.evaluation.outcomes)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Adds the epoch's entry and rewrites the record."""
        now = time.perf_counter()
        train_s = now - self._epoch_start - self._validation_s
        logged = {name: finite(float(value)) for name, value in trainer.callback_metrics.items()}
        epoch: Epoch = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        for metric in pl_module.metrics:  # what the training logs, Lightning averages as NAME_epoch
            epoch[metric.name] = logged.get(f"{metric.name}_epoch", self._measured.get(metric.name))
        for name in logged:
            if name.split("/")[0] in ("p", "drop_share") and not name.endswith("_epoch"):
                epoch[name] = logged.get(f"{name}_epoch", logged[name])
        epoch |= {
            "images_per_s": self._images / train_s,
            "data_wait_share": self._wait_s / train_s,
            "wall_s": now - self._epoch_start,
        }
        self.epochs.append(epoch)
        if trainer.is_global_zero:
            write_record(self.folder, self.record())

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Marks the run finished and draws its pictures."""
        if not trainer.is_global_zero or trainer.interrupted:
            return
        record = self.record("finished")
        write_figure(self.folder / "curves.png", curves_figure(record))
        if shown := [sample for sample in record.samples if sample.file and Path(sample.file).is_file()]:
            write_figure(self.folder / "samples.png", samples_figure(shown))
        write_record(self.folder, record)

    def record(self, status: Literal["running", "finished"] = "running") -> Record:
        """The run as it is now."""
        asked = [epoch.get("p") for epoch in self.epochs if epoch.get("drop_share") is not None]
        realised = _mean(epoch.get("drop_share") for epoch in self.epochs)
        allocated = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        return Record(
            status=status,
            epochs=tuple(self.epochs),
            images_per_s=_mean(epoch.get("images_per_s") for epoch in self.epochs),
            peak_memory_bytes=allocated or _peak_resident_bytes(),
            drop_share={"asked": _mean(iter(asked)), "realised": realised} if asked else None,
            samples=self._samples,
            **self._facts,
        )


def _mean(values: Iterator[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None


def _peak_resident_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
