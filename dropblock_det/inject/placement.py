"""Where regularizers go: a model and ``at`` in, dotted site names out. Nothing here changes a model.

A *site* is a module whose output is regularized, or an attribute that a torchvision block keeps at ``None``
on an identity skip. What torchvision's classes do not show by their structure is written in the tables below.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeGuard, TypeVar

from torch import nn

from dropblock_det.errors import InputError

Where = str | Callable[[str, nn.Module], bool]
"""A preset, a dotted pattern (``*`` = one name segment), or a filter ``(name, module) -> bool``."""


T = TypeVar("T")


@dataclass(frozen=True)
class Block:
    """What the forward of one torchvision block class does with its children."""

    units: tuple[str, ...] | None = None
    """Children that end a conv-norm(-activation) unit, ``""`` the block; ``None``: Sequentials show them."""
    skip: str = ""
    """Attribute called on the skip connection; ``None`` on an identity skip."""
    joins_input: Callable[[nn.Module], bool] = lambda block: False
    """Whether the forward itself adds (or concatenates) the input, with no module on the skip.

    The site is then the block's output, branch and skip under one mask, in place of the branch's last unit.
    """


_RESIDUAL = Block(joins_input=lambda block: bool(block.use_res_connect))

# Keys are "file.Class" below torchvision.models; subclasses (the quantizable ones) are found by their base.
BLOCKS: dict[str, Block] = {
    # One `relu` is called three times here, so the norms are the sites (a ReLU commutes with the mask).
    "resnet.BasicBlock": Block(units=("bn1", "bn2"), skip="downsample"),
    "resnet.Bottleneck": Block(units=("bn1", "bn2", "bn3"), skip="downsample"),
    "regnet.ResBottleneckBlock": Block(skip="proj"),
    # Pre-activation: relu1 closes the unit begun by the convolutions of earlier layers, relu2 that of conv1.
    "densenet._DenseLayer": Block(units=("relu1", "relu2")),
    "mobilenetv2.InvertedResidual": _RESIDUAL,
    "mobilenetv3.InvertedResidual": _RESIDUAL,
    "efficientnet.MBConv": _RESIDUAL,
    "efficientnet.FusedMBConv": _RESIDUAL,
    "mnasnet._InvertedResidual": Block(joins_input=lambda block: bool(block.apply_residual)),
    "shufflenetv2.InvertedResidual": Block(joins_input=lambda block: bool(block.stride == 1)),
    "convnext.CNBlock": Block(joins_input=lambda block: True),
    "maxvit.MBConv": Block(units=("layers.conv_a.2", "layers.conv_b.2"), joins_input=lambda block: True),
    "squeezenet.Fire": Block(units=("squeeze_activation", "expand1x1_activation", "expand3x3_activation")),
    "googlenet.BasicConv2d": Block(units=("",)),
    "inception.BasicConv2d": Block(units=("",)),
}

# Names that carry a stage number. Others are cut where a convolution or pooling lowers the resolution.
STAGE_NAME = re.compile(r"(?:^|\.)(?:layer|block|denseblock|stage|inception|Mixed_|blocks\.)(\d+)")

# Modules that run the named children one after the other, besides nn.Sequential ("*": all of them).
RUNS_IN_ORDER: dict[str, tuple[str, ...]] = {
    "_utils.IntermediateLayerGetter": ("*",),
    "detection.ssd.SSDFeatureExtractorVGG": ("features", "extra.0"),
}

PYRAMIDS: dict[str, tuple[str, ...]] = {
    "torchvision.ops.feature_pyramid_network.FeaturePyramidNetwork": (
        "layer_blocks.*",
        "extra_blocks.p6",
        "extra_blocks.p7",
    ),
}

# Their hidden conv-norm-activation units are sites; the layers that predict are not.
HEADS = {
    "detection.retinanet.RetinaNetHead",
    "detection.fcos.FCOSHead",
    "detection.ssdlite.SSDLiteHead",
    "detection.rpn.RPNHead",
    "detection.faster_rcnn.FastRCNNConvFCHead",
    "detection.mask_rcnn.MaskRCNNHeads",
    "detection.keypoint_rcnn.KeypointRCNNHeads",
    "segmentation.deeplabv3.DeepLabHead",
    "segmentation.fcn.FCNHead",
    "segmentation.lraspp.LRASPPHead",
}

# Names below a block whose outputs are tokens or (N, H, W, C) maps. Every nn.Linear's and nn.LayerNorm's are.
CHANNELS_LAST: dict[str, str] = {
    "swin_transformer.SwinTransformer": r"features\.0\.1",
    "swin_transformer.SwinTransformerBlock": r".*",
    "swin_transformer.PatchMerging": r".*",
    "swin_transformer.PatchMergingV2": r".*",
    "maxvit.PartitionAttentionLayer": r".+",  # what it returns is a (N, C, H, W) map again
    "convnext.CNBlock": r"block\.[1-5]",
    "vision_transformer.Encoder": r".*",
}

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)
_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.ELU, nn.Mish)
_POOLS = (nn.MaxPool2d, nn.AvgPool2d)


def find_sites(model: nn.Module, at: Where | Iterable[Where]) -> tuple[str, ...]:
    """Names the sites that ``at`` selects, in the order in which the model lists its modules.

    Args:
        model: Any module; torchvision networks are recognised wherever they are nested in it.
        at: ``"paper"`` (every conv-norm-activation unit and every skip in the last two stages), ``"stageN"``
            (the same in one stage), ``"fpn"`` (outputs of the feature pyramid), ``"head"`` (hidden units of
            the detection or segmentation heads), a dotted pattern, a filter, or a list of these.

    Returns:
        Distinct dotted names. An ``nn.Sequential`` is resolved to its last layer, whose output it returns.

    Raises:
        InputError: Nothing matches, or one match lies inside another (a residual block's sum and the units of
            its branch may be sites together).
    """
    names = dict(walk(model))
    chosen: set[str] = set()
    for where in [at] if isinstance(at, str) or callable(at) else list(at):
        sites = None if callable(where) else _preset(model, where)
        if sites is None:
            sites = [_last_layer(name, names[name]) for name in _matches(model, names, where)]
        chosen.update(sites)
    found = [name for name in names if name in chosen]
    if not found:
        raise InputError("at is empty: give a preset, a dotted pattern or a filter (name, module) -> bool")
    for inner in found:
        for outer in _parents(inner):
            if outer in chosen and not _joins_input(names[outer]):
                raise InputError(f"at selects {inner} and {outer}, which contains it: select one of them")
    # A module with two names is one site; a slot has no module and only one name.
    first = {id(names[name]) if names[name] is not None else name: name for name in reversed(found)}
    return tuple(name for name in found if name in first.values())


def walk(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module | None]]:
    """Yields ``(name, module)`` for a module and all below it, ``(name, None)`` for an identity skip's slot.

    A module with two names comes twice. What ``regularize_`` added is left out.
    """
    yield name, module
    for child_name, child in module._modules.items():
        if child is not None and child_name != "regularizer":
            yield from walk(child, _join(name, child_name))
    block = _lookup(BLOCKS, module)
    if block and block.skip and getattr(module, block.skip) is None:
        yield _join(name, block.skip), None


def is_channels_last(modules: dict[str, nn.Module | None], site: str) -> bool:
    """Whether a site's output is known to have its channels in the last dimension.

    Args:
        modules: All of :func:`walk`.
        site: A name in it.
    """
    module = modules[site]
    if isinstance(module, nn.LayerNorm):  # torchvision's LayerNorm2d has a forward of its own
        return len(module.normalized_shape) == 1 and type(module).forward is nn.LayerNorm.forward
    if isinstance(module, nn.Linear):
        return True
    for holder in ("", *_parents(site), site):
        block = modules[holder]
        inside = _lookup(CHANNELS_LAST, block) if block is not None else None
        if inside and re.fullmatch(inside, site[len(holder) :].removeprefix(".")):
            return True
    return False


def runs_in_order(module: nn.Module) -> TypeGuard[nn.Sequential]:
    """Whether a module's output is its last child's: an ``nn.Sequential`` that kept its forward."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _preset(model: nn.Module, name: str) -> list[str] | None:
    """The sites of a preset, or ``None`` where the name is not a preset's."""
    stage = re.fullmatch(r"stage(\d+)", name)
    if name == "paper" or stage:
        stages = _stages(model)
        if not stages:
            raise _unknown(model, name, "no stages are known")
        if stage and int(stage[1]) not in stages:
            raise _unknown(model, name, f"the stages are {', '.join(map(str, stages))}")
        return [site for n in ([int(stage[1])] if stage else list(stages)[-2:]) for site in stages[n]]
    if name == "fpn":
        sites = [
            _last_layer(site, layer)
            for at, pyramid in walk(model)
            if pyramid is not None
            for path in _lookup(PYRAMIDS, pyramid) or ()
            for site, layer in walk(pyramid, at)
            if _fits(_join(at, path), site)
        ]
    elif name == "head":
        heads = [(at, module) for at, module in walk(model) if module is not None and _key(module, HEADS)]
        sites = [site for at, module in heads for site in _units(at, module)]
    else:
        return None
    if not sites:
        raise _unknown(model, name, "nothing of that kind was found")
    return sites


def _units(name: str, module: nn.Module) -> Iterator[str]:
    """Yields the ends of the conv-norm(-activation) units and the skips in a module."""
    block = _lookup(BLOCKS, module)
    if block and block.units is not None:
        yield from (_join(name, unit) for unit in block.units)
    elif runs_in_order(module):
        yield from _units_in_order(name, module)
    else:
        inside = [
            site
            for child_name, child in module.named_children()
            if child_name not in ("regularizer", block.skip if block else None)
            for site in _units(_join(name, child_name), child)
        ]
        yield from inside[:-1] if _joins_input(module) else inside
    if _joins_input(module):
        yield name
    if block and block.skip:
        yield _last_layer(_join(name, block.skip), getattr(module, block.skip))


def _joins_input(module: nn.Module | None) -> bool:
    if module is None:
        return False
    block = _lookup(BLOCKS, module)
    return block is not None and block.joins_input(module)


def _units_in_order(name: str, module: nn.Module) -> Iterator[str]:
    """A convolution opens a unit, the norms and activations that directly follow belong to it."""
    inside, end = False, None
    for child_name, child in module.named_children():
        site = _join(name, child_name)
        if inside and _is_norm_or_activation(child):
            end = site
            continue
        if end:
            yield end
        inside, end = isinstance(child, nn.Conv2d), None
        if not inside:
            yield from _units(site, child)
    if end:
        yield end


def _stages(model: nn.Module) -> dict[int, list[str]]:
    """Stage number -> sites: the number in the model's own names, else counted from 1 by resolution."""
    sites = list(dict.fromkeys(_units("", model)))
    stages: dict[int, list[str]] = {}
    for site in sites:
        if numbered := STAGE_NAME.search(site):
            stages.setdefault(int(numbered[1]), []).append(site)
    if not stages:
        for trunk in _trunks("", model):
            number = dict(trunk)
            for site in sites:
                holder = site if site in number else next((p for p in _parents(site) if p in number), None)
                if holder is not None:
                    stages.setdefault(number[holder], []).append(site)
    return dict(sorted(stages.items()))


def _trunks(name: str, module: nn.Module) -> Iterator[list[tuple[str, int]]]:
    """Yields the layers' stage numbers for each chain that lowers the resolution at least three times."""
    if _children_in_order(name, module) is None:
        for child_name, child in module.named_children():
            yield from _trunks(_join(name, child_name), child)
        return
    layers = list(_flatten(name, module))
    if sum(_downsamples(layer) for _, layer in layers) >= 3:
        number, numbers = 1, []
        for index, (layer_name, layer) in enumerate(layers):
            number += index > 0 and _downsamples(layer)
            numbers.append((layer_name, number))
        yield numbers


def _flatten(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    children = _children_in_order(name, module)
    if children is None:
        yield name, module
    else:
        for child_name, child in children:
            yield from _flatten(child_name, child)


def _children_in_order(name: str, module: nn.Module) -> list[tuple[str, nn.Module]] | None:
    paths = ("*",) if runs_in_order(module) else _lookup(RUNS_IN_ORDER, module)
    if paths is None:
        return None
    if paths == ("*",):
        return [(_join(name, child_name), child) for child_name, child in module.named_children()]
    return [(_join(name, path), module.get_submodule(path)) for path in paths]


def _downsamples(layer: nn.Module) -> bool:
    # MobileNet marks the blocks that would have a stride were they not dilated.
    return getattr(layer, "_is_cn", False) or any(
        isinstance(m, (nn.Conv2d, *_POOLS)) and m.stride not in (1, (1, 1)) for m in layer.modules()
    )


def _is_norm_or_activation(module: nn.Module) -> bool:
    # Identity: a norm that was fused into its convolution.
    known = isinstance(module, (*_NORMS, *_ACTIVATIONS, nn.Identity))
    return known or _key(module, {"torchvision.ops.misc.FrozenBatchNorm2d"}) is not None


def _matches(model: nn.Module, names: dict[str, nn.Module | None], where: Where) -> list[str]:
    """The names that a pattern or filter selects."""
    if callable(where):
        found = [
            name for name, module in names.items() if name and module is not None and where(name, module)
        ]
        if not found:
            raise InputError(f"the filter selects none of the {len(names)} modules of {type(model).__name__}")
        return found
    found = [name for name in names if name and _fits(where, name)]
    if not found:
        near = difflib.get_close_matches(where, names, n=3, cutoff=0.4)
        hint = f"; the nearest names are {', '.join(near)}" if near else ""
        raise InputError(f"at={where!r} matches no module of {type(model).__name__}{hint}")
    return found


def _unknown(model: nn.Module, preset: str, why: str) -> InputError:
    examples = [name for name, module in walk(model) if isinstance(module, nn.Conv2d)]
    return InputError(
        f"at={preset!r}: {why} for {type(model).__name__}; name the sites by a pattern"
        + (f" such as {examples[-1]!r}" if examples else "")
        + " or by a filter (name, module) -> bool"
    )


def _last_layer(name: str, module: nn.Module | None) -> str:
    """The child whose output a Sequential returns, so that nothing has to be added to the Sequential."""
    while module is not None and runs_in_order(module) and len(module):
        child_name, module = list(module.named_children())[-1]
        name = _join(name, child_name)
    return name


def _fits(pattern: str, name: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\*", r"[^.]+"), name) is not None


def _lookup(table: dict[str, T], module: nn.Module) -> T | None:
    key = _key(module, table)
    return None if key is None else table[key]


def _key(module: nn.Module, table: Iterable[str]) -> str | None:
    for cls in type(module).__mro__:
        key = f"{cls.__module__.removeprefix('torchvision.models.')}.{cls.__qualname__}"
        if key in table:
            return key
    return None


def _join(parent: str, child: str) -> str:
    return f"{parent}.{child}" if parent and child else parent or child


def _parents(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
