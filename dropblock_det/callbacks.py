"""Injecting and scheduling a regularizer in anyone's LightningModule, as one callback."""

import math
import os
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from dropblock_det.datasets.sampling import draw_seed
from dropblock_det.errors import InputError
from dropblock_det.inject.inject import RegularizerHandle, regularize_
from dropblock_det.inject.shares import SiteShares
from dropblock_det.layers import make_regularizer
from dropblock_det.schedule import P_SCHEDULES, p_at


class Regularize(Callback):
    """Puts a regularizer into any LightningModule that holds a torchvision model, and schedules its ``p``.

    ``Trainer(callbacks=[Regularize("dropblock", p=0.1, block_size=7, at="paper")])`` is all a project
    needs. The regularizer is there while ``fit`` runs and gone afterwards; the checkpoint's keys are the
    stock model's. ``p`` is a pure function of the batch's number, and before each batch the random
    generators are seeded from (seed, rank, step): processes draw different masks, and a resumed run
    draws those that it would have drawn.

    Logged are ``p`` and, on the steps that are logged, the share really dropped over all sites
    (``drop_share``); at an epoch's end both as means over these steps (``p_epoch``, ``drop_share_epoch``) and
    the share per site (``drop_share/<site>``). Of several such callbacks each logs ``p/<regularizer>``,
    ``drop_share/<regularizer>`` and so on.

    Args:
        regularizer: A name in :data:`~dropblock_det.layers.REGULARIZERS`: ``none``, ``dropout``,
            ``spatial_dropout``, ``dropblock`` or ``stochastic_depth``. Or what builds a module of your own
            for each site, in YAML ``{class_path: ..., init_args: ...}``; its ``p`` is then the target.
        p: Target drop probability, between 0 and 1, of a regularizer by name.
        block_size: For ``dropblock``: side of a block on the feature map, or its height and width.
        at: Where: a preset such as ``paper``, dotted names in which ``*`` is one segment, a list of these,
            or these with factors on ``p``: ``{stage3: 0.25, stage4: 1.0}``.
        schedule: A name in :data:`~dropblock_det.schedule.P_SCHEDULES`, such as ``linear`` (0 to ``p`` over
            the training, as in the paper) or ``constant``. All but ``constant`` need to know how long the
            training is: from ``max_epochs``, ``max_steps`` or ``max_time``.
        per_channel: For ``dropblock``: a mask per channel (the paper's finding) or one for all.
        calibration: For ``dropblock``: ``paper``, or ``exact`` for an expected dropped share of ``p``.
        cutoff: For ``early`` and ``late``: the share of the training at which they switch.

    Raises:
        InputError: An unknown name or a value out of range; in ``setup``, no site found; at the training's
            start, a schedule that does not know how long it is.
    """

    def __init__(
        self,
        regularizer: str | Callable[[], nn.Module] = "none",
        p: float = 0.1,
        block_size: int | tuple[int, int] = 7,
        at: str | list[str] | dict[str, float] = "paper",
        schedule: str = "linear",
        per_channel: bool = True,
        calibration: Literal["paper", "exact"] = "paper",
        cutoff: float = 0.5,
    ) -> None:
        if schedule not in P_SCHEDULES:
            raise InputError(f"schedule: got {schedule!r}, give one of {', '.join(P_SCHEDULES)}")
        if not 0 <= cutoff <= 1:
            raise InputError(f"cutoff: got {cutoff!r}, give a share of the training, from 0 to 1")
        self.regularizer, self.at, self.schedule, self.cutoff = regularizer, at, schedule, cutoff
        self.arguments: dict[str, Any] = {
            "p": p,
            "block_size": block_size,
            "per_channel": per_channel,
            "calibration": calibration,
        }
        made = self.make()  # a bad argument is refused now, not after the data is loaded
        self.name = regularizer if isinstance(regularizer, str) else type(made).__name__
        self.p: float | None = p if isinstance(regularizer, str) else getattr(made, "p", None)
        if self.p is None and schedule != "constant":
            raise InputError(f"{self.name} has no drop probability `p`: give it one, or schedule: constant")
        self.handle: RegularizerHandle | None = None
        self.shares: SiteShares | None = None
        self._seed = 0
        self._total_steps: float = 0  # batches, or optimizer steps where the trainer has max_steps
        self._by_batches = True
        self._epochs = 1
        self._counted: list[float] = []  # p in the steps whose shares are counted
        self._compiled = False

    def make(self) -> nn.Module:
        """Returns a new regularizer."""
        if callable(self.regularizer):
            return self.regularizer()
        return make_regularizer(self.regularizer, **self.arguments)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Injects, before the optimizer, the strategy and SyncBatchNorm see the model."""
        if stage != "fit":
            return
        self._seed = int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed()))
        if self.regularizer == "none":
            return
        pl_module.configure_model()  # idempotent by contract; a model built there counts too
        try:
            self.handle = regularize_(pl_module, self.make, at=self.at)
        except InputError as error:
            if type(pl_module).setup is LightningModule.setup:
                raise
            raise InputError(
                f"{error}; a model is to be built in __init__ or configure_model, for setup comes after this"
            ) from error
        self.shares = SiteShares(self.handle)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds out how long the training is, and whether the model is compiled.

        Raises:
            InputError: It is not known, and the schedule needs it.
        """
        self._compiled = _is_compiled(pl_module)
        if self.handle is None or self.schedule == "constant":
            return
        batches, epochs = trainer.num_training_batches, trainer.max_epochs or -1
        self._by_batches = trainer.max_steps == -1
        if self._by_batches:  # whatever an optimizer step is, here or later in the training
            total = float(batches * epochs)
        else:
            total = float(trainer.estimated_stepping_batches)
            batches = math.ceil(batches / trainer.accumulate_grad_batches) if batches < math.inf else batches
        self._total_steps = total if 0 < total < math.inf else 0
        if not self._total_steps and _timer(trainer) is None:
            raise InputError(
                f"schedule: {self.schedule} needs to know how long the training is: give the trainer"
                " max_steps or max_time, or choose constant"
            )
        if self._total_steps and batches < math.inf:
            self._epochs = math.ceil(total / batches)
        elif self.schedule == "epochwise":
            raise InputError("schedule: epochwise needs to know how many epochs there are; give max_epochs")

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Sets this step's ``p`` and this rank's and step's random stream."""
        torch.manual_seed(draw_seed(self._seed, trainer.global_rank, trainer.fit_loop.total_batch_idx))
        if self.handle is None or self.shares is None:
            return
        if self.p is not None:
            p = p_at(self._progress(trainer), self.p, self.schedule, self.cutoff, self._epochs)
            self.handle.set_p(p)
            pl_module.log(self._log_name(trainer, "p"), torch.tensor(p))  # a float would go to the device
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        step = trainer.fit_loop.epoch_loop._batches_that_stepped  # what Lightning's logging goes by
        if trainer.is_last_batch or (every and (step + 1) % every == 0):
            self.shares.start()
            if self.p is not None:
                self._counted.append(p)
            if self._compiled:  # compiled code has no hooks that count
                torch.compiler.set_stance("force_eager")

    def _progress(self, trainer: Trainer) -> float:
        """How much of the training is done, from 0 to 1.

        In batches, in steps where these have an end, or in time where only that has one.
        """
        if self._total_steps:
            step = trainer.fit_loop.total_batch_idx if self._by_batches else trainer.global_step
            return min(1.0, step / max(1, self._total_steps - 1))
        timer = _timer(trainer)
        if timer is None:
            return 0.0
        elapsed, remaining = timer.time_elapsed(), timer.time_remaining() or 0.0
        return min(1.0, elapsed / max(1e-9, elapsed + remaining))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the share that was really dropped, over all sites; names sites that did not run."""
        if self.handle is None or self.shares is None:
            return
        self.handle.warn_of_idle_sites()
        share = self.shares.stop()
        if self._compiled:
            torch.compiler.set_stance("default")
        if share is not None:
            pl_module.log(self._log_name(trainer, "drop_share"), share)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the share dropped at each site, and warns where it is not what it should be."""
        if self.shares is None:
            return
        share, shares, warnings = self.shares.collect(
            pl_module.device, lambda sums: trainer.strategy.reduce(sums, reduce_op="sum")
        )
        counted, self._counted = self._counted, []
        for name, value in (("p", sum(counted) / len(counted) if counted else None), ("drop_share", share)):
            if value is not None:
                pl_module.log(f"{self._log_name(trainer, name)}_epoch", value)
        for site, share in shares.items():
            pl_module.log(f"drop_share/{site}", share)
        for warning in warnings:
            rank_zero_warn(warning)

    def _log_name(self, trainer: Trainer, quantity: str) -> str:
        others = [c for c in trainer.callbacks if isinstance(c, Regularize) and c.handle is not None]  # type: ignore[attr-defined]
        if len(others) == 1:
            return quantity
        namesakes = [c for c in others if c.name == self.name]
        number = f"_{namesakes.index(self) + 1}" if len(namesakes) > 1 else ""
        return f"{quantity}/{self.name}{number}"

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds what is regularized and how, so that ``evaluate --samples`` does the same.

        A module of one's own cannot be rebuilt from a checkpoint that is safe to load; its class is noted.
        """
        regularizers = checkpoint.setdefault("regularizers", [])
        if self.handle is not None:
            arguments = self.arguments if isinstance(self.regularizer, str) else {}
            regularizers.append({"name": self.name, "sites": self.handle.factors, **arguments})

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Gives the stock model back also where the fit failed or was interrupted."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives the stock model back."""
        if self._compiled:
            torch.compiler.set_stance("default")  # the fit may have ended in a step that was not compiled
        if self.handle is not None:
            self.handle.remove()
            self.handle = self.shares = None


def _is_compiled(module: nn.Module) -> bool:
    """Whether any part is: by ``part.compile()``, or by ``torch.compile`` of it or of the whole module."""
    return getattr(module, "_compiler_ctx", None) is not None or any(
        part._compiled_call_impl is not None or hasattr(part, "_orig_mod") for part in module.modules()
    )


def _timer(trainer: Trainer) -> Timer | None:
    """What ends a training after ``max_time``."""
    timers = [c for c in trainer.callbacks if isinstance(c, Timer) and c.time_remaining() is not None]  # type: ignore[attr-defined]
    return timers[0] if timers else None
