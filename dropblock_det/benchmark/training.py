"""Our training as a run makes it, through Lightning's Trainer, beside torchvision's reference loop.

Both train in one process, a block of steps after the other's, on the same images. A block of ours lasts from
one end of a step to another: data, callbacks, logging and all that Lightning does are in it.
"""

import re
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import Profiler

from dropblock_det.benchmark.measure import WARM_UP, Case, Row, check_memory, rows_of
from dropblock_det.benchmark.reference_loop import PRINT_EVERY, reference_steps
from dropblock_det.errors import InputError
from dropblock_det.files import write_text
from dropblock_det.tasks.detection.models import build_detector
from dropblock_det.training.cli import TrainCLI, command_line
from dropblock_det.training.launch import refusals

OURS = "ours"
REST = "ours: logging, callbacks, checks"
# Which of Lightning's actions make which part; what is in none of them is the rest.
PARTS = {
    "ours: data": r"dataloader_next|batch_transfer|batch_to_device",
    "ours: forward": r"forward$",
    "ours: backward": r"\.backward$",
    "ours: optimizer": r"\.(optimizer_step|optimizer_zero_grad|lr_scheduler_step)$",
}
EXPLAINED = 10  # steps whose parts are timed, after the blocks


@dataclass(frozen=True)
class TrainingCase:
    """What to measure: the settings of one training.

    Attributes:
        root: COCO folder.
        name: The detector's.
        size: Shorter side of the images in pixels; ``None`` where the detector has a size of its own.
        batch: Images per batch.
        workers: Processes that load images, for each of the trainings.
        precision: Of ours, as ``--trainer.precision``.
        device: ``cpu`` or ``cuda``.
        rounds: How many blocks of each are timed.
        steps: Of a block.
    """

    root: Path
    name: str
    size: int | None
    batch: int
    workers: int
    precision: str
    device: str
    rounds: int
    steps: int

    def settings(self) -> dict[str, Any]:
        """Of ``tools/train.py``, for our fastest steps. The optimizer is the reference's, for equal work."""
        return {
            "trainer": {
                "accelerator": "gpu" if self.device == "cuda" else "cpu",
                "devices": 1,
                "precision": self.precision,
                "max_epochs": 1,
                "num_sanity_val_steps": 0,
                "log_every_n_steps": PRINT_EVERY,
                "enable_progress_bar": False,
            },
            "data": {
                "class_path": "dropblock_det.datasets.coco.CocoDataModule",
                "init_args": {
                    "root": str(self.root),
                    "batch_size": self.batch,
                    "num_workers": self.workers,
                },
            },
            "model": {
                "name": self.name,
                "min_size": self.size,
                "max_size": self.size and self.size * 5 // 3,  # 800 x 1333 in torchvision
                "optimizer": "sgd",
                "lr": 0.01,
                "lr_schedule": "constant",
            },
            "regularize": {"regularizer": "none"},
        }


class Parts(Profiler):
    """Sums up the seconds of each part of a training; an action's are without those of the actions inside it.

    Attributes:
        clock: Gives the time in seconds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clock = time.perf_counter
        self._actions = [""]
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._last = self.clock()

    def start(self, action_name: str) -> None:
        """An action begins."""
        self._lap()
        self._actions.append(action_name)

    def stop(self, action_name: str) -> None:
        """The innermost action ends."""
        self._lap()
        self._actions.pop()

    def _lap(self) -> None:
        now = self.clock()
        self._seconds[self._actions[-1]] += now - self._last
        self._last = now

    def take(self) -> dict[str, float]:
        """Returns the seconds of each part since the last call."""
        self._lap()
        parts = dict.fromkeys([*PARTS, REST], 0.0)
        for action, seconds in self._seconds.items():
            parts[next((name for name, pattern in PARTS.items() if re.search(pattern, action)), REST)] += (
                seconds
            )
        self._seconds.clear()
        return parts

    def wrapped(self, action_name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a function as an action."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.profile(action_name):
                return function(*args, **kwargs)

        return timed


class Blocks(Callback):
    """Times blocks of our steps, between which others train; then the parts of some more steps.

    Args:
        others: Trainings that make a step at each ``next``, by name.
        rounds: How many blocks are timed, after :data:`WARM_UP`. One in which an epoch ends does not count.
        steps: Of a block.
        parts: The trainer's profiler.
        clock: Gives the time in seconds when the device has done its work.
        on_round: Called after every round.

    Attributes:
        seconds: By training, of each block.
        explained: By part, of each step.
        validation: Seconds of the whole validation at the end.
        evaluation: What of it evaluates the predictions.
        closing: Seconds after it, of record and checkpoint.
    """

    def __init__(
        self,
        others: Mapping[str, Iterator[Any]],
        rounds: int,
        steps: int,
        parts: Parts,
        clock: Callable[[], float],
        on_round: Callable[[], None] = lambda: None,
    ) -> None:
        self.others, self.steps, self.parts, self.clock = others, steps, parts, clock
        self.on_round = on_round
        self.blocks = WARM_UP + rounds
        self.seconds: dict[str, list[float]] = {name: [] for name in (OURS, *others)}
        self.explained: dict[str, list[float]] = defaultdict(list)
        self.validation = self.evaluation = self.closing = 0.0
        self._step = 0
        self._whole = False
        self._begun = 0.0

    @property
    def all_steps(self) -> int:
        """How many of our steps that takes."""
        return self.blocks * self.steps + 1 + EXPLAINED

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the model's forward and the evaluation actions of their own."""
        module: Any = pl_module
        module.losses = self.parts.wrapped("forward", module.losses)
        module.evaluate = self._timed_evaluation(module.evaluate)

    def _timed_evaluation(self, evaluate: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            begun = self.clock()
            result = evaluate(*args)
            self.evaluation = self.clock() - begun
            return result

        return timed

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves out the block that an epoch's end and start belong to."""
        self._whole = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends a block, lets the others train as many steps, and begins the next one."""
        self._step += 1
        blocks, step = divmod(self._step, self.steps)
        if self._step > self.blocks * self.steps:
            self.parts.clock = self.clock
            taken = self.parts.take()
            if self._whole and self._step > self.blocks * self.steps + 1:
                for name, seconds in taken.items():
                    self.explained[name].append(seconds)
            self._whole = True
            trainer.should_stop = self._step == self.all_steps
        elif step == 0:
            counts = self._whole and blocks > WARM_UP
            self._keep(OURS, self.clock() - self._begun, counts)
            for name, training in self.others.items():
                begun = self.clock()
                for _ in range(self.steps):
                    next(training)
                self._keep(name, self.clock() - begun, counts)
            self.on_round()
            self._whole, self._begun = True, self.clock()

    def _keep(self, name: str, seconds: float, counts: bool) -> None:
        if counts:
            self.seconds[name].append(seconds)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the validation's clock."""
        self._begun = self.clock()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the validation's clock, and starts that of the epoch's end."""
        now = self.clock()
        self.validation, self._begun = now - self._begun, now

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the clock of the epoch's end."""
        self.closing = self.clock() - self._begun


def device_clock(device: str) -> Callable[[], float]:
    """A clock that waits until the device has done its work."""

    def clock() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    return clock


def channels_last(model: torch.nn.Module) -> bool:
    """Whether a model's convolutions have their weights in that memory format."""
    weights = [p for p in model.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    return all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


def other_trainings(cli: TrainCLI, case: TrainingCase) -> tuple[str, dict[str, Iterator[str]]]:
    """How ours computes, and the reference loop on the same model: as it stands, and computing like ours."""
    module: Any = cli.model
    if cli.trainer.precision not in ("bf16-mixed", "32-true"):
        raise InputError(f"--precision {case.precision}: give auto, bf16-mixed or 32-true")
    names = [category["name"] for category in cli.datamodule.categories]
    bfloat16, last = cli.trainer.precision == "bf16-mixed", channels_last(module.detector)
    how = f"{'bfloat16' if bfloat16 else 'float32'}{' channels_last' if last else ''}"

    def training(bfloat16: bool, memory_format: torch.memory_format) -> Iterator[str]:
        sizes = {side: module.hparams[side] for side in ("min_size", "max_size")}
        model = build_detector(case.name, names, **sizes)
        model.load_state_dict(module.detector.state_dict())
        model.to(memory_format=memory_format)
        return reference_steps(model, cli.datamodule, case.device, module.hparams["lr"], bfloat16)

    loop = "torchvision's reference loop"
    others = {f"{loop}, float32": training(False, torch.contiguous_format)}
    if how != "float32":
        others[f"{loop}, {how}"] = training(
            bfloat16, torch.channels_last if last else torch.contiguous_format
        )
    return how, others


@refusals()
def measure_training(case: TrainingCase, on_round: Callable[[], None]) -> list[Row]:
    """Measures one training.

    Raises:
        InputError: A setting that the training refuses, or fewer images than a block needs.
    """
    side = 4 / 3 * (case.size or 320)
    check_memory(f"batch {case.batch} at {case.size}", 2500 * case.batch * side**2 + 2**31, case.device)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_text(folder / "settings.yaml", yaml.safe_dump(case.settings()))
        words = [f"--config={folder / 'settings.yaml'}", f"--output={folder / 'run'}"]
        cli = command_line(words, stack)
        per_epoch = -(-len(cli.datamodule.train_dataset) // case.batch)
        if per_epoch < 2 * case.steps:
            raise InputError(
                f"{case.root}: {per_epoch} batches of training images; give a smaller batch, or fewer steps"
            )
        how, others = other_trainings(cli, case)
        parts = Parts()
        blocks = Blocks(others, case.rounds, case.steps, parts, device_clock(case.device), on_round)
        trainer: Any = cli.trainer
        trainer.profiler = parts
        trainer.callbacks.append(blocks)
        # The validation is the last epoch's, which ends when all is measured.
        trainer.fit_loop.max_epochs = trainer.check_val_every_n_epoch = -(-blocks.all_steps // per_epoch)
        trainer.fit(cli.model, datamodule=cli.datamodule)
    return training_rows(case, how, blocks, per_epoch, cli.model.detector.transform.min_size[-1])


def training_rows(case: TrainingCase, how: str, blocks: Blocks, per_epoch: int, size: int) -> list[Row]:
    """The rows of what was measured, in milliseconds of a step or an epoch."""
    ours = Case("training", f"{case.name}, ours {how}", (case.batch, 3, size), case.device, OURS)
    steps = {name: [s * 1e3 / case.steps for s in seconds] for name, seconds in blocks.seconds.items()}
    explained = {name: [s * 1e3 for s in seconds] for name, seconds in blocks.explained.items()}
    explained["ours: a step"] = [sum(of_step) for of_step in zip(*explained.values(), strict=True)]
    epoch = {
        "ours: its steps": per_epoch * statistics.median(steps[OURS]),
        "ours: validation": blocks.validation * 1e3,
        "ours: record and checkpoint": blocks.closing * 1e3,
    }
    epoch["ours: an epoch"] = sum(epoch.values())
    epoch["ours: evaluating the predictions, of the validation"] = blocks.evaluation * 1e3
    return [
        *rows_of(ours, steps),
        *rows_of(replace(ours, what="training: parts of a step", baseline="ours: a step"), explained),
        *rows_of(
            replace(ours, what="training: parts of an epoch", baseline="ours: an epoch"),
            {name: [value, value] for name, value in epoch.items()},
        ),
    ]
