"""Which sites ``at`` names: presets, patterns, filters and what is refused."""

import pytest
import torchvision
from torch import nn

from dropblock_det.errors import InputError
from dropblock_det.placement import find_sites


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
    assert find_sites(retinanet, "backbone.body.*") == (
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
    assert find_sites(retinanet, at) == (*find_sites(retinanet, "fpn"), "head.classification_head.cls_logits")


def test_models_are_found_inside_others(retinanet):
    class Theirs(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = nn.DataParallel(retinanet)

    for preset in ("paper", "fpn", "head"):
        assert find_sites(Theirs(), preset) == tuple(
            f"model.module.{site}" for site in find_sites(retinanet, preset)
        )


def test_a_module_with_two_names_is_one_site():
    shared = nn.Conv2d(3, 3, 1)
    assert find_sites(nn.ModuleDict({"a": shared, "b": shared}), ["a", "b"]) == ("a",)


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
