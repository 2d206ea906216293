"""Where regularizers go: a model and ``at`` in, dotted site names out. Nothing here changes a model.

A *site* is a module whose output is regularized, or an attribute that a block keeps at ``None`` on an
identity skip. A preset takes all units that it stands for or refuses: nothing is left out in silence.
"""

import difflib
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import TypeGuard

from torch import nn

from dropblock_det.errors import InputError
from dropblock_det.inject.backbones import (
    Backbone,
    Gap,
    block_of,
    find_backbones,
    join,
    joins_input,
    last_layer,
    parents,
    units,
    walk,
    within,
)
from dropblock_det.inject.blocks import (
    HEADS,
    PYRAMIDS,
    TWIN_BACKBONES,
    find_key,
    is_norm_or_activation,
    is_pooling,
    look_up,
)

Where = str | Callable[[str, nn.Module], bool]
"""A preset, a dotted pattern (``*`` = one name segment), or a filter ``(name, module) -> bool``."""

At = Where | Iterable[Where] | Mapping[str, float]
"""One or several of these; or each with a factor on ``p``."""


def find_sites(model: nn.Module, at: At) -> dict[str, float]:
    """Names the sites that ``at`` selects, in the order in which the model lists its modules.

    Args:
        model: Any module; networks are recognised wherever they are nested in it.
        at: A preset, a dotted pattern in which ``*`` is one segment, a filter ``(name, module) -> bool``, a
            list of these, or a mapping of presets and patterns to factors on ``p``. The presets are
            ``"paper"`` (every conv-norm-activation unit and every skip in the last two stages of the
            backbone), ``"paper_groups"`` (the same with the authors' factors: a quarter in the last but one),
            ``"stageN"`` (one stage), ``"residual"`` (the end of each residual branch), ``"fpn"`` (outputs of
            the feature pyramid), ``"head"`` (hidden units of detection and segmentation heads) and ``"pool"``
            (every pooling that lowers the resolution). ``"encoder:paper"`` is ``"paper"`` in the module named
            ``encoder``: of several backbones one has to be chosen.

    Returns:
        Distinct dotted names, each with its factor on ``p`` (1 where none is given). An ``nn.Sequential`` is
        resolved to its last layer, whose output it returns.

    Raises:
        InputError: Nothing matches, a preset meets what it does not understand, two factors for one site, or
            one match lies inside another (a residual block's sum and the units of its branch may be sites
            together).
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    names = dict(walk(model))
    chosen: dict[str, float] = {}
    for where, factor in _entries(at):
        preset = None if callable(where) else _preset(model, where)
        if preset is None:
            preset = {last_layer(name, names[name]): 1.0 for name in _matches(model, names, where)}
        for site, own_factor in preset.items():
            if chosen.setdefault(site, factor * own_factor) != factor * own_factor:
                raise InputError(
                    f"at gives {site} the factors {chosen[site]:g} and {factor * own_factor:g}: give one"
                )
    found = [name for name in names if name in chosen]
    if not found:
        raise InputError("at is empty: give a preset, a dotted pattern or a filter (name, module) -> bool")
    for inner in found:
        for outer in parents(inner):
            if outer in chosen and not joins_input(names[outer]):
                raise InputError(f"at selects {inner} and {outer}, which contains it: select one of them")
    # A module with two names is one site; a slot has no module and only one name.
    first = {id(names[name]) if names[name] is not None else name: name for name in reversed(found)}
    return {name: chosen[name] for name in found if name in first.values()}


def _entries(at: At) -> list[tuple[Where, float]]:
    """What ``at`` lists, each with its factor."""
    if _is_where(at):
        return [(at, 1.0)]
    if isinstance(at, bytes) or not isinstance(at, Iterable):
        raise InputError(f"at must be a preset, a pattern, a filter, or several of these, not {at!r}")
    factors = dict(at) if isinstance(at, Mapping) else dict.fromkeys(at, 1.0)
    for where, factor in factors.items():
        if not _is_where(where):
            raise InputError(
                f"at: got {where!r}, give a preset, a pattern or a filter (name, module) -> bool"
            )
        if not isinstance(factor, Real) or not 0 <= float(factor) < math.inf:
            raise InputError(f"at: the factor of {where!r} must be a number of at least 0, not {factor!r}")
    return list(factors.items())


def _is_where(value: object) -> TypeGuard[Where]:
    return isinstance(value, str) or (callable(value) and not isinstance(value, nn.Module))


def _paper(model: nn.Module) -> dict[str, float]:
    """Every unit and every skip of the last two stages."""
    backbones = _backbones(model, "paper")
    return {
        site: 1.0
        for b in backbones
        for number in b.last_two
        for site in _checked(model, "paper", b.stages[number])
    }


def _paper_groups(model: nn.Module) -> dict[str, float]:
    """The same with ``p / 4**(4 - g)`` in group g of 4, as in the authors' code."""
    return {
        site: 4.0 ** (number - max(backbone.stages))
        for backbone in _backbones(model, "paper_groups")
        for number in backbone.last_two
        for site in _checked(model, "paper_groups", backbone.stages[number])
    }


def _stage(model: nn.Module, number: str) -> dict[str, float]:
    """Every unit and every skip of one stage."""
    at, n = f"stage{number}", int(number)
    backbones = _backbones(model, at)
    for backbone in backbones:
        if n not in backbone.stages:
            raise _refuse(model, at, f"the stages are {', '.join(map(str, backbone.stages))}")
    return {site: 1.0 for backbone in backbones for site in _checked(model, at, backbone.stages[n])}


def _residual(model: nn.Module) -> dict[str, float]:
    """The end of each residual branch in the backbone, before the sum: where stochastic depth goes."""
    backbones = _backbones(model, "residual")
    names = [(name, module) for name, module in walk(model) if module is not None]
    sites = {}
    for backbone in backbones:
        for units_of_stage in backbone.stages.values():
            _checked(model, "residual", units_of_stage)
        holders = [holder for holders in backbone.holders.values() for holder in holders]
        for name, module in names:
            if any(within(name, holder) for holder in holders) and (branch := _branch(name, module)):
                sites[branch] = 1.0
    if not sites:
        raise _refuse(model, "residual", "there is no residual branch")
    return sites


def _branch(name: str, module: nn.Module) -> str:
    block = block_of(module)
    if not block or not block.branch or not (block.skip or block.joins_input(module)):
        return ""
    return last_layer(join(name, block.branch), module.get_submodule(block.branch))


def _pyramid(model: nn.Module) -> dict[str, float]:
    """The outputs of feature pyramids."""
    return {
        last_layer(site, layer): 1.0
        for at, pyramid in walk(model)
        if pyramid is not None
        for path in look_up(PYRAMIDS, pyramid) or ()
        for site, layer in walk(pyramid, at)
        if _fits(join(at, path), site)
    }


def _head(model: nn.Module) -> dict[str, float]:
    """The hidden units of heads."""
    heads = [(at, module) for at, module in walk(model) if module is not None and find_key(module, HEADS)]
    return dict.fromkeys(_checked(model, "head", [s for at, module in heads for s in units(at, module)]), 1.0)


def _pool(model: nn.Module) -> dict[str, float]:
    """Every pooling that lowers the resolution."""
    return {name: 1.0 for name, module in walk(model) if module is not None and is_pooling(module)}


PRESETS: dict[str, Callable[..., dict[str, float]]] = {
    "paper": _paper,
    "paper_groups": _paper_groups,
    r"stage(\d+)": _stage,
    "residual": _residual,
    "fpn": _pyramid,
    "head": _head,
    "pool": _pool,
}
"""Pattern of the name -> what maps a network, and the pattern's groups, to sites with factors on ``p``."""


def _preset(model: nn.Module, where: str) -> dict[str, float] | None:
    """The sites of a preset, or ``None`` where the name is not a preset's."""
    scope, colon, preset = where.rpartition(":")
    for pattern, find in PRESETS.items():
        if match := re.fullmatch(pattern, preset):
            names = dict(walk(model)) if scope else {"": model}
            part = names.get(scope)
            if part is None:
                raise InputError(
                    f"at={where!r}: {scope} is no module of {type(model).__name__}{_near(scope, names)}"
                )
            sites = find(part, *match.groups())
            if not sites:
                raise _refuse(part, preset, "nothing of that kind was found")
            return {join(scope, site): factor for site, factor in sites.items()}
    if colon:
        presets = ", ".join(re.sub(r"\(.*\)", "N", pattern) for pattern in PRESETS)
        raise InputError(f"at={where!r}: {preset!r} is no preset; there are {presets}")
    return None


def _backbones(model: nn.Module, preset: str) -> list[Backbone]:
    """The backbone that a preset is for."""
    found = find_backbones(model)
    if not found:
        raise _refuse(model, preset, "no stages are known")
    if len(found) > 1 and not _are_twins(model, found):
        named = ", ".join(b.name or type(model).__name__ for b in found)
        choice = max(found, key=lambda b: len(b.name)).name
        raise InputError(
            f"at={preset!r}: {type(model).__name__} has several backbones, {named}: choose, such as"
            f" at='{choice}:{preset}'"
        )
    return found


def _are_twins(model: nn.Module, backbones: list[Backbone]) -> bool:
    whole = [at for at, module in walk(model) if module is not None and find_key(module, TWIN_BACKBONES)]
    return any(all(within(backbone.name, at) for backbone in backbones) for at in whole)


def _checked(model: nn.Module, preset: str, sites: list[str | Gap]) -> list[str]:
    """Returns the sites; refuses them where one is not understood."""
    for gap in sites:
        if isinstance(gap, Gap):
            raise _refuse(model, preset, f"{gap.name} is not understood ({gap.why})", gap.name)
    return [site for site in sites if isinstance(site, str)]


def _refuse(model: nn.Module, preset: str, why: str, place: str = "") -> InputError:
    pattern = _example(model, place)
    return InputError(
        f"at={preset!r}: {why} for {type(model).__name__}; name the sites by a pattern"
        + (f" such as {pattern!r}" if pattern else "")
        + " or by a filter (name, module) -> bool"
    )


def _example(model: nn.Module, place: str) -> str:
    """A pattern of convolutions deep in a part of a network, but not of those that predict."""
    modules = {name: module for name, module in walk(model) if module is not None}
    leaves = [
        name for name, module in modules.items() if not module._modules or is_norm_or_activation(module)
    ]
    normed = {name for name, after in itertools.pairwise(leaves) if is_norm_or_activation(modules[after])}
    convolutions = [n for n in leaves if isinstance(modules[n], nn.Conv2d) and within(n, place)]
    if not convolutions:
        return ""
    # Of the convolutions with a norm or activation those larger than 1x1, which gates and classifiers are.
    large = [n for n in convolutions if modules[n].kernel_size != (1, 1)]
    name = next(group for group in ([n for n in large if n in normed], large, convolutions) if group)[-1]
    pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
    fitting = [module for other, module in modules.items() if _fits(pattern, other)]
    return pattern if all(isinstance(module, nn.Conv2d) for module in fitting) else name


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
        raise InputError(f"at={where!r} matches no module of {type(model).__name__}{_near(where, names)}")
    return found


def _near(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, filter(None, names), n=3, cutoff=0.4)
    return f"; the nearest names are {', '.join(near)}" if near else ""


def _fits(pattern: str, name: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\*", r"[^.]+"), name) is not None
