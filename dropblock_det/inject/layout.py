"""Whether a site puts out maps ``(N, C, H, W)``, which some regularizers need."""

import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dropblock_det.errors import InputError
from dropblock_det.inject.backbones import parents
from dropblock_det.inject.blocks import CHANNELS_LAST, look_up, stock_class
from dropblock_det.layers import DropBlock2d

OF_MAPS = (DropBlock2d, nn.Dropout2d)
"""Regularizers that need ``(N, C, H, W)``."""


@dataclass(frozen=True)
class Layout:
    """What a regularizer expects of the outputs at its site."""

    of_maps: bool
    """Whether they must be ``(N, C, H, W)``."""
    width: int | None
    """What C is if they are ``(N, H, W, C)``; ``None`` where they are not, by the layer that makes them."""

    def check(self, site: str, output: Any) -> None:
        """Refuses an output that the regularizer would misread.

        Raises:
            InputError: It is no tensor, or no map with the channels first although the regularizer needs one.
        """
        if not isinstance(output, Tensor):
            raise InputError(
                f"{site} returns a {type(output).__name__}, and a regularizer takes one tensor:"
                " name a layer in it"
            )
        if self.of_maps:
            self.check_shape(site, tuple(output.shape))

    def check_shape(self, site: str, shape: tuple[int, ...]) -> None:
        """The same for a shape."""
        channels_last = self.width is not None and len(shape) == 4 and shape[3] == self.width != shape[1]
        if self.of_maps and (len(shape) != 4 or channels_last):
            raise InputError(
                f"{site} puts out {shape}{', channels last,' * channels_last} and its regularizer needs"
                " (N, C, H, W): name another site, such as a convolution, or use nn.Dropout"
            )


def find_layouts(
    modules: dict[str, nn.Module | None], regularizers: dict[str, nn.Module]
) -> dict[str, Layout]:
    """What the regularizers expect at their sites.

    Args:
        modules: All of :func:`~dropblock_det.inject.backbones.walk`.
        regularizers: Site -> what would go there.

    Raises:
        InputError: One needs ``(N, C, H, W)`` and its site is known to have the channels last.
    """
    widths = _widths(modules)
    found = {}
    for site, regularizer in regularizers.items():
        of_maps = isinstance(regularizer, OF_MAPS)
        if of_maps and has_channels_last(modules, site):
            raise InputError(
                f"{site} has its channels in the last dimension and {type(regularizer).__name__} needs"
                " (N, C, H, W): name another site, such as a convolution, or use nn.Dropout"
            )
        found[site] = Layout(of_maps, widths[site])
    return found


def has_channels_last(modules: dict[str, nn.Module | None], site: str) -> bool:
    """Whether a site's output is known to have its channels in the last dimension.

    Args:
        modules: All of :func:`~dropblock_det.inject.backbones.walk`.
        site: A name in it.
    """
    module = modules[site]
    if isinstance(module, nn.LayerNorm):  # torchvision's LayerNorm2d has a forward of its own
        return len(module.normalized_shape) == 1 and stock_class(module).forward is nn.LayerNorm.forward
    if isinstance(module, nn.Linear):
        return True
    for holder in ("", *parents(site), site):
        block = modules[holder]
        inside = look_up(CHANNELS_LAST, block) if block is not None else None
        if inside and re.fullmatch(inside, site[len(holder) :].removeprefix(".")):
            return True
    return False


def _widths(modules: dict[str, nn.Module | None]) -> dict[str, int | None]:
    """The features of each module's last layer, or the last before it, if it works on the last dimension."""
    widths: dict[str, int | None] = {}
    width = None
    for name, module in modules.items():
        if isinstance(module, nn.Linear):
            width = module.out_features
        elif isinstance(module, nn.LayerNorm):
            width = module.normalized_shape[-1]
        elif module is not None and not module._modules and module._parameters:
            width = None
        for holder in (name, *parents(name)):
            widths[holder] = width
    return widths
