"""The detection task's module: a detector, its losses and COCO's metrics. It knows nothing of DropBlock."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.models.detection.ssd import SSD

from dropblock_det.arguments import Count, Natural, Share, Side
from dropblock_det.datasets.coco import CocoDataModule
from dropblock_det.errors import InputError
from dropblock_det.tasks.breakdown import Breakdown
from dropblock_det.tasks.detection.breakdown import detection_breakdown
from dropblock_det.tasks.detection.coco_eval import (
    COCO_METRICS,
    coco_evaluation,
    detections_to_coco,
    metrics_of,
    outcomes_of,
)
from dropblock_det.tasks.detection.eval_losses import losses_and_detections
from dropblock_det.tasks.detection.float32 import boxes_in_float32
from dropblock_det.tasks.detection.metrics import HEADLINE, METRICS
from dropblock_det.tasks.detection.models import build_detector
from dropblock_det.tasks.detection.samples import box_samples
from dropblock_det.tasks.evaluation import Evaluation
from dropblock_det.tasks.module import TaskModule

Batch = tuple[list[Tensor], list[dict[str, Any]]]


class DetectionModule(TaskModule):
    """Trains one of torchvision's box detectors. Its predictions are in COCO's results format.

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
        channels_last: Keep weights and feature maps in that memory format. A step of RetinaNet on a CPU takes
            3 to 9 % less time so in bfloat16, and the same in float32.
        **optimization: As :class:`TaskModule`.
    """

    task = "detection"
    metrics = METRICS
    headline = HEADLINE
    logged = "|".join(COCO_METRICS)

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
        channels_last: bool = True,
        _load_weights: bool = True,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
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
        boxes_in_float32(self.detector)
        if channels_last:
            self.detector.to(memory_format=torch.channels_last)

    def on_fit_start(self) -> None:
        """Refuses what would fail in the midst of the training.

        Raises:
            InputError: A precision that boxes do not survive, or a last batch of one image where SSDlite's
                batch norms see a single pixel of each.
        """
        if self.trainer.precision in ("bf16-true", "16-true", "64-true"):
            raise InputError(
                f"trainer.precision: {self.trainer.precision} does not suit the detectors' boxes; give"
                " bf16-mixed, 16-mixed or 32-true"
            )
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        norms = any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in self.detector.modules())
        if not (isinstance(data, CocoDataModule) and isinstance(self.detector, SSD) and norms):
            return
        of_process = -(-len(data.train_dataset) // self.trainer.world_size)
        if of_process % data.batch_size == 1 % data.batch_size:
            raise InputError(
                f"data.batch_size: {data.batch_size} leaves one image for the last batch of an epoch, too few"
                f" for the batch norms of {self.hparams['name']}; give another"
            )

    def parts_to_compile(self) -> list[nn.Module]:
        """The backbone and the heads; matching boxes and choosing among them depends on the values."""
        parts = dict(self.detector.named_modules())
        return [
            parts[name] for name in ("backbone", "head", "rpn.head", "roi_heads.box_head") if name in parts
        ]

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The detector's own."""
        self._check_shapes(batch)
        return _short_names(self.detector(*batch))

    def losses_and_predictions(self, batch: Batch) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """Both from a single forward in eval mode."""
        self._check_shapes(batch)
        per_image, detections = losses_and_detections(self.detector, *batch, per_image=True)
        losses = {name: each.mean() for name, each in _short_names(per_image).items()}
        return losses, detections_to_coco(self.image_ids(batch), detections, self.hparams["categories"])

    def evaluate(self, image_ids: list[int], predictions: list[dict[str, Any]]) -> Evaluation:
        """COCO's twelve metrics, by pycocotools."""
        data: CocoDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        evaluation = coco_evaluation(data.val_coco, predictions, image_ids)
        samples = box_samples(data.val_coco, data.val_dataset, predictions)
        return Evaluation(metrics_of(evaluation), samples, outcomes_of(evaluation))

    def breakdown(self, predictions: list[dict[str, Any]], score: float | None = None) -> Breakdown:
        """By category, by kind of error, what is taken for what, and the best and the worst images."""
        data: CocoDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        return detection_breakdown(data.val_coco, data.val_dataset, predictions, score)

    def prepared(self, image: Tensor) -> Tensor:
        """As float32 in [0, 1]; the detector resizes."""
        self._check_shape(image)
        return image.float() / 255

    def predict_step(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """The detector's own: ``boxes`` as x1, y1, x2, y2 in pixels, without those of the background."""
        return [
            {name: value[detections["labels"] > 0] for name, value in detections.items()}
            for detections in self.detector(images)
        ]

    def _check_shapes(self, batch: Batch) -> None:
        for image, target in zip(*batch, strict=True):
            try:
                self._check_shape(image)
            except InputError as error:
                raise InputError(f"image {target['image_id']}: {error}") from None

    def _check_shape(self, image: Tensor) -> None:
        # torchvision's resize fails where a side comes to 0 pixels.
        transform: Any = self.detector.transform
        if transform.fixed_size is not None:
            return
        height, width = image.shape[-2:]
        short, long = sorted((height, width))
        if short * min(transform.min_size[-1] / short, transform.max_size / long) < 1:
            raise InputError(
                f"{width}x{height} pixels, of which model.max_size {transform.max_size} would leave none on "
                "one side; leave it out"
            )


def _short_names(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    # Faster R-CNN's begin with "loss_", as all do in the log.
    return {name.removeprefix("loss_"): loss for name, loss in losses.items()}
