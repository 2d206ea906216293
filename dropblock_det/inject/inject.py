"""``regularize_``: puts regularizers into a model in place, and takes them out again.

A site's module changes its class, as in PyTorch's ``fully_shard`` and ``parametrize``: a ``BatchNorm2d``
becomes a ``RegularizedBatchNorm2d`` whose forward ends in ``self.regularizer(...)``. The module itself, its
parameters and its state-dict keys stay; all that walks, copies, moves or saves modules sees the regularizer.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import nn
from torch.fx import Proxy
from torch.jit import ScriptModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.module import register_module_module_registration_hook

from dropblock_det.errors import InputError
from dropblock_det.inject.placement import Where, find_sites, is_channels_last, walk
from dropblock_det.layers import DropBlock2d


def regularize_(
    model: nn.Module, make: Callable[[], nn.Module], at: Where | Iterable[Where] = "paper"
) -> "RegularizerHandle":
    """Puts a regularizer behind each site that ``at`` selects. Changes ``model`` in place.

    State-dict keys, parameters and eval outputs stay those of the stock model. Everything is checked first,
    so that after an error the model is untouched.

    Args:
        model: A torchvision model, or any module that holds one (a LightningModule, a DDP wrapper).
        make: Called once per site, returns a new regularizer: ``lambda: DropBlock2d(p=0.1, block_size=7)``,
            or any module without parameters or buffers that maps a tensor to one of its shape; called in
            training mode only.
        at: A preset, a dotted pattern, a filter or a list of these, see
            :func:`~dropblock_det.inject.placement.find_sites`. ``DropBlock2d`` and ``nn.Dropout2d`` need
            sites with ``(N, C, H, W)`` outputs. Those of torchvision's transformers that have others are
            refused; in networks that are not torchvision's, only ``nn.Linear`` and ``nn.LayerNorm`` are.

    Returns:
        The handle that lists the sites, sets ``p`` and removes the regularizers; also a context manager.

    Raises:
        InputError: No match, a match inside another, a site that is regularized already or that cannot be, or
            ``make`` returns something unfit for the site.
    """
    sites = find_sites(model, at)
    modules = dict(walk(model))
    for site in sites:
        _check_site(site, modules[site])
    regularizers = [_check_regularizer(make()) for _ in sites]
    if len({id(regularizer) for regularizer in regularizers}) < len(sites):
        raise InputError("make returned the same module twice: it must build a new one on each call")
    for site, regularizer in zip(sites, regularizers, strict=True):
        check_layout(site, modules, regularizer)
    for site, regularizer in zip(sites, regularizers, strict=True):
        module = modules[site]
        if module is None:
            module = Skip()
            parent, _, slot = site.rpartition(".")
            setattr(model.get_submodule(parent), slot, module)
            module.train(model.get_submodule(parent).training)
        near = next((t for m in (module, model) for t in (*m.parameters(), *m.buffers())), None)
        if near is not None and not near.is_meta:
            regularizer.to(near.device)
        stock_class: Any = type(module)
        module.__class__ = regularized(stock_class)
        # Of a batch norm whose statistics are frozen, see Regularized.eval, the block's mode tells more.
        block = model.get_submodule(site.rpartition(".")[0]) if isinstance(module, _BatchNorm) else module
        module.regularizer = regularizer.train(block.training)
    return RegularizerHandle(model, sites)


def check_layout(site: str, modules: dict[str, nn.Module | None], regularizer: nn.Module) -> None:
    """Refuses a regularizer of ``(N, C, H, W)`` maps at a site that is known to put out something else.

    Args:
        site: A name in ``modules``.
        modules: All of :func:`~dropblock_det.inject.placement.walk`.
        regularizer: What ``make`` returned for the site.

    Raises:
        InputError: The channels are the last dimension there.
    """
    if isinstance(regularizer, (DropBlock2d, nn.Dropout2d)) and is_channels_last(modules, site):
        raise InputError(
            f"{site} has its channels in the last dimension and {type(regularizer).__name__} needs"
            " (N, C, H, W): name another site, such as a convolution, or use nn.Dropout"
        )


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

    def set_p(self, p: float) -> None:
        """Sets the drop probability of every regularizer, in [0, 1]; what a schedule calls before a step."""
        if not 0 <= p <= 1:
            raise InputError(f"p must be between 0 and 1, not {p!r}")
        for site in self.sites:
            self._site(site).regularizer.p = p

    def remove(self) -> None:
        """Gives the stock model back. A second call does nothing."""
        modules = {site: self._site(site) for site in self.sites}
        for site, module in modules.items():
            if type(module) is not regularized(module._stock_class):
                raise InputError(f"{site} was wrapped as {type(module).__name__} later: undo that first")
        for site, module in modules.items():
            del module.regularizer
            module.__class__ = module._stock_class
            if isinstance(module, Skip):
                slot = site.rpartition(".")[2]  # the block itself: by name one may get a wrapper around it
                block = next(m for m in self.model.modules() if m._modules.get(slot) is module)
                delattr(block, slot)
                setattr(block, slot, None)
        self.sites = ()

    def _site(self, name: str) -> Any:
        try:
            module = self.model.get_submodule(name)
            module.regularizer, module._stock_class  # noqa: B018
        except AttributeError as error:
            raise InputError(f"{name} was replaced after regularize_: nothing regularizes it now") from error
        return module

    def __enter__(self) -> "RegularizerHandle":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        name = type(self.model).__name__
        if not self.sites:
            return f"<{name}, not regularized>"
        kinds = dict.fromkeys(repr(self._site(site).regularizer) for site in self.sites)
        where = self.sites[0]
        if len(self.sites) > 1:
            where = f"{len(self.sites)} sites: {self.sites[0]} ... {self.sites[-1]}"
        return f"<{name} with {', '.join(kinds)} at {where}>"


class Regularized(nn.Module):
    """Mixed in before a site's own class by :func:`regularized`."""

    regularizer: nn.Module
    _stock_class: type

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The stock forward, then, in training mode, the regularizer."""
        y = super().forward(*args, **kwargs)
        if not self.regularizer.training:
            return y
        if isinstance(y, Proxy):  # FX, as in create_feature_extractor, takes the regularizer as one node
            tracer: Any = y.tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self.regularizer), (y,), {})
        return self.regularizer(y)

    def eval(self) -> Any:
        """Of a batch norm: stops its running statistics, as people freeze them, and not its regularizer.

        ``eval()`` of any module around it comes here as ``train(False)`` and stops the regularizer too.
        """
        if not isinstance(self, _BatchNorm):
            return super().eval()
        self.training = False
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class exists in this process only: a copy or an unpickled module makes it anew.
        _, _, *state = tuple(super().__reduce_ex__(protocol))
        return _new_regularized, (self._stock_class,), *state


@functools.cache
def regularized(stock_class: Any) -> Any:
    """The class of regularized modules of a stock class, one per stock class."""
    _keep_through_batch_norm_conversions()
    # FX takes modules that say they are torch.nn's as leaves: a regularized one must stay what it was.
    namespace = {"__module__": stock_class.__module__, "_stock_class": stock_class}
    return type(f"Regularized{stock_class.__name__}", (Regularized, stock_class), namespace)


def _new_regularized(stock_class: type) -> Any:
    cls = regularized(stock_class)
    return cls.__new__(cls)


class Skip(nn.Identity):
    """Stands on an identity skip, where the block keeps ``None``."""


@functools.cache
def _keep_through_batch_norm_conversions() -> None:
    """Lets regularizers survive ``SyncBatchNorm.convert_sync_batchnorm`` and Lightning's way back from it.

    They build a new module for each batch norm and add the old one's children to it: a ``regularizer`` that
    arrives in a plain batch norm makes it a regularized one.
    """

    def hook(module: nn.Module, name: str, child: nn.Module | None) -> None:
        if name == "regularizer" and isinstance(module, _BatchNorm) and not isinstance(module, Regularized):
            stock_class: Any = type(module)
            module.__class__ = regularized(stock_class)

    register_module_module_registration_hook(hook)


def _check_site(name: str, module: nn.Module | None) -> None:
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
    elif module is not None and "forward" in module.__dict__:
        reason = "has a forward patched onto the instance: regularize the model before it is wrapped"
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
