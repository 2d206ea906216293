import pytest
import torch
from support.detectors import batch, small

from dropblock_det.tasks.detection.float32 import ANCHORS, boxes_in_float32


@pytest.mark.parametrize(
    "name",
    [
        "retinanet_resnet50_fpn",
        "fasterrcnn_mobilenet_v3_large_320_fpn",
        "fcos_resnet50_fpn",
        "ssdlite320_mobilenet_v3_large",
    ],
)
def test_anchors_and_boxes_are_exact_where_the_layers_are_not(name):
    """torchvision's own come in bfloat16 there, and lie pixels beside the others."""
    images = [torch.nn.functional.interpolate(image[None], size=(64, 520))[0] for image in batch()[0][:1]]
    sizes = {} if "ssdlite" in name else {"min_size": 64, "max_size": 520}

    def seen(in_float32, dtype):
        model, anchors = small(name, score_thresh=0.001, **sizes), []
        if in_float32:
            boxes_in_float32(model)
        generator = next(part for path, part in model.named_modules() if path in ANCHORS)
        generator.register_forward_hook(lambda *args: anchors.extend(args[-1]))
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype is not None):
            detections = model(images)
        return anchors, detections

    exact, by_float = seen(False, None)
    ours, detections = seen(True, torch.bfloat16)
    theirs, rounded = seen(False, torch.bfloat16)
    assert all(map(torch.equal, ours, exact))
    rounds = not all(torch.equal(one.float(), other) for one, other in zip(theirs, exact, strict=True))
    assert rounds or "fcos" in name  # whose anchors are multiples of 8
    assert {each["boxes"].dtype for each in detections} == {torch.float32}
    assert {each["boxes"].dtype for each in rounded} != {torch.float32} or "fasterrcnn" in name
    assert all(len(each["boxes"]) for each in detections)
    plain, plain_detections = seen(True, None)
    assert all(map(torch.equal, plain, exact))
    for one, other in zip(plain_detections, by_float, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in other)
