"""``list_sites``: see where regularizers would go, and what they would drop, before anything is changed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dropblock_det.inject.backbones import walk
from dropblock_det.inject.inject import install, p_of
from dropblock_det.inject.layout import find_layouts
from dropblock_det.inject.placement import At, find_sites
from dropblock_det.inject.regularized import Use
from dropblock_det.inject.shares import expected_share
from dropblock_det.layers import DropBlock2d


@dataclass(frozen=True)
class Site:
    """A place that :func:`~dropblock_det.inject.inject.regularize_` would regularize."""

    name: str
    kind: str
    """Class of the module; ``identity skip`` where the block has none."""
    p: float | None
    """The drop probability there, ``None`` where the regularizer has none."""
    shapes: tuple[tuple[int, ...], ...] = ()
    """Shapes of the module's output in one run on the example; a head's layers run once per level."""
    shares: tuple[float | None, ...] = ()
    """For each shape the expected share dropped, ``None`` where it is not known."""


def list_sites(
    model: nn.Module, at: At = "paper", example: Any = None, make: Callable[[], nn.Module] = DropBlock2d
) -> list[Site]:
    """Lists the sites that ``at`` selects; the model is left as it was.

    Args:
        model: As for :func:`~dropblock_det.inject.inject.regularize_`.
        at: As for :func:`~dropblock_det.inject.inject.regularize_`.
        example: What one would call the model with (a tuple: its arguments). If given, the model runs on it
            once, in eval mode and without gradients, and shapes and shares are listed too. A site that did
            not run has none.
        make: What would be put there; its share is computed, not drawn.

    Raises:
        InputError: As for :func:`~dropblock_det.inject.inject.regularize_`; with an example also where the
            regularizer would misread a site's output.
    """
    factors = find_sites(model, at)
    made: dict[str, Any] = {name: make() for name in factors}
    layouts = find_layouts(dict(walk(model)), made)
    shapes = {name: [] for name in factors} if example is None else _shapes(model, factors, example)
    sites = []
    for name, regularizer in made.items():
        for shape in shapes[name]:
            layouts[name].check_shape(name, shape)
        if factors[name] != 1:
            regularizer.p = Use(name, factors[name], layouts[name]).scaled(p_of(name, regularizer))
        shares = tuple(expected_share(regularizer, shape) for shape in shapes[name])
        p = getattr(regularizer, "p", None)
        sites.append(Site(name, _kind(model, name), p, tuple(shapes[name]), shares))
    return sites


class _Recorder(nn.Module):
    """Takes a regularizer's place and notes what comes by."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.shapes.append(tuple(x.shape))
        return x


def _shapes(model: nn.Module, factors: dict[str, float], example: Any) -> dict[str, list[tuple[int, ...]]]:
    training = {module: module.training for module in model.modules()}
    recorders: list[_Recorder] = []

    def make() -> _Recorder:
        recorders.append(_Recorder())
        return recorders[-1]

    try:
        with install(model, dict.fromkeys(factors, 1.0), make), torch.no_grad():
            model.eval()
            for recorder in recorders:  # regularizers run in training mode only
                recorder.train()
            model(*example) if isinstance(example, tuple) else model(example)
    finally:
        for module, mode in training.items():
            module.training = mode
    return {name: recorder.shapes for name, recorder in zip(factors, recorders, strict=True)}


def _kind(model: nn.Module, name: str) -> str:
    parent, _, child = name.rpartition(".")
    module = getattr(model.get_submodule(parent), child)
    return "identity skip" if module is None else type(module).__name__
