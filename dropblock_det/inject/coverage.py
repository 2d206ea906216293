"""How much of a network's stages a set of sites covers."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from dropblock_det.inject.backbones import find_backbones, join, walk, within
from dropblock_det.inject.blocks import children_of, is_norm_or_activation


@dataclass(frozen=True)
class Coverage:
    """How many of a stage's convolutions have a site beside them."""

    stage: str
    covered: int
    convolutions: int


def measure_coverage(model: nn.Module, sites: Iterable[str]) -> list[Coverage]:
    """Counts, in each stage that has a site, the convolutions that a regularizer stands beside.

    A convolution is covered if it is a site, if one of the norms and activations behind it is (or before it,
    where none is behind), or if it is the last one in a site. Those of squeeze-and-excitation never are.

    Args:
        model: The model.
        sites: Names as :func:`~dropblock_det.inject.placement.find_sites` gives them.
    """
    sites = set(sites)
    modules = {name: module for name, module in walk(model) if module is not None}
    leaves = _leaves("", model)
    convolutions = [name for name in leaves if isinstance(modules[name], nn.Conv2d)]
    covered = {name for name in convolutions if name in sites or sites & _beside(name, leaves, modules)}
    for site in sites:
        covered.update([name for name in convolutions if within(name, site)][-1:])
    found = []
    for backbone in find_backbones(model):
        for number, holders in backbone.holders.items():
            if any(within(site, holder) for site in sites for holder in holders):
                inside = {n for n in convolutions if any(within(n, holder) for holder in holders)}
                stage = f"{backbone.name} stage {number}".strip()
                found.append(Coverage(stage, len(inside & covered), len(inside)))
    return found


def _leaves(name: str, module: nn.Module) -> list[str]:
    """What has no parts; a norm that holds its activation counts as one."""
    children = [] if is_norm_or_activation(module) else children_of(module)
    return [leaf for own, child in children for leaf in _leaves(join(name, own), child)] or [name]


def _beside(convolution: str, leaves: list[str], modules: dict[str, nn.Module]) -> set[str]:
    """The norms and activations, of the same parent, that follow a convolution, or else precede it."""
    at, parent = leaves.index(convolution), convolution.rpartition(".")[0]
    for side in (leaves[at + 1 :], leaves[:at][::-1]):
        beside = set()
        for name in side:
            if name.rpartition(".")[0] != parent or not is_norm_or_activation(modules[name]):
                break
            beside.add(name)
        if beside:
            return beside
    return set()
