"""``list_sites``: what would be regularized, on which maps, and what share of them would be dropped."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from dropblock_det.errors import InputError
from dropblock_det.inject.inject import regularize_
from dropblock_det.inject.placement import find_sites
from dropblock_det.inject.preview import Site, list_sites
from dropblock_det.layers import DropBlock2d

TOOL = Path(__file__).parents[2] / "tools" / "list_sites.py"


@pytest.fixture
def resnet():
    return torchvision.models.resnet18(weights=None)


def test_names_and_kinds(resnet):
    sites = list_sites(resnet, "stage4")
    assert [site.name for site in sites] == list(find_sites(resnet, "stage4"))
    assert [site.kind for site in sites] == ["BatchNorm2d"] * 5 + ["identity skip"]
    assert all(site.shapes == site.shares == () for site in sites)


def test_an_example_gives_shapes_and_shares_and_leaves_the_model_alone(resnet):
    resnet.train()
    resnet.layer1.eval()
    modes = [module.training for module in resnet.modules()]
    before, state = repr(resnet), {key: value.clone() for key, value in resnet.state_dict().items()}
    sites = list_sites(resnet, ["stage3", "fc"], torch.rand(2, 3, 96, 64), lambda: nn.Dropout(0.25))
    assert sites[0] == Site("layer3.0.bn1", "BatchNorm2d", 0.25, ((2, 256, 6, 4),), (0.25,))
    assert sites[-1] == Site("fc", "Linear", 0.25, ((2, 1000),), (0.25,))
    assert repr(resnet) == before
    assert [module.training for module in resnet.modules()] == modes
    assert all(torch.equal(state[key], value) for key, value in resnet.state_dict().items())


def test_what_list_sites_names_can_be_regularized():
    """Also where a block's sum and its units are sites together."""
    model = torchvision.models.mobilenet_v3_small(weights=None)
    names = [site.name for site in list_sites(model)]
    assert list(regularize_(model, DropBlock2d, at=names).sites) == names


def test_what_would_be_refused_is_refused_here_too():
    model = torchvision.models.swin_t(weights=None)
    with pytest.raises(InputError, match=r"features\.1\.0 has its channels in the last dimension"):
        list_sites(model, "features.1.*")
    (site,) = list_sites(model, "features.1.0", torch.rand(1, 3, 64, 64), nn.Dropout)
    assert site.shapes == ((1, 16, 16, 96),)


def test_a_head_lists_one_map_per_level():
    head = torchvision.models.detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None).head
    levels = [torch.rand(1, 256, side, side + 2) for side in (8, 4, 2)]
    for site in list_sites(head, "head", (levels,)):
        assert site.shapes == tuple(tuple(level.shape) for level in levels)
        assert len(site.shares) == 3


@pytest.mark.parametrize("calibration", ["paper", "exact"])
def test_the_share_is_the_one_dropped(resnet, calibration):
    def make():
        return DropBlock2d(p=0.3, block_size=3, calibration=calibration)

    (site,) = list_sites(resnet, "layer3.0.bn1", torch.rand(1, 3, 96, 144), make)
    torch.manual_seed(0)
    shares = (make().train()(torch.ones(300, 100, *site.shapes[0][2:])) == 0).float().mean(dim=(2, 3))
    # 30,000 independent maps; the interval is four standard errors, under 2 % of the share.
    error = 4 * shares.std().item() / 30_000**0.5
    assert error < 0.02 * site.shares[0]
    assert shares.mean().item() == pytest.approx(site.shares[0], abs=error)


def test_the_tool_prints_a_table():
    arguments = ["resnet18", "--at", "stage4", "--size", "64", "--p", "0.2", "--block-size", "1"]
    shown = subprocess.run([sys.executable, TOOL, *arguments], capture_output=True, text=True).stdout
    assert "6 sites" in shown
    assert "stage 4: 5 of 5 convolutions covered" in shown
    assert "layer4.1.downsample" in shown
    assert "identity skip" in shown
    assert "512×2×2" in shown
    assert "20.0%" in shown


def test_the_tool_shows_the_factors_and_what_takes_two_images():
    arguments = ["raft_small", "--at", "paper_groups", "--size", "128", "--block-size", "1"]
    shown = subprocess.run([sys.executable, TOOL, *arguments], capture_output=True, text=True).stdout
    assert "26 sites" in shown
    rows = [re.findall(r"0\.\d+|\d+\.\d%", line) for line in shown.splitlines() if "encoder.layer" in line]
    assert {tuple(row) for row in rows} == {("0.025", "2.5%"), ("0.1", "10.0%")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnat18"], "error: torchvision has no model 'resnat18'"),
        (["resnet18", "--p", "2"], "error: p: got 2"),
        (["resnet18", "--size", "0"], "error: size: got 0"),
        (["inception_v3", "--size", "32"], "error: --size 32: inception_v3 does not run on it (Calculated"),
        (["raft_small", "--size", "32"], "error: --size 32: raft_small does not run on it ("),
        (["resnet18", "--at", "layer9"], "error: at='layer9' matches no module"),
    ],
)
def test_the_tool_says_what_is_wrong_in_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["list_sites.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(TOOL), run_name="__main__")
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(message)
    assert said.count("\n") == 1
