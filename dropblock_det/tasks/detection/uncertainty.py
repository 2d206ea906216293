"""Uncertainty of detections: several forwards with regularizers on, merged (MC-Dropout, MC-DropBlock)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import box_iou

from dropblock_det.errors import InputError
from dropblock_det.inject.inject import handle_of
from dropblock_det.inject.regularized import Regularized

Detections = dict[str, Tensor]


@torch.no_grad()
def mc_detections(
    model: nn.Module,
    images: Sequence[Tensor],
    *,
    samples: int = 20,
    seed: int = 0,
    p: float | None = None,
    iou: float = 0.5,
) -> list[Detections]:
    """Returns detections with their uncertainty, from several forwards in which the regularizers are on.

    The model is in eval mode meanwhile, batch norms at rest, and afterwards as it was. The seed alone decides
    the masks; the global random state stays as it is. In a ResNet or MobileNet with a feature pyramid, the
    layers before the first regularized one run once for all samples.

    Args:
        model: A regularized detector of torchvision, or any module that maps a list of images to boxes,
            scores and labels.
        images: Float tensors of shape (3, H, W) in [0, 1], on the model's device.
        samples: Forwards, at least 1.
        seed: Of the masks.
        p: Drop probability meanwhile, by default what it is.
        iou: Overlap from which detections of two samples are the same object.

    Returns:
        What :func:`merge_samples` makes of each image's samples.

    Raises:
        InputError: Nothing in the model is regularized, or ``samples``, ``p`` or ``iou`` is out of range.
    """
    if samples < 1:
        raise InputError(f"samples: got {samples}, give at least 1")
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    with handle_of(model).active(p), _seeded(seed, device), _first_layers_once(model):
        drawn = [model(list(images)) for _ in range(samples)]
    return [merge_samples(of_image, iou) for of_image in zip(*drawn, strict=True)]


def merge_samples(samples: Sequence[Detections], iou: float = 0.5) -> Detections:
    """Merges the detections of an image in several samples: those of one class that overlap are one object.

    Objects are found as in non-maximum suppression: the detection of the highest score that is left takes
    from each other sample the one that overlaps it most.

    Args:
        samples: For each sample ``boxes`` (n, 4) in xyxy pixels, ``scores`` (n,) and ``labels`` (n,).
        iou: Overlap from which two are the same object, over 0 and at most 1.

    Returns:
        In the order of their scores ``boxes`` (m, 4), means over the samples that found the object;
        ``labels`` (m,); ``scores`` (m,), means over all samples, 0 where one did not find it;
        ``found_shares`` (m,), the share of samples that did; and ``corner_spreads`` (m,) in pixels, the
        standard deviation of a corner's coordinate (over x and y of both corners the root mean square),
        NaN where a single sample found it.

    Raises:
        InputError: ``iou`` is out of range.
    """
    if not 0 < iou <= 1:
        raise InputError(f"iou: got {iou}, give a number over 0, at most 1")
    device, dtype = samples[0]["boxes"].device, samples[0]["boxes"].dtype
    boxes = torch.cat([sample["boxes"] for sample in samples]).cpu().double()
    scores = torch.cat([sample["scores"] for sample in samples]).cpu().double()
    labels = torch.cat([sample["labels"] for sample in samples]).cpu()
    origin = torch.repeat_interleave(torch.tensor([len(sample["boxes"]) for sample in samples]))
    from_sample = origin == torch.arange(len(samples))[:, None]
    left = torch.ones(len(boxes), dtype=torch.bool)
    objects = []
    for best in scores.argsort(descending=True, stable=True).tolist():
        if not left[best]:
            continue
        overlap = box_iou(boxes[best, None], boxes)[0]
        overlap[(boxes == boxes[best]).all(dim=1)] = 1  # without area it would be NaN
        others = left & (labels == labels[best]) & (origin != origin[best]) & (overlap >= iou)
        most, closest = torch.where(from_sample & others, overlap, 0).max(dim=1)
        members = torch.cat((torch.tensor([best]), closest[most > 0]))
        left[members] = False
        objects.append(
            {
                "boxes": boxes[members].mean(dim=0),
                "labels": labels[best],
                "scores": scores[members].sum() / len(samples),
                "found_shares": torch.tensor(len(members) / len(samples)).double(),
                "corner_spreads": _spread(boxes[members]),
            }
        )
    if not objects:
        nothing = boxes.new_zeros(0)
        objects_of = {"boxes": boxes, "labels": labels, "scores": nothing}
        return _like(objects_of | {"found_shares": nothing, "corner_spreads": nothing}, device, dtype)
    merged = {name: torch.stack([each[name] for each in objects]) for name in objects[0]}
    order = merged["scores"].argsort(descending=True, stable=True)
    return _like({name: values[order] for name, values in merged.items()}, device, dtype)


def _spread(boxes: Tensor) -> Tensor:
    if len(boxes) == 1:
        return boxes.new_tensor(torch.nan)
    return boxes.var(dim=0).mean().sqrt()


def _like(detections: Detections, device: torch.device, dtype: torch.dtype) -> Detections:
    return {
        name: values.to(device, dtype if values.is_floating_point() else values.dtype)
        for name, values in detections.items()
    }


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draws with a seed on the CPU and the model's device; their random states come back."""
    on_gpu = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(on_gpu):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would change other GPUs' states too
        for each in on_gpu:
            torch.cuda.default_generators[each.index].manual_seed(seed)
        yield


@contextmanager
def _first_layers_once(model: Any) -> Iterator[None]:
    """Keeps what the layers before the first regularized one give, where torchvision's own code runs them.

    A body runs its children in order, each on what the one before gave. Of other backbones, and of
    subclasses, nothing is known.
    """
    backbone: Any = getattr(model, "backbone", None)
    if type(backbone) is not BackboneWithFPN or type(backbone.body) is not IntermediateLayerGetter:
        yield
        return
    body = backbone.body
    stochastic = [any(isinstance(m, Regularized) for m in child.modules()) for child in body.children()]
    first = [*stochastic, True].index(True)
    layers = dict(list(body.named_children())[:first])
    try:
        for number, (name, layer) in enumerate(layers.items(), start=1):
            body[name] = _Once(layer, name in body.return_layers or number == first)
        yield
    finally:
        body.update(layers)


class _Once(nn.Module):
    """Stands for a layer that gives the same in every sample.

    Args:
        layer: Runs at the first call.
        needed: Whether its output goes to a layer that runs every time; otherwise that of the next layer is
            known as well, and what it is called with does not matter.
    """

    def __init__(self, layer: nn.Module, needed: bool) -> None:
        super().__init__()
        self.layer, self.needed = layer, needed
        self.ran, self.output = False, torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        if not self.ran:
            self.ran = True
            output = self.layer(x)
            if self.needed:
                self.output = output.clone()  # the next layer may change what it is given
            return output
        return self.output.clone() if self.needed else x
