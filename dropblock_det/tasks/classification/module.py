"""The classification task's module: cross-entropy, and accuracy over all images and per class."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.functional.classification import multiclass_accuracy
from torchvision.io import encode_png
from torchvision.transforms.v2.functional import resize, rgb_to_grayscale

from dropblock_det.arguments import Share
from dropblock_det.datasets.classification import Batch, ClassificationDataModule, pixels
from dropblock_det.errors import InputError
from dropblock_det.files import write_bytes
from dropblock_det.tasks.breakdown import Breakdown
from dropblock_det.tasks.classification.breakdown import classification_breakdown
from dropblock_det.tasks.classification.metrics import HEADLINE, METRICS
from dropblock_det.tasks.classification.models import SMALL_CNN, Stem, build_classifier
from dropblock_det.tasks.evaluation import Evaluation, Mark, Outcomes, Sample
from dropblock_det.tasks.module import TaskModule
from dropblock_det.tasks.nonfinite import DIVERGED

SAMPLES = 8
Prediction = dict[str, int | float]
"""``image_id``, the ``label`` of the image, the class ``predicted`` and its ``score``, a probability."""


class ClassificationModule(TaskModule):
    """Trains a classifier on small images.

    Args:
        categories: One ``{"label", "id", "name"}`` per class, labels from 0 in order; the data module's. They
            travel in the checkpoint's hyperparameters.
        image_shape: Channels, height and width of the images; the data module's.
        name: ``small_cnn``, or a classifier's name in torchvision.
        stem: ``small`` gives a ResNet or DenseNet the first layers that images of some 32 pixels need.
        label_smoothing: Of the training loss; ``val_loss`` has none.
        channels_last: Keep images and feature maps in that memory format, which is faster on most devices.
        **optimization: As :class:`TaskModule`.
    """

    task = "classification"
    metrics = METRICS
    headline = HEADLINE
    logged = "accuracy/.+"

    def __init__(
        self,
        categories: list[dict[str, Any]],
        image_shape: tuple[int, int, int],
        name: str = SMALL_CNN,
        stem: Stem = "imagenet",
        label_smoothing: Share = 0.0,
        channels_last: bool = True,
        _load_weights: bool = True,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        self.classifier = build_classifier(name, len(categories), image_shape, stem)
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.classifier.to(memory_format=self.format)
        self.channels = image_shape[0] if name == SMALL_CNN else 3

    def parts_to_compile(self) -> list[nn.Module]:
        """All of the model."""
        return [self.classifier]

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits.

        Args:
            images: uint8 ``(B, C, H, W)``; gray ones come to torchvision's classifiers three times over.
        """
        x = images.expand(-1, self.channels, -1, -1).contiguous(memory_format=self.format)
        dtype = next(self.classifier.parameters()).dtype  # float32, unless the training's precision is "true"
        logits: Tensor = self.classifier(x.to(dtype) / 255)
        return logits

    def image_ids(self, batch: Batch) -> list[int]:
        """Returns the numbers of a batch's images."""
        return batch[2]

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy with label smoothing."""
        images, labels, _ = batch
        smoothing = self.hparams["label_smoothing"]
        return {"cross_entropy": cross_entropy(self(images), labels, label_smoothing=smoothing)}

    def losses_and_predictions(self, batch: Batch) -> tuple[dict[str, Tensor], list[Prediction]]:
        """Cross-entropy without label smoothing, and each image's most probable class."""
        images, labels, image_ids = batch
        if images.shape[1:] != (trained := torch.Size(self.hparams["image_shape"])):
            raise InputError(
                f"the images are {_words(images.shape[1:])}, the model was trained on {_words(trained)};"
                " give data.size"
            )
        logits = self(images).float()
        if not logits.isfinite().all():
            number = image_ids[int((~logits.isfinite()).any(1).nonzero()[0])]
            raise InputError(f"image {number}: the predictions are not finite, {DIVERGED}")
        scores, predicted = logits.softmax(1).max(1)
        names = ("image_id", "label", "predicted", "score")
        columns = (image_ids, labels.tolist(), predicted.tolist(), scores.tolist())
        rows = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
        return {"cross_entropy": cross_entropy(logits, labels)}, rows

    def prepared(self, image: Tensor) -> Tensor:
        """In the size and the number of channels of the images of the training."""
        channels, *size = self.hparams["image_shape"]
        image = resize(image, size, antialias=True)
        return rgb_to_grayscale(image) if channels == 1 else image

    def predict_step(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """Each image's most probable class, ``labels`` and ``scores`` of shape (1,)."""
        scores, labels = self(torch.stack(images)).float().softmax(1).max(1, keepdim=True)
        return [{"scores": score, "labels": label} for score, label in zip(scores, labels, strict=True)]

    def evaluate(self, image_ids: list[int], predictions: list[Prediction]) -> Evaluation:
        """Accuracy over all images and, as ``accuracy/CLASS``, of each class; NaN where it has no images."""
        names = [category["name"] for category in self.hparams["categories"]]
        labels, predicted = (torch.tensor([p[key] for p in predictions]) for key in ("label", "predicted"))
        right, images = (
            torch.bincount(of, minlength=len(names)) for of in (labels[labels == predicted], labels)
        )
        values = {"accuracy": float(multiclass_accuracy(predicted, labels, len(names), average="micro"))}
        values |= {f"accuracy/{n}": share for n, share in zip(names, (right / images).tolist(), strict=True)}
        return Evaluation(values, self._samples(predictions, names), outcomes_of(predictions, names))

    def breakdown(self, predictions: list[Prediction], score: float | None = None) -> Breakdown:
        """By class, what is taken for what, and the images where it is sure and wrong."""
        data: ClassificationDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        names = [category["name"] for category in self.hparams["categories"]]
        return classification_breakdown(data.val_dataset, predictions, names)

    def _samples(self, predictions: list[Prediction], names: list[str]) -> tuple[Sample, ...]:
        if self.trainer.state.fn != "fit":  # an evaluation has no folder to leave pictures in
            return ()
        data: ClassificationDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        folder = Path(self.trainer.default_root_dir) / "samples"
        samples = []
        for prediction, image in zip(predictions[:SAMPLES], data.val_dataset.images, strict=False):
            name = str(prediction["image_id"])
            file = folder / f"{name}.png"
            write_bytes(file, encode_png(image).numpy().tobytes())
            truth, seen = (names[int(prediction[key])] for key in ("label", "predicted"))
            marks = (Mark(truth),), (Mark(seen, score=float(prediction["score"])),)
            height, width = image.shape[1:]
            samples.append(Sample(name, "label", width, height, *marks, str(file.resolve())))
        return tuple(samples)


def _words(shape: torch.Size) -> str:
    return f"{pixels(shape)} pixels with {shape[0]} channel{'s' if shape[0] > 1 else ''}"


def outcomes_of(predictions: list[Prediction], names: list[str]) -> Outcomes:
    """Returns which images were given their own class, the images of a class together."""
    rows = sorted(predictions, key=lambda prediction: prediction["image_id"])
    labels = np.array([row["label"] for row in rows], np.int32)
    right = np.array([row["label"] == row["predicted"] for row in rows], bool)
    by_class = np.argsort(labels, kind="stable")
    return Outcomes(
        columns={"accuracy": (0,)},
        images=np.array([row["image_id"] for row in rows], np.int64),
        categories=tuple(names),
        truths=np.eye(len(names), dtype=np.int32)[labels],
        image=by_class.astype(np.int32),
        category=labels[by_class],
        score=np.array([row["score"] for row in rows], np.float32)[by_class],
        hit=right[by_class, None],
        ignored=np.zeros((len(rows), 1), bool),
        measure="share",
    )
