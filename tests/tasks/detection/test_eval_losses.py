import subprocess
import sys

import pytest
import torch
from support.detectors import batch, small, training_losses
from torch import nn
from torchvision.models import detection as stock
from torchvision.models.detection import FasterRCNN

from dropblock_det import DropBlock2d, regularize_
from dropblock_det.errors import InputError
from dropblock_det.tasks.detection import losses_and_detections
from dropblock_det.tasks.detection.models import DETECTORS

FASTER = "fasterrcnn_mobilenet_v3_large_320_fpn"


def equal(some, others):
    return all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in b)
        for a, b in zip(some, others, strict=True)
    )


@pytest.mark.parametrize("name", DETECTORS)
@torch.no_grad()
def test_torchvisions_own_losses_and_detections_from_one_pass(name):
    model = small(name, score_thresh=0.005)
    images, targets = batch()
    runs = []
    for part in ("transform", "backbone"):
        getattr(model, part).register_forward_hook(lambda *_, part=part: runs.append(part))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [(key, module.training) for key, module in model.named_modules()]
    torch.manual_seed(3)
    random_state = torch.get_rng_state()

    losses, detections = losses_and_detections(model, images, targets)

    assert runs == ["transform", "backbone"]
    assert torch.equal(torch.get_rng_state(), random_state)
    assert list(model.state_dict()) == list(before), "no module was moved"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [(key, module.training) for key, module in model.named_modules()] == modes
    assert equal(detections, model(images))
    assert sum(len(of_image["boxes"]) for of_image in detections) > 0
    expected = training_losses(model, images, targets)
    assert losses.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(losses[key], value, rtol=1e-6, atol=1e-6)
    assert sum(losses.values()) > 0.1


@pytest.mark.parametrize("name", [FASTER, "fcos_resnet50_fpn", "ssdlite320_mobilenet_v3_large"])
@torch.no_grad()
def test_a_loss_per_image_depends_on_that_image_alone(name):
    model = small(name)
    images, targets = batch((3, 4, 5))
    together, _ = losses_and_detections(model, images, targets, per_image=True)
    order = [2, 0, 1]
    mixed, _ = losses_and_detections(
        model, [images[i] for i in order], [targets[i] for i in order], per_image=True
    )
    for number, (image, target) in enumerate(zip(images, targets, strict=True)):
        alone = training_losses(model, [image], [target])
        for key, value in alone.items():
            assert together[key].shape == (3,)
            torch.testing.assert_close(together[key][number], value, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(mixed[key][order.index(number)], value, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_samples_are_drawn_anew_for_another_image():
    model = small("fasterrcnn_resnet50_fpn")
    images, targets = batch((5,))
    others = [target | {"image_id": 6} for target in targets]
    first, again, other = (losses_and_detections(model, images, t)[0] for t in (targets, targets, others))
    assert first == again
    assert first["loss_objectness"] != other["loss_objectness"]


@torch.no_grad()
def test_boxes_that_the_detections_needed_are_not_computed_again():
    model, rows = small("fasterrcnn_resnet50_fpn"), []
    model.roi_heads.box_head.register_forward_hook(lambda _, __, output: rows.append(len(output)))
    losses_and_detections(model, *batch())
    training_losses(model, *batch())
    of_detections, new, of_training = rows
    assert of_detections == 2 * 60
    assert 0 < new < 0.7 * of_training


def test_gradients_flow():
    model = small(FASTER)
    losses, _ = losses_and_detections(model, *batch())
    expected = training_losses(model, *batch())
    weight = model.roi_heads.box_predictor.cls_score.weight
    (ours,) = torch.autograd.grad(losses["loss_classifier"], weight)
    assert ours.abs().sum() > 0
    assert torch.isclose(losses["loss_classifier"], expected["loss_classifier"])


@pytest.mark.parametrize("name", [FASTER, "ssdlite320_mobilenet_v3_large", "retinanet_resnet50_fpn"])
@torch.no_grad()
def test_regularizers_rest(name):
    model = small(name)
    expected = losses_and_detections(model, *batch())
    regularize_(model, lambda: DropBlock2d(0.5, 3), at="paper")
    losses, detections = losses_and_detections(model, *batch())
    assert losses == expected[0]
    assert equal(detections, expected[1])


class Subclass(FasterRCNN):
    """As people write them: a forward around torchvision's."""

    def forward(self, images, targets=None):
        return super().forward([image.flip(-1) for image in images], targets)


@torch.no_grad()
def test_subclasses_and_wrappers():
    stock_model = small(FASTER)
    model = Subclass(stock_model.backbone, 3, rpn_anchor_generator=stock_model.rpn.anchor_generator)
    model.load_state_dict(stock_model.state_dict())
    model.transform = stock_model.transform
    model.eval()
    images, targets = batch()
    losses, detections = losses_and_detections(model, images, targets)
    assert equal(detections, model(images))
    expected = training_losses(model, images, targets)
    for key, value in expected.items():
        torch.testing.assert_close(losses[key], value, rtol=1e-6, atol=1e-6)
    for wrapper in (nn.DataParallel(model), torch.compile(model, backend="eager")):
        assert losses_and_detections(wrapper.eval(), images, targets)[0] == losses


ONE_PROCESS = """
import torch
from support.detectors import batch, small
from dropblock_det.tasks.detection import losses_and_detections
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
model = small("ssdlite320_mobilenet_v3_large")
wrapped = torch.nn.parallel.DistributedDataParallel(model).eval()
assert losses_and_detections(wrapped, *batch())[0] == losses_and_detections(model, *batch())[0]
"""


def test_ddp():
    subprocess.run([sys.executable, "-c", ONE_PROCESS], check=True, timeout=120, cwd="tests")


@torch.no_grad()
def test_mask_and_keypoint_rcnn():
    images, targets = batch()
    torch.manual_seed(0)
    sizes = {"weights_backbone": None, "num_classes": 3, "min_size": 96, "max_size": 128}
    mask = stock.maskrcnn_resnet50_fpn(**sizes).eval()
    with pytest.raises(InputError, match="MaskRCNN needs the masks of every image"):
        losses_and_detections(mask, images, targets)
    for target in targets:
        target["masks"] = torch.ones(len(target["boxes"]), 96, 128, dtype=torch.uint8)
    losses, detections = losses_and_detections(mask, images, targets)
    assert equal(detections, mask(images))
    for key, value in training_losses(mask, images, targets).items():
        torch.testing.assert_close(losses[key], value, rtol=1e-6, atol=1e-6)
    assert losses["loss_mask"] > 0
    with pytest.raises(InputError, match="KeypointRCNN needs the keypoints"):
        losses_and_detections(
            stock.keypointrcnn_resnet50_fpn(**(sizes | {"num_classes": 2})).eval(), images, targets
        )


def test_what_is_refused():
    with pytest.raises(InputError, match="Linear is not one of torchvision's detectors"):
        losses_and_detections(nn.Linear(2, 2), *batch())
    with pytest.raises(InputError, match=r"in training mode; call model.eval\(\) first"):
        losses_and_detections(small(FASTER).train(), *batch())


def test_an_error_inside_leaves_the_model_as_it_was():
    model = small(FASTER)
    head, sampler = model.rpn.head, model.rpn.fg_bg_sampler
    _, targets = batch()
    targets[0]["labels"] = targets[0]["labels"][:1]  # a box without a label
    images, _ = batch()
    with pytest.raises(IndexError):
        losses_and_detections(model, images, targets)
    assert model.rpn.head is head
    assert model.rpn.fg_bg_sampler is sampler
    assert not any(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
