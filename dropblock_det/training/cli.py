"""Train and evaluate as commands: LightningCLI, a run's folder, and the table at the end."""

import argparse
import os
import re
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import set_parsing_settings
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from rich.console import Console
from rich.table import Table

from dropblock_det.callbacks import Regularize
from dropblock_det.datasets.coco import CocoDataModule
from dropblock_det.errors import InputError, disk_errors
from dropblock_det.files import write_json, write_text
from dropblock_det.runs.recorder import (
    AtomicCheckpointIO,
    RunRecord,
    check_same_config,
    checkpoint_callbacks,
    is_finished,
    load_checkpoint,
    newest_checkpoint,
    read_config,
    read_summary,
)
from dropblock_det.tasks.detection.coco_eval import FIGURES
from dropblock_det.tasks.detection.module import RetinaNetModule

# A setting can name a class, and to import a module is to run it: nothing outside these is imported.
PACKAGES = ["dropblock_det", "lightning", "torch", "torchvision"]
SHORT = {"--on-nonfinite": "--model.on_nonfinite"}


class DetectionCLI(LightningCLI):
    """``tools/train.py``: settings from YAML files and the command line, all results under ``--output``."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds ``--output`` and ``--regularize.*``, and lets the data say which categories there are."""
        parser.add_argument("--output", type=str, default="runs/quickstart", help="The run's folder.")
        parser.add_argument(
            "--resume",
            metavar="RUN_FOLDER",
            default=argparse.SUPPRESS,
            help="Go on with the run in this folder, with its own settings.",
        )
        parser.add_lightning_class_args(Regularize, "regularize")
        parser.link_arguments("seed_everything", "data.init_args.seed")
        parser.link_arguments("data.categories", "model.categories", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses; a fault is one line."""
        try:
            super().parse_arguments(parser, args)
        except RecursionError:
            raise InputError("--config: nested too deeply, or a YAML alias holds itself") from None
        except (argparse.ArgumentError, UnicodeError) as error:
            if denied := re.search("Importing '([^']+)' is not allowed", str(error)):
                raise InputError(
                    f"{denied[1]}: not imported; a class must be one of {', '.join(PACKAGES)}"
                ) from None
            reason = " ".join(str(error).split())
            raise InputError(f"{reason[:600]}; --help lists the settings") from None

    @property
    def output(self) -> Path:
        """The run's folder."""
        return Path(self.config["output"])

    def before_instantiate_classes(self) -> None:
        """Finds what an earlier start left in the run's folder, and refuses to mix settings."""
        if "resume" in self.config:
            raise InputError("resume: not a setting; give --resume RUN_FOLDER on the command line")
        for name in ("logger", "plugins", "default_root_dir"):
            if self.config["trainer"][name] is not None:
                raise InputError(f"trainer.{name}: leave it out, a run writes below --output alone")
        for name in ("max_epochs", "accumulate_grad_batches"):
            if (value := self.config["trainer"][name]) is not None and value < 1:
                raise InputError(f"trainer.{name}: got {value}, give 1 or more")
        try:
            self.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"{self.output}: cannot be the run's folder ({error.strerror}); give another --output"
            ) from None
        self.resume_from = newest_checkpoint(self.output)
        self.finished = is_finished(self.output)
        if self.finished or self.resume_from is not None:
            check_same_config(self.output, resolved_config(self.parser, self.config))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Adds what every run has: loggers, checkpoints, the record and a progress bar."""
        callbacks: list[Callback] = [RunRecord(self.output), *checkpoint_callbacks(self.output)]
        if self.config["trainer"]["enable_progress_bar"] is not False:
            callbacks.append(RichProgressBar())
        self.trainer_defaults["callbacks"] = callbacks
        board = TensorBoardLogger(self.output, name="logs")
        try:
            return super().instantiate_trainer(
                logger=[board, CSVLogger(self.output, name="logs", version=board.version)],
                default_root_dir=self.output,
                plugins=[AtomicCheckpointIO()],
                use_distributed_sampler=False,  # the data module's samplers know their rank
                **kwargs,
            )
        except (TypeError, ValueError, MisconfigurationException) as error:
            raise _trainer_refused(error) from None


def _trainer_refused(error: Exception) -> InputError:
    return InputError(f"trainer: {' '.join(str(error).split())[:300]}")


class SaveConfig(SaveConfigCallback):
    """Writes the resolved ``config.yaml`` into the run's folder."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called on the first process only."""
        folder = Path(self.config["output"])
        text = yaml.safe_dump(resolved_config(self.parser, self.config), sort_keys=False)
        write_text(folder / "config.yaml", text)


def resolved_config(parser: LightningArgumentParser, config: Any) -> dict[str, Any]:
    """Returns every setting as plain data, as ``config.yaml`` holds it."""
    resolved: dict[str, Any] = yaml.safe_load(parser.dump(config, skip_none=False))
    return resolved


def spelled_out(args: list[str], default_config: Path) -> list[str]:
    """Returns the arguments with a ``--config``, and without the shorter ways to say things.

    ``--resume FOLDER`` stands for the folder's own settings and the folder as ``--output``.

    Raises:
        InputError: No run in the folder to resume.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--resume", type=Path)
    try:
        given, args = parser.parse_known_args(args)
    except argparse.ArgumentError as error:
        raise InputError(f"{error}; give the folder of an interrupted run") from None
    args = ["=".join([SHORT.get(name, name), *value]) for name, *value in (arg.split("=", 1) for arg in args)]
    if given.resume is not None:
        read_config(given.resume)
        return [f"--config={given.resume}/config.yaml", f"--output={given.resume}", *args]
    if any(arg.split("=")[0] in ("-c", "--config") for arg in args):
        return args
    return [f"--config={default_config}", *args]


def train(default_config: Path, args: list[str] | None = None) -> None:
    """Trains, or goes on with, the run that the arguments describe, and prints what came of it.

    Args:
        default_config: The YAML file that stands in where no ``--config`` is given.
        args: Command-line arguments; by default the process's own.
    """
    args = spelled_out(sys.argv[1:] if args is None else args, default_config)
    sys.argv[1:] = args  # Lightning's launcher starts the other processes with these
    end_with_launcher()
    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=PACKAGES)
    cli = DetectionCLI(
        RetinaNetModule,
        CocoDataModule,
        subclass_mode_data=True,
        save_config_callback=SaveConfig,
        save_config_kwargs={"save_to_log_dir": False},
        seed_everything_default=0,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        parser_kwargs={"exit_on_error": False, "description": "Trains a detector; see configs/."},
        run=False,
    )
    if not cli.finished:
        fit(cli)
    if cli.trainer.is_global_zero:
        print_result(cli.output)


def fit(cli: DetectionCLI) -> None:
    """Trains; when stopped from outside or left by another process, says how to go on and exits.

    Exit status 143 after SIGTERM, 130 after Ctrl-C, 1 when another process has died.
    """
    go_on = f"--resume {cli.output} goes on from the last epoch"
    # All processes log the same figures, which each has from the first: there is nothing to average.
    warnings.filterwarnings("ignore", message=r"It is recommended to use .*sync_dist=True")
    try:
        cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.resume_from, weights_only=True)
    except SystemExit as stop:  # Lightning's answer to both signals
        if cli.trainer.is_global_zero:
            print(f"stopped; {go_on}", file=sys.stderr)
        sys.exit(143 if isinstance(stop, SIGTERMException) else 130)
    except RuntimeError as error:
        if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
            raise
        lost = f"process {cli.trainer.global_rank} lost another, which has died (see above)"
        sys.exit(f"error: {lost}; {go_on}")


def end_with_launcher() -> None:
    """Ends a process that Lightning's launcher started when the one that started it has died.

    Without this it may wait for that one as long as the backend's time limit, ten minutes with NCCL. The
    launcher watches the others itself.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.environ["DROPBLOCK_DET_LAUNCHER"] = str(os.getpid())
    elif launcher := os.environ.get("DROPBLOCK_DET_LAUNCHER"):

        def watch() -> None:
            while os.getppid() == int(launcher):
                time.sleep(5)
            print(f"error: the first process ({launcher}) has died, this one ends too", file=sys.stderr)
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()


def print_result(folder: Path) -> None:
    """Prints the best and the last epoch of a run, its files, and how to evaluate it."""
    epochs = read_summary(folder)["epochs"]
    columns = ("loss", "val_loss", "mAP", "AP50", "AP75")
    table = Table(title=str(folder))
    for column in ("epoch", *columns):
        table.add_column(column, justify="right")
    best = max(epochs, key=lambda epoch: epoch["mAP"] or 0.0)
    for name, epoch in (("best", best), ("last", epochs[-1])):
        values = ("-" if epoch[column] is None else f"{epoch[column]:.4f}" for column in columns)
        table.add_row(f"{name} ({epoch['epoch'] + 1})", *values)
    console = Console(soft_wrap=True)
    console.print(table)
    console.print(f"pictures    {folder}/detections.png, {folder}/curves.png")
    console.print(f"checkpoint  {folder}/checkpoints/best.ckpt")
    console.print(f"evaluate    python tools/evaluate.py {folder}/checkpoints/best.ckpt")


def evaluate(
    checkpoint: Path, data: dict[str, Any], results: Path | None, trainer_arguments: dict[str, Any]
) -> dict[str, float]:
    """Evaluates a checkpoint on validation images; gives the twelve COCO figures and ``val_loss``.

    Args:
        checkpoint: A file that :func:`train` wrote.
        data: Arguments of :class:`CocoDataModule` that replace those of the training.
        results: Where to write the detections as standard COCO results JSON, or None.
        trainer_arguments: Passed to Lightning's ``Trainer``.

    Raises:
        InputError: A checkpoint that is not ours, one with other categories than the data, or no folder for
            ``results``.
    """
    if results is not None and results.is_dir():
        raise InputError(f"{results}: is a folder; give --results a file name")
    if results is not None and not results.parent.is_dir():
        raise InputError(f"{results}: its folder does not exist; make it or give another --results")
    content = load_checkpoint(checkpoint)
    datamodule = CocoDataModule(**{**content["validation_data"], **data}, num_workers=0)
    known, found = content["hyper_parameters"]["categories"], datamodule.val_dataset.categories
    if found != known:
        raise InputError(
            f"{checkpoint}: trained on {_categories(known)}, but {datamodule.val_annotations} has "
            f"{_categories(found)}; give --data with the categories of the training"
        )
    try:
        module = RetinaNetModule.from_checkpoint(content)
    except (RuntimeError, TypeError) as error:  # load_state_dict names keys and shapes, a call its arguments
        raise InputError(
            f"{checkpoint}: its weights do not fit the model ({' '.join(str(error).split())[:200]})"
        ) from None
    try:
        trainer = Trainer(
            logger=False, callbacks=[RichProgressBar()], use_distributed_sampler=False, **trainer_arguments
        )
    except (TypeError, ValueError, MisconfigurationException) as error:
        raise _trainer_refused(error) from None
    trainer.validate(module, datamodule, verbose=False)
    figures = {name: float(trainer.callback_metrics[name]) for name in (*FIGURES, "val_loss")}
    if not trainer.is_global_zero:
        return figures
    if results is not None:
        with disk_errors(results.parent):
            write_json(results, module.detections)
    table = Table(title=str(checkpoint))
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in figures.items():
        table.add_row(name, f"{value:.4f}")
    Console().print(table)
    return figures


def _categories(categories: list[dict[str, Any]]) -> str:
    names = [category["name"] for category in categories]
    return f"{len(names)} categories ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
