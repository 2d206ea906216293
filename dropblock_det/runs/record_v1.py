"""The record of one training run: what a comparison is rebuilt from, long after the checkpoints are gone.

A comparison lives in one folder::

    RUNS/plan.json                   which base config, settings, seeds and overrides belong to it
    RUNS/images/<image id>.jpg       thumbnails of the validation images that are shown
    RUNS/<setting>/seed<S>/          one training run, and in it
    RUNS/<setting>/seed<S>/record.json

Every file is replaced whole (written beside, then renamed), so a reader never meets half of one.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from dropblock_det.errors import InputError
from dropblock_det.files import read_json

REFERENCE = "none"  # the setting that every other one is compared with
RECORD_NAME = "record.json"
SUMMARY_NAME = "summary.json"
PLAN_NAME = "plan.json"


@dataclass(frozen=True)
class Epoch:
    """One epoch's figures. ``None``: not measured, or not finite."""

    epoch: int
    step: int
    loss: float | None = None
    val_loss: float | None = None
    mAP: float | None = None  # noqa: N815 (the field's name for it)
    AP50: float | None = None
    AP75: float | None = None
    p: float | None = None
    wall_s: float | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Takes the known keys; raises ``TypeError`` or ``ValueError`` on one of the wrong type."""
        known = {f.name: _number(data[f.name], f.name) for f in fields(cls) if f.name in data}
        if "epoch" not in known or "step" not in known:
            raise ValueError("an epoch without 'epoch' or 'step'")
        return cls(**known)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Record:
    """One run of one setting with one seed, finished or failed.

    Attributes:
        setting: the setting's name, its file's stem.
        seed: the seed of initialization, data order, augmentation and masks.
        status: ``"finished"`` or ``"failed"``.
        reason: why it failed, one line.
        epochs: figures of every finished epoch, oldest first; a failed run has those it reached.
        config: the resolved configuration.
        images_per_s: training images per second of training, validation left out.
        peak_memory_bytes: of the GPU's allocator, or resident memory on a CPU.
        drop_share: ``{"asked": p, "realised": share}`` or ``None``.
        versions: name -> version.
        hardware: ``device``, ``cpu``, ``cores``.
        data_hash: of annotations and chosen images.
        init_hash: of the freshly built model's weights.
        detections: per shown validation image: ``image_id``, ``width``, ``height``, ``ground_truth``
            and ``detections`` with COCO boxes ``[x, y, w, h]`` in pixels.
    """

    setting: str
    seed: int
    status: str
    reason: str | None = None
    epochs: tuple[Epoch, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    images_per_s: float | None = None
    peak_memory_bytes: int | None = None
    drop_share: dict[str, float] | None = None
    versions: dict[str, str] = field(default_factory=dict)
    hardware: dict[str, Any] = field(default_factory=dict)
    data_hash: str | None = None
    init_hash: str | None = None
    detections: tuple[dict[str, Any], ...] = ()

    @property
    def finished(self) -> bool:
        """Whether the training came to its end."""
        return self.status == "finished"

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: Path | str = "record") -> Self:
        """Reads what :meth:`to_dict` wrote.

        Raises:
            InputError: a field is missing or of another type; names ``where`` and the field.
        """
        try:
            known = {f.name: data[f.name] for f in fields(cls) if f.name in data}
            for name, kinds in _FIELD_TYPES.items():
                if not isinstance(known.get(name), kinds):
                    raise TypeError(f"'{name}' is {known.get(name)!r}")
            if known["status"] not in ("finished", "failed"):
                raise ValueError(f"'status' is {known['status']!r}")
            known["epochs"] = tuple(Epoch.from_dict(epoch) for epoch in known["epochs"])
            known["detections"] = tuple(known.get("detections") or ())
            for shown in known["detections"]:
                if not isinstance(shown["image_id"], int):  # it names a file
                    raise TypeError(f"'image_id' is {shown['image_id']!r}")
            return cls(**known)
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise InputError(f"{where}: not a run record: {error}; delete it and run again") from error


_FIELD_TYPES: dict[str, type | tuple[type, ...]] = {
    "setting": str,
    "seed": int,
    "status": str,
    "epochs": (list, tuple),
}


def _number(value: Any, name: str) -> float | int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"'{name}' is {value!r}, not a number")
    return value if math.isfinite(value) else None


def run_folder(runs: Path, setting: str, seed: int) -> Path:
    """Where one run of a comparison lives."""
    return runs / setting / f"seed{seed}"


def read_record(folder: Path) -> Record | None:
    """The run's record, or ``None`` where none was written yet."""
    path = folder / RECORD_NAME
    return Record.from_dict(read_json(path), path) if path.exists() else None


def record_from_run(
    folder: Path, setting: str, seed: int, *, config: Mapping[str, Any], failure: str | None = None
) -> Record:
    """Builds the record from the files that a training run leaves in its folder.

    Args:
        folder: the run's folder with ``summary.json`` and, when finished, ``val_detections.json``.
        setting: the setting's name.
        seed: the run's seed.
        config: the resolved configuration.
        failure: why the run failed, or ``None`` when the training said it finished.

    Raises:
        InputError: the files are missing or not what a training run writes.
    """
    path = folder / SUMMARY_NAME
    summary = read_json(path) if failure is None or path.exists() else {}
    detections = folder / "val_detections.json"
    return Record.from_dict(
        {
            **summary,
            "setting": setting,
            "seed": seed,
            "status": "finished" if failure is None else "failed",
            "reason": failure,
            "epochs": summary.get("epochs", []),
            "config": dict(config),
            "detections": read_json(detections) if failure is None and detections.exists() else [],
        },
        path,
    )


@dataclass(frozen=True)
class Absent:
    """A run without a result, and why."""

    setting: str
    seed: int
    status: str  # "failed", "unfinished" or "not started"
    reason: str
    epochs: int = 0


@dataclass(frozen=True)
class Comparison:
    """All that a report is made of."""

    root: Path
    base: str  # the base config's name
    settings: tuple[str, ...]  # the reference first
    seeds: tuple[int, ...]
    records: tuple[Record, ...]  # the finished ones
    absent: tuple[Absent, ...]


def read_plan(root: Path) -> dict[str, Any] | None:
    """A comparison's plan, or ``None`` where none was written yet.

    Raises:
        InputError: the file is damaged.
    """
    path = root / PLAN_NAME
    if not path.exists():
        return None
    match plan := read_json(path):
        case {"base": {"name": str()}, "overrides": list(), "settings": dict(), "seeds": [*seeds]} if all(
            type(seed) is int for seed in seeds
        ):
            return dict(plan)
    raise InputError(f"{path}: not a comparison's plan; delete it, and `compare.py run` writes it anew")


def read_comparison(root: Path) -> Comparison:
    """Reads a comparison's folder: its plan if there is one, and every record.

    Raises:
        InputError: the folder does not exist, holds no record and no plan, or one of them is damaged.
    """
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give the folder that `compare.py run --runs` wrote")
    plan = read_plan(root) or {}
    found = [Record.from_dict(read_json(path), path) for path in sorted(root.glob(f"*/seed*/{RECORD_NAME}"))]
    if not found and not plan:
        raise InputError(
            f"{root}: holds no plan.json and no */seed*/{RECORD_NAME}: not a comparison's folder"
        )
    settings = {*plan.get("settings", {}), *(record.setting for record in found)}
    seeds = sorted({*plan.get("seeds", []), *(record.seed for record in found)})
    by_run = {(record.setting, record.seed): record for record in found}
    ordered = sorted(settings, key=lambda name: (name != REFERENCE, name))
    absent = [
        _absent(root, setting, seed, by_run.get((setting, seed)))
        for setting in ordered
        for seed in seeds
        if not ((setting, seed) in by_run and by_run[setting, seed].finished)
    ]
    return Comparison(
        root,
        plan.get("base", {}).get("name", root.name),
        tuple(ordered),
        tuple(seeds),
        tuple(by_run[s, n] for s in ordered for n in seeds if (s, n) in by_run and by_run[s, n].finished),
        tuple(absent),
    )


def _absent(root: Path, setting: str, seed: int, record: Record | None) -> Absent:
    if record is not None:
        return Absent(setting, seed, "failed", record.reason or "no reason recorded", len(record.epochs))
    summary = run_folder(root, setting, seed) / SUMMARY_NAME
    if not summary.exists():
        return Absent(setting, seed, "not started", "no record yet")
    data = read_json(summary)
    done = len(data.get("epochs", []))
    return Absent(setting, seed, "unfinished", f"{done} of {data.get('max_epochs', '?')} epochs done", done)
