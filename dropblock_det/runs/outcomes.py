"""``outcomes.npz``: which predictions of a run's last validation were right."""

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from dropblock_det.errors import InputError
from dropblock_det.files import read_bytes, write_bytes
from dropblock_det.tasks.evaluation import Outcomes

OUTCOMES_NAME = "outcomes.npz"
MAX_BYTES = 2**30


def write_outcomes(folder: Path, outcomes: Outcomes) -> None:
    """Replaces a run's outcomes whole."""
    arrays: dict[str, Any] = vars(outcomes).copy()
    columns = arrays.pop("columns")
    chosen = np.zeros((len(columns), outcomes.hit.shape[1]), bool)
    for row, numbers in zip(chosen, columns.values(), strict=True):
        row[list(numbers)] = True
    arrays |= {"metrics": np.array(list(columns), str), "columns": chosen}
    arrays["categories"] = np.array(outcomes.categories, str)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_bytes(folder / OUTCOMES_NAME, buffer.getvalue())


def read_outcomes(folder: Path) -> Outcomes | None:
    """Reads a run's outcomes; ``None`` where none were written, as by older versions.

    Raises:
        InputError: They are damaged.
    """
    path = folder / OUTCOMES_NAME
    if not path.exists():
        return None
    try:
        content = io.BytesIO(read_bytes(path, MAX_BYTES))
        with zipfile.ZipFile(content) as archive:
            if sum(part.file_size for part in archive.infolist()) > MAX_BYTES:
                raise ValueError("it would fill the memory")
        with np.load(content, allow_pickle=False) as file:
            arrays = dict(file)
        columns = {
            str(metric): tuple(np.flatnonzero(row).tolist())
            for metric, row in zip(arrays.pop("metrics"), arrays["columns"], strict=True)
        }
        arrays |= {"columns": columns, "categories": tuple(map(str, arrays["categories"]))}
        arrays["measure"] = str(arrays["measure"])
        outcomes = Outcomes(**arrays)
        _check(outcomes)
    except InputError:
        raise
    except Exception as error:  # numpy and zipfile raise whatever the broken bytes lead them to
        raise InputError(f"{path}: not a run's outcomes ({error}); remove it") from None
    return outcomes


def _check(outcomes: Outcomes) -> None:
    if outcomes.measure not in ("average_precision", "share"):
        raise ValueError(f"measure is {outcomes.measure!r}")
    images, categories = len(outcomes.images), len(outcomes.categories)
    rows, ways = outcomes.hit.shape
    shapes = {
        "truths": (np.int32, (images, categories)),
        "image": (np.int32, (rows,)),
        "category": (np.int32, (rows,)),
        "score": (np.float32, (rows,)),
        "hit": (np.bool_, (rows, ways)),
        "ignored": (np.bool_, (rows, ways)),
    }
    for name, (kind, shape) in shapes.items():
        array = getattr(outcomes, name)
        if array.dtype != kind or array.shape != shape:
            raise ValueError(f"{name} is {array.dtype} {array.shape}, not {np.dtype(kind)} {shape}")
    for name, size in (("image", images), ("category", categories)):
        array = getattr(outcomes, name)
        if rows and not (array.min() >= 0 and array.max() < size):
            raise ValueError(f"{name} is outside 0 to {size - 1}")
    if not np.isfinite(outcomes.score).all() or (outcomes.truths < 0).any():
        raise ValueError("a score or a number of objects is none")
