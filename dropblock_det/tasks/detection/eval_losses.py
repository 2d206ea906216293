"""Losses and detections of a torchvision detector from one pass in eval mode."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD
from torchvision.ops import box_iou

from dropblock_det.errors import InputError

Losses = dict[str, Tensor]


def losses_and_detections(
    model: nn.Module, images: list[Tensor], targets: list[dict[str, Any]], *, per_image: bool = False
) -> tuple[Losses, list[dict[str, Tensor]]]:
    """Returns losses and detections from one eval-mode pass of any torchvision detector.

    torchvision gives losses only in training mode and boxes only in eval mode, so that a validation loss
    costs a second forward with batch norms, dropouts and regularizers awake. Here the model's own ``forward``
    runs once in eval mode, and the losses are then the model's own, computed from what that forward saw:
    the transform, the backbone and every layer that sees whole feature maps run once. A two-stage detector
    computes its losses on other boxes than its detections, and so its box head runs again, on those.

    A two-stage detector samples the anchors and proposals that count. Here each image's samples are drawn on
    the CPU with its ``image_id`` as the seed: they depend neither on the other images nor on the device, and
    the global random state stays as it is.

    Args:
        model: torchvision's RetinaNet, FCOS, SSD or Faster, Mask or Keypoint R-CNN, or a subclass, in eval
            mode; also regularized, or wrapped in DistributedDataParallel.
        images: Float tensors of shape (3, H, W) in [0, 1], of any sizes.
        targets: For each image ``boxes`` (n, 4) in xyxy pixels, ``labels`` (n,) from 1, optionally
            ``image_id``, an integer; for Mask R-CNN also ``masks``, for Keypoint R-CNN ``keypoints``.
        per_image: Return one loss per image instead of the batch's. Most detectors divide by the number of
            objects or samples in the batch, so that a mean over batches would depend on their size.

    Returns:
        The losses by torchvision's names, each of shape () or, with ``per_image``, (N,), there as if every
        image were a batch of its own; and the detections that ``model(images)`` returns, bit for bit.

    Raises:
        InputError: A model that is no torchvision detector or is in training mode, or targets without the
            masks or keypoints that it needs.
    """
    detector: Any = _unwrapped(model)
    family = next((family for family in _FAMILIES if isinstance(detector, family)), None)
    if family is None:
        raise InputError(
            f"model: {type(detector).__name__} is not one of torchvision's detectors "
            f"({', '.join(family.__name__ for family in _FAMILIES)}) or a subclass"
        )
    if detector.training:
        raise InputError("model: is in training mode; call model.eval() first")
    if family is GeneralizedRCNN:
        _check_annotations(detector, targets)
    shared, losses_of = _FAMILIES[family]
    seen: dict[str, Any] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _module, _inputs, output: seen.update({name: output})

    with ExitStack() as hooks:
        for name in ("transform", "backbone", *shared):
            hooks.enter_context(detector.get_submodule(name).register_forward_hook(keep(name)))
        detections = detector(images, targets)
    if not per_image:
        return losses_of(detector, seen, slice(None)), detections
    each = [losses_of(detector, seen, slice(number, number + 1)) for number in range(len(images))]
    return {name: torch.stack([losses[name] for losses in each]) for name in each[0]}, detections


def _unwrapped(model: nn.Module) -> nn.Module:
    # DistributedDataParallel's own forward waits for the other processes, whose batches may be fewer.
    while not isinstance(model, tuple(_FAMILIES)):
        inner = getattr(model, "module", getattr(model, "_orig_mod", None))  # DDP's name, torch.compile's
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model


def _check_annotations(detector: Any, targets: Sequence[dict[str, Any]]) -> None:
    for key, needed in (("masks", "has_mask"), ("keypoints", "has_keypoint")):
        if getattr(detector.roi_heads, needed)() and not all(key in target for target in targets):
            raise InputError(
                f"targets: {type(detector).__name__} needs the {key} of every image for its losses"
            )


def _one_stage(seen: dict[str, Any], chosen: slice) -> tuple[list[dict[str, Any]], Losses, list[Tensor]]:
    """Targets, head outputs and anchors of some of the images."""
    _, targets = seen["transform"]
    outputs = {name: output[chosen] for name, output in seen["head"].items()}
    return targets[chosen], outputs, seen["anchor_generator"][chosen]


def _retinanet(model: Any, seen: dict[str, Any], chosen: slice) -> Losses:
    return model.compute_loss(*_one_stage(seen, chosen))


def _fcos(model: Any, seen: dict[str, Any], chosen: slice) -> Losses:
    locations = [level.shape[-2] * level.shape[-1] for level in _levels(seen).values()]
    return model.compute_loss(*_one_stage(seen, chosen), locations)


def _ssd(model: Any, seen: dict[str, Any], chosen: slice) -> Losses:
    targets, outputs, anchors = _one_stage(seen, chosen)
    matches = [
        model.proposal_matcher(box_iou(target["boxes"], boxes))
        if len(target["boxes"])
        else torch.full((len(boxes),), -1, device=boxes.device)
        for target, boxes in zip(targets, anchors, strict=True)
    ]
    return model.compute_loss(targets, outputs, anchors, matches)


def _rcnn(model: Any, seen: dict[str, Any], chosen: slice) -> Losses:
    """Runs both stages again as in training, and takes all outputs that are known already from ``seen``."""
    images, targets = seen["transform"]
    images, targets = ImageList(images.tensors[chosen], images.image_sizes[chosen]), targets[chosen]
    features = {name: level[chosen] for name, level in _levels(seen).items()}
    first_stage = tuple([level[chosen] for level in levels] for levels in seen["rpn.head"])
    anchors = seen["rpn.anchor_generator"][chosen]
    boxes, _ = seen["rpn"]
    counts = [len(of_image) for of_image in boxes]
    second_stage = [torch.cat(output.split(counts)[chosen]) for output in seen["roi_heads.box_predictor"]]
    seeds = [int(target.get("image_id", 0)) for target in targets]
    rpn, heads = model.rpn, model.roi_heads
    new_only = _NewBoxesOnly(heads, boxes[chosen], second_stage)
    with _changed(
        (rpn, "head", _Function(lambda _: first_stage)),
        (rpn, "anchor_generator", _Function(lambda *_: anchors)),
        (heads, "box_roi_pool", _Function(new_only.pool_new)),
        (heads, "box_predictor", _Function(new_only.predict_all)),
        *((stage, "fg_bg_sampler", _seeded(stage.fg_bg_sampler, seeds)) for stage in (rpn, heads)),
        *((stage, "training", True) for stage in (rpn, heads)),  # of these alone, not of the layers in them
    ):
        proposals, first_losses = rpn(images, features, targets)
        _, second_losses = heads(features, proposals, images.image_sizes, targets)
    return {**second_losses, **first_losses}


class _NewBoxesOnly:
    """Lets the box head run on the boxes that it has not seen, and takes the others' outputs as known.

    Args:
        heads: The second stage.
        known_boxes: Per image (n, 4).
        known: What the box predictor gave for all of them, one row per box.
    """

    def __init__(self, heads: Any, known_boxes: Sequence[Tensor], known: Sequence[Tensor]) -> None:
        self.pool, self.predictor = heads.box_roi_pool, heads.box_predictor
        self.known_boxes, self.known = known_boxes, known
        self.rows = torch.empty(0)  # of each box, in the known outputs with the new ones behind them

    def pool_new(self, features: Any, boxes: list[Tensor], sizes: Any) -> Any:
        """Stands for the pooling: looks each box up, and pools for those that are not among the known."""
        found, before = [], 0
        for some, others in zip(boxes, self.known_boxes, strict=True):
            same = (some[:, None] == others).all(dim=2)
            place = torch.cat((same, same.new_ones(len(some), 1)), dim=1).int().argmax(dim=1)
            found.append(torch.where(place < len(others), place + before, -1))
            before += len(others)
        self.rows = torch.cat(found)
        new = self.rows < 0
        self.rows[new] = before + torch.arange(int(new.sum()), device=new.device)
        return self.pool(features, [b[f < 0] for b, f in zip(boxes, found, strict=True)], sizes)

    def predict_all(self, pooled: Any) -> tuple[Tensor, ...]:
        """Stands for the predictor: its outputs for the new boxes, put among the known ones."""
        return tuple(
            torch.cat(both)[self.rows] for both in zip(self.known, self.predictor(pooled), strict=True)
        )


_FAMILIES: dict[type[nn.Module], tuple[tuple[str, ...], Callable[[Any, dict[str, Any], slice], Losses]]] = {
    RetinaNet: (("head", "anchor_generator"), _retinanet),
    FCOS: (("head", "anchor_generator"), _fcos),
    SSD: (("head", "anchor_generator"), _ssd),
    GeneralizedRCNN: (("rpn.head", "rpn.anchor_generator", "rpn", "roi_heads.box_predictor"), _rcnn),
}
"""Detector class -> modules whose outputs the losses are made of, and how."""


def _levels(seen: dict[str, Any]) -> dict[str, Tensor]:
    features = seen["backbone"]
    return {"0": features} if isinstance(features, Tensor) else features


class _Function(nn.Module):
    """A function as a module: torch lets nothing else take a module's place."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Any) -> Any:
        return self.function(*inputs)


def _seeded(sampler: Callable[..., Any], seeds: Sequence[int]) -> Callable[..., Any]:
    """Makes a sampler draw for each image by itself, with the image's seed."""

    def sample(labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        state = torch.get_rng_state()
        positive, negative = [], []
        try:
            for of_image, seed in zip(labels, seeds, strict=True):
                torch.default_generator.manual_seed(seed)  # torch.manual_seed would change a GPU's state too
                (some,), (others,) = sampler([of_image.cpu()])
                positive.append(some.to(of_image.device))
                negative.append(others.to(of_image.device))
        finally:
            torch.set_rng_state(state)
        return positive, negative

    return sample


@contextmanager
def _changed(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    """Sets attributes, ``(object, name, value)`` each, and puts the old values back."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
