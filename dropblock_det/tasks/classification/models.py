"""Classifiers by name: torchvision's, and the small CNN of the course project."""

from typing import Any, Literal

import torch
import torchvision
from torch import nn
from torchvision.models import get_model, list_models
from torchvision.models.densenet import DenseNet
from torchvision.models.resnet import ResNet

from dropblock_det.errors import InputError

SMALL_CNN = "small_cnn"
Stem = Literal["imagenet", "small"]

# Without the auxiliary classifiers, with which a training forward returns three results, and without their
# own initialization, which takes scipy half a minute.
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": False},
    "inception_v3": {"aux_logits": False, "init_weights": False},
}


def small_cnn(num_classes: int, channels: int, height: int, width: int) -> nn.Sequential:
    """The course project's CNN: three pairs of convolutions with 32, 64 and 128 channels.

    Each convolution is followed by ReLU and BatchNorm, each pair by a max-pooling (the placement ``pool``),
    and all by one dense layer. For CIFAR-10 it has 308,394 parameters.

    Args:
        num_classes: outputs.
        channels: of the images.
        height: of the images in pixels, at least 8.
        width: likewise.
    """
    layers: list[nn.Module] = []
    before = channels
    for after in (32, 64, 128):
        for _ in range(2):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(inplace=True), nn.BatchNorm2d(after)]
            before = after
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * (height // 8) * (width // 8), num_classes))


def build_classifier(
    name: str, num_classes: int, image_shape: tuple[int, int, int], stem: Stem = "imagenet"
) -> nn.Module:
    """Builds a classifier with random weights; its state-dict keys are torchvision's.

    Args:
        name: ``small_cnn``, or a classifier's name in ``torchvision.models.list_models()``.
        num_classes: outputs.
        image_shape: channels, height and width of the images. torchvision's classifiers take three channels:
            give them gray images three times over.
        stem: ``imagenet`` leaves the network as it is, ``small`` is for images of some 32 pixels: the first
            convolution 3x3 with stride 1 and no pooling after it (ResNets and DenseNets have that).

    Raises:
        InputError: The name is unknown, the network has no small stem or doesn't take images of that size.
    """
    channels, height, width = image_shape
    if name == SMALL_CNN:
        if min(height, width) < 8:
            raise InputError(
                f"model.name: {SMALL_CNN} halves images three times, {height}x{width} is too small"
            )
        if stem != "imagenet":
            raise InputError(f"model.stem: {SMALL_CNN} has no stem to change; leave it out")
        return small_cnn(num_classes, channels, height, width)
    if name not in list_models(module=torchvision.models):
        raise InputError(
            f"model.name: no classifier {name!r}; give {SMALL_CNN}, resnet50, densenet121 or the like"
        )
    model: nn.Module = get_model(name, weights=None, num_classes=num_classes, **_ARGUMENTS.get(name, {}))
    if stem == "small":
        _shrink_stem(name, model)
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, height, width))
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"model.name: {name} takes no images of {height}x{width} pixels ({reason})"
        ) from None
    return model.train()


def _shrink_stem(name: str, model: nn.Module) -> None:
    match model:
        case ResNet():
            model.conv1 = nn.Conv2d(3, model.conv1.out_channels, 3, padding=1, bias=False)
            model.maxpool = nn.Identity()
            convolution = model.conv1
        case DenseNet():
            convolution = nn.Conv2d(3, model.features.conv0.out_channels, 3, padding=1, bias=False)
            model.features.conv0, model.features.pool0 = convolution, nn.Identity()
        case _:
            raise InputError(
                f"model.stem: {name} has no small stem; leave it out, or give a ResNet or DenseNet"
            )
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's
