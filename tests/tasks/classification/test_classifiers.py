"""Classifiers by name."""

import pytest
import torch
from support.tiny_run import ROOT
from torch import nn

from dropblock_det.errors import InputError
from dropblock_det.files import read_yaml
from dropblock_det.inject.inject import regularize_
from dropblock_det.layers import DropBlock2d
from dropblock_det.tasks.classification.models import build_classifier
from dropblock_det.tasks.classification.module import ClassificationModule

SHIPPED = [
    f"{data}_{model}" for data in ("cifar10", "mnist") for model in ("small_cnn", "resnet50", "densenet")
]


def test_the_small_cnn_is_the_course_project_s():
    model = build_classifier("small_cnn", 10, (3, 32, 32))
    assert sum(p.numel() for p in model.parameters()) == 308_394
    kinds = [type(layer).__name__ for layer in model]
    pair = ["Conv2d", "ReLU", "BatchNorm2d"] * 2 + ["MaxPool2d"]
    assert kinds == [*pair * 3, "Flatten", "Linear"]
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert build_classifier("small_cnn", 10, (1, 28, 28))(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def until_the_first_block(name, model):
    if name == "densenet121":
        return model.features[:4]
    return nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool)


@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_a_small_stem_keeps_the_resolution_and_the_keys(name):
    models = {stem: build_classifier(name, 10, (3, 32, 32), stem) for stem in ("imagenet", "small")}
    image = torch.zeros(1, 3, 32, 32)
    sides = {stem: until_the_first_block(name, model)(image).shape[-1] for stem, model in models.items()}
    assert sides == {"imagenet": 8, "small": 32}
    assert models["imagenet"].state_dict().keys() == models["small"].state_dict().keys()


def test_densenet_is_the_course_project_s():
    """conv 7x7/2 and pooling give 8x8 maps, growth rate 32, bottlenecks of 128 channels."""
    model = build_classifier("densenet121", 10, (3, 32, 32))
    layer = model.features.denseblock1.denselayer1
    assert model.features.conv0.kernel_size == (7, 7)
    assert model.features[:4](torch.zeros(1, 3, 32, 32)).shape[-2:] == (8, 8)
    assert (layer.conv1.kernel_size, layer.conv1.out_channels) == ((1, 1), 128)
    assert (layer.conv2.kernel_size, layer.conv2.out_channels) == ((3, 3), 32)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_configs_models_take_their_images_and_regularizers(name):
    settings = read_yaml(ROOT / "configs" / "classification" / f"{name}.yaml")
    data, model = settings["data"]["init_args"], settings["model"]
    side = data.get("size", {"mnist": 28, "cifar10": 32}[data["source"]])
    shape = ({"mnist": 1, "cifar10": 3}[data["source"]], side, side)
    categories = [{"label": label, "id": label, "name": str(label)} for label in range(10)]
    module = ClassificationModule(categories, shape, model["name"])
    regularize_(module, lambda: DropBlock2d(0.1, 7), at=settings["regularize"]["at"])
    assert module(torch.randint(0, 256, (2, *shape), dtype=torch.uint8)).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "shape", "stem", "message"),
    [
        ("lenet", (3, 32, 32), "imagenet", "model.name: no classifier 'lenet'"),
        ("fcn_resnet50", (3, 32, 32), "imagenet", "model.name: no classifier 'fcn_resnet50'"),
        ("small_cnn", (3, 7, 32), "imagenet", "7x32 is too small"),
        ("small_cnn", (3, 32, 32), "small", "has no stem to change"),
        ("vgg11", (3, 32, 32), "small", "vgg11 has no small stem"),
        ("alexnet", (3, 32, 32), "imagenet", "alexnet takes no images of 32x32 pixels"),
        ("vit_b_16", (3, 32, 32), "imagenet", "vit_b_16 takes no images of 32x32 pixels"),
    ],
)
def test_what_cannot_be_built_is_one_line(name, shape, stem, message):
    with pytest.raises(InputError, match=message) as caught:
        build_classifier(name, 10, shape, stem)
    assert "\n" not in str(caught.value)


def test_a_training_forward_gives_one_result():
    for name in ("googlenet", "inception_v3"):
        model = build_classifier(name, 5, (3, 96, 96))
        assert isinstance(model, nn.Module)
        assert model(torch.zeros(2, 3, 96, 96)).shape == (2, 5)
