"""What a site's module becomes: its own class, with a regularizer after its forward.

A site's module changes its class, as in PyTorch's ``fully_shard`` and ``parametrize``: a ``BatchNorm2d``
becomes a ``RegularizedBatchNorm2d`` whose forward ends in ``self.regularizer(...)``. The module itself, its
parameters and its state-dict keys stay; all that walks, copies, moves or saves modules sees the regularizer.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.utils.parametrize import is_parametrized

from dropblock_det.errors import InputError
from dropblock_det.inject.active import is_kept_on
from dropblock_det.inject.layout import Layout


@dataclass
class Use:
    """What a regularizer has to know of its site; its attribute, so that copies take it along."""

    site: str
    factor: float
    layout: Layout
    ran: bool = False

    def scaled(self, p: float) -> float:
        """The drop probability here where all sites are given ``p``."""
        if p * self.factor > 1:
            raise InputError(f"p={p:g} times the factor {self.factor:g} at {self.site} is over 1: give less")
        return p * self.factor


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
        use: Any = self.regularizer._use
        use.layout.check(use.site, y)
        use.ran = True
        return self.regularizer(y)

    def train(self, mode: bool = True) -> Any:
        """Sets the mode, as always, and leaves a regularizer on that ``handle.active()`` keeps on."""
        super().train(mode)
        if is_kept_on(self.regularizer):
            self.regularizer.train()
        return self

    def eval(self) -> Any:
        """Of a batch norm: stops its running statistics, as people freeze them, and not its regularizer.

        ``eval()`` of any module around it comes here as ``train(False)`` and stops the regularizer too.
        """
        if not isinstance(self, _BatchNorm):
            return super().eval()
        self.training = False
        return self

    def __prepare_scriptable__(self) -> Any:
        """What ``torch.jit.script`` asks of each module first."""
        raise InputError("torch.jit.script cannot take a regularized model: call remove() first")

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
        ours = name == "regularizer" and hasattr(child, "_use")
        if ours and isinstance(module, _BatchNorm) and not isinstance(module, Regularized):
            change_class(module, regularized)

    register_module_module_registration_hook(hook)


def class_before_parametrization(module: nn.Module) -> Any:
    """A module's class, without the one that ``torch.nn.utils.parametrize`` put on top."""
    return type(module).__bases__[0] if is_parametrized(module) else type(module)


def change_class(module: nn.Module, change: Callable[[Any], Any]) -> None:
    """Changes a module's class; below the class that ``torch.nn.utils.parametrize`` put on top, if it did.

    That class holds the parametrized tensors' properties and is found again by its place on top.
    """
    cls = change(class_before_parametrization(module))
    if is_parametrized(module):
        cls = type(f"Parametrized{cls.__name__}", (cls,), dict(vars(type(module))))
    module.__class__ = cls
