"""Evaluate as a command: the task's metrics of a checkpoint, from it and the images alone."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich.table import Column, Table

from dropblock_det.arguments import Count, checked_arguments
from dropblock_det.commands import PlainConsole
from dropblock_det.errors import InputError
from dropblock_det.files import check_replaceable, write_json
from dropblock_det.runs.checkpoints import load_checkpoint
from dropblock_det.tasks.module import TaskModule
from dropblock_det.training.launch import refusals
from dropblock_det.training.tasks import task_classes


@refusals()
def evaluate(
    checkpoint: Path,
    data: Path | None = None,
    images: str | None = None,
    annotations: str | None = None,
    results: Path | None = None,
    batch_size: Count | None = None,
    accelerator: str = "auto",
    devices: Count = 1,
) -> dict[str, float]:
    """Evaluates a checkpoint: its task's metrics and val_loss, from it and the images alone.

    Args:
        checkpoint: A .ckpt file that tools/train.py wrote.
        data: Folder of the data set; by default that of the training.
        images: Detection: image folder below it; by default as in the training.
        annotations: Detection: annotation file below it; by default likewise.
        results: Write the predictions here: detections as COCO results JSON.
        batch_size: Images per batch; by default as in the training.
        accelerator: auto, cpu, gpu, ...
        devices: How many of them.

    Returns:
        The values by the metrics' names.

    Raises:
        InputError: A checkpoint that is not ours, one with other categories than the data, or results that
            would replace what is no regular file or is read here.
    """
    content = load_checkpoint(checkpoint)
    given: dict[str, Any] = {"root": data and str(data), "val_images": images, "val_annotations": annotations}
    given = {name: value for name, value in {**given, "batch_size": batch_size}.items() if value is not None}
    data_class = task_of(content)[1]
    trained_on = checked_arguments(data_class, content["validation_data"], f"{checkpoint}: ")
    datamodule = data_class(**{**trained_on, **checked_arguments(data_class, given, "--")})
    if results is not None:
        check_replaceable(results, checkpoint, *datamodule.val_files)
    known, found = content["hyper_parameters"]["categories"], datamodule.val_categories
    if found != known:
        raise InputError(
            f"{checkpoint}: trained on {_categories(known)}, but {datamodule.root} has "
            f"{_categories(found)}; give --data with the categories of the training"
        )
    module = rebuilt(content, checkpoint)
    trainer = Trainer(
        logger=False,
        callbacks=[RichProgressBar()],
        use_distributed_sampler=False,
        accelerator=accelerator,
        devices=devices,
    )
    trainer.validate(module, datamodule, verbose=False)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    values = {name: value for name, value in logged.items() if not name.startswith("val_loss_")}  # its parts
    if trainer.is_global_zero:
        table = Table("metric", Column("value", justify="right"), title=str(checkpoint))
        for name, value in values.items():
            table.add_row(name, f"{value:.4f}")
        PlainConsole().print(table)
        if results is not None:
            write_json(results, module.predictions)
    return values


def rebuilt(content: dict[str, Any], checkpoint: Path) -> TaskModule:
    """Builds a loaded checkpoint's module again, in training mode.

    Raises:
        InputError: Its settings or weights don't fit its task's module; names ``checkpoint``.
    """
    kind = task_of(content)[0]
    checked_arguments(kind, content["hyper_parameters"], f"{checkpoint}: ")
    try:
        module = kind.from_checkpoint(content)
    except (RuntimeError, TypeError, NotImplementedError) as error:  # by load_state_dict, or a call
        raise InputError(
            f"{checkpoint}: its weights do not fit the model ({' '.join(str(error).split())[:200]})"
        ) from None
    if not all(value.isfinite().all() for value in module.state_dict().values()):
        raise InputError(f"{checkpoint}: its weights are not finite numbers; give another checkpoint")
    return module


def task_of(content: dict[str, Any]) -> tuple[Any, Any]:
    """Returns the module and the data module of a loaded checkpoint's task."""
    return task_classes(content.get("task", "detection"))  # older versions had one


def _categories(categories: list[dict[str, Any]]) -> str:
    names = [category["name"] for category in categories]
    return f"{len(names)} categories ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
