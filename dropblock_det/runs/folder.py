"""A run's folder, as far as it can be known without torch.

::

    config.yaml            every setting, resolved
    checkpoints/           best.ckpt, and the last two epochs' (last-NNNNN.ckpt)
    logs/version_N/        metrics.csv and TensorBoard events; a resumed run opens the next N
    record.json            what the run is, ran on and measured, epoch by epoch: see runs/record.py
    outcomes.npz           which predictions of the last validation were right: see runs/outcomes.py
    curves.png, samples.png
"""

import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dropblock_det.commands import started_as
from dropblock_det.errors import InputError
from dropblock_det.files import read_yaml
from dropblock_det.runs.record import read_record

CONFIG_NAME = "config.yaml"
BEST_NAME = "best.ckpt"
TRAINING_LOCK = ".training.lock"  # held by the process that trains here


def is_finished(folder: Path) -> bool:
    """Returns whether the folder holds a run that came to its end.

    Raises:
        InputError: Its record is damaged.
    """
    record = read_record(folder)
    return record is not None and record.finished


def best_checkpoint(folder: Path) -> Path:
    """Returns where the checkpoint of the best epoch is, if there is one."""
    return folder / "checkpoints" / BEST_NAME


def goes_on(folder: Path) -> str:
    """Returns how to go on with a run that ended early, for a message."""
    return f"{started_as('train')} --resume {folder} goes on from the last epoch"


def last_checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoints that a run resumes from, the newest first."""
    return sorted((folder / "checkpoints").glob("last-*.ckpt"), reverse=True)


def newest_checkpoint(folder: Path) -> Path | None:
    """Returns the last epoch's whole checkpoint in a run's folder; a broken one is named and skipped."""
    for path in last_checkpoints(folder):
        try:
            check_whole(path)
        except InputError as error:
            print(f"skipped: {error}", file=sys.stderr)
        else:
            return path
    return None


def check_whole(path: Path) -> None:
    """Reads a checkpoint through and compares the checksums that torch.save wrote; torch.load does not.

    Raises:
        InputError: No such file, or not the bytes that were written.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint; give a .ckpt file that a training wrote")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, ValueError, EOFError, NotImplementedError, zlib.error, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not a whole checkpoint ({error})") from None
    if damaged is not None:
        raise InputError(f"{path}: not a whole checkpoint ({damaged} has another checksum)")


def read_config(folder: Path) -> dict[str, Any]:
    """Reads the settings that the run in a folder was started with.

    Raises:
        InputError: There is no run, or its settings can't be read.
    """
    path = folder / CONFIG_NAME
    if not path.exists():
        raise InputError(f"{path}: no such file, so {folder} has no run to resume")
    return read_yaml(path)


def config_differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yields a line for each setting in which two configs differ; one that `old` lacks is new."""
    for key in sorted(old):
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
