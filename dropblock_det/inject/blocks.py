"""What torchvision's classes do that their structure does not show, as tables, and how to look them up."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeGuard, TypeVar

from torch import nn

T = TypeVar("T")


@dataclass(frozen=True)
class Block:
    """What the forward of one block class does with its children."""

    units: tuple[str, ...] | None = None
    """Children that end a conv-norm(-activation) unit, or hold units; ``""`` the block; ``None``: the
    structure shows them."""
    skip: str = ""
    """Attribute called on the skip connection; ``None`` on an identity skip."""
    joins_input: Callable[[nn.Module], bool] = lambda block: False
    """Whether the forward itself adds (or concatenates) the input, with no module on the skip.

    The site is then the block's output, branch and skip under one mask, in place of the branch's last unit.
    """
    branch: str = ""
    """Child whose output the residual branch ends with, if there is something that it is added to."""


def _inverted_residual(branch: str, flag: str = "use_res_connect") -> Block:
    return Block(joins_input=lambda block: bool(getattr(block, flag)), branch=branch)


# Keys are "file.Class" below torchvision.models; subclasses (the quantizable ones) are found by their base.
BLOCKS: dict[str, Block] = {
    # One `relu` is called three times here, so the norms are the sites (a ReLU commutes with the mask).
    "resnet.BasicBlock": Block(units=("bn1", "bn2"), skip="downsample", branch="bn2"),
    "resnet.Bottleneck": Block(units=("bn1", "bn2", "bn3"), skip="downsample", branch="bn3"),
    "regnet.ResBottleneckBlock": Block(skip="proj", branch="f"),
    # Pre-activation: relu1 closes the unit begun by the convolutions of earlier layers, relu2 that of conv1.
    "densenet._DenseLayer": Block(units=("relu1", "relu2")),
    "mobilenetv2.InvertedResidual": _inverted_residual("conv"),
    "mobilenetv3.InvertedResidual": _inverted_residual("block"),
    "efficientnet.MBConv": _inverted_residual("block"),
    "efficientnet.FusedMBConv": _inverted_residual("block"),
    "mnasnet._InvertedResidual": _inverted_residual("layers", "apply_residual"),
    "shufflenetv2.InvertedResidual": Block(joins_input=lambda block: bool(block.stride == 1)),
    "convnext.CNBlock": Block(joins_input=lambda block: True, branch="block"),
    "maxvit.MBConv": Block(
        units=("layers.conv_a.2", "layers.conv_b.2"), joins_input=lambda block: True, branch="layers"
    ),
    "squeezenet.Fire": Block(units=("squeeze_activation", "expand1x1_activation", "expand3x3_activation")),
    "googlenet.BasicConv2d": Block(units=("",)),
    "inception.BasicConv2d": Block(units=("",)),
}

# Names that carry a stage number. Other backbones are cut where the resolution is lowered.
STAGE_NAME = re.compile(r"(?:^|\.)(?:layer|block|denseblock|stage|inception|Mixed_|blocks\.|stages\.)(\d+)")

# Networks whose backbones have one task and are regularized together.
TWIN_BACKBONES = {"optical_flow.raft.RAFT"}

# Modules that run the named children one after the other, besides nn.Sequential ("*": all of them).
RUNS_IN_ORDER: dict[str, tuple[str, ...]] = {
    "_utils.IntermediateLayerGetter": ("*",),
    "detection.ssd.SSDFeatureExtractorVGG": ("features", "extra.0"),
}

PYRAMIDS: dict[str, tuple[str, ...]] = {
    "torchvision.ops.feature_pyramid_network.FeaturePyramidNetwork": (
        "layer_blocks.*",
        "extra_blocks.p6",
        "extra_blocks.p7",
    ),
}

# Their hidden conv-norm-activation units are sites; the layers that predict are not.
HEADS = {
    "detection.retinanet.RetinaNetHead",
    "detection.fcos.FCOSHead",
    "detection.ssdlite.SSDLiteHead",
    "detection.rpn.RPNHead",
    "detection.faster_rcnn.FastRCNNConvFCHead",
    "detection.mask_rcnn.MaskRCNNHeads",
    "detection.keypoint_rcnn.KeypointRCNNHeads",
    "segmentation.deeplabv3.DeepLabHead",
    "segmentation.fcn.FCNHead",
    "segmentation.lraspp.LRASPPHead",
}

# Names below a block whose outputs are tokens or (N, H, W, C) maps. Every nn.Linear's and nn.LayerNorm's are.
CHANNELS_LAST: dict[str, str] = {
    "swin_transformer.SwinTransformer": r"features\.0\.1",
    "swin_transformer.SwinTransformerBlock": r".*",
    "swin_transformer.PatchMerging": r".*",
    "swin_transformer.PatchMergingV2": r".*",
    "maxvit.PartitionAttentionLayer": r".+",  # what it returns is a (N, C, H, W) map again
    "convnext.CNBlock": r"block\.[1-5]",
    "vision_transformer.Encoder": r".*",
}

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)
_ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.ELU, nn.Mish, nn.PReLU),
    *(nn.CELU, nn.SELU, nn.Softplus, nn.Tanh),  # no sigmoids: these are gates
)
_POOLS = (nn.MaxPool2d, nn.AvgPool2d)
_PASSED = (*_POOLS, nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def stock_class(module: nn.Module) -> Any:
    """A module's class, without what ``regularize_`` made of it."""
    return getattr(type(module), "_stock_class", type(module))


def find_key(module: nn.Module, table: Iterable[str]) -> str | None:
    """The key in a table of torchvision's classes under which a module's class, or a base of it, stands."""
    for cls in type(module).__mro__:
        key = f"{cls.__module__.removeprefix('torchvision.models.')}.{cls.__qualname__}"
        if key in table:
            return key
    return None


def look_up(table: dict[str, T], module: nn.Module) -> T | None:
    """The entry of a module's class, or of a base of it."""
    key = find_key(module, table)
    return None if key is None else table[key]


def has_known_forward(module: nn.Module) -> bool:
    """Whether a module's forward is torch's or torchvision's own: then the tables tell what it does."""
    owner = next(cls for cls in stock_class(module).__mro__ if "forward" in vars(cls))
    return owner.__module__.startswith(("torch.nn.", "torch.ao.", "torchvision."))


def runs_in_order(module: nn.Module) -> TypeGuard[nn.Sequential]:
    """Whether a module's output is its last child's: an ``nn.Sequential`` that kept its forward."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def children_of(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """A module's own children by name, without what ``regularize_`` added."""
    ours = "regularizer" if hasattr(type(module), "_stock_class") else None
    return [(name, child) for name, child in module._modules.items() if child is not None and name != ours]


def has_convolution(module: nn.Module) -> bool:
    """Whether there is a convolution of maps in a module."""
    return any(isinstance(m, nn.Conv2d) for m in module.modules())


def is_norm_or_activation(module: nn.Module) -> bool:
    """Whether a module belongs to the unit of the convolution before it."""
    # Identity: a norm that was fused into its convolution.
    known = isinstance(module, (*_NORMS, *_ACTIVATIONS, nn.Identity))
    return known or find_key(module, {"torchvision.ops.misc.FrozenBatchNorm2d"}) is not None


def may_lie_within_a_unit(module: nn.Module) -> bool:
    """Whether a module between a convolution and its norm or activation leaves them one unit."""
    return isinstance(module, _PASSED)


def is_pooling(module: nn.Module) -> bool:
    """Whether a module pools a map to a smaller one."""
    return isinstance(module, _POOLS) and module.stride not in (1, (1, 1))


def lowers_resolution(layer: nn.Module) -> bool:
    """Whether a convolution or pooling in a layer has a stride."""
    # MobileNet marks the blocks that would have a stride were they not dilated.
    return getattr(layer, "_is_cn", False) or any(
        is_pooling(m) or (isinstance(m, nn.Conv2d) and m.stride not in (1, (1, 1))) for m in layer.modules()
    )
