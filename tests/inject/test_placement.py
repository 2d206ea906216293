"""Which sites ``at`` names: presets, patterns, filters and what is refused."""

import warnings

import pytest
import torch
import torchvision
from torch import nn

from dropblock_det.errors import InputError
from dropblock_det.inject.backbones import units, walk
from dropblock_det.inject.blocks import runs_in_order
from dropblock_det.inject.layout import has_channels_last
from dropblock_det.inject.placement import find_sites
from dropblock_det.torchvision_models import build_without_weights


@pytest.fixture(scope="module")
def retinanet():
    return torchvision.models.detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None)


def bottleneck_sites(body, layer, blocks):
    sites = []
    for i in range(blocks):
        sites += [f"{body}.{layer}.{i}.{unit}" for unit in ("bn1", "bn2", "bn3")]
        sites.append(f"{body}.{layer}.{i}.downsample" + (".1" if i == 0 else ""))
    return sites


def test_paper_is_every_unit_and_every_skip_of_layer3_and_layer4(retinanet):
    expected = bottleneck_sites("backbone.body", "layer3", 6) + bottleneck_sites("backbone.body", "layer4", 3)
    assert list(find_sites(retinanet, "paper")) == expected


def test_a_stage_is_one_layer(retinanet):
    assert list(find_sites(retinanet, "stage2")) == bottleneck_sites("backbone.body", "layer2", 4)
    assert set(find_sites(retinanet, ["stage3", "stage4"])) == set(find_sites(retinanet, "paper"))


def test_fpn_is_every_pyramid_level(retinanet):
    levels = [f"backbone.fpn.layer_blocks.{i}.0" for i in range(3)]
    assert list(find_sites(retinanet, "fpn")) == [
        *levels,
        "backbone.fpn.extra_blocks.p6",
        "backbone.fpn.extra_blocks.p7",
    ]


def test_head_is_the_hidden_units_and_never_a_prediction(retinanet):
    towers = [f"head.{tower}_head.conv.{i}.1" for tower in ("classification", "regression") for i in range(4)]
    assert list(find_sites(retinanet, "head")) == towers


def test_star_is_one_segment_and_a_sequential_means_its_last_layer(retinanet):
    assert tuple(find_sites(retinanet, "backbone.body.*")) == (
        "backbone.body.conv1",
        "backbone.body.bn1",
        "backbone.body.relu",
        "backbone.body.maxpool",
        "backbone.body.layer1.2",
        "backbone.body.layer2.3",
        "backbone.body.layer3.5",
        "backbone.body.layer4.2",
    )
    skips = find_sites(retinanet, "backbone.body.layer4.*.downsample")
    assert [name.split(".")[3:] for name in skips] == [
        ["0", "downsample", "1"],
        ["1", "downsample"],
        ["2", "downsample"],
    ]


def test_a_list_mixes_presets_patterns_and_filters_and_counts_each_site_once(retinanet):
    at = ["fpn", "backbone.fpn.layer_blocks.0", lambda name, module: name.endswith("cls_logits")]
    assert tuple(find_sites(retinanet, at)) == (
        *find_sites(retinanet, "fpn"),
        "head.classification_head.cls_logits",
    )


def test_models_are_found_inside_others(retinanet):
    class Theirs(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = nn.DataParallel(retinanet)

    for preset in ("paper", "fpn", "head"):
        assert tuple(find_sites(Theirs(), preset)) == tuple(
            f"model.module.{site}" for site in find_sites(retinanet, preset)
        )


def test_a_module_with_two_names_is_one_site():
    shared = nn.Conv2d(3, 3, 1)
    assert tuple(find_sites(nn.ModuleDict({"a": shared, "b": shared}), ["a", "b"])) == ("a",)


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ("backbone.body.layer5", "backbone.body.layer4"),
        ("body.layer4", "backbone.body.layer4"),
        ("backbone.layer4.*", "at='backbone.layer4.*' matches no module of RetinaNet"),
        ("stage9", "the stages are 1, 2, 3, 4"),
        (
            ["backbone.body.layer4", "backbone.body.layer4.2.bn3"],
            "layer4.2.bn3 and backbone.body.layer4.2, which",
        ),
        (["paper", "backbone.body.layer4.1"], "contains it"),
        (lambda name, module: "layer4" in name, "contains it"),
        (lambda name, module: False, "the filter selects none"),
        ([], "at is empty"),
    ],
)
def test_what_cannot_be_meant_is_refused(retinanet, at, message):
    with pytest.raises(InputError) as refusal:
        find_sites(retinanet, at)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_an_unknown_network_is_told_how_to_name_sites():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    for preset in ("paper", "stage1", "fpn", "head"):
        with pytest.raises(
            InputError, match=r"a pattern such as '0' or by a filter \(name, module\) -> bool"
        ):
            find_sites(model, preset)


def test_dropout_and_pooling_stay_within_a_unit():
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3), nn.Dropout2d(), nn.BatchNorm2d(8), nn.Tanh(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
    )
    assert [*units("", model)] == ["3", "7", "11"]


@pytest.mark.parametrize("name", ["vit_b_16", "swin_t", "swin_v2_t"])
def test_transformers_have_no_paper_placement_and_the_error_names_a_site_that_works(name):
    model = build(name)
    for preset in ("paper", "stage3"):
        with pytest.raises(
            InputError, match=f"at='{preset}': no stages are known for \\w+Transformer"
        ) as error:
            find_sites(model, preset)
        assert "\n" not in str(error.value)
        (suggested,) = find_sites(model, str(error.value).split("such as '")[1].split("'")[0])
        assert isinstance(model.get_submodule(suggested), nn.Conv2d)


@pytest.mark.parametrize("name", ["swin_t", "swin_v2_t", "convnext_tiny"])
def test_channels_last_is_said_of_the_maps_that_are(name):
    """The maps of a small image are at most 16 x 16 and have 96 channels or more, so shapes tell."""
    model = build(name)
    modules, shapes = dict(walk(model)), {}
    for site, module in modules.items():
        if not runs_in_order(module) and site:
            module.register_forward_hook(lambda *args, site=site: shapes.update({site: args[2].shape}))
    model.eval()(torch.rand(2, 3, 64, 64, device=next(model.parameters()).device))
    maps = {site: shape for site, shape in shapes.items() if len(shape) == 4 and shape[0] == 2}
    assert len(maps) > 50
    assert {site: has_channels_last(modules, site) for site in maps} == {
        site: shape[-1] > shape[1] for site, shape in maps.items()
    }
    assert {True, False} <= {shape[-1] > shape[1] for shape in maps.values()}


# One block of each family: (builder, the block's name, its sites, all of them in "paper").
FAMILIES = [
    ("resnet18", "layer4.0", ["bn1", "bn2", "downsample.1"]),
    ("resnet18", "layer4.1", ["bn1", "bn2", "downsample"]),
    ("resnext50_32x4d", "layer3.2", ["bn1", "bn2", "bn3", "downsample"]),
    ("quantized_resnet18", "layer4.1", ["bn1", "bn2", "downsample"]),
    ("deeplabv3_resnet50", "backbone.layer4.1", ["bn1", "bn2", "bn3", "downsample"]),
    ("regnet_y_400mf", "trunk_output.block4.block4-0", ["proj.1", "f.a.2", "f.b.2", "f.c.1"]),
    ("regnet_y_400mf", "trunk_output.block3.block3-1", ["f.a.2", "f.b.2", "f.c.1", "proj"]),
    ("densenet121", "features.denseblock4.denselayer2", ["relu1", "relu2"]),
    ("vgg16_bn", "features", [str(i) for i in (26, 29, 32, 36, 39, 42)]),
    ("vgg16", "features", [str(i) for i in (18, 20, 22, 25, 27, 29)]),
    ("alexnet", "features", ["4", "7", "9", "11"]),
    # A residual block's own output stands for its last unit and its skip; others end in their norm.
    ("mobilenet_v2", "features.8", ["", "conv.0.2", "conv.1.2"]),
    ("mobilenet_v2", "features.14", ["conv.0.2", "conv.1.2", "conv.3"]),
    ("mobilenet_v3_small", "features.5", ["", "block.0.2", "block.1.2"]),
    ("mobilenet_v3_small", "features.4", ["block.0.2", "block.1.2", "block.3.1"]),
    ("efficientnet_b0", "features.6.1", ["", "block.0.2", "block.1.2"]),
    ("efficientnet_v2_s", "features.4.0", ["block.0.2", "block.1.2", "block.3.1"]),
    ("mnasnet0_5", "layers.12.1", ["", "layers.2", "layers.5"]),
    ("mnasnet0_5", "layers.12.0", ["layers.2", "layers.5", "layers.7"]),
    ("shufflenet_v2_x0_5", "stage4.0", ["branch1.1", "branch1.4", "branch2.2", "branch2.4", "branch2.7"]),
    ("shufflenet_v2_x0_5", "stage4.1", ["", "branch2.2", "branch2.4"]),
    ("convnext_tiny", "features.7.1", [""]),
    ("maxvit_t", "blocks.3.layers.0.layers.MBconv", ["", "layers.conv_a.2", "layers.conv_b.2"]),
    ("squeezenet1_1", "features.12", ["squeeze_activation", "expand1x1_activation", "expand3x3_activation"]),
    ("googlenet", "inception5b", ["branch1", *(f"branch{i}" for i in ("2.0", "2.1", "3.0", "3.1", "4.1"))]),
    ("inception_v3", "Mixed_7a", ["branch3x3_1", "branch3x3_2", *(f"branch7x7x3_{i}" for i in (1, 2, 3, 4))]),
    ("ssd300_vgg16", "backbone.extra.0", ["2", "4", "6", "7.2", "7.4"]),
    ("ssdlite320_mobilenet_v3_large", "backbone.features.1.1", ["", "block.0.2", "block.1.2"]),
    ("fasterrcnn_mobilenet_v3_large_fpn", "backbone.body.14", ["", "block.0.2", "block.1.2"]),
    ("lraspp_mobilenet_v3_large", "backbone.13", ["block.0.2", "block.1.2", "block.3.1"]),
]  # fmt: skip


def build(name):
    with torch.device("meta" if "regnet" not in name else "cpu"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build_without_weights(name)


@pytest.mark.parametrize(("name", "block", "expected"), FAMILIES, ids=[f"{n}-{b}" for n, b, _ in FAMILIES])
def test_every_family_has_its_units_and_skips(name, block, expected):
    sites = find_sites(build(name), "paper")
    inside = [site for site in sites if site == block or site.startswith(block + ".")]
    assert inside == [f"{block}.{site}".rstrip(".") for site in expected]


@pytest.mark.parametrize(
    ("name", "outside"),
    [
        ("mobilenet_v2", ["features.0", "features.6", "classifier"]),
        ("vgg16", ["features.15", "classifier"]),
        ("ssd300_vgg16", ["backbone.features.13", "backbone.extra.1", "head"]),
        ("inception_v3", ["Mixed_5d", "AuxLogits"]),
        ("googlenet", ["inception3b", "aux1", "aux2"]),
        ("densenet121", ["features.transition3", "features.norm5"]),
        ("efficientnet_b0", ["features.3"]),
    ],
)
def test_paper_keeps_to_the_last_two_stages(name, outside):
    for site in find_sites(build(name), "paper"):
        assert not any(site == module or site.startswith(module + ".") for module in outside)


HEADS = {
    "fcos_resnet50_fpn": [
        f"head.{h}_head.conv.{i}" for h in ("classification", "regression") for i in (2, 5, 8, 11)
    ],
    "fasterrcnn_resnet50_fpn_v2": [f"rpn.head.conv.{i}.1" for i in (0, 1)]
    + [f"roi_heads.box_head.{i}.2" for i in range(4)],
    "maskrcnn_resnet50_fpn": ["rpn.head.conv.0.1"] + [f"roi_heads.mask_head.{i}.1" for i in range(4)],
    "keypointrcnn_resnet50_fpn": ["rpn.head.conv.0.1"]
    + [f"roi_heads.keypoint_head.{i}" for i in range(1, 16, 2)],
    "fcn_resnet50": ["classifier.2"],
    "deeplabv3_resnet50": [f"classifier.0.convs.{i}.2" for i in range(4)]
    + ["classifier.0.project.2", "classifier.3"],
    "lraspp_mobilenet_v3_large": ["classifier.cbr.2"],
}


@pytest.mark.parametrize("name", HEADS)
def test_heads(name):
    assert list(find_sites(build(name), "head")) == HEADS[name]
