import pytest
import torch
from torchvision.models import ResNet50_Weights
from torchvision.models.detection import RetinaNet_ResNet50_FPN_Weights, retinanet_resnet50_fpn
from torchvision.models.resnet import Bottleneck

from dropblock_det.errors import InputError
from dropblock_det.tasks.detection.models import build_retinanet, losses_and_detections

SIZES = {"min_size": 96, "max_size": 128}


def batch():
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 90, 120, generator=generator), torch.rand(3, 100, 80, generator=generator)]
    targets = [
        {
            "boxes": torch.tensor([[5.0, 5.0, 60.0, 50.0], [20.0, 30.0, 90.0, 80.0]]),
            "labels": torch.tensor([1, 2]),
        },
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    return images, targets


@pytest.fixture(scope="module")
def stock_weights(tmp_path_factory):
    """A locally made stand-in for the published file: stock keys, 91 classes."""
    torch.manual_seed(1)
    stock = retinanet_resnet50_fpn(weights=None, weights_backbone=None)
    state = {k: v for k, v in stock.state_dict().items() if not k.endswith("num_batches_tracked")}
    state["head.classification_head.cls_logits.bias"] = torch.arange(9 * 91, dtype=torch.float32)
    return state


def test_it_is_the_stock_model():
    model = build_retinanet(["a"] * 90)
    stock = retinanet_resnet50_fpn(weights=None, weights_backbone=None)
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in stock.state_dict().items()
    }
    model.load_state_dict(stock.state_dict())
    assert (model.transform.min_size, model.transform.max_size) == ((800,), 1333)
    model.transform.min_size = stock.transform.min_size = (96,)  # seconds, not half a minute
    images, _ = batch()
    ours, theirs = model.eval()(images), stock.eval()(images)
    for mine, other in zip(ours, theirs, strict=True):
        assert all(torch.equal(mine[key], other[key]) for key in ("boxes", "scores", "labels"))


def test_one_forward_gives_torchvisions_losses_and_detections(monkeypatch):
    monkeypatch.setattr(ResNet50_Weights, "get_state_dict", lambda self, **_: _random_resnet50())
    model = build_retinanet(
        ["a", "b"],
        norm="frozen",
        weights_backbone="ResNet50_Weights.IMAGENET1K_V1",
        score_thresh=0.005,
        **SIZES,
    )
    images, targets = batch()
    runs = {"transform": 0, "backbone": 0}
    for name in runs:
        getattr(model, name).register_forward_hook(lambda *_, name=name: runs.update({name: runs[name] + 1}))
    model.eval()
    with torch.no_grad():
        losses, detections = losses_and_detections(model, images, targets)
        assert runs == {"transform": 1, "backbone": 1}
        expected_detections = model(images)
        expected_losses = model.train()(images, targets)
    assert losses.keys() == expected_losses.keys()
    assert all(torch.equal(losses[key], expected_losses[key]) for key in losses)
    assert len(detections[0]["boxes"]) > 0
    for mine, other in zip(detections, expected_detections, strict=True):
        assert all(torch.equal(mine[key], other[key]) for key in other)
    assert not any(module._forward_hooks for module in (model.head, model.anchor_generator)), "hooks are gone"


def test_one_forward_leaves_batchnorm_and_mode_alone():
    model = build_retinanet(["a", "b"], **SIZES).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    losses_and_detections(model, *batch())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(module.training for module in model.modules())


def test_from_scratch_branches_start_at_zero_and_heads_keep_the_signal():
    model = build_retinanet(["a"])
    blocks = [module for module in model.modules() if isinstance(module, Bottleneck)]
    assert len(blocks) == 16
    assert all(not block.bn3.weight.any() for block in blocks)
    signal = torch.randn(1, 256, 24, 24)
    for head in (model.head.classification_head, model.head.regression_head):
        assert 0.5 < head.conv(signal).square().mean().sqrt() < 2


def test_published_rows_are_matched_by_category_name(monkeypatch, stock_weights):
    monkeypatch.setattr(
        RetinaNet_ResNet50_FPN_Weights, "get_state_dict", lambda self, **_: dict(stock_weights)
    )
    names = RetinaNet_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    weights = "RetinaNet_ResNet50_FPN_Weights.COCO_V1"
    model = build_retinanet(["dog", "unicorn", "person"], weights=weights, norm="frozen")
    bias = model.head.classification_head.cls_logits.bias.reshape(9, 4)
    published = torch.arange(9 * 91, dtype=torch.float32).reshape(9, 91)
    assert torch.equal(bias[:, 1], published[:, names.index("dog")])
    assert torch.equal(bias[:, 3], published[:, names.index("person")])
    assert bias[:, 2].max() < 0, "a name that COCO does not have keeps the focal prior"
    assert model.backbone.body.bn1.eps == 0.0
    trainable = build_retinanet(["dog"], weights=weights, norm="batch")
    key = "backbone.body.conv1.weight"
    assert torch.equal(trainable.state_dict()[key], stock_weights[key])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "frozen"}, "norm: 'frozen' at random"),
        ({"trainable_stages": 3}, "would freeze random weights"),
        ({"trainable_stages": 6}, "trainable_stages: got 6"),
        ({"anchor_sizes": [8, 16]}, "anchor_sizes: got 2"),
        ({"weights_backbone": "IMAGENET1K_V1"}, "weights_backbone: got 'IMAGENET1K_V1'"),
        ({"weights_backbone": "ResNet50_Weights.IMAGENET9"}, "knows no 'ResNet50_Weights.IMAGENET9'"),
        ({"weights": "ResNet50_Weights.DEFAULT"}, "weights: got 'ResNet50_Weights.DEFAULT'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        build_retinanet(["a"], **arguments)


def test_training_is_finite_with_norm_and_frozen_stages(monkeypatch):
    monkeypatch.setattr(ResNet50_Weights, "get_state_dict", lambda self, **_: _random_resnet50())
    model = build_retinanet(
        ["a", "b"], trainable_stages=2, weights_backbone="ResNet50_Weights.DEFAULT", **SIZES
    )
    body = model.backbone.body
    assert {name.split(".")[0] for name, p in body.named_parameters() if p.requires_grad} == {
        "layer3",
        "layer4",
    }
    losses = model.train()(*batch())
    assert all(torch.isfinite(loss) for loss in losses.values())


def _random_resnet50():
    from torchvision.models import resnet50

    torch.manual_seed(2)
    return resnet50(weights=None).state_dict()
