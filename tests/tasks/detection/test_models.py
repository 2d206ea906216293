import pytest
import torch
from support.detectors import batch, publish, random_trunk, small
from torchvision.models import detection as stock
from torchvision.models import get_model_weights
from torchvision.models.resnet import Bottleneck
from torchvision.ops import FrozenBatchNorm2d

from dropblock_det.errors import InputError
from dropblock_det.tasks.detection.models import DETECTORS, build_detector

RETINANET = "retinanet_resnet50_fpn"
ONE_OF_EACH = [
    RETINANET,
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "fcos_resnet50_fpn",
    "ssd300_vgg16",
    "ssdlite320_mobilenet_v3_large",
]


def test_every_box_detector_of_torchvision_is_there():
    registered = {name for name in stock.__dict__ if name.endswith(("_fpn", "_v2", "_vgg16", "_v3_large"))}
    assert {name for name in registered if "mask" not in name and "keypoint" not in name} == set(DETECTORS)


@pytest.mark.parametrize("name", DETECTORS)
def test_a_pretrained_trunk_and_trained_stages_are_as_torchvision_makes_them(name, monkeypatch):
    """The whole model is compared: keys, shapes, the trunk's values, and what trains."""
    trunk = DETECTORS[name].trunk
    weights = publish(monkeypatch, trunk.name, random_trunk(trunk.name))
    theirs = getattr(stock, name)(weights_backbone=weights, num_classes=3, trainable_backbone_layers=2)
    frozen = any(isinstance(module, FrozenBatchNorm2d) for module in theirs.modules())
    norm = "frozen" if frozen else "batch" if trunk.has_norms else None
    ours = build_detector(name, ["a", "b"], weights_backbone=weights, trainable_stages=2, norm=norm)
    state, expected = ours.state_dict(), theirs.state_dict()
    assert {key: value.shape for key, value in state.items()} == {
        key: value.shape for key, value in expected.items()
    }
    where = {"vgg16": "backbone.features.", "mobilenet_v3_large": "backbone."}.get(
        trunk.name, "backbone.body."
    )
    pretrained = [
        key
        for key in state
        if key.startswith(where) and not any(new in key for new in (".fpn.", ".extra.", "num_batches"))
    ]
    assert len(pretrained) >= 20
    assert all(torch.equal(state[key], expected[key]) for key in pretrained)
    assert {key: value.requires_grad for key, value in ours.named_parameters()} == {
        key: value.requires_grad for key, value in theirs.named_parameters()
    }


@pytest.mark.parametrize("name", ["retinanet_resnet50_fpn", "ssdlite320_mobilenet_v3_large"])
def test_detections_are_the_stock_models(name):
    ours = small(name, score_thresh=0.005)
    torch.manual_seed(1)
    sizes = {"min_size": 96, "max_size": 128} if DETECTORS[name].has_sizes else {}
    theirs = getattr(stock, name)(weights_backbone=None, num_classes=3, score_thresh=0.005, **sizes).eval()
    ours.load_state_dict(theirs.state_dict())
    images, _ = batch()
    for mine, other in zip(ours(images), theirs(images), strict=True):
        assert len(other["boxes"]) > 0
        assert all(torch.equal(mine[key], other[key]) for key in other)


def test_from_scratch_branches_start_at_zero_and_retinanets_heads_keep_the_signal():
    model = small(RETINANET)
    blocks = [module for module in model.modules() if isinstance(module, Bottleneck)]
    assert len(blocks) == 16
    assert all(not block.bn3.weight.any() for block in blocks)
    signal = torch.randn(1, 256, 24, 24)
    for head in (model.head.classification_head, model.head.regression_head):
        assert 0.5 < head.conv(signal).square().mean().sqrt() < 2


def rows_of_classes(name, state, classes):
    """Of each layer that has rows per class, those rows as (..., class, rest)."""
    if "rcnn" in name:
        predictor = "roi_heads.box_predictor"
        return [
            state[f"{predictor}.{layer}.{kind}"].unflatten(0, (1, classes, -1))
            for layer in ("cls_score", "bbox_pred")
            for kind in ("weight", "bias")
        ]
    if name.startswith("ssd"):
        inner = ".1" if "lite" in name else ""
        layers = [f"head.classification_head.module_list.{level}{inner}" for level in range(6)]
    else:
        layers = ["head.classification_head.cls_logits"]
    return [
        state[f"{layer}.{kind}"].unflatten(0, (-1, classes, 1))
        for layer in layers
        for kind in ("weight", "bias")
    ]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_published_rows_are_matched_by_category_name(name, monkeypatch):
    keys = getattr(stock, name)(weights_backbone=None).state_dict()
    published = {  # all far from anything that an initialization gives
        key: 100 + torch.rand(value.shape) if value.is_floating_point() else value
        for key, value in keys.items()
    }
    weights = publish(monkeypatch, name, published)
    names = get_model_weights(name).COCO_V1.meta["categories"]
    state = build_detector(name, ["dog", "unicorn", "person"], weights=weights).state_dict()
    theirs = rows_of_classes(name, published, 91)
    for mine, other in zip(rows_of_classes(name, state, 4), theirs, strict=True):
        for label, row in ((0, 0), (1, names.index("dog")), (3, names.index("person"))):
            assert torch.equal(mine[:, label], other[:, row])
        assert mine[:, 2].abs().max() < 10, "a name that COCO does not have stays as it was"
    same = [key for key in state if state[key].shape == published[key].shape]
    assert len(same) > 50
    assert all(torch.equal(state[key], published[key]) for key in same)


@pytest.mark.parametrize("name", [RETINANET, "fasterrcnn_resnet50_fpn"])
def test_frozen_norms_of_the_first_published_weights_have_eps_0(name, monkeypatch):
    torch.manual_seed(1)
    state = getattr(stock, name)(weights_backbone=None).state_dict()
    state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    weights = publish(monkeypatch, name, state)
    assert build_detector(name, ["dog"], weights=weights, norm="frozen").backbone.body.bn1.eps == 0.0
    assert build_detector(name, ["dog"], weights=weights, norm="batch").backbone.body.bn1.eps > 0
    fetched = build_detector(name, ["dog"], weights=weights, norm="frozen", load_weights=False)
    assert fetched.backbone.body.bn1.eps == 0.0
    key = "backbone.body.conv1.weight"
    assert not torch.equal(fetched.state_dict()[key], state[key])


def test_settings_arrive_where_the_detector_has_them():
    small_sizes = [8, 16, 32, 64, 96]
    faster = build_detector(
        "fasterrcnn_mobilenet_v3_large_320_fpn",
        ["a"],
        anchor_sizes=small_sizes,
        score_thresh=0.3,
        min_size=64,
    )
    assert faster.rpn.anchor_generator.sizes == (tuple(small_sizes),) * 3
    assert (faster.roi_heads.score_thresh, faster.roi_heads.detections_per_img) == (0.3, 100)
    assert (faster.transform.min_size, faster.transform.max_size) == ((64,), 640)
    retinanet = build_detector(RETINANET, ["a"], anchor_sizes=small_sizes, detections_per_img=7)
    assert retinanet.anchor_generator.sizes[1] == (16, 20, 25)
    assert (retinanet.detections_per_img, retinanet.score_thresh) == (7, 0.05)
    assert (retinanet.transform.min_size, retinanet.transform.max_size) == ((800,), 1333)


FCOS, SSD, SSDLITE = "fcos_resnet50_fpn", "ssd300_vgg16", "ssdlite320_mobilenet_v3_large"


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (RETINANET, {"norm": "frozen"}, "norm: 'frozen' at random"),
        (RETINANET, {"trainable_stages": 3}, "trainable_stages: 3 would freeze random weights; give 5"),
        (SSDLITE, {"trainable_stages": 5}, "trainable_stages: 5 would freeze random weights; give 6"),
        (RETINANET, {"trainable_stages": 6}, "trainable_stages: got 6"),
        (RETINANET, {"anchor_sizes": [8, 16]}, "anchor_sizes: got 2"),
        (RETINANET, {"weights_backbone": "IMAGENET1K_V1"}, "weights_backbone: got 'IMAGENET1K_V1'"),
        (
            RETINANET,
            {"weights_backbone": "ResNet50_Weights.IMAGENET9"},
            "knows no 'ResNet50_Weights.IMAGENET9'",
        ),
        (RETINANET, {"weights": "ResNet50_Weights.DEFAULT"}, "weights: got 'ResNet50_Weights.DEFAULT'"),
        (FCOS, {"weights": "RetinaNet_ResNet50_FPN_Weights.COCO_V1"}, "such as 'FCOS_ResNet50_FPN_Weights.D"),
        (
            SSD,
            {"weights_backbone": "ResNet50_Weights.DEFAULT"},
            "such as 'VGG16_Weights.IMAGENET1K_FEATURES'",
        ),
        (FCOS, {"anchor_sizes": [8, 16, 32, 64, 128]}, "anchor_sizes: fcos_resnet50_fpn has no such setting"),
        (SSD, {"anchor_sizes": [8, 16, 32, 64, 128]}, "anchor_sizes: ssd300_vgg16 has no such setting"),
        (SSD, {"norm": "batch"}, "norm: ssd300_vgg16 has no such setting"),
        (SSD, {"min_size": 128}, "min_size: ssd300_vgg16 has no such setting"),
        (SSDLITE, {"max_size": 128}, "max_size: ssdlite320_mobilenet_v3_large has no such setting"),
        ("maskrcnn_resnet50_fpn_v2", {}, "learns from masks.*; give fasterrcnn_resnet50_fpn_v2 instead"),
        ("keypointrcnn_resnet50_fpn", {}, "learns from keypoints.*; give fasterrcnn_resnet50_fpn instead"),
        ("yolov8", {}, "name: no detector 'yolov8'; give one of retinanet_resnet50_fpn, "),
    ],
)
def test_bad_arguments(name, settings, message):
    with pytest.raises(InputError, match=message) as caught:
        build_detector(name, ["a"], **settings)
    assert "\n" not in str(caught.value)
