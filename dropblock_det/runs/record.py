"""The record of a training run, ``record.json``: written by the run itself, read by whatever asks about it.

An epoch is a dictionary ``{name: value}``; which names are metrics, how they are shown and which of them is
the headline, is in the record too, as its task declared it.
"""

import importlib
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from msgspec import Meta

from dropblock_det.errors import InputError
from dropblock_det.files import checked, read_json, write_json
from dropblock_det.tasks.evaluation import Sample
from dropblock_det.tasks.metric import Metric

RECORD_NAME = "record.json"
MAX_BYTES = 2**28

Whole = Annotated[int, Meta(ge=0, le=2**62)]
Number = Annotated[int, Meta(ge=-(2**62), le=2**62)] | Annotated[float, Meta(ge=-1e100, le=1e100)]
Epoch = dict[str, Number | None]
"""One epoch's values by name, ``epoch`` (from 0) and ``step`` among them; ``None``: not measured."""


@dataclass(frozen=True)
class Record:
    """One run.

    Attributes:
        task: the task's name, such as ``detection``.
        metrics: what the task declared, in the order of the columns.
        headline: name of the metric by which the best epoch is chosen.
        status: ``running`` until the last epoch is done, then ``finished``; or ``failed``.
        reason: why it failed, one line.
        epochs: values of every finished epoch, oldest first.
        max_epochs: of how many, if known.
        seed: the random seed of initialization, data order, augmentation and masks.
        setting: the name under which a comparison runs it.
        config: the resolved configuration.
        images_per_s: training images per second of training, validation left out.
        peak_memory_bytes: of the GPU's allocator, or resident memory on a CPU.
        drop_share: ``{"asked": p, "realised": share}``, means over the epochs, or ``None``.
        trainable_parameters: their number.
        versions: name -> version.
        hardware: ``device``, ``cpu``, ``cores``, ``processes``.
        data_hash: of annotations and chosen images.
        init_hash: of the freshly built model's weights.
        samples: a few validation images with what the last epoch's model sees there.
    """

    task: str
    metrics: tuple[Metric, ...]
    headline: str
    status: Literal["running", "finished", "failed"]
    reason: str | None = None
    epochs: tuple[Epoch, ...] = ()
    max_epochs: int | None = None
    seed: int = 0
    setting: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    images_per_s: Number | None = None
    peak_memory_bytes: Whole | None = None
    drop_share: dict[str, Number | None] | None = None
    trainable_parameters: Whole | None = None
    versions: dict[str, str] = field(default_factory=dict)
    hardware: dict[str, str | int | None] = field(default_factory=dict)
    data_hash: str | None = None
    init_hash: str | None = None
    samples: tuple[Sample, ...] = ()
    version: Literal[2] = 2

    def __post_init__(self) -> None:
        """Raises ``ValueError``, which names what doesn't fit."""
        names = [metric.name for metric in self.metrics]
        if len({*names}) < len(names):
            raise ValueError("two metrics have the same name")
        if (names or self.finished) and self.headline not in names:
            raise ValueError(f"headline {self.headline!r} is none of the metrics")
        for name in ("epoch", "step"):
            numbers = [epoch.get(name) for epoch in self.epochs]
            if not all(isinstance(number, int) and number >= 0 for number in numbers):
                raise ValueError(f"an epoch has no whole number {name!r}")
        epochs = [epoch["epoch"] or 0 for epoch in self.epochs]
        if any(later <= earlier for earlier, later in itertools.pairwise(epochs)):
            raise ValueError("its epochs are not in rising order")

    @property
    def finished(self) -> bool:
        """Whether the training came to its end."""
        return self.status == "finished"

    def values(self, name: str) -> list[tuple[int, float]]:
        """Epoch (from 0) and value of a metric, in every epoch that has one."""
        return [(int(e["epoch"] or 0), value) for e in self.epochs if (value := e.get(name)) is not None]

    def best(self, name: str) -> Epoch | None:
        """The first of the epochs with the best value of a metric; ``None`` where none has one."""
        better = {metric.name: metric.better for metric in self.metrics}[name]
        measured = [epoch for epoch in self.epochs if epoch.get(name) is not None]
        choose = max if better == "higher" else min
        return choose(measured, key=lambda epoch: epoch[name] or 0.0) if measured else None

    @classmethod
    def decode(cls, content: Any, path: Path) -> Self:
        """Checks decoded JSON, of this version or the first.

        Raises:
            InputError: it is something else; names ``path`` and the field.
        """
        if isinstance(content, dict) and "version" not in content and isinstance(content.get("epochs"), list):
            content = _from_version_1(content, path)
        record: Self = checked(content, cls, path)
        return record


def finite(value: float) -> float | None:
    """The value, or ``None`` for what JSON can't hold."""
    return value if math.isfinite(value) else None


def read_record(folder: Path) -> Record | None:
    """Reads a run's record; ``None`` where none was written yet.

    Raises:
        InputError: it is damaged.
    """
    for name in (RECORD_NAME, "summary.json"):  # as the first version called it in a run without comparison
        if (path := folder / name).exists():
            return Record.decode(read_json(path, limit=MAX_BYTES), path)
    return None


def write_record(folder: Path, record: Record) -> None:
    """Replaces a run's record whole."""
    write_json(folder / RECORD_NAME, record)


def _from_version_1(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The first version knew detection alone, and left its metrics to the reader."""
    task = importlib.import_module("dropblock_det.tasks.detection.metrics")
    try:
        samples = [
            {
                "id": str(shown["image_id"]),
                "kind": "boxes",
                **{key: shown[key] for key in ("width", "height", "file") if key in shown},
                "truth": shown["ground_truth"],
                "predicted": shown["detections"],
            }
            for shown in content.get("detections") or ()
        ]
    except (TypeError, KeyError) as error:
        raise InputError(f"{path}: not a run's record: 'detections': {error!r}; replace the file") from None
    status = content.get("status", "finished" if content.get("finished") is True else "running")
    kept = {key: value for key, value in content.items() if key not in ("finished", "detections")}
    return kept | {
        "version": 2,
        "task": "detection",
        "metrics": task.METRICS,
        "headline": task.HEADLINE,
        "status": status,
        "samples": samples,
    }
