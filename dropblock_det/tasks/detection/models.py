"""torchvision's RetinaNet ResNet-50 FPN: building it, and losses and detections from one forward."""

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torchvision.models import WeightsEnum, get_weight
from torchvision.models.detection import RetinaNet, RetinaNet_ResNet50_FPN_Weights
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.resnet import Bottleneck
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from dropblock_det.errors import InputError

NORMS: dict[str, type[nn.Module]] = {"batch": nn.BatchNorm2d, "frozen": FrozenBatchNorm2d}


def build_retinanet(
    category_names: Sequence[str],
    *,
    weights: str | None = None,
    weights_backbone: str | None = None,
    load_weights: bool = True,
    trainable_stages: int = 5,
    norm: Literal["batch", "frozen"] = "batch",
    anchor_sizes: Sequence[int] = (32, 64, 128, 256, 512),
    **retinanet_arguments: Any,
) -> RetinaNet:
    """Builds torchvision's ``retinanet_resnet50_fpn`` for given categories.

    The state-dict keys are the stock model's. Where torchvision chooses the norm layer for you (frozen
    if anything is pretrained), here it is said explicitly. Without any published weights, residual branches
    start at zero and the heads with He's initialization, so that training from scratch gets going.

    Args:
        category_names: One name per category; the model gets ``len + 1`` classes, 0 being background.
        weights: ``"RetinaNet_ResNet50_FPN_Weights.COCO_V1"`` or None. The rows of the classification
            layer are matched by category name, so any subset of COCO's categories keeps its scores;
            rows of names that COCO does not have stay at their initialization.
        weights_backbone: ``"ResNet50_Weights.IMAGENET1K_V1"`` or another member, or None.
        load_weights: False builds the same model without fetching the named weights: a checkpoint follows.
        trainable_stages: How many of the five backbone stages train, counted from the last; 0 to 5.
        norm: ``"batch"`` (BatchNorm that trains) or ``"frozen"`` (FrozenBatchNorm2d, needs weights).
        anchor_sizes: Five base sizes in pixels, P3 to P7; each is used at octaves 0, 1/3 and 2/3.
        **retinanet_arguments: ``min_size``, ``max_size``, ``score_thresh`` and the like, passed on to
            :class:`torchvision.models.detection.RetinaNet`.

    Raises:
        InputError: An unknown weights name, a frozen norm or untrained stages without weights, or a
            wrong number of anchor sizes.
    """
    detector_weights = _weights("weights", weights, "RetinaNet_ResNet50_FPN_Weights.")
    backbone_weights = _weights("weights_backbone", weights_backbone, "ResNet50_Weights.")
    if not 0 <= trainable_stages <= 5:
        raise InputError(f"trainable_stages: got {trainable_stages}, give 0 to 5")
    if detector_weights is None and backbone_weights is None:
        if norm == "frozen":
            raise InputError(
                "norm: 'frozen' at random initialization normalizes nothing; give 'batch' or weights"
            )
        if trainable_stages < 5:
            raise InputError(
                f"trainable_stages: {trainable_stages} would freeze random weights; give 5, or weights"
            )
    if len(anchor_sizes) != 5:
        raise InputError(f"anchor_sizes: got {len(anchor_sizes)} sizes, give five, one for each of P3 to P7")

    backbone = resnet_fpn_backbone(
        backbone_name="resnet50",
        weights=backbone_weights if load_weights and detector_weights is None else None,
        norm_layer=NORMS[norm],
        trainable_layers=trainable_stages,
        returned_layers=[2, 3, 4],  # P2 is left out: too many anchors (RetinaNet paper, section 4)
        extra_blocks=LastLevelP6P7(256, 256),
    )
    octaves = tuple(tuple(int(size * 2 ** (octave / 3)) for octave in range(3)) for size in anchor_sizes)
    anchors = AnchorGenerator(octaves, ((0.5, 1.0, 2.0),) * len(octaves))
    model = RetinaNet(backbone, len(category_names) + 1, anchor_generator=anchors, **retinanet_arguments)
    if detector_weights is None and backbone_weights is None:
        _initialize_for_scratch(model)
    if detector_weights is not None and load_weights:
        _load_published(model, detector_weights, category_names)
    if detector_weights == RetinaNet_ResNet50_FPN_Weights.COCO_V1:
        for module in model.modules():  # these weights were trained with eps 0, as torchvision's builder says
            if isinstance(module, FrozenBatchNorm2d):
                module.eps = 0.0
    return model


def losses_and_detections(
    model: RetinaNet, images: list[Tensor], targets: list[dict[str, Any]]
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Returns losses and detections from one eval-mode forward.

    torchvision gives losses only in training mode and boxes only in eval mode, so that a validation
    loss costs a second forward with BatchNorm and regularizers awake. Here transform, backbone, head
    and anchors run once, in eval mode, through the model's own ``forward``; the losses are then the
    model's own ``compute_loss`` on what that forward computed.

    Args:
        model: A RetinaNet in eval mode.
        images: Float tensors of shape (3, H, W) in [0, 1], of any sizes.
        targets: For each image ``boxes`` (n, 4) in xyxy pixels and ``labels`` (n,).

    Returns:
        ``{"classification", "bbox_regression"}``, each the mean over the images, and for each image
        ``{"boxes", "scores", "labels"}`` in the original image's pixels.
    """
    assert not model.training, "losses_and_detections is for eval mode; in training mode call the model"
    seen: dict[str, Any] = {}

    def keep(name: str) -> Any:
        return getattr(model, name).register_forward_hook(lambda _, __, output: seen.update({name: output}))

    with keep("transform"), keep("head"), keep("anchor_generator"):
        detections = model(images, targets)
    _, resized_targets = seen["transform"]
    losses = model.compute_loss(resized_targets, seen["head"], seen["anchor_generator"])
    return losses, detections


def _initialize_for_scratch(model: RetinaNet) -> None:
    # Residual branches that start at zero learn sooner (Goyal et al. 2017, section 5.1). The heads' hidden
    # layers get He's initialization: torchvision's standard deviation of 0.01, meant to follow a pretrained
    # backbone, makes the signal some 75 times smaller over the four layers, (0.01 * sqrt(9 * 256 / 2)) ** 4,
    # and learning as slow.
    for module in model.modules():
        if isinstance(module, Bottleneck):
            nn.init.zeros_(module.bn3.weight)
    for head in (model.head.classification_head, model.head.regression_head):
        for module in head.conv.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")


def _weights(argument: str, name: str | None, prefix: str) -> WeightsEnum | None:
    if name is None:
        return None
    if not name.startswith(prefix):
        raise InputError(f"{argument}: got {name!r}, give a name such as '{prefix}DEFAULT', or null")
    try:
        return get_weight(name)
    except (ValueError, KeyError, AttributeError):
        raise InputError(
            f"{argument}: torchvision knows no {name!r}; give '{prefix}DEFAULT', or null"
        ) from None


def _load_published(model: RetinaNet, weights: WeightsEnum, category_names: Sequence[str]) -> None:
    state = weights.get_state_dict(progress=True, check_hash=True)
    own = model.state_dict()
    published_names = weights.meta["categories"]
    rows = {name: row for row, name in enumerate(published_names)}
    known = [(label, rows[name]) for label, name in enumerate(category_names, start=1) if name in rows]
    labels, published = (list(column) for column in zip(*known, strict=True)) if known else ([], [])
    anchors = model.head.classification_head.num_anchors
    for kind in ("weight", "bias"):  # out channels are (anchor, class), class running fastest
        key = f"head.classification_head.cls_logits.{kind}"
        ours, theirs = own[key].unflatten(0, (anchors, -1)), state[key].unflatten(0, (anchors, -1))
        ours[:, labels] = theirs[:, published]
        state[key] = own[key]
    # A trainable BatchNorm counts batches; the published FrozenBatchNorm weights have no such count.
    counts = {key: value for key, value in own.items() if key.endswith("num_batches_tracked")}
    model.load_state_dict({**counts, **state})
