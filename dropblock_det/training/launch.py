"""A run's process: alone in its folder, stopped by signals, left by others, refused by the machine."""

import contextlib
import os
import re
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities.exceptions import SIGTERMException

from dropblock_det.errors import InputError
from dropblock_det.locks import locked
from dropblock_det.runs.folder import TRAINING_LOCK, goes_on
from dropblock_det.tasks.module import TaskModule
from dropblock_det.training.allowed import PACKAGES

# All 0 or absent in the first process.
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
# What every training logs beside its task's metrics: names, as a regular expression.
LOGGED = r"(val_)?loss(_.+)?|(p|drop_share)(_epoch|/.+)?|lr|data_wait_s|loss_scale|skipped_steps"
# What torch refuses in the middle of a step, and which settings change that.
REFUSALS = {
    "Expected more than 1 value per channel": "the last batch is too small for batch norm: give another "
    "data.batch_size, or a larger model.min_size",
    "not implemented for '(Half|BFloat16)'": "trainer.precision: not for this device; give another",
    "DataLoader worker .* is killed": "a process that loads images was killed: out of memory? lower "
    "data.num_workers or data.batch_size, or give more shared memory",
    "out of memory|can't allocate memory": "out of memory: lower data.batch_size or the size of the images",
}
# What torch says first where a scheduler sends SIGTERM to all processes, those that load images among them.
TERMINATED = "is killed by signal: Terminated"


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Turns what Lightning and torch refuse because of a setting into one line.

    Lightning has no one exception for that: it is what its own code raises by a ``raise`` statement. A fault
    of ours fails in our code, or inside a statement of a library.
    """
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause:  # jsonargparse wraps what the constructor of a class refuses
            if isinstance(cause, InputError):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        for pattern, advice in REFUSALS.items():
            if isinstance(error, RuntimeError | ValueError) and re.search(pattern, str(error)):
                raise InputError(advice) from error
        raised = traceback.extract_tb(error.__traceback__)[-1]
        if "lightning" in Path(raised.filename).parts and (raised.line or "").startswith("raise "):
            raise InputError(f"trainer: {' '.join(str(error).split())[:400]}") from error
        raise


@contextlib.contextmanager
def sole_use(folder: Path) -> Iterator[None]:
    """Keeps other trainings out of a run's folder. The first of several processes does so for all.

    Raises:
        InputError: Another training has it.
    """
    if any(os.environ.get(name, "0") != "0" for name in RANKS):
        yield
        return
    with locked(folder / TRAINING_LOCK, folder):
        yield


class Sound(Callback):
    """Refuses a training that would end without a result, and ends one whose weights are not finite."""

    def __init__(self) -> None:
        self._validated = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks that the first validation comes before the end.

        Raises:
            InputError: It doesn't.
        """
        if not sum(trainer.num_val_batches):
            raise InputError(
                "trainer.limit_val_batches: leaves no validation, and so no result; leave it out"
            )
        every, epochs = trainer.check_val_every_n_epoch, trainer.max_epochs
        if every and epochs and 0 < epochs < every:
            raise InputError(
                f"trainer.check_val_every_n_epoch: {every}, but {epochs} epochs: no validation, and "
                "so no result; give fewer"
            )

    def state_dict(self) -> dict[str, Any]:
        """A resumed run may have had its result before."""
        return {"validated": self._validated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back what :meth:`state_dict` gave."""
        self._validated = state_dict["validated"]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes that there is a result."""
        self._validated |= not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the run before a checkpoint is written where the weights are not finite.

        Raises:
            InputError: They are not.
        """
        values = [value for value in pl_module.state_dict().values() if value.is_floating_point()]
        finite = all(bool(value.isfinite().all()) for value in values)
        if not trainer.strategy.reduce_boolean_decision(finite):
            raise InputError(
                f"epoch {trainer.current_epoch + 1}: stopped, weights are no longer finite; the checkpoint "
                "before is kept: lower model.lr"
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses to count a run as finished that a limit ended before its first validation.

        Raises:
            InputError: That happened.
        """
        if not self._validated and not trainer.interrupted:
            raise InputError(
                f"ended at step {trainer.global_step}, before the first validation, and so without a result; "
                "raise the trainer's limits (limit_train_batches, max_steps, max_time)"
            )


def check_launcher(trainer: Trainer) -> None:
    """Refuses strategies whose processes are forked or spawned by the first.

    Raises:
        InputError: It is one of these.
    """
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise InputError(
            "trainer.strategy: processes that are spawned or forked leave their weights in temporary files; "
            "give ddp"
        )


def check_monitors(trainer: Trainer, module: TaskModule) -> None:
    """Refuses callbacks that monitor what is not logged; Lightning does after the first validation.

    Modules that are not ours or Lightning's may log anything.

    Raises:
        InputError: Names the callback, and what there is.
    """
    if any(type(c).__module__.partition(".")[0] not in PACKAGES for c in trainer.callbacks):  # type: ignore[attr-defined]
        return
    names = [metric.name for metric in module.metrics]
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        monitor = getattr(callback, "monitor", None)
        if monitor is not None and not re.fullmatch("|".join([*names, module.logged, LOGGED]), monitor):
            raise InputError(
                f"trainer.callbacks: {type(callback).__name__} monitors {monitor}, which no one logs; "
                f"give one of {', '.join(names)}"
            )


def fit(trainer: Trainer, model: LightningModule, data: Any, checkpoint: Path | None, folder: Path) -> None:
    """Trains; when stopped from outside or left by another process, says how to go on and exits.

    Exit status 143 after SIGTERM, 130 after Ctrl-C, 1 when another process has died.
    """
    # All processes log the same values, which each has from the first: there is nothing to average.
    warnings.filterwarnings("ignore", message=r"It is recommended to use .*sync_dist=True")
    try:
        trainer.fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except (SystemExit, RuntimeError) as error:
        terminated = TERMINATED in str(error) or isinstance(error, SIGTERMException)
        if terminated or isinstance(error, SystemExit):  # Lightning's answer to both signals
            if trainer.is_global_zero:
                print(f"stopped; {goes_on(folder)}", file=sys.stderr)
            sys.exit(143 if terminated else 130)
        if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
            raise
        lost = f"process {trainer.global_rank} lost another, which has died (see above)"
        sys.exit(f"error: {lost}; {goes_on(folder)}")


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
