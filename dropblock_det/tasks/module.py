"""What the modules of all tasks share: optimizer, learning rate, losses that are not finite, validation."""

import math
from abc import abstractmethod
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from dropblock_det.arguments import Natural, Rate, Share
from dropblock_det.errors import InputError
from dropblock_det.schedule import lr_factor
from dropblock_det.tasks.breakdown import Breakdown
from dropblock_det.tasks.evaluation import Evaluation
from dropblock_det.tasks.metric import Metric
from dropblock_det.tasks.nonfinite import Watch


class _Batch(NamedTuple):
    """A validated batch, as processes exchange it."""

    image_ids: list[int]
    losses: dict[str, float]
    predictions: list[Any]


class TaskModule(LightningModule):
    """Trains a model and reports ``loss``, ``val_loss`` and its task's metrics.

    A task declares its metrics and gives losses, predictions and their evaluation; everything that comes
    after reads only those. The regularizer comes from the :class:`dropblock_det.callbacks.Regularize`
    callback, as it would in anyone's module.

    Attributes:
        task: the task's name.
        metrics: what it measures, in the order of the columns; the losses are among them.
        headline: name of the metric by which the best epoch is chosen.
        logged: what its evaluation gives beside these: names, as a regular expression.
        predictions: those of the last validation, in the order of the images.
        evaluation: of the last validation, on the first process; ``None`` on others and before.
        precision: of the training that a checkpoint is from, as Lightning names it.
        seen_loss: training loss of the last step that the host has seen, one behind; ``None`` before.

    Args:
        optimizer: ``sgd`` (with momentum 0.9) or ``adamw``.
        lr: Base learning rate.
        weight_decay: Weight decay of all trained parameters.
        lr_schedule: ``constant``, ``cosine`` or ``step``.
        lr_milestones: For ``step``: shares of the training after which the rate is divided by ten.
        warmup_steps: Optimizer steps of linear warm-up.
        on_nonfinite: A step whose loss or gradients are not finite changes no weight. ``stop`` ends the run
            there; ``skip`` goes on and counts it as ``skipped_steps``.
        compile: Compile the model's layers for the training, which takes minutes at its start. Neither images
            of another size nor DropBlock's ``p`` compile anything anew; torch's own dropouts do at each new
            ``p``: give them ``schedule: constant``. Checkpoints are those of an uncompiled model.
    """

    task: ClassVar[str]
    metrics: ClassVar[tuple[Metric, ...]]
    headline: ClassVar[str]
    logged: ClassVar[str] = ""

    def __init__(
        self,
        optimizer: Literal["sgd", "adamw"] = "sgd",
        lr: Rate = 0.01,
        weight_decay: Rate = 1e-4,
        lr_schedule: Literal["constant", "cosine", "step"] = "cosine",
        lr_milestones: list[Share] = [0.8, 0.93],  # noqa: B006 (never changed; shown in --help)
        warmup_steps: Natural = 500,
        on_nonfinite: Literal["stop", "skip"] = "stop",
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="_load_weights")  # the subclass's too
        self.predictions: list[Any] = []
        self.evaluation: Evaluation | None = None
        self._validated: list[_Batch] = []
        self.precision: Any = "32-true"
        self.seen_loss: float | None = None
        self._watch = Watch()
        self._skipped_steps = 0

    @abstractmethod
    def losses(self, batch: Any) -> dict[str, Tensor]:
        """Returns the training losses of a batch by name, each the mean over its images; they are summed."""

    @abstractmethod
    def losses_and_predictions(self, batch: Any) -> tuple[dict[str, Tensor], list[Any]]:
        """Returns the losses of a validation batch, as :meth:`losses`, and its predictions, to be pickled."""

    @abstractmethod
    def evaluate(self, image_ids: list[int], predictions: list[Any]) -> Evaluation:
        """Evaluates the predictions of a whole validation; runs on the first process only."""

    @abstractmethod
    def breakdown(self, predictions: list[Any], score: float | None = None) -> Breakdown:
        """Looks closer at the predictions of a whole validation.

        Args:
            predictions: As :meth:`losses_and_predictions` gives them.
            score: Where only predictions from some score on are counted: that score, or None.
        """

    @abstractmethod
    def parts_to_compile(self) -> list[nn.Module]:
        """Returns the parts of the model that ``compile`` compiles, each by itself."""

    def setup(self, stage: str) -> None:
        """Compiles: after the callbacks' own setup, in which a regularizer comes into the model."""
        if stage == "fit" and self.hparams["compile"]:
            for part in self.parts_to_compile():
                part.compile(dynamic=True)

    def image_ids(self, batch: Any) -> list[int]:
        """Returns the ids of a batch's images."""
        return [target["image_id"] for target in batch[1]]

    @abstractmethod
    def prepared(self, image: Tensor) -> Tensor:
        """Returns an image, uint8 ``(3, H, W)``, as :meth:`predict_step` takes it.

        Raises:
            InputError: The model can't take it; the message does not name it.
        """

    @abstractmethod
    def predict_step(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """Returns each image's ``scores`` and ``labels``, and of a detector ``boxes``, as tensors."""

    @classmethod
    def from_checkpoint(cls, checkpoint: dict[str, Any]) -> Self:
        """Rebuilds the module from a loaded checkpoint alone; published weights are not fetched again."""
        module = cls(**checkpoint["hyper_parameters"] | {"_load_weights": False})
        module.load_state_dict(checkpoint["state_dict"])
        module.precision = checkpoint.get("precision", module.precision)
        return module

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the task's name, the precision and where the validation images are, for the evaluation."""
        self._look(all_but=0)
        checkpoint["precision"] = self.trainer.precision
        checkpoint["task"] = self.task
        checkpoint["validation_data"] = self.trainer.datamodule.validation_arguments()  # type: ignore[attr-defined]

    def configure_optimizers(self) -> Any:
        """SGD or AdamW over the trainable parameters, its rate a pure function of the global step."""
        hp: Any = self.hparams
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        fused = self.device.type in ("cpu", "cuda")
        optimizer: torch.optim.Optimizer
        if hp.optimizer == "sgd":
            optimizer = torch.optim.SGD(
                parameters, hp.lr, momentum=0.9, weight_decay=hp.weight_decay, fused=fused
            )
            for parameter in parameters:  # torch leaves them unset where the first step is left out
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        else:
            optimizer = torch.optim.AdamW(parameters, hp.lr, weight_decay=hp.weight_decay, fused=fused)
        # float16's scaler unscales the gradients before they are clipped, and not within the fused step.
        optimizer._step_supports_amp_scaling = False
        optimizer.register_load_state_dict_pre_hook(_stays_fused)
        optimizer.register_load_state_dict_post_hook(_laid_out_as_the_weights)
        total = float(self.trainer.estimated_stepping_batches)  # infinite or -1 where it is not known
        known = 0 < total < math.inf or not self.trainer.limit_train_batches
        if not known and hp.lr_schedule != "constant":
            raise InputError(
                f"model.lr_schedule: {hp.lr_schedule} needs to know how many steps the training has: give"
                " the trainer max_epochs or max_steps, or choose constant"
            )
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: lr_factor(step, total, hp.lr_schedule, hp.warmup_steps, hp.lr_milestones)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the sum of the batch's losses. Nothing here waits for the device."""
        losses, ids = self.losses(batch), self.image_ids(batch)
        loss = torch.stack(list(losses.values())).sum()
        self._watch.add(ids, losses)
        self.log_dict({f"loss_{name}": value.detach() for name, value in losses.items()}, batch_size=len(ids))
        self.log("loss", loss.detach(), batch_size=len(ids))
        finite = loss.detach().isfinite()
        weight: Any = finite * len(ids)  # in the epoch's mean
        self.log(
            "loss_epoch",
            torch.where(finite, loss.detach(), 0),
            on_step=False,
            on_epoch=True,
            sync_dist=True,
            batch_size=weight,
        )
        self.log("lr", torch.tensor(self.trainer.optimizers[0].param_groups[0]["lr"]))
        # Times 1, or times NaN: then every gradient is NaN, and after their exchange in every process.
        return loss * (1 + 0 * loss.detach())

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips the gradients, and leaves the step out where they are not finite.

        A fused optimizer does so on the device; with another one the host has to wait and see. All processes
        have the same gradients and so decide alike.
        """
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        gradients = [
            p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        left_out = (~get_total_norm(gradients).isfinite()).float()
        if optimizer.defaults.get("fused"):
            optimizer.found_inf = left_out  # type: ignore[attr-defined]
        elif left_out:
            optimizer.zero_grad()
        self._watch.close(self.global_step, left_out)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Looks at the losses of the step before: those of this one would have to be waited for."""
        self._look(all_but=0 if self.trainer.is_last_batch else 1)
        if self._skipped_steps:
            self.log("skipped_steps", torch.tensor(float(self._skipped_steps)))

    def _look(self, all_but: int) -> None:
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        for step in self._watch.look(all_but):
            self.seen_loss = step.loss
            if not step.nonfinite and (scaled or not step.left_out):  # the scaler's overflows are expected
                continue
            if self.hparams["on_nonfinite"] == "stop":
                raise InputError(f"step {step.number}: {step.fault()}")
            self._skipped_steps += 1

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Keeps losses and predictions of one batch."""
        ids = self.image_ids(batch)
        if not ids:  # this process has a batch less than others, see ValBatches
            return
        losses, predictions = self.losses_and_predictions(batch)
        self._validated.append(
            _Batch(ids, {name: value.item() for name, value in losses.items()}, predictions)
        )

    def on_validation_epoch_end(self) -> None:
        """Gathers every process's batches and logs ``val_loss`` and the task's metrics, the same on all."""
        gathered = [self._validated]
        if self.trainer.world_size > 1:
            gathered = [[] for _ in range(self.trainer.world_size)]
            torch.distributed.all_gather_object(gathered, self._validated)
        self._validated = []
        if self.trainer.sanity_checking:
            return
        batches = sorted((batch for rank in gathered for batch in rank), key=lambda batch: batch.image_ids)
        image_ids = [image_id for batch in batches for image_id in batch.image_ids]
        self.predictions = [prediction for batch in batches for prediction in batch.predictions]
        means = {
            f"val_loss_{name}": sum(b.losses[name] * len(b.image_ids) for b in batches) / len(image_ids)
            for name in batches[0].losses
        }
        values: dict[str, float] = {}
        if self.trainer.is_global_zero:
            self.evaluation = self.evaluate(image_ids, self.predictions)
            values = self.evaluation.values
        values = self.trainer.strategy.broadcast(values)
        self.log_dict(means)
        self.log("val_loss", sum(means.values()), prog_bar=True)
        for name, value in values.items():
            self.log(name, value, prog_bar=name == self.headline)


def _stays_fused(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Keeps ``fused`` as it suits this device: a saved state has its own, of another device or version."""
    fused = {"fused": optimizer.defaults["fused"]}
    return {**state, "param_groups": [group | fused for group in state["param_groups"]]}


def _laid_out_as_the_weights(optimizer: torch.optim.Optimizer) -> None:
    """Gives the state the weights' memory format, which a fused step on a CPU takes for granted."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
