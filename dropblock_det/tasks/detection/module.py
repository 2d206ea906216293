"""The LightningModule: a detector, its losses and COCO figures. It knows nothing of DropBlock."""

from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from dropblock_det.arguments import Count, Natural, Rate, Share, Side
from dropblock_det.datasets.coco import CocoDataModule
from dropblock_det.errors import InputError
from dropblock_det.schedule import lr_factor
from dropblock_det.tasks.detection.coco_eval import coco_figures, detections_to_coco
from dropblock_det.tasks.detection.eval_losses import losses_and_detections
from dropblock_det.tasks.detection.models import build_detector

Batch = tuple[list[Tensor], list[dict[str, Any]]]


class DetectionModule(LightningModule):
    """Trains one of torchvision's box detectors and reports ``loss``, ``val_loss`` and ``mAP``.

    The regularizer comes from the :class:`dropblock_det.callbacks.Regularize` callback, as it would in
    anyone's module.

    Args:
        categories: One ``{"label", "id", "name"}`` per category, labels 1..K in order; the data module's.
            They travel in the checkpoint's hyperparameters.
        name: ``retinanet_resnet50_fpn``, ``retinanet_resnet50_fpn_v2``, ``fasterrcnn_resnet50_fpn``,
            ``fasterrcnn_resnet50_fpn_v2``, ``fasterrcnn_mobilenet_v3_large_fpn``,
            ``fasterrcnn_mobilenet_v3_large_320_fpn``, ``fcos_resnet50_fpn``, ``ssd300_vgg16`` or
            ``ssdlite320_mobilenet_v3_large``. The settings below that it does not have must be null.
        weights: Published detector weights by torchvision's name, such as
            ``RetinaNet_ResNet50_FPN_Weights.COCO_V1``, or null.
        weights_backbone: Published backbone weights by torchvision's name, such as
            ``ResNet50_Weights.IMAGENET1K_V1``, or null for random initialization.
        trainable_stages: How many backbone stages train, counted from the last; null is all.
        norm: The backbone's: ``batch`` (BatchNorm that trains; null is the same, and the only choice at
            random initialization) or ``frozen``. Not in ``ssd300_vgg16``.
        min_size: Shorter side in pixels that images are resized to, unless the longer becomes too long; null
            is the detector's own. Not in the two SSDs, whose images become 300x300 and 320x320.
        max_size: Longest side in pixels; likewise.
        anchor_sizes: Five anchor base sizes in pixels; null is the detector's own. Not in FCOS and the SSDs.
        score_thresh: Detections below this score are dropped; null is the detector's own.
        detections_per_img: At most this many detections per image; COCO evaluates 100.
        optimizer: ``sgd`` (with momentum 0.9) or ``adamw``.
        lr: Base learning rate.
        weight_decay: Weight decay of all trained parameters.
        lr_schedule: ``constant``, ``cosine`` or ``step``.
        lr_milestones: For ``step``: shares of the training after which the rate is divided by ten.
        warmup_steps: Optimizer steps of linear warm-up.
        on_nonfinite: ``stop`` ends the run at a loss that is not finite; ``skip`` leaves the step out and
            counts it as ``skipped_steps``.
    """

    def __init__(
        self,
        categories: list[dict[str, Any]],
        name: str = "retinanet_resnet50_fpn",
        weights: str | None = None,
        weights_backbone: str | None = None,
        trainable_stages: Natural | None = None,
        norm: Literal["batch", "frozen"] | None = None,
        min_size: Side | None = None,
        max_size: Side | None = None,
        anchor_sizes: list[Side] | None = None,
        score_thresh: Share | None = None,
        detections_per_img: Count = 100,
        optimizer: Literal["sgd", "adamw"] = "sgd",
        lr: Rate = 0.01,
        weight_decay: Rate = 1e-4,
        lr_schedule: Literal["constant", "cosine", "step"] = "cosine",
        lr_milestones: list[Share] = [0.8, 0.93],  # noqa: B006
        warmup_steps: Natural = 500,
        on_nonfinite: Literal["stop", "skip"] = "stop",
        _load_weights: bool = True,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="_load_weights")
        self.detector = build_detector(
            name,
            [category["name"] for category in categories],
            weights=weights,
            weights_backbone=weights_backbone,
            load_weights=_load_weights,
            trainable_stages=trainable_stages,
            norm=norm,
            anchor_sizes=anchor_sizes,
            min_size=min_size,
            max_size=max_size,
            score_thresh=score_thresh,
            detections_per_img=detections_per_img,
        )
        self.detections: list[dict[str, Any]] = []  # of the last validation, in COCO's results format
        self._validated: list[dict[str, Any]] = []
        self._skipped_steps = 0

    @property
    def _data(self) -> CocoDataModule:
        data: CocoDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        return data

    @classmethod
    def from_checkpoint(cls, checkpoint: dict[str, Any]) -> "DetectionModule":
        """Rebuilds the module from a loaded checkpoint alone; published weights are not fetched again."""
        module = cls(**checkpoint["hyper_parameters"], _load_weights=False)
        module.load_state_dict(checkpoint["state_dict"])
        return module

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds where the validation images are, for ``tools/evaluate.py``."""
        checkpoint["validation_data"] = self._data.validation_arguments()

    def configure_optimizers(self) -> Any:
        """SGD or AdamW over the trainable parameters, its rate a pure function of the global step."""
        hp: Any = self.hparams
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer: torch.optim.Optimizer
        if hp.optimizer == "sgd":
            optimizer = torch.optim.SGD(parameters, hp.lr, momentum=0.9, weight_decay=hp.weight_decay)
        else:
            optimizer = torch.optim.AdamW(parameters, hp.lr, weight_decay=hp.weight_decay)
        total = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: lr_factor(step, total, hp.lr_schedule, hp.warmup_steps, hp.lr_milestones)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _check_shapes(self, images: list[Tensor], targets: list[dict[str, Any]]) -> None:
        # torchvision's resize fails where a side comes to 0 pixels, and names no image.
        transform: Any = self.detector.transform
        if transform.fixed_size is not None:
            return
        for image, target in zip(images, targets, strict=True):
            height, width = image.shape[-2:]
            short, long = sorted((height, width))
            if short * min(transform.min_size[-1] / short, transform.max_size / long) < 1:
                raise InputError(
                    f"image {target['image_id']}: {width}x{height} pixels, of which model.max_size "
                    f"{transform.max_size} would leave none on one side; leave it out"
                )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """Returns the sum of the detector's losses."""
        images, targets = batch
        self._check_shapes(images, targets)
        losses = _short_names(self.detector(images, targets))
        loss = torch.stack(list(losses.values())).sum()
        finite = bool(torch.isfinite(loss))
        if not self.trainer.strategy.reduce_boolean_decision(finite):  # every rank stops, or every rank skips
            self._nonfinite(finite, losses, targets)
            return None
        parts = {f"loss_{name}": value.detach() for name, value in losses.items()}
        self.log_dict(parts, batch_size=len(images))
        self.log("loss", loss.detach(), prog_bar=True, batch_size=len(images))
        self.log(
            "loss_epoch", loss.detach(), on_step=False, on_epoch=True, sync_dist=True, batch_size=len(images)
        )
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def _nonfinite(self, finite: bool, losses: dict[str, Tensor], targets: list[dict[str, Any]]) -> None:
        if self.hparams["on_nonfinite"] == "stop":
            if finite:
                raise InputError(
                    f"step {self.global_step}: stopped, the loss of another process is not finite"
                )
            values = ", ".join(f"{name} {value.item()}" for name, value in losses.items())
            images = ", ".join(str(target["image_id"]) for target in targets)
            raise InputError(
                f"step {self.global_step}: the loss is not finite ({values}) on the images {images}; the "
                "last checkpoint is kept: lower model.lr, or set model.on_nonfinite=skip"
            )
        self._skipped_steps += 1
        self.log("skipped_steps", float(self._skipped_steps), prog_bar=True)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Keeps losses and detections of one batch, both from a single forward in eval mode."""
        images, targets = batch
        if not images:  # this process has a batch less than others, see ValBatches
            return
        self._check_shapes(images, targets)
        per_image, detections = losses_and_detections(self.detector, images, targets, per_image=True)
        losses = {name: each.mean() for name, each in _short_names(per_image).items()}
        ids = [target["image_id"] for target in targets]
        self._validated.append(
            {
                "image_ids": ids,
                "losses": {name: value.item() for name, value in losses.items()},
                "results": detections_to_coco(ids, detections, self.hparams["categories"]),
            }
        )

    def on_validation_epoch_end(self) -> None:
        """Gathers every process's batches and logs ``val_loss`` and the COCO figures, the same on all."""
        gathered = [self._validated]
        if self.trainer.world_size > 1:
            gathered = [[] for _ in range(self.trainer.world_size)]
            torch.distributed.all_gather_object(gathered, self._validated)
        self._validated = []
        if self.trainer.sanity_checking:
            return
        batches = sorted((batch for rank in gathered for batch in rank), key=lambda batch: batch["image_ids"])
        images = sum(len(batch["image_ids"]) for batch in batches)
        means = {
            f"val_loss_{name}": sum(b["losses"][name] * len(b["image_ids"]) for b in batches) / images
            for name in batches[0]["losses"]
        }
        self.detections = [result for batch in batches for result in batch["results"]]
        image_ids = [image_id for batch in batches for image_id in batch["image_ids"]]
        figures: dict[str, float] = {}
        if self.trainer.is_global_zero:
            figures = coco_figures(self._data.val_coco, self.detections, image_ids)
        figures = self.trainer.strategy.broadcast(figures)
        self.log_dict(means)
        self.log("val_loss", sum(means.values()), prog_bar=True)
        for name, value in figures.items():
            self.log(name, value, prog_bar=name in ("mAP", "AP50"))


def _short_names(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    # Faster R-CNN's begin with "loss_", as all do in the log.
    return {name.removeprefix("loss_"): loss for name, loss in losses.items()}
