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
from dropblock_det.tasks.module import TaskModule
from dropblock_det.training.launch import refusals
from dropblock_det.training.tasks import task_classes
from dropblock_det.training.terminal import calm, shows_a_bar
from dropblock_det.training.uncertainty import (
    Samples,
    regularize_as_trained,
    reliability_figure,
    uncertainty_figures,
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
        data: Folder of the data set; by default that of the training.
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
        The values by the metrics' names; with samples also mAP, AP50, calibration error and number of
        detections of the ``single`` pass and the ``merged`` detections, and each uncertainty's AUROC.

    Raises:
        InputError: A checkpoint that is not ours or has other categories than the data, or no regularizer
            where samples are wanted; or an output would replace what is no regular file or is read here.
    """
    if diagram is not None and samples is None:
        raise InputError("--diagram: drawn from samples; give --samples too")
    if score is not None and report is None:
        raise InputError("--score: where --report counts detections; give --report too")
    if report is not None:
        check_folder(report)
        for output in filter(None, (results, diagram)):
            if report.resolve() in output.resolve().parents:
                raise InputError(
                    f"{output}: in the report's folder, which holds nothing else; give another name"
                )
    content = load_checkpoint(checkpoint)
    if score is not None and content.get("task", "detection") != "detection":
        raise InputError("--score: detectors alone have one; leave it out")
    given: dict[str, Any] = {"root": data and str(data), "val_images": images, "val_annotations": annotations}
    given = {name: value for name, value in {**given, "batch_size": batch_size}.items() if value is not None}
    data_class = task_of(content)[1]
    if samples is not None and (content.get("task", "detection"), devices) != ("detection", 1):
        raise InputError("--samples: for detectors, on one device")
    trained_on = checked_arguments(data_class, content["validation_data"], f"{checkpoint}: ")
    try:
        datamodule = data_class(**{**trained_on, **checked_arguments(data_class, given, "--")})
    except TypeError as error:
        raise InputError(f"{checkpoint}: validation_data: {error}; give another checkpoint") from None
    if samples is not None and diagram is None:
        diagram = (results or checkpoint).with_name("reliability.png")
    if results is not None and results == diagram:
        raise InputError(f"{results}: for the results and the diagram alike; give --diagram another name")
    for output in filter(None, (results, diagram)):
        check_replaceable(output, checkpoint, *datamodule.val_files)
    known, found = content["hyper_parameters"]["categories"], datamodule.val_categories
    if found != known:
        raise InputError(
            f"{checkpoint}: trained on {_categories(known)}, but {datamodule.root} has "
            f"{_categories(found)}; give --data with the categories of the training"
        )
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
    if trainer.is_global_zero:
        table = Table("metric", Column("value", justify="right"), title=str(checkpoint))
        for name, value in values.items():
            table.add_row(name, f"{value:.4f}")
        PlainConsole().print(table)
        predictions = module.predictions
        if sampling is not None and diagram is not None:
            compared, areas, bins = uncertainty_figures(
                datamodule.val_coco, sampling.image_ids, module.predictions, sampling.results
            )
            _print_uncertainty(compared, areas, sampling)
            values |= {f"{name}/{of}": value for name, both in compared.items() for of, value in both.items()}
            values |= {f"AUROC/{name}": value for name, value in areas.items()}
            predictions = sampling.results
            write_figure(diagram, reliability_figure(bins))
        if results is not None:
            write_json(results, predictions)
        if report is not None:
            seen = f"{len(datamodule.val_dataset):,} images of {datamodule.root}"
            if samples is not None:
                seen += f", {samples} samples merged"
            _write_report(report, module, predictions, score, str(checkpoint), seen)
    return values


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


def _print_uncertainty(
    compared: dict[str, dict[str, float]], areas: dict[str, float], sampling: Samples
) -> None:
    table = Table("", *(Column(name, justify="right") for name in ("single", "merged")))
    table.title = f"the single pass, and {sampling.samples} samples merged"
    for name, both in compared.items():
        table.add_row(
            name, *(f"{value:.0f}" if name == "detections" else f"{value:.4f}" for value in both.values())
        )
    console = PlainConsole()
    console.print(table)
    table = Table("uncertainty", Column("AUROC", justify="right"), title="tells wrong from right detections")
    for name, value in areas.items():
        table.add_row(name, f"{value:.4f}")
    console.print(table)


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
