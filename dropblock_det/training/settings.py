"""All settings of a run: as plain data, and checked before anything is built."""

import importlib
import re
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.cli import LightningArgumentParser

from dropblock_det.arguments import Seed, checked_arguments
from dropblock_det.callbacks import Regularize
from dropblock_det.errors import InputError
from dropblock_det.training.allowed import OPTION

VERBOSE = "--verbose"
# Settings of the trainer that are not for the user: a run has its own, or could not be a run.
OURS = ("plugins", "default_root_dir", "use_distributed_sampler", "fast_dev_run", "barebones")
# Smallest values that make a training; Lightning takes smaller ones, and ends without a result.
LEAST = {
    "max_epochs": 1,
    "check_val_every_n_epoch": 1,
    "accumulate_grad_batches": 1,
    "max_steps": 1,
    "log_every_n_steps": 0,
}


def resolved_config(parser: LightningArgumentParser, config: Any) -> dict[str, Any]:
    """Returns every setting as plain data, as ``config.yaml`` holds it.

    Raises:
        InputError: The default of a class' argument is no plain data, as that of Lightning's ``Timer``.
    """
    try:
        resolved: dict[str, Any] = yaml.safe_load(parser.dump(config, skip_unset=False))
    except ValueError as error:
        reason = re.search("cannot represent an object', (.*)\\)", str(error))
        if reason is None:
            raise
        raise InputError(f"{reason[1]}: a class' default, not plain data; give that argument too") from error
    return resolved


def check_settings(config: dict[str, Any], module: type, data: type) -> None:
    """Checks what types alone don't: ranges, and that there is something where a run needs it.

    Args:
        config: Resolved.
        module: The task's.
        data: The task's, where the config names no class.

    Raises:
        InputError: Names the setting.
    """
    for name in ("trainer", "model", "data", "regularize", "output", "seed_everything"):
        value = config.get(name)
        if value is None or (name == "trainer" and not {*OURS} <= value.keys()):
            raise InputError(f"{name}: is null; leave it out, or give a value")
    for name, option in {
        "resume": "--resume RUN_FOLDER",
        "verbose": VERBOSE,
        "allow": f"{OPTION} MODULE",
    }.items():
        if name in config:
            raise InputError(f"{name}: not a setting; give {option} on the command line")
    run = {name: config[name] for name in ("output", "seed_everything")}
    if isinstance(run["seed_everything"], bool):  # LightningCLI's: any seed, or none
        del run["seed_everything"]
    checked_arguments(_run_settings, run)
    trainer = config["trainer"]
    for name in OURS:
        if trainer[name] not in (None, False, True if name == "use_distributed_sampler" else None):
            raise InputError(
                f"trainer.{name}: leave it out, a run has its own and writes below --output alone"
            )
    for name, least in LEAST.items():
        value = trainer[name]
        if value is not None and value < least and (name, value) != ("max_steps", -1):
            raise InputError(f"trainer.{name}: got {value}, give {least} or more")
    for name, value in trainer.items():
        if isinstance(value, int | float) and not -(2**31) <= value < 2**31:
            raise InputError(f"trainer.{name}: got {value}, give a number below {2**31}")
    # A regularizer of one's own is a class with arguments: it is checked when it is built.
    regularize = {name: value for name, value in config["regularize"].items() if name != "regularizer"}
    checked_arguments(Regularize, regularize, "regularize.")
    checked_arguments(*_class_and_arguments(config["model"], module), "model.")
    checked_arguments(*_class_and_arguments(config["data"], data), "data.")


def _run_settings(output: Path, seed_everything: Seed) -> None:
    """Declares the types of the settings that are neither the trainer's nor a class'."""


def _class_and_arguments(setting: dict[str, Any], default: type) -> tuple[type, dict[str, Any]]:
    if "class_path" not in setting:
        return default, setting
    module, _, name = setting["class_path"].rpartition(".")
    return getattr(importlib.import_module(module), name), setting.get("init_args", {})
