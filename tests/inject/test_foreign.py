"""Networks that are not torchvision's: a preset takes all of a stage's units or refuses, with a way out."""

import importlib.util
import inspect
import re
import warnings

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection import RetinaNet

from dropblock_det.errors import InputError
from dropblock_det.inject.backbones import walk
from dropblock_det.inject.inject import regularize_
from dropblock_det.inject.placement import find_sites
from dropblock_det.inject.preview import list_sites
from dropblock_det.layers import DropBlock2d

timm = pytest.importorskip("timm")


def build(name, **arguments):
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return timm.create_model(name, pretrained=False, **arguments)


@pytest.fixture(scope="module")
def their_resnet(tmp_path_factory):
    """torchvision's resnet.py, copied into somebody's project."""
    source = inspect.getsource(torchvision.models.resnet).replace("@register_model()\n", "")
    source = re.sub(r"^from \.\.(\w+)", r"from torchvision.\1", source, flags=re.M)
    source = re.sub(r"^from \.(_\w+)", r"from torchvision.models.\1", source, flags=re.M)
    path = tmp_path_factory.mktemp("theirs") / "their_resnet.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("their_resnet", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SAME_AS = [("resnet50", "resnet50"), ("densenet121", "densenet121"), ("vgg16_bn", "vgg16_bn")]


@pytest.mark.parametrize(("theirs", "ours"), SAME_AS)
def test_timms_twin_of_a_torchvision_network_has_as_many_sites_in_the_same_blocks(theirs, ours):
    with torch.device("meta"):
        stock = torchvision.models.get_model(ours, weights=None)

    def blocks(model):
        return [site.rpartition(".")[0] for site in find_sites(model, "paper")]

    assert sorted(blocks(build(theirs))) == sorted(blocks(stock))


@pytest.mark.parametrize(
    ("name", "block", "expected"),
    [
        ("resnet50", "layer4.0", ["act1", "act2", "bn3", "downsample.1"]),
        ("resnet50", "layer4.1", ["act1", "act2", "bn3", "downsample"]),
        ("resnet26d", "layer4.0", ["act1", "act2", "bn3", "downsample.2"]),
        ("seresnet50", "layer3.1", ["act1", "act2", "bn3", "downsample"]),
        ("densenet121", "features.denseblock4.denselayer3", ["norm1", "norm2"]),
        ("darknet53", "stages.4.blocks.1", ["", "conv1.bn"]),
    ],
)
def test_blocks_are_read_from_their_forwards(name, block, expected):
    sites = [site for site in find_sites(build(name), "paper") if (site + ".").startswith(block + ".")]
    assert sorted(sites) == sorted(f"{block}.{site}".rstrip(".") for site in expected)


@pytest.mark.parametrize("builder", ["resnet18", "resnet50"])
def test_a_copy_of_torchvisions_source_has_the_same_sites(their_resnet, builder):
    with torch.device("meta"):
        copied, stock = getattr(their_resnet, builder)(), getattr(torchvision.models, builder)()
    assert find_sites(copied, "paper") == find_sites(stock, "paper")
    handle = regularize_(copied, DropBlock2d)
    assert [(c.stage, c.covered, c.convolutions) for c in handle.coverage] == (
        [("stage 3", 19, 19), ("stage 4", 10, 10)]
        if builder == "resnet50"
        else [("stage 3", 5, 5), ("stage 4", 5, 5)]
    )
    assert "10 of 10 convolutions of stage 4" in repr(handle) or "5 of 5" in repr(handle)


def test_copies_train_like_the_stock_model(their_resnet):
    """Each site drops, once per forward; afterwards the copy is what it was."""
    copied = their_resnet.resnet18(num_classes=3)
    before = repr(copied)
    handle = regularize_(copied, lambda: DropBlock2d(0.5, 1))
    dropped = {}
    for site in handle.sites:
        copied.get_submodule(site).regularizer.register_forward_hook(
            lambda m, i, y, site=site: dropped.setdefault(site, []).append((y == 0).float().mean().item())
        )
    copied.train()(torch.randn(2, 3, 64, 64))
    assert set(dropped) == set(handle.sites)
    assert all(len(shares) == 1 and shares[0] > 0.4 for shares in dropped.values())
    assert handle.idle_sites == ()
    handle.remove()
    assert repr(copied) == before


def test_a_patterns_coverage_is_not_called_whole():
    with torch.device("meta"):
        handle = regularize_(torchvision.models.resnet50(), DropBlock2d, "layer4.*.bn1")
    assert [(c.covered, c.convolutions) for c in handle.coverage] == [(3, 10)]


def test_retinanet_on_a_timm_backbone():
    features = build("resnet50", features_only=True, out_indices=(2, 3, 4))

    class Backbone(nn.Module):
        out_channels = 256

        def __init__(self):
            super().__init__()
            self.body = features

    model = RetinaNet(Backbone(), num_classes=3)
    assert len(find_sites(model, "paper")) == 36
    assert all(site.startswith("backbone.body.layer") for site in find_sites(model, "paper"))


REFUSED = [
    "hrnet_w18_small", "res2net50_26w_4s", "resnest50d", "convnext_tiny", "regnety_004",
    "swin_tiny_patch4_window7_224",
]  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused_with_a_pattern_that_works(name):
    model = build(name)
    with pytest.raises(InputError) as refusal:
        regularize_(model, DropBlock2d, "paper")
    assert "\n" not in str(refusal.value)
    pattern = re.search("such as '([^']+)'", str(refusal.value))[1]
    sites = regularize_(model, DropBlock2d, pattern).sites
    modules = dict(walk(model))
    assert all(isinstance(modules[site], nn.Conv2d) for site in sites)
    assert not any(part in ("fc", "classifier", "head") for site in sites for part in site.split("."))


def test_one_block_that_is_not_understood_is_enough():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2048, 2048, 1)

        def forward(self, x):
            return x + self.conv(x).flip(3)

    model = torchvision.models.resnet50(weights=None)
    model.layer4[2] = Odd()
    with pytest.raises(InputError, match=r"layer4\.2 is not understood \(Odd: its forward uses flip\)"):
        find_sites(model, "paper")
    assert find_sites(model, "stage3"), "a stage that is understood"


def test_a_convolution_in_a_sequential_of_its_own_is_not_left_out():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Sequential(nn.Conv2d(2048, 2048, 1)), nn.BatchNorm2d(2048)

        def forward(self, x):
            return x + self.norm(self.conv(x))

    model = torchvision.models.resnet50(weights=None)
    model.layer4[2] = Odd()
    with pytest.raises(InputError, match=r"layer4\.2\.conv is not understood"):
        find_sites(model, "paper")


def test_a_subclass_with_a_forward_of_its_own_is_not_taken_for_its_base():
    class Wide(torchvision.models.resnet.BasicBlock):
        def forward(self, x):
            return self.relu(self.bn1(self.conv1(x))) * 2

    with torch.device("meta"):
        model = torchvision.models.resnet.ResNet(Wide, [1, 1, 1, 1])
    assert not any("downsample" in site for site in find_sites(model, "paper"))


class Decoder(nn.Module):
    def __init__(self, depth=5):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(depth)
        )


class UNet(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.decoder = encoder, Decoder()


@pytest.mark.parametrize(
    ("builder", "sites"),
    [("mobilenet_v2", 34), ("resnet50", 36), ("densenet121", 80), ("efficientnet_b0", 34)],
)
def test_a_decoder_with_numbered_blocks_changes_nothing(builder, sites):
    with torch.device("meta"):
        model = UNet(torchvision.models.get_model(builder))
    found = find_sites(model, "paper")
    assert len(found) == sites
    assert all(site.startswith("encoder.") for site in found)


def test_an_encoder_spread_over_the_network_itself():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            stock = torchvision.models.resnet18()
            self.stem = nn.Sequential(stock.conv1, stock.bn1, stock.relu, stock.maxpool)
            self.layer1, self.layer2, self.layer3, self.layer4 = (
                stock.layer1, stock.layer2, stock.layer3, stock.layer4,
            )  # fmt: skip
            self.decoder = Decoder()

    with torch.device("meta"):
        assert tuple(find_sites(Flat(), "paper")) == tuple(find_sites(torchvision.models.resnet18(), "paper"))


def test_several_backbones_are_named_and_chosen():
    with torch.device("meta"):
        model = nn.ModuleDict(
            {"student": torchvision.models.resnet18(), "teacher": torchvision.models.mobilenet_v2()}
        )
    for preset in ("paper", "stage4", "residual", "paper_groups"):
        with pytest.raises(
            InputError, match=r"several backbones, student, teacher\.features: choose"
        ) as said:
            find_sites(model, preset)
        choice = re.search("at='([^']+)'$", str(said.value))[1]
        assert all(site.startswith("teacher.features") for site in find_sites(model, choice))
    assert len(find_sites(model, "student:paper")) == 12
    assert len(find_sites(model, ["student:paper", "teacher:paper"])) == 12 + 34
    with pytest.raises(InputError, match="tutor is no module of ModuleDict"):
        find_sites(model, "tutor:paper")
    with pytest.raises(InputError, match="'papers' is no preset; there are paper, paper_groups, stageN, "):
        find_sites(model, "student:papers")


def test_a_backbone_with_two_names_is_one():
    with torch.device("meta"):
        backbone = torchvision.models.resnet18()
    model = nn.ModuleDict({"left": backbone, "right": backbone})
    assert list(find_sites(model, "paper")) == [f"left.{site}" for site in find_sites(backbone, "paper")]


def test_pool_is_every_pooling_that_lowers_the_resolution():
    def part(inputs, outputs):
        for channels in (inputs, outputs):
            yield from (nn.Conv2d(channels, outputs, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(outputs))
        yield nn.MaxPool2d(2)

    model = nn.Sequential(*part(3, 4), *part(4, 8), nn.MaxPool2d(3, 1, 1), nn.Flatten(), nn.Linear(512, 2))
    handle = regularize_(model, lambda: DropBlock2d(0.5, 1), "pool")
    assert handle.sites == ("6", "13")
    dropped = []
    model[13].regularizer.register_forward_hook(lambda m, i, y: dropped.append((y == 0).float().mean()))
    model.train()(torch.rand(8, 3, 32, 32))
    assert dropped[0] > 0.4
    with pytest.raises(InputError, match="at='paper': no stages are known"):
        find_sites(model, "paper")


@pytest.mark.parametrize("at", ["layers.1.blocks.0", "layers.*.blocks.*", "layers.1.blocks.0.drop_path1"])
def test_maps_with_channels_last_are_found_at_the_first_forward(at):
    model = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False)
    regularize_(model, lambda: DropBlock2d(0.1, 3), at)
    with pytest.raises(
        InputError, match=r"layers\.\d\.blocks\.0\S* puts out \(1, \d+, \d+, \d+\), channels last"
    ):
        model.train()(torch.rand(1, 3, 224, 224))


def test_list_sites_shows_where_the_channels_are_last():
    model = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False)
    example = torch.rand(1, 3, 224, 224)
    with pytest.raises(InputError, match=r"layers\.1\.blocks\.0 puts out \(1, 28, 28, 192\), channels last"):
        list_sites(model, "layers.1.blocks.0", example)
    (site,) = list_sites(model, "layers.1.blocks.0", example, lambda: nn.Dropout(0.2))
    assert site.shapes == ((1, 28, 28, 192),)


def test_tokens_are_no_maps():
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False)
    for make in (lambda: DropBlock2d(0.1, 3), lambda: nn.Dropout2d(0.1)):
        with (
            regularize_(model, make, "blocks.0"),
            pytest.raises(
                InputError,
                match=r"blocks\.0 puts out \(1, 197, 192\) and its regularizer needs \(N, C, H, W\)",
            ),
        ):
            model.train()(torch.rand(1, 3, 224, 224))
    with regularize_(model, nn.Dropout, "blocks.0"):
        assert model.train()(torch.rand(1, 3, 224, 224)).shape == (1, 1000)


def test_convnexts_own_layout_inside_a_block_is_no_obstacle():
    """Its last layer works on the last dimension, its output has the channels first."""
    model = timm.create_model("convnext_atto", pretrained=False)
    handle = regularize_(model, lambda: DropBlock2d(0.1, 3), "stages.*.blocks.*")
    model.train()(torch.rand(1, 3, 64, 64))
    assert handle.idle_sites == ()
