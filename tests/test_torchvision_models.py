"""``<name>_dropblock`` is a torchvision model like any other, also in scripts that never heard of it."""

import subprocess
import sys

import pytest
import torchvision
from torchvision.models import get_model, get_model_weights, list_models

from dropblock_det import torchvision_models
from dropblock_det.errors import InputError
from dropblock_det.inject.inject import handle_of


def test_get_model_builds_it_with_the_stock_builders_arguments():
    nothing = {"weights": None, "weights_backbone": None}
    model = get_model("retinanet_resnet50_fpn_dropblock", num_classes=4, min_size=200, **nothing)
    stock = get_model("retinanet_resnet50_fpn", num_classes=4, **nothing)
    assert list(model.state_dict()) == list(stock.state_dict())
    handle = handle_of(model)
    assert model.transform.min_size == (200,)
    assert len(handle.sites) == 36
    assert "DropBlock2d(p=0.1, block_size=7" in repr(handle)


def test_dropblocks_arguments_are_keywords():
    model = get_model("resnet18_dropblock", num_classes=3, p=0.2, block_size=5, at="stage4")
    assert "DropBlock2d(p=0.2, block_size=5" in repr(handle_of(model))
    assert len(handle_of(model).sites) == 6


def test_weights_are_found_by_the_name():
    for name in ("retinanet_resnet50_fpn_v2", "resnet50", "deeplabv3_resnet50"):
        assert get_model_weights(f"{name}_dropblock") is get_model_weights(name)


def test_every_detector_and_segmenter_is_registered():
    for module in (torchvision.models.detection, torchvision.models.segmentation):
        names = list_models(module)
        assert {f"{name}_dropblock" for name in names if not name.endswith("_dropblock")} < set(names)


SCRIPT = """
import argparse
import torchvision
from neighbour import NUM_CLASSES  # the reference scripts import their neighbours

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="fasterrcnn_resnet50_fpn")
parser.add_argument("--weights")
parser.add_argument("--weights-backbone")
args = parser.parse_args()
model = torchvision.models.get_model(
    args.model, weights=args.weights, weights_backbone=args.weights_backbone, num_classes=NUM_CLASSES
)
print(__name__, sum("Regularized" in type(module).__name__ for module in model.modules()))
"""


@pytest.mark.slow
def test_a_script_trains_with_it_by_name_alone(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "neighbour.py").write_text("NUM_CLASSES = 5\n")
    command = [sys.executable, "-m", "dropblock_det.torchvision_models", str(tmp_path / "train.py")]
    done = subprocess.run(
        [*command, "--model", "fcos_resnet50_fpn_dropblock"], capture_output=True, text=True
    )
    assert done.stdout.split() == ["__main__", "36"], done.stderr


def test_a_missing_script_is_said(monkeypatch):
    for arguments, message in (([], "give a training script"), (["nope.py"], "nope.py: there is no such")):
        monkeypatch.setattr(sys, "argv", ["torchvision_models", *arguments])
        with pytest.raises(InputError, match=message):
            torchvision_models.main()
