"""Injecting and scheduling a regularizer in anyone's LightningModule, as one callback."""

import os
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from dropblock_det.datasets.sampling import draw_seed
from dropblock_det.errors import InputError
from dropblock_det.inject.inject import RegularizerHandle, regularize_
from dropblock_det.layers import make_regularizer
from dropblock_det.schedule import P_SCHEDULES, scheduled_p


class Regularize(Callback):
    """Puts a regularizer into any LightningModule that holds a torchvision model, and schedules its ``p``.

    ``Trainer(callbacks=[Regularize("dropblock", p=0.1, block_size=7, at="paper")])`` is all a project
    needs. The regularizer is there while ``fit`` runs and gone afterwards; the checkpoint's keys are the
    stock model's. ``p`` is a pure function of the global step, and before each batch the random
    generators are seeded from (seed, rank, step): processes draw different masks, and a resumed run
    draws those that it would have drawn.

    Args:
        regularizer: ``none``, ``dropout``, ``spatial_dropout`` or ``dropblock``.
        p: Target drop probability, between 0 and 1.
        block_size: For ``dropblock``: side of a block on the feature map, or its height and width.
        at: Where: a preset such as ``paper``, or dotted names in which ``*`` is one segment.
        schedule: ``linear`` (0 to ``p`` over the training, as in the paper) or ``constant``.
        per_channel: For ``dropblock``: a mask per channel (the paper's finding) or one for all.
        calibration: For ``dropblock``: ``paper``, or ``exact`` for an expected dropped share of ``p``.

    Raises:
        InputError: An unknown name or a value out of range; in ``setup``, no site found.
    """

    def __init__(
        self,
        regularizer: Literal["none", "dropout", "spatial_dropout", "dropblock"] = "none",
        p: float = 0.1,
        block_size: int | tuple[int, int] = 7,
        at: str | list[str] = "paper",
        schedule: Literal["linear", "constant"] = "linear",
        per_channel: bool = True,
        calibration: Literal["paper", "exact"] = "paper",
    ) -> None:
        if schedule not in P_SCHEDULES:
            raise InputError(f"schedule: got {schedule!r}, give one of {', '.join(P_SCHEDULES)}")
        self.regularizer, self.p, self.at, self.schedule = regularizer, p, at, schedule
        self.arguments: dict[str, Any] = {}
        if regularizer == "dropblock":
            self.arguments = {
                "block_size": block_size,
                "per_channel": per_channel,
                "calibration": calibration,
            }
        self.make()  # a bad argument is said now, not after the data is loaded
        self.handle: RegularizerHandle | None = None
        self._seed = 0
        self._counts: list[tuple[Tensor, Tensor]] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def make(self) -> Any:
        """Returns a new regularizer, or None for ``none``."""
        return make_regularizer(self.regularizer, self.p, **self.arguments)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Injects, before the optimizer, the strategy and SyncBatchNorm see the model."""
        if stage != "fit":
            return
        self._seed = int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed()))
        if self.regularizer == "none":
            return
        pl_module.configure_model()  # idempotent by contract; a model built there counts too
        if self.handle is not None:
            self.handle.remove()  # an earlier fit ended in an exception
        self.handle = regularize_(pl_module, self.make, at=self.at)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Sets this step's ``p`` and this rank's and step's random stream."""
        torch.manual_seed(draw_seed(self._seed, trainer.global_rank, trainer.fit_loop.total_batch_idx))
        if self.handle is None:
            return
        p = scheduled_p(self.p, trainer.global_step, int(trainer.estimated_stepping_batches), self.schedule)
        self.handle.set_p(p)
        pl_module.log("p", p)
        logged = (batch_idx + 1) % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if logged or trainer.is_last_batch:
            sites: list[Any] = [pl_module.get_submodule(site) for site in self.handle.sites]
            self._hooks = [site.regularizer.register_forward_hook(self._count) for site in sites]

    def _count(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # A zero in the input, as behind a ReLU, cannot be told from a dropped element: it does not count.
        alive = inputs[0] != 0
        self._counts.append(((alive & (output == 0)).sum(), alive.sum()))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the share that was really dropped, over all sites."""
        for hook in self._hooks:
            hook.remove()
        if self._counts:
            dropped, alive = (torch.stack(column).sum() for column in zip(*self._counts, strict=True))
            pl_module.log("drop_share", dropped / alive)
        self._hooks, self._counts = [], []

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives the stock model back."""
        if self.handle is not None:
            self.handle.remove()
            self.handle = None
