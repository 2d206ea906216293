"""``regularize_``: puts regularizers into a model in place, and takes them out again."""

import itertools
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from torch import nn
from torch.jit import ScriptModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from dropblock_det.errors import InputError
from dropblock_det.inject.active import keep_on
from dropblock_det.inject.backbones import walk
from dropblock_det.inject.coverage import Coverage, measure_coverage
from dropblock_det.inject.layout import find_layouts
from dropblock_det.inject.placement import At, find_sites
from dropblock_det.inject.regularized import (
    Regularized,
    Skip,
    Use,
    change_class,
    class_before_parametrization,
    regularized,
)
from dropblock_det.layers import changing_many
from dropblock_det.ops.dropblock import check_p


def regularize_(model: nn.Module, make: Callable[[], nn.Module], at: At = "paper") -> "RegularizerHandle":
    """Puts a regularizer behind each site that ``at`` selects. Changes ``model`` in place.

    State-dict keys, parameters and eval outputs stay those of the stock model. Everything is checked first,
    so that after an error the model is untouched.

    Args:
        model: A torchvision model, or any module that holds one (a LightningModule, a DDP wrapper).
        make: Called once per site, returns a new regularizer: ``lambda: DropBlock2d(p=0.1, block_size=7)``,
            or any module without parameters or buffers that maps a tensor to one of its shape; called in
            training mode only.
        at: A preset, a dotted pattern, a filter, a list of these, or a mapping of presets and patterns to
            factors on ``p``, see :func:`~dropblock_det.inject.placement.find_sites`. ``DropBlock2d`` and
            ``nn.Dropout2d`` need sites with ``(N, C, H, W)`` outputs: others are refused here where they are
            known, else at the first forward.

    Returns:
        The handle that lists the sites, sets ``p`` and removes the regularizers; also a context manager.

    Raises:
        InputError: No match, a match inside another, a preset that meets what it does not understand, a site
            that is regularized already or that cannot be, or ``make`` returns something unfit for the site.
    """
    return install(model, find_sites(model, at), make)


def install(model: nn.Module, sites: dict[str, float], make: Callable[[], nn.Module]) -> "RegularizerHandle":
    """As :func:`regularize_`, at sites that :func:`~dropblock_det.inject.placement.find_sites` has named."""
    modules = dict(walk(model))
    for site in sites:
        _check_site(site, modules)
    regularizers = {site: _check_regularizer(make()) for site in sites}
    if len({id(regularizer) for regularizer in regularizers.values()}) < len(sites):
        raise InputError("make returned the same module twice: it must build a new one on each call")
    regularizer: Any
    for site, layout in find_layouts(modules, regularizers).items():
        regularizer = regularizers[site]
        regularizer._use = Use(site, sites[site], layout)
        if sites[site] != 1:
            regularizer.p = regularizer._use.scaled(p_of(site, regularizer))
    for site, regularizer in regularizers.items():
        module = modules[site]
        if module is None:
            module = Skip()
            parent, _, slot = site.rpartition(".")
            setattr(model.get_submodule(parent), slot, module)
            module.train(model.get_submodule(parent).training)
        near = next(
            itertools.chain(module.parameters(), module.buffers(), model.parameters(), model.buffers()), None
        )
        if near is not None and not near.is_meta:
            regularizer.to(near.device)
        change_class(module, regularized)
        # A batch norm may be in eval mode only to freeze its statistics (see Regularized.eval).
        block = model.get_submodule(site.rpartition(".")[0]) if isinstance(module, _BatchNorm) else module
        module.regularizer = regularizer.train(block.training)
    return RegularizerHandle(model, tuple(sites))


def handle_of(model: nn.Module) -> "RegularizerHandle":
    """The handle of a model that was copied, unpickled or converted after it was regularized.

    Raises:
        InputError: Nothing in ``model`` is regularized.
    """
    sites = tuple(name for name, module in model.named_modules() if isinstance(module, Regularized))
    if not sites:
        raise InputError(
            f"nothing in {type(model).__name__} is regularized: call regularize_(model, make) first"
        )
    return RegularizerHandle(model, sites)


@dataclass(eq=False, repr=False)
class RegularizerHandle:
    """The regularizers in a model. Sites are kept by name: layers may be converted in the meantime."""

    model: nn.Module
    sites: tuple[str, ...]
    _looked_for_idle: bool = field(default=False, init=False)

    @property
    def coverage(self) -> list[Coverage]:
        """How many of the convolutions have a regularizer beside them, for each stage that has a site."""
        return measure_coverage(self.model, self.sites)

    @property
    def factors(self) -> dict[str, float]:
        """Each site's factor on ``p``: what :func:`install` takes."""
        return {site: self._site(site).regularizer._use.factor for site in self.sites}

    @property
    def idle_sites(self) -> tuple[str, ...]:
        """The sites that have not run in training mode yet; for good, where a network never calls a layer."""
        return tuple(site for site in self.sites if not self._site(site).regularizer._use.ran)

    def warn_of_idle_sites(self) -> None:
        """Warns, once, of sites that did not run. Called after the first training step, also by ``set_p``."""
        idle = () if self._looked_for_idle else self.idle_sites
        self._looked_for_idle = True
        if idle:
            names = ", ".join(idle[:5]) + (", ..." if len(idle) > 5 else "")
            warnings.warn(
                f"{len(idle)} of {len(self.sites)} regularized sites did not run in the first training step:"
                f" nothing is regularized at {names}",
                stacklevel=3,
            )

    def set_p(self, p: float) -> None:
        """Sets the drop probability of every regularizer; what a schedule calls before a step.

        Args:
            p: In [0, 1]. A site to which ``at`` gave a factor gets the product.

        Raises:
            InputError: ``p`` is no such number, a product is over 1, or a regularizer has no ``p``. Then all
                keep theirs.
        """
        values = self._each_p(p)
        before = [(regularizer, regularizer.p) for regularizer, _ in values]
        with changing_many():
            try:
                for regularizer, value in values:
                    regularizer.p = value
            except BaseException:
                for regularizer, value in before:
                    regularizer.p = value
                raise
        if not self._looked_for_idle and len(self.idle_sites) < len(self.sites):
            self.warn_of_idle_sites()

    def active(self, p: float | None = None) -> AbstractContextManager[None]:
        """Within ``with handle.active():`` the model is in eval mode, but its regularizers are on.

        So batch norms rest and every forward draws new masks: Monte Carlo samples of the network. On leaving,
        every module has its mode and ``p`` again, also after an exception. Blocks may be nested, and several
        threads may be in one; the ``p`` given last holds for all.

        Args:
            p: Drop probability meanwhile, as for :meth:`set_p`; by default what it is.

        Raises:
            InputError: As for :meth:`set_p`.
        """
        values = (
            [(self._site(site).regularizer, None) for site in self.sites] if p is None else self._each_p(p)
        )
        return keep_on(self.model, values)

    def remove(self) -> None:
        """Gives the stock model back. A second call does nothing."""
        modules = {site: self._site(site) for site in self.sites}
        for site, module in modules.items():
            cls = class_before_parametrization(module)
            if cls is not regularized(module._stock_class):
                raise InputError(f"{site} was wrapped as {cls.__name__} later: undo that first")
        for site, module in modules.items():
            del module.regularizer
            change_class(module, lambda cls: cls._stock_class)
            if isinstance(module, Skip):
                slot = site.rpartition(".")[2]  # the block itself: by name one may get a wrapper around it
                block = next(m for m in self.model.modules() if m._modules.get(slot) is module)
                delattr(block, slot)
                setattr(block, slot, None)
        self.sites = ()

    def _each_p(self, p: float) -> list[tuple[Any, float]]:
        check_p(p)
        regularizers: list[tuple[str, Any]] = [(site, self._site(site).regularizer) for site in self.sites]
        for site, regularizer in regularizers:
            p_of(site, regularizer)
        return [(regularizer, regularizer._use.scaled(p)) for _, regularizer in regularizers]

    def _site(self, name: str) -> Any:
        try:
            module: Any = self.model.get_submodule(name)
            module.regularizer._use, module._stock_class  # noqa: B018
        except AttributeError as error:
            raise InputError(f"{name} was replaced after regularize_: nothing regularizes it now") from error
        return module

    def __enter__(self) -> "RegularizerHandle":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        name = type(self.model).__name__
        if not self.sites:
            return f"<{name}, not regularized>"
        kinds = dict.fromkeys(repr(self._site(site).regularizer) for site in self.sites)
        where = self.sites[0]
        if len(self.sites) > 1:
            where = f"{len(self.sites)} sites: {self.sites[0]} ... {self.sites[-1]}"
        covered = [f"{c.covered} of {c.convolutions} convolutions of {c.stage}" for c in self.coverage]
        return f"<{name} with {', '.join(kinds)} at {'; '.join([where, *covered])}>"


def _check_site(name: str, modules: dict[str, nn.Module | None]) -> None:
    module, parent = modules[name], modules[name.rpartition(".")[0]]
    reason = None
    if isinstance(module, Regularized):
        reason = "is regularized already: remove() that first"
    elif isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        reason = f"is a {type(module).__name__}, which runs its children: name one of them, or what follows"
    elif isinstance(module, (nn.ParameterList, nn.ParameterDict)):
        reason = "holds parameters and has no output"
    elif isinstance(module, ScriptModule):
        reason = "is a TorchScript module: regularize the model before it is scripted or traced"
    elif isinstance(module, LazyModuleMixin):
        reason = "is lazy and changes its class at its first batch: run one batch first"
    elif isinstance(module, nn.MultiheadAttention):
        reason = "returns a pair, and a regularizer takes one tensor: name a layer after it"
    elif isinstance(parent, nn.MultiheadAttention):
        reason = (
            "is never called, nn.MultiheadAttention only reads its weight: name a layer after the attention"
        )
    elif module is not None and "forward" in module.__dict__:
        reason = "has a forward patched onto the instance: regularize the model before it is wrapped"
    elif hasattr(module, "regularizer"):
        reason = "has a `regularizer` of its own, where ours would go: name a layer in it or after it"
    if reason:
        raise InputError(f"{name} {reason}")


def _check_regularizer(regularizer: nn.Module) -> nn.Module:
    if not isinstance(regularizer, nn.Module):
        raise InputError(f"make must return a torch.nn.Module, not {type(regularizer).__name__}")
    if [*regularizer.parameters(), *regularizer.buffers()]:
        raise InputError(
            f"make returned a {type(regularizer).__name__} with parameters or buffers: use one without"
        )
    return regularizer


def p_of(site: str, regularizer: Any) -> float:
    """Returns the drop probability of the regularizer at a site.

    Raises:
        InputError: It has none.
    """
    if not isinstance(getattr(regularizer, "p", None), Real):
        raise InputError(f"the {type(regularizer).__name__} at {site} has no drop probability `p` to set")
    return float(regularizer.p)
