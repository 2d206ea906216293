"""Registers ``<name>_dropblock`` with torchvision for its classifiers, detectors and segmenters.

After ``import dropblock_det.torchvision_models``,
``torchvision.models.get_model("retinanet_resnet50_fpn_dropblock", weights=..., num_classes=...)`` builds the
stock network with DropBlock in it. To train with it by name in a script that knows nothing of this package,
such as torchvision's reference scripts::

    python -m dropblock_det.torchvision_models train.py --model retinanet_resnet50_fpn_dropblock ...
    torchrun --nproc-per-node 8 -m dropblock_det.torchvision_models train.py --model ...
"""

import functools
import inspect
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torchvision
from torch import nn
from torchvision.models import get_model_builder, list_models
from torchvision.models._api import register_model

from dropblock_det.errors import InputError, run_tool
from dropblock_det.inject.inject import regularize_
from dropblock_det.inject.placement import At
from dropblock_det.layers import DropBlock2d

SUFFIX = "_dropblock"

_MODULES = (torchvision.models, torchvision.models.detection, torchvision.models.segmentation)
_WITHOUT_PAPER_PLACEMENT = ("vit_*", "swin*", f"*{SUFFIX}")


def build_without_weights(name: str, **kwargs: Any) -> nn.Module:
    """Builds a torchvision model by name with nothing downloaded (its default may be a pretrained backbone).

    Raises:
        InputError: torchvision has no model of that name.
    """
    try:
        builder = get_model_builder(name)
    except ValueError as error:
        raise InputError(
            f"torchvision has no model {name!r}: see torchvision.models.list_models()"
        ) from error
    accepted = inspect.signature(builder).parameters
    nothing = {argument: None for argument in ("weights", "weights_backbone") if argument in accepted}
    return builder(**nothing, **kwargs)


def with_dropblock(builder: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Wraps a builder: the same arguments, and those of DropBlock by keyword."""

    @functools.wraps(builder)
    def build(*args: Any, p: float = 0.1, block_size: int = 7, at: At = "paper", **kwargs: Any) -> nn.Module:
        model = builder(*args, **kwargs)
        regularize_(model, lambda: DropBlock2d(p, block_size), at)
        return model

    return build


for _module in _MODULES:
    for _name in list_models(_module, exclude=_WITHOUT_PAPER_PLACEMENT):
        if _name + SUFFIX not in list_models():
            register_model(_name + SUFFIX)(with_dropblock(get_model_builder(_name)))


def main() -> None:
    """Runs the script named first on the command line, with the rest as its arguments."""
    if len(sys.argv) < 2:
        raise InputError(
            "give a training script and its arguments: train.py --model retinanet_resnet50_fpn_dropblock"
        )
    script = Path(sys.argv[1])
    if not script.is_file():
        raise InputError(f"{script}: there is no such script")
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    run_tool(main)
