import pytest
import torch
from support.detectors import batch
from torch import nn

from dropblock_det import DropBlock2d, regularize_
from dropblock_det.tasks.detection.module import DetectionModule

CATEGORIES = [{"label": label, "id": label, "name": str(label)} for label in (1, 2)]
SIZES = {"min_size": 96, "max_size": 128}


@pytest.mark.parametrize(
    ("name", "settings"), [("retinanet_resnet50_fpn", SIZES), ("ssdlite320_mobilenet_v3_large", {})]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maps_stay_in_the_format_from_the_first_layer_to_the_heads(name, settings, dtype):
    """Behind DropBlock too: no layer but the first gets a map in another one, which it would have to copy."""
    module = DetectionModule(CATEGORIES, name=name, channels_last=True, **settings).train()
    handle = regularize_(module, lambda: DropBlock2d(p=0.2, block_size=3), at="paper")
    wrong, maps = [], 0

    def look(layer, inputs, output):
        nonlocal maps
        for x in (*inputs, output):
            if isinstance(x, torch.Tensor) and x.dim() == 4 and x.shape[1] > 3:
                maps += 1
                if not x.is_contiguous(memory_format=torch.channels_last):
                    wrong.append((type(layer).__name__, x.shape))

    for layer in module.detector.modules():
        if isinstance(layer, (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, DropBlock2d)):
            layer.register_forward_hook(look)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        sum(module.losses(batch()).values()).backward()
    assert maps > 100
    assert len(handle.sites) > 5
    assert wrong == []
    weights = [p for p in module.detector.backbone.parameters() if p.dim() == 4 and p.grad is not None]
    assert all(p.grad.stride() == p.stride() for p in weights)  # as a fused step needs it
