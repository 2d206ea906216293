"""torchvision's box detectors for any categories: what a name, published weights and settings make."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torchvision.models.detection
from torch import nn
from torchvision.models import WeightsEnum, get_model_weights, get_weight, mobilenet_v3_large, vgg16
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights, RetinaNet_ResNet50_FPN_Weights
from torchvision.models.detection._utils import retrieve_out_channels
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.ssd import _vgg_extractor
from torchvision.models.detection.ssdlite import SSDLiteHead, _mobilenet_extractor
from torchvision.models.resnet import Bottleneck
from torchvision.ops import FrozenBatchNorm2d

from dropblock_det.errors import InputError

Norm = Literal["batch", "frozen"]
NORMS: dict[str, type[nn.Module]] = {"batch": nn.BatchNorm2d, "frozen": FrozenBatchNorm2d}


@dataclass(frozen=True)
class Trunk:
    """The classification network in a detector's backbone."""

    name: str
    stages: int
    rebuild: Callable[["Built", WeightsEnum | None], None]
    has_norms: bool = True


@dataclass(frozen=True)
class Detector:
    """What a detector of torchvision's differs in from the others."""

    trunk: Trunk
    has_sizes: bool = True
    anchors: Callable[[Sequence[int]], tuple[tuple[int, ...], ...]] | None = None
    """Five base sizes in pixels -> the sizes at each level; None where they are fixed."""


@dataclass(frozen=True)
class Built:
    """A stock model whose trunk is to be rebuilt, and how."""

    model: Any
    classes: int
    norm: str
    stages: int
    pretrained_trunk: bool


def _rebuild_resnet(built: Built, weights: WeightsEnum | None) -> None:
    fpn = built.model.backbone
    fpn.body = resnet_fpn_backbone(
        backbone_name="resnet50",
        weights=weights,
        norm_layer=NORMS[built.norm],
        trainable_layers=built.stages,
        returned_layers=[int(name.removeprefix("layer")) for name in fpn.body.return_layers],
    ).body


def _rebuild_mobilenet(built: Built, weights: WeightsEnum | None) -> None:
    built.model.backbone.body = mobilenet_backbone(
        backbone_name="mobilenet_v3_large",
        weights=weights,
        fpn=True,
        norm_layer=NORMS[built.norm],
        trainable_layers=built.stages,
    ).body


def _rebuild_vgg(built: Built, weights: WeightsEnum | None) -> None:
    built.model.backbone = _vgg_extractor(vgg16(weights=weights), False, built.stages)


def _rebuild_ssdlite(built: Built, weights: WeightsEnum | None) -> None:
    # With a pretrained trunk torchvision leaves its last block at full width, and the head fits that.
    batch_norm = partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)
    norm = partial(FrozenBatchNorm2d, eps=0.001) if built.norm == "frozen" else batch_norm
    trunk = mobilenet_v3_large(weights=weights, norm_layer=norm, reduced_tail=not built.pretrained_trunk)
    built.model.backbone = _mobilenet_extractor(trunk, built.stages, batch_norm)
    channels = retrieve_out_channels(built.model.backbone, built.model.transform.fixed_size)
    anchors = built.model.anchor_generator.num_anchors_per_location()
    built.model.head = SSDLiteHead(channels, anchors, built.classes, batch_norm)


RESNET = Trunk("resnet50", 5, _rebuild_resnet)
MOBILENET = Trunk("mobilenet_v3_large", 6, _rebuild_mobilenet)


def _octaves(sizes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(size * 2 ** (octave / 3)) for octave in range(3)) for size in sizes)


def _one_a_level(sizes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    return tuple((size,) for size in sizes)


def _all_at_each_level(sizes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    return (tuple(sizes),) * 3


DETECTORS = {
    "retinanet_resnet50_fpn": Detector(RESNET, anchors=_octaves),
    "retinanet_resnet50_fpn_v2": Detector(RESNET, anchors=_octaves),
    "fasterrcnn_resnet50_fpn": Detector(RESNET, anchors=_one_a_level),
    "fasterrcnn_resnet50_fpn_v2": Detector(RESNET, anchors=_one_a_level),
    "fasterrcnn_mobilenet_v3_large_fpn": Detector(MOBILENET, anchors=_all_at_each_level),
    "fasterrcnn_mobilenet_v3_large_320_fpn": Detector(MOBILENET, anchors=_all_at_each_level),
    "fcos_resnet50_fpn": Detector(RESNET),
    "ssd300_vgg16": Detector(Trunk("vgg16", 5, _rebuild_vgg, has_norms=False), has_sizes=False),
    "ssdlite320_mobilenet_v3_large": Detector(
        Trunk("mobilenet_v3_large", 6, _rebuild_ssdlite), has_sizes=False
    ),
}
"""The detectors that train on boxes alone, by torchvision's names."""

# Layers with a block of rows per class, within each anchor: name -> rows per class.
CLASS_LAYERS = {
    r"head\.classification_head\.cls_logits": 1,
    r"head\.classification_head\.module_list\.\d+(\.1)?": 1,
    r"roi_heads\.box_predictor\.cls_score": 1,
    r"roi_heads\.box_predictor\.bbox_pred": 4,
}


def build_detector(
    name: str,
    category_names: Sequence[str],
    *,
    weights: str | None = None,
    weights_backbone: str | None = None,
    load_weights: bool = True,
    trainable_stages: int | None = None,
    norm: Norm | None = None,
    anchor_sizes: Sequence[int] | None = None,
    min_size: int | None = None,
    max_size: int | None = None,
    score_thresh: float | None = None,
    detections_per_img: int | None = None,
) -> nn.Module:
    """Builds one of torchvision's box detectors for given categories.

    The model is what torchvision's builder makes, with its state-dict keys. Where torchvision chooses the
    backbone's norm layer for you (frozen if anything is pretrained), here it is an argument. Without any
    published weights the initialization is such that training from scratch gets going.

    Args:
        name: A name in :data:`DETECTORS`.
        category_names: One name per category; the model gets ``len + 1`` classes, 0 being background.
        weights: The detector's published weights, such as ``"RetinaNet_ResNet50_FPN_Weights.COCO_V1"``, or
            None. The rows of the classification layers are matched by category name, so any subset of COCO's
            categories keeps its scores; rows of names that COCO does not have stay at their initialization.
        weights_backbone: Published weights of the backbone, such as ``"ResNet50_Weights.IMAGENET1K_V1"``, or
            None. Not used where ``weights`` are given.
        load_weights: False builds the same model without fetching the named weights: a checkpoint follows.
        trainable_stages: How many backbone stages train, counted from the last; None is all of them.
        norm: ``"batch"`` (BatchNorm that trains; the default) or ``"frozen"`` (FrozenBatchNorm2d, needs
            weights), in the backbone's classification network.
        anchor_sizes: Five base sizes in pixels. RetinaNet uses one at each of P3 to P7, at octaves 0, 1/3 and
            2/3; Faster R-CNN one at each of P2 to P6, with MobileNet all five at each level.
        min_size: Shorter side in pixels that images are resized to, unless the longer becomes too long.
        max_size: Longest side in pixels.
        score_thresh: Detections below this score are dropped.
        detections_per_img: At most this many detections per image.

    Raises:
        InputError: An unknown name of a detector or of weights, a setting that the detector does not have, a
            frozen norm or untrained stages without weights, or a wrong number of anchor sizes.
    """
    detector = _detector(name)
    trunk = detector.trunk
    stages = trunk.stages if trainable_stages is None else trainable_stages
    detector_weights = _weights("weights", weights, name)
    trunk_weights = _weights("weights_backbone", weights_backbone, trunk.name)
    from_scratch = detector_weights is None and trunk_weights is None
    for setting, value, present in (
        ("min_size", min_size, detector.has_sizes),
        ("max_size", max_size, detector.has_sizes),
        ("anchor_sizes", anchor_sizes, detector.anchors is not None),
        ("norm", norm, trunk.has_norms),
    ):
        if value is not None and not present:
            raise InputError(f"{setting}: {name} has no such setting; leave it out or give null")
    if not 0 <= stages <= trunk.stages:
        raise InputError(f"trainable_stages: got {stages}, give 0 to {trunk.stages}")
    if from_scratch and norm == "frozen":
        raise InputError(
            "norm: 'frozen' at random initialization normalizes nothing; give 'batch' or weights"
        )
    if from_scratch and stages < trunk.stages:
        raise InputError(
            f"trainable_stages: {stages} would freeze random weights; give {trunk.stages}, or weights"
        )
    if anchor_sizes is not None and len(anchor_sizes) != 5:
        raise InputError(f"anchor_sizes: got {len(anchor_sizes)} sizes, give five")

    prefix = "box_" if name.startswith("fasterrcnn") else ""
    arguments = {
        "min_size": min_size,
        "max_size": max_size,
        f"{prefix}score_thresh": score_thresh,
        f"{prefix}detections_per_img": detections_per_img,
    }
    classes = len(category_names) + 1
    model: Any = getattr(torchvision.models.detection, name)(
        weights=None,
        weights_backbone=None,
        num_classes=classes,
        **{key: value for key, value in arguments.items() if value is not None},
    )
    if anchor_sizes is not None and detector.anchors is not None:
        sizes = detector.anchors(anchor_sizes)
        owner = getattr(model, "rpn", model)
        owner.anchor_generator = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    pretrained_trunk = detector_weights is None and trunk_weights is not None
    if pretrained_trunk or norm == "frozen" or stages < trunk.stages:
        built = Built(model, classes, norm or "batch", stages, pretrained_trunk)
        trunk.rebuild(built, trunk_weights if pretrained_trunk and load_weights else None)
    if from_scratch:
        _initialize_for_scratch(model)
    if detector_weights is not None:
        if load_weights:
            _load_published(model, detector_weights, category_names)
        if detector_weights in (
            RetinaNet_ResNet50_FPN_Weights.COCO_V1,
            FasterRCNN_ResNet50_FPN_Weights.COCO_V1,
        ):
            for module in model.modules():  # trained with eps 0, as in torchvision's builders
                if isinstance(module, FrozenBatchNorm2d):
                    module.eps = 0.0
    return model


def _detector(name: str) -> Detector:
    for family, needs in (("maskrcnn", "masks"), ("keypointrcnn", "keypoints")):
        if name.startswith(family):
            instead = name.replace(family, "fasterrcnn", 1)
            raise InputError(
                f"name: {name} learns from {needs}, and only boxes are read here; give {instead} instead"
            )
    if name not in DETECTORS:
        raise InputError(f"name: no detector {name!r}; give one of {', '.join(DETECTORS)}")
    return DETECTORS[name]


def _weights(argument: str, name: str | None, model: str) -> WeightsEnum | None:
    if name is None:
        return None
    published = get_model_weights(model)
    prefix = f"{published.__name__}."
    # SSD300's, whose images are scaled as these expect; the classifier's are VGG16's default.
    good = prefix + ("IMAGENET1K_FEATURES" if "IMAGENET1K_FEATURES" in published.__members__ else "DEFAULT")
    if not name.startswith(prefix):
        raise InputError(f"{argument}: got {name!r}, give a name such as '{good}', or null")
    try:
        return get_weight(name)
    except (ValueError, KeyError, AttributeError):
        raise InputError(f"{argument}: torchvision knows no {name!r}; give '{good}', or null") from None


def _initialize_for_scratch(model: nn.Module) -> None:
    # Residual branches that start at zero learn sooner (Goyal et al. 2017, section 5.1). The hidden layers of
    # RetinaNet's heads get He's initialization: torchvision's standard deviation of 0.01, meant to follow a
    # pretrained backbone, makes the signal some 75 times smaller over the four layers,
    # (0.01 * sqrt(9 * 256 / 2)) ** 4, and learning as slow. The other detectors need no such thing: the norms
    # in the heads of FCOS and RetinaNet v2 restore the signal, Faster R-CNN's first stage has one or two such
    # layers, not four, and SSD's heads have one layer, Xavier's.
    for module in model.modules():
        if isinstance(module, Bottleneck):
            nn.init.zeros_(module.bn3.weight)
    head = getattr(model, "head", None)
    if isinstance(head, RetinaNetHead) and not any(isinstance(m, nn.GroupNorm) for m in head.modules()):
        for layer in (*head.classification_head.conv.modules(), *head.regression_head.conv.modules()):
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")


def _load_published(model: nn.Module, weights: WeightsEnum, category_names: Sequence[str]) -> None:
    state = weights.get_state_dict(progress=True, check_hash=True)
    own = model.state_dict()
    published_names = weights.meta["categories"]
    rows = {name: row for row, name in enumerate(published_names)}
    names = [published_names[0], *category_names]  # label 0 is the background
    labels = [label for label, name in enumerate(names) if name in rows]
    published = [rows[names[label]] for label in labels]
    for layer, per_class in CLASS_LAYERS.items():
        for key in filter(re.compile(rf"{layer}\.(weight|bias)").fullmatch, own):
            ours = own[key].unflatten(0, (-1, len(names), per_class))
            theirs = state[key].unflatten(0, (-1, len(published_names), per_class))
            ours[:, labels] = theirs[:, published]
            state[key] = own[key]
    # A trainable BatchNorm counts batches; published FrozenBatchNorm weights have no such count.
    counts = {key: value for key, value in own.items() if key.endswith("num_batches_tracked")}
    model.load_state_dict({**counts, **state})
