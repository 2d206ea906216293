"""DropBlock, Dropout or SpatialDropout inside a torchvision detector. The names below need torch alone."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dropblock_det.inject.inject import RegularizerHandle, handle_of, regularize_
    from dropblock_det.inject.preview import list_sites
    from dropblock_det.layers import DropBlock2d
    from dropblock_det.ops.dropblock import drop_block2d

__all__ = ["DropBlock2d", "RegularizerHandle", "drop_block2d", "handle_of", "list_sites", "regularize_"]

_HOMES = {"DropBlock2d": "layers", "drop_block2d": "ops.dropblock", "list_sites": "inject.preview"}


def __getattr__(name: str) -> Any:
    # Fetching a COCO subset needs no torch, whose import takes half a gigabyte of memory.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'inject.inject')}"), name)
