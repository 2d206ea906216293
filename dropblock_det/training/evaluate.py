"""Evaluate as a command: the task's metrics of a checkpoint, from it and the images alone."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich.table import Column, Table

from dropblock_det.arguments import Count, Seed, Share, checked_arguments
from dropblock_det.commands import PlainConsole
from dropblock_det.errors import InputError
from dropblock_det.files import check_replaceable, write_figure, write_json
from dropblock_det.report.breakdown import check_folder, write_breakdown
from dropblock_det.runs.checkpoints import load_checkpoint
from dropblock_det.tasks.detection.calibration import compare_with_single_pass
from dropblock_det.tasks.module import TaskModule
from dropblock_det.training.launch import refusals
from dropblock_det.training.tasks import task_classes
from dropblock_det.training.terminal import calm, shows_a_bar
from dropblock_det.training.uncertainty import (
    Samples,
    regularize_as_trained,
    reliability_figure,
)


@refusals()
@calm()
def evaluate(
    checkpoint: Path,
    data: Path | None = None,
    images: str | None = None,
    annotations: str | None = None,
    results: Path | None = None,
    batch_size: Count | None = None,
    accelerator: str = "auto",
    devices: Count = 1,
    samples: Count | None = None,
    seed: Seed = 0,
    diagram: Path | None = None,
    report: Path | None = None,
    score: Share | None = None,
) -> dict[str, float]:
    """Evaluates a checkpoint: its task's metrics and val_loss, from it and the images alone.

    Args:
        checkpoint: A .ckpt file that a training wrote.
        data: Folder of a data set, all of whose images count; by default the training's, and its val_subset.
        images: Detection: image folder below it; by default as in the training.
        annotations: Detection: annotation file below it; by default likewise.
        results: Write the predictions here: detections as COCO results JSON.
        batch_size: Images per batch; by default as in the training.
        accelerator: auto, cpu, gpu, ...
        devices: How many of them.
        samples: Detection: forwards per image with the training's regularizer on, merged into detections with
            an uncertainty; --results then has those.
        seed: Of the samples.
        diagram: Write the reliability diagram here, a PNG; by default beside --results or the checkpoint.
        report: Write a closer look into this folder: a page, and CSV files.
        score: Detection: where --report counts detections, from this score on; by default from the one with
            the highest F1.

    Returns:
        The values by the metrics' names; with samples also those of :func:`compare_with_single_pass`, as
        ``QUANTITY/single``, ``QUANTITY/merged`` and ``AUROC/UNCERTAINTY``.

    Raises:
        InputError: A checkpoint that is not ours or has other categories than the data, or no regularizer
            where samples are wanted; or an output would replace what is no regular file or is read here.
    """
    if diagram is not None and samples is None:
        raise InputError("--diagram: drawn from samples; give --samples too")
    if score is not None and report is None:
        raise InputError("--score: where --report counts detections; give --report too")
    if samples is not None and diagram is None:
        diagram = (results or checkpoint).with_name("reliability.png")
    outputs = [path for path in (results, diagram) if path is not None]
    _check_outputs(outputs, report)
    content = load_checkpoint(checkpoint)
    is_detector = content.get("task", "detection") == "detection"
    if score is not None and not is_detector:
        raise InputError("--score: detectors alone have one; leave it out")
    if samples is not None and (not is_detector or devices != 1):
        raise InputError("--samples: for detectors, on one device")
    given = {"root": data and str(data), "val_images": images, "val_annotations": annotations}
    datamodule = _validation_data(content, checkpoint, {**given, "batch_size": batch_size})
    for output in outputs:
        check_replaceable(output, checkpoint, *datamodule.val_files)
    module = rebuilt(content, checkpoint)
    sampling = None
    if samples is not None:
        regularize_as_trained(module, content, checkpoint)
        sampling = Samples(samples, seed)
    bar = shows_a_bar(True)
    trainer = Trainer(
        logger=False,
        callbacks=[callback for callback in (RichProgressBar() if bar else None, sampling) if callback],
        enable_progress_bar=bar,
        use_distributed_sampler=False,
        accelerator=accelerator,
        devices=devices,
        precision=module.precision,
    )
    trainer.validate(module, datamodule, verbose=False)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    values = {name: value for name, value in logged.items() if not name.startswith("val_loss_")}  # its parts
    if not trainer.is_global_zero:
        return values
    predictions, seen = module.predictions, f"{len(datamodule.val_dataset):,} images of {datamodule.root}"
    _print_values("metric", "value", values, f"{checkpoint}, {seen}")
    if sampling is not None and diagram is not None:
        values |= _compare_samples(datamodule.val_coco, sampling, predictions, diagram)
        predictions, seen = sampling.results, f"{seen}, {samples} samples merged"
    if results is not None:
        write_json(results, predictions)
    if report is not None:
        _write_report(report, module, predictions, score, str(checkpoint), seen)
    return values


def _check_outputs(outputs: list[Path], report: Path | None) -> None:
    """Refuses one name for two files, and a report's folder that is not its own."""
    if len({*outputs}) < len(outputs):
        raise InputError(f"{outputs[0]}: for the results and the diagram alike; give --diagram another name")
    if report is None:
        return
    check_folder(report)
    for output in outputs:
        if report.resolve() in output.resolve().parents:
            raise InputError(f"{output}: in the report's folder, which holds nothing else; give another name")


def _validation_data(content: dict[str, Any], checkpoint: Path, given: dict[str, Any]) -> Any:
    """Builds the data module that a checkpoint was validated on, with what is given in place of its own.

    Raises:
        InputError: The checkpoint's data are incomplete, or have other categories than the training's.
    """
    _, data_class = task_of(content)
    given = {name: value for name, value in given.items() if value is not None}
    trained_on = checked_arguments(data_class, content["validation_data"], f"{checkpoint}: ")
    if given.keys() - {"batch_size"}:
        trained_on = {**trained_on, "val_subset": None}
    try:
        datamodule = data_class(**{**trained_on, **checked_arguments(data_class, given, "--")})
    except TypeError as error:
        raise InputError(f"{checkpoint}: validation_data: {error}; give another checkpoint") from None
    known, found = content["hyper_parameters"]["categories"], datamodule.val_categories
    if found != known:
        raise InputError(
            f"{checkpoint}: trained on {_categories(known)}, but {datamodule.root} has "
            f"{_categories(found)}; give --data with the categories of the training"
        )
    return datamodule


def _print_values(name: str, value: str, values: dict[str, float], title: str) -> None:
    table = Table(name, Column(value, justify="right"), title=title)
    for row, number in values.items():
        table.add_row(row, f"{number:.4f}")
    PlainConsole().print(table)


def _write_report(
    folder: Path, module: TaskModule, predictions: list[Any], score: float | None, about: str, lead: str
) -> None:
    console = PlainConsole()
    with console.status("looking closer"):
        breakdown = module.breakdown(predictions, score)
        page = write_breakdown(folder, breakdown, about, lead)
    for line in breakdown.answer:
        console.print(line)
    console.print(f"report  {page}")


def _compare_samples(
    coco: Any, sampling: Samples, single: list[dict[str, Any]], diagram: Path
) -> dict[str, float]:
    """Prints and draws what the samples change, and returns it by name."""
    compared, areas, bins = compare_with_single_pass(coco, sampling.image_ids, single, sampling.results)
    table = Table("", *(Column(name, justify="right") for name in ("single", "merged")))
    table.title = f"the single pass, and {sampling.samples} samples merged"
    for name, both in compared.items():
        digits = 0 if name == "detections" else 4
        table.add_row(name, *(f"{value:.{digits}f}" for value in both.values()))
    PlainConsole().print(table)
    _print_values("uncertainty", "AUROC", areas, "tells wrong from right detections")
    write_figure(diagram, reliability_figure(bins))
    values = {f"{name}/{of}": value for name, both in compared.items() for of, value in both.items()}
    return values | {f"AUROC/{name}": value for name, value in areas.items()}


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
