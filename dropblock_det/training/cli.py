"""Train as a command: LightningCLI's settings, checked when they are parsed, and the table at the end."""

import argparse
import contextlib
import inspect
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from dropblock_det.callbacks import Regularize
from dropblock_det.commands import PlainHelp, parsed, started_as
from dropblock_det.errors import InputError, disk_errors
from dropblock_det.files import read_yaml, write_text
from dropblock_det.runs.checkpoints import AtomicCheckpointIO, Checkpoints
from dropblock_det.runs.folder import (
    CONFIG_NAME,
    check_same_config,
    is_finished,
    newest_checkpoint,
    read_config,
)
from dropblock_det.runs.recorder import RunRecord
from dropblock_det.shipped import FIRST, config_file
from dropblock_det.training.allowed import OPTION, PACKAGES, allow
from dropblock_det.training.heartbeat import Heartbeat
from dropblock_det.training.launch import (
    Sound,
    check_launcher,
    check_monitors,
    end_with_launcher,
    fit,
    refusals,
    sole_use,
)
from dropblock_det.training.loggers import Pictures, loggers
from dropblock_det.training.precision import AutoTrainer, resolve_precision
from dropblock_det.training.settings import VERBOSE, check_settings, resolved_config
from dropblock_det.training.tasks import Task, task_classes
from dropblock_det.training.terminal import Bar, Story, calm, print_result, shows_a_bar

CONFIG_OPTIONS = ("--config", "-c")
SHORT = {"--on-nonfinite": "--model.on_nonfinite"}


class TrainCLI(LightningCLI):
    """The train command: settings from YAML files and the command line, all results under ``--output``.

    Args:
        task: The task's name: its module's settings are ``--model.*``.
        stack: Releases the run's folder when it ends.
        verbose: Show what Lightning says of itself, and its table of the model.
        **arguments: LightningCLI's.
    """

    def __init__(self, task: str, stack: contextlib.ExitStack, verbose: bool, **arguments: Any) -> None:
        self.stack, self.verbose = stack, verbose
        self.module, self.data = task_classes(task)
        super().__init__(self.module, self.data, trainer_class=AutoTrainer, **arguments)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds ``--task``, ``--output`` and ``--regularize.*``, and what the model takes from the data."""
        parser.add_argument("--task", type=Task, default="detection", help="What is trained.")
        parser.add_argument("--output", type=str, default="runs/quickstart", help="The run's folder.")
        parser.add_argument(
            "--resume",
            metavar="RUN_FOLDER",
            default=argparse.SUPPRESS,
            help="Go on with the run in this folder, with its own settings.",
        )
        parser.add_argument(
            VERBOSE,
            action="store_true",
            default=argparse.SUPPRESS,
            help="Show what Lightning says of itself, and its table of the model.",
        )
        parser.add_argument(
            OPTION,
            metavar="MODULE",
            default=argparse.SUPPRESS,
            help="Classes in the settings may come from this module, too; may be given more than once.",
        )
        parser.add_lightning_class_args(Regularize, "regularize")
        parser.link_arguments("seed_everything", "data.init_args.seed")
        for known in ("categories", "image_shape"):
            if known in inspect.signature(self.module).parameters:
                parser.link_arguments(f"data.{known}", f"model.{known}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses and checks; a fault is one line."""
        try:
            self.config = parsed(parser, args)
        except InputError as error:
            if denied := re.search("Importing '([^']+)' is not allowed", str(error.__cause__)):
                raise InputError(
                    f"{denied[1]}: not imported; a class must be one of {', '.join(PACKAGES)}, "
                    f"or of a module that {OPTION} MODULE names on the command line"
                ) from None
            raise
        check_settings(resolved_config(parser, self.config), self.module, self.data)
        trainer = self.config["trainer"]
        if trainer["precision"] == "auto":  # config.yaml keeps what it was: elsewhere a run goes on with that
            trainer["precision"] = resolve_precision(trainer["accelerator"], trainer["devices"])

    def instantiate_classes(self) -> None:
        """Makes them; a package that one misses, or why it can't be made, is one line."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            if missing := re.search("HINT: Try running `(pip install [^`]*)`", str(error)):
                raise InputError(f"a package is not installed: {missing[1]}") from error
            # jsonargparse lists an error for each type that the setting may have, and the class' own.
            if reasons := re.findall(r"^  - +(?!Not a valid|Expected a)(\S.*)", str(error), re.MULTILINE):
                raise InputError(f"trainer: a class can't be made: {'; '.join(reasons)[:400]}") from error
            raise

    @property
    def output(self) -> Path:
        """The run's folder."""
        return Path(self.config["output"])

    def before_instantiate_classes(self) -> None:
        """Takes the run's folder, finds what an earlier start left there, and refuses to mix settings."""
        if not is_finished(self.output):
            self.stack.enter_context(sole_use(self.output))
        self.finished = is_finished(self.output)  # another process may have finished it until now
        self.resume_from = newest_checkpoint(self.output)
        if self.finished or self.resume_from or (self.output / CONFIG_NAME).exists():
            check_same_config(self.output, resolved_config(self.parser, self.config))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Adds what every run has: loggers, checkpoints, the record and a progress bar."""
        recorder = RunRecord(self.output)
        callbacks: list[Callback] = [Sound(), Heartbeat(self.output), recorder]
        callbacks += [Pictures(self.output), Checkpoints(recorder)]
        asked = self.config["trainer"]
        bar, summary = shows_a_bar(asked["enable_progress_bar"]), asked["enable_model_summary"]
        callbacks += [Story(recorder, lines=not bar), *([Bar()] if bar else [])]
        self.trainer_defaults["callbacks"] = callbacks
        return super().instantiate_trainer(
            logger=loggers(self.output, self.config_init["trainer"]["logger"]),
            default_root_dir=self.output,
            plugins=[AtomicCheckpointIO()],
            enable_progress_bar=bar,
            enable_model_summary=self.verbose if summary is None else summary,
            use_distributed_sampler=False,  # the data module's samplers know their rank
            **kwargs,
        )


class SaveConfig(SaveConfigCallback):
    """Writes the resolved ``config.yaml`` into the run's folder, and gives it to the loggers."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called on the first process only."""
        folder = Path(self.config["output"])
        config = resolved_config(self.parser, self.config)
        write_text(folder / CONFIG_NAME, yaml.safe_dump(config, sort_keys=False))
        for logger in trainer.loggers:
            logger.log_hyperparams(config)


def spelled_out(args: Sequence[str]) -> tuple[str, list[str]]:
    """Returns the task, and the arguments with a ``--config`` and without the shorter ways to say things.

    ``--resume FOLDER`` stands for the folder's own settings and the folder as ``--output``.

    Raises:
        InputError: No run in the folder to resume, another ``--output``, or a config that can't be read.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--resume", type=Path)
    looked_at = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    looked_at.add_argument(*CONFIG_OPTIONS, action="append", type=Path, default=[])
    looked_at.add_argument("--output", type=Path)
    looked_at.add_argument("--task")
    args = list(_with_config_files(args))
    try:
        given, rest = parser.parse_known_args(args)
        seen, _ = looked_at.parse_known_args(rest)
    except argparse.ArgumentError as error:
        raise InputError(f"{error}; --help lists the settings") from None
    configs = [read_yaml(path) for path in seen.config or [FIRST]]
    if given.resume is not None:
        configs = [read_config(given.resume), *(configs if seen.config else [])]
    named = [config["task"] for config in configs if "task" in config]
    task = seen.task or (named[-1] if named else "detection")
    rest = ["=".join([SHORT.get(name, name), *value]) for name, *value in (arg.split("=", 1) for arg in rest)]
    if given.resume is None:
        return task, rest if seen.config else [f"--config={FIRST}", *rest]
    if seen.output not in (None, given.resume):
        raise InputError(
            f"--output {seen.output}: --resume goes on in {given.resume} itself; leave --output out, "
            "or copy the folder and resume the copy"
        )
    return task, [f"--config={given.resume}/{CONFIG_NAME}", *rest, f"--output={given.resume}"]


def _with_config_files(words: Sequence[str]) -> Iterator[str]:
    """Yields the words, with a file in place of the name of a shipped config."""
    before = ""
    for word in words:
        name, equals, value = word.partition("=")
        if before in CONFIG_OPTIONS:
            yield str(config_file(word))
        else:
            yield f"{name}={config_file(value)}" if name in CONFIG_OPTIONS and equals else word
        before = word


def command_line(words: Sequence[str], stack: contextlib.ExitStack) -> TrainCLI:
    """Makes trainer, module and data of the run that the arguments describe; nothing is trained yet.

    Args:
        words: The command line after the command's name; without a ``--config`` it is the quickstart's.
        stack: Releases the run's folder, and Lightning's own messages, when it ends.
    """
    end_with_launcher()
    words = allow(words, stack)
    verbose = VERBOSE in words
    task, args = spelled_out([word for word in words if word != VERBOSE])
    stack.enter_context(calm(verbose))
    cli = TrainCLI(
        task,
        stack,
        verbose,
        args=args,
        subclass_mode_data=True,
        save_config_callback=SaveConfig,
        save_config_kwargs={"save_to_log_dir": False},
        seed_everything_default=0,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        parser_kwargs={
            "exit_on_error": False,
            "allow_abbrev": False,  # compare refuses some settings, and knows their whole names
            "prog": started_as("train"),
            "description": "Trains a model. --config takes a file or the name of a shipped config. "
            "--data.help lists the settings of the images, --data.*.",
            "formatter_class": PlainHelp,
        },
        run=False,
    )
    check_launcher(cli.trainer)
    check_monitors(cli.trainer, cli.model)
    return cli


@refusals()
def train(words: Sequence[str]) -> None:
    """Trains, or goes on with, the run that the arguments describe, and prints what came of it.

    Args:
        words: As :func:`command_line`.
    """
    with contextlib.ExitStack() as stack:
        cli = command_line(words, stack)
        if not cli.finished:
            with disk_errors(cli.output):
                fit(cli.trainer, cli.model, cli.datamodule, cli.resume_from, cli.output)
        if cli.trainer.is_global_zero:
            print_result(cli.output)
