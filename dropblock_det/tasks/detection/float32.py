"""Boxes in float32, whatever the layers compute in."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

HEADS = ("head", "rpn.head", "roi_heads.box_predictor")
ANCHORS = ("anchor_generator", "rpn.anchor_generator")


def boxes_in_float32(detector: nn.Module) -> None:
    """Lets one of torchvision's detectors place anchors and decode boxes in float32.

    By itself it takes the layers' dtype, and of the pixels above 256 bfloat16 knows every second only.
    """
    parts = dict(detector.named_modules())
    for name in parts.keys() & {*HEADS}:
        parts[name].register_forward_hook(_outputs_in_float32)
    for name in parts.keys() & {*ANCHORS}:
        parts[name].register_forward_pre_hook(_shapes_in_float32)


def _outputs_in_float32(head: nn.Module, inputs: Any, outputs: Any) -> Any:
    if not head.training:
        return tree_map_only(Tensor, Tensor.float, outputs)
    # There the classes, which are most of it, make no boxes, and a step with them in float32 takes longer.
    if isinstance(outputs, dict):
        return {name: value.float() if name.startswith("bbox") else value for name, value in outputs.items()}
    classes, boxes = outputs
    return classes, tree_map_only(Tensor, Tensor.float, boxes)


def _shapes_in_float32(generator: Any, inputs: tuple[Any, list[Tensor]]) -> tuple[Any, list[Tensor]]:
    # It reads the maps' shape, device and dtype, and none of their values.
    images, maps = inputs
    return images, [torch.empty((), device=each.device).expand(each.shape) for each in maps]
