"""The tasks by name: each one's module and data, imported when chosen."""

import importlib
from typing import Any, Literal, get_args

from dropblock_det.errors import InputError

Task = Literal["detection", "classification"]

_CLASSES = {
    "detection": ("tasks.detection.module.DetectionModule", "datasets.coco.CocoDataModule"),
    "classification": (
        "tasks.classification.module.ClassificationModule",
        "datasets.classification.ClassificationDataModule",
    ),
}


def task_classes(task: object) -> tuple[Any, Any]:
    """Returns a task's module and its data module, of which the configured one may be a subclass.

    Raises:
        InputError: There is no such task.
    """
    if task not in get_args(Task):
        raise InputError(f"task: got {task!r}, give one of {', '.join(get_args(Task))}")
    module, data = (path.rpartition(".") for path in _CLASSES[str(task)])
    return tuple(
        getattr(importlib.import_module(f"dropblock_det.{room}"), name) for room, _, name in (module, data)
    )
