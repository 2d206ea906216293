"""The backbones in a network, their stages, and the units in them."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from dropblock_det.inject.blocks import (
    BLOCKS,
    RUNS_IN_ORDER,
    STAGE_NAME,
    Block,
    children_of,
    has_convolution,
    has_known_forward,
    is_norm_or_activation,
    look_up,
    lowers_resolution,
    may_lie_within_a_unit,
    runs_in_order,
)
from dropblock_det.inject.tracing import NotUnderstoodError, has_empty_skip_slot, read_block


@dataclass(frozen=True)
class Gap:
    """A module that has convolutions and whose units are not known."""

    name: str
    why: str


@dataclass
class Backbone:
    """A part of a network that lowers the resolution stage by stage."""

    name: str
    holders: dict[int, list[str]]
    """Stage number -> the modules that make it up."""
    stages: dict[int, list[str | Gap]]
    """Stage number -> sites, and what is not understood."""

    @property
    def last_two(self) -> list[int]:
        """The numbers of the stages that the paper regularizes."""
        return list(self.stages)[-2:]


def block_of(module: nn.Module) -> Block | None:
    """What is known of a block: from the table or, where the forward is somebody else's, read from a trace.

    Returns:
        ``None`` for classes of torch and torchvision whose structure shows it all.

    Raises:
        NotUnderstoodError: The forward is somebody else's and cannot be followed.
    """
    if has_known_forward(module):
        return look_up(BLOCKS, module)
    return read_block(module) if has_convolution(module) else None


def walk(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module | None]]:
    """Yields ``(name, module)`` for a module and all below it, ``(name, None)`` for an identity skip's slot.

    A module with two names comes twice. What ``regularize_`` added is left out.
    """
    yield name, module
    for child_name, child in children_of(module):
        yield from walk(child, join(name, child_name))
    slot = _empty_skip_slot(module)
    if slot:
        yield join(name, slot), None


def _empty_skip_slot(module: nn.Module) -> str:
    try:
        block = block_of(module) if has_known_forward(module) or has_empty_skip_slot(module) else None
    except NotUnderstoodError:
        return ""
    return block.skip if block and block.skip and getattr(module, block.skip) is None else ""


def joins_input(module: nn.Module | None) -> bool:
    """Whether a block's own forward adds its input, so that its output is a site beside those in it."""
    try:
        block = None if module is None else block_of(module)
    except NotUnderstoodError:
        return False
    return module is not None and block is not None and block.joins_input(module)


def units(name: str, module: nn.Module) -> Iterator[str | Gap]:
    """Yields the ends of the conv-norm(-activation) units and the skips in a module."""
    if runs_in_order(module):
        yield from _units_in_order(name, module)
        return
    try:
        block = block_of(module)
    except NotUnderstoodError as why:
        yield Gap(name, f"{type(module).__name__}: {why}")
        return
    if block and block.units is not None:
        inside = [site for unit in block.units for site in _unit(name, unit, module)]
    else:
        inside = [
            site
            for child_name, child in children_of(module)
            if child_name != (block.skip if block else None)
            for site in units(join(name, child_name), child)
        ]
    joins = block is not None and block.joins_input(module)
    # The block's output stands in for its branch's last unit, which units from the table leave out already.
    listed = block is not None and block.units is not None and has_known_forward(module)
    if joins and not listed and inside and not isinstance(inside[-1], Gap):
        inside.pop()
    yield from inside
    if joins:
        yield name
    if block and block.skip:
        yield last_layer(join(name, block.skip), getattr(module, block.skip))


def _unit(name: str, unit: str, module: nn.Module) -> Iterator[str | Gap]:
    """A unit of a block by its child's name; a child that holds convolutions holds units."""
    child = module.get_submodule(unit)
    if unit and has_convolution(child) and not isinstance(child, nn.Conv2d):
        found = list(units(join(name, unit), child))
        yield from found or [Gap(join(name, unit), "its convolutions end in no unit of its own")]
    else:
        yield join(name, unit)


def _units_in_order(name: str, module: nn.Module) -> Iterator[str | Gap]:
    """A convolution opens a unit, the norms and activations that follow belong to it."""
    inside, end = False, None
    for child_name, child in children_of(module):
        site = join(name, child_name)
        if inside and is_norm_or_activation(child):
            end = site
            continue
        if inside and end is None and may_lie_within_a_unit(child):
            continue
        if end:
            yield end
        if inside and end is None and not has_known_forward(child):
            yield Gap(site, f"{type(child).__name__}: what follows a convolution is no norm or activation")
        inside, end = isinstance(child, nn.Conv2d), None
        if not inside:
            yield from units(site, child)
    if end:
        yield end


def find_backbones(model: nn.Module) -> list[Backbone]:
    """Finds the backbones: by stage numbers in names, else by chains that lower the resolution.

    Decoders whose modules bear stage numbers are none: they do not lower the resolution.
    """
    modules = {name: module for name, module in walk(model) if module is not None}
    chains = dict(_chains("", model))
    named: dict[str, dict[int, list[str]]] = {}
    for name, module in modules.items():
        found = STAGE_NAME.search(name) if isinstance(module, nn.Conv2d) else None
        if found:
            holder = name[: found.end()] + name[found.end() :].partition(".")[0]
            holders = named.setdefault(name[: found.start()], {}).setdefault(int(found[1]), [])
            if holder not in holders:
                holders.append(holder)
    others = [*named, *(chain for chain in chains if not _holds(chain, named))]

    def lowers(root: str) -> bool:
        """Whether it does so at least twice, without the layers of other backbones inside it."""
        inner = [other for other in others if other != root and within(other, root)]
        layers = [
            module
            for name, module in modules.items()
            if within(name, root) and not any(within(name, other) for other in inner) and not module._modules
        ]
        return sum(map(lowers_resolution, layers)) >= 2

    backbones = []
    for root, stages in named.items():
        if lowers(root):
            sites = {
                number: list(dict.fromkeys(s for holder in holders for s in units(holder, modules[holder])))
                for number, holders in sorted(stages.items())
            }
            backbones.append(Backbone(root, stages, sites))
    taken = [holder for b in backbones for holders in b.holders.values() for holder in holders]
    for root, numbers in chains.items():
        if not any(within(root, holder) or within(holder, root) for holder in taken):
            stages = {n: [at for at, number in numbers.items() if number == n] for n in numbers.values()}
            backbones.append(Backbone(root, stages, _stages_of_chain(root, modules[root], numbers)))
    # A backbone with two names is one.
    first = {id(modules[backbone.name]): backbone for backbone in reversed(backbones)}
    return [b for b in backbones if first[id(modules[b.name])] is b and any(b.stages.values())]


def _holds(chain: str, named: dict[str, dict[int, list[str]]]) -> bool:
    return any(within(h, chain) for stages in named.values() for holders in stages.values() for h in holders)


def _stages_of_chain(root: str, module: nn.Module, numbers: dict[str, int]) -> dict[int, list[str | Gap]]:
    stages: dict[int, list[str | Gap]] = {}
    for site in units(root, module):
        name = site.name if isinstance(site, Gap) else site
        holder = name if name in numbers else next((p for p in parents(name) if p in numbers), None)
        if holder is not None:
            stages.setdefault(numbers[holder], []).append(site)
    return dict(sorted(stages.items()))


def _chains(name: str, module: nn.Module) -> Iterator[tuple[str, dict[str, int]]]:
    """Yields the layers' stage numbers for each chain that lowers the resolution at least three times."""
    if _children_in_order(name, module) is not None:
        layers = list(_flatten(name, module))
        if sum(lowers_resolution(layer) for _, layer in layers) >= 3:
            number, numbers = 1, {}
            for index, (layer_name, layer) in enumerate(layers):
                number += index > 0 and lowers_resolution(layer)
                numbers[layer_name] = number
            yield name, numbers
            return
    for child_name, child in children_of(module):
        yield from _chains(join(name, child_name), child)


def _flatten(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    children = _children_in_order(name, module)
    if children is None:
        yield name, module
    else:
        for child_name, child in children:
            yield from _flatten(child_name, child)


def _children_in_order(name: str, module: nn.Module) -> list[tuple[str, nn.Module]] | None:
    paths = ("*",) if runs_in_order(module) else look_up(RUNS_IN_ORDER, module)
    if paths is None:
        return None
    if paths == ("*",):
        return [(join(name, child_name), child) for child_name, child in children_of(module)]
    return [(join(name, path), module.get_submodule(path)) for path in paths]


def last_layer(name: str, module: nn.Module | None) -> str:
    """The child whose output a Sequential returns, so that nothing has to be added to the Sequential."""
    while module is not None and runs_in_order(module) and len(module):
        child_name, module = children_of(module)[-1]
        name = join(name, child_name)
    return name


def join(parent: str, child: str) -> str:
    """A dotted name."""
    return f"{parent}.{child}" if parent and child else parent or child


def parents(name: str) -> Iterator[str]:
    """The names of all that a module lies in, from the inside out, without the root's empty one."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def within(name: str, outer: str) -> bool:
    """Whether a name is another's or lies in it."""
    return not outer or name == outer or name.startswith(f"{outer}.")
