"""``DropBlock2d`` and the table of regularizers by name."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from dropblock_det.errors import InputError
from dropblock_det.ops.dropblock import check_arguments, check_p, drop_block2d
from dropblock_det.ops.reference import BlockSize, block_sides


class DropBlock2d(nn.Module):
    """:func:`drop_block2d` as a layer, without parameters, buffers or state-dict keys.

    Setting ``layer.p`` changes the drop probability between steps, without recompilation under
    ``torch.compile``.

    Args:
        p: drop probability in [0, 1].
        block_size: side of the dropped block, at least 1, or its height and width.
        per_channel: one mask per channel, or one for all channels of a sample.
        calibration: ``"paper"`` or ``"exact"``.

    Raises:
        InputError: an argument is out of range.
    """

    def __init__(
        self, p: float = 0.1, block_size: BlockSize = 7, per_channel: bool = True, calibration: str = "paper"
    ) -> None:
        super().__init__()
        check_arguments(p, block_size, per_channel, calibration)
        height, width = block_sides(block_size)  # Python's integers, also where NumPy's were given
        self.block_size = height if height == width else (height, width)
        self.per_channel = per_channel
        self.calibration = calibration
        self._p = float(p)
        # Compiled code and CUDA graphs read this tensor, so that they don't depend on the number. Not a
        # buffer, which would be a key or, when not persistent, a placeholder in exported programs.
        self._p_tensor = self._p_on(torch.get_default_device())

    @property
    def p(self) -> float:
        """The drop probability."""
        return self._p

    @p.setter
    def p(self, value: float) -> None:
        check_p(value)
        if value != self._p:
            self._p = float(value)
            if _changed is None:
                self._p_tensor.fill_(self._p)
            else:
                _changed[self] = None

    def forward(self, x: Tensor) -> Tensor:
        """Applies DropBlock in training mode.

        Args:
            x: ``(N, C, H, W)``, floating point.

        Returns:
            A tensor like ``x``; in eval mode, or eagerly with ``p == 0``, ``x`` itself.
        """
        if isinstance(x, fx.Proxy) and x.tracer.root is not self:
            # A symbolic trace calls the layer, as it does torch.nn's, and so follows p and train().
            return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x,), {})
        p: float | Tensor = self._p
        compiling = torch.compiler.is_compiling()
        if self.training and (compiling or (isinstance(x, Tensor) and x.is_cuda)):
            # A layer without parameters may never have been moved. A graph that is being captured can't move
            # it, so the call that warms up does.
            if self._p_tensor.device != x.device:
                self._p_tensor = self._p_tensor.to(x.device) if compiling else self._p_on(x.device)
            if compiling or torch.cuda.is_current_stream_capturing():
                p = self._p_tensor  # what is recorded now runs again later, when p may be another
        return drop_block2d(x, p, self.block_size, self.training, self.per_channel, self.calibration)

    def _p_on(self, device: torch.device) -> Tensor:
        # Not on the meta device, which would lose the value, and no inference tensor, which can't be set.
        with torch.inference_mode(False):
            device = torch.device("cpu") if device.type == "meta" else device
            return torch.tensor(self._p, dtype=torch.float32, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DropBlock2d":
        super()._apply(fn, recurse)
        # Follows the device of .to() and its like; .half() and to_empty() must not change the value.
        self._p_tensor = self._p_on(fn(self._p_tensor).device)
        return self

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return (
            f"p={self.p:g}, block_size={self.block_size}, per_channel={self.per_channel},"
            f" calibration={self.calibration!r}"
        )


_changed: dict[DropBlock2d, None] | None = None  # inside changing_many


@contextmanager
def changing_many() -> Iterator[None]:
    """Many layers' ``p`` may change inside: a GPU then takes two launches for all, not one for each."""
    global _changed
    _changed = {}
    try:
        yield
    finally:
        layers, _changed = _changed, None
        if layers:
            torch._foreach_zero_([layer._p_tensor for layer in layers])
            torch._foreach_add_([layer._p_tensor for layer in layers], [layer.p for layer in layers])


def _stochastic_depth(p: float, **dropblock: Any) -> nn.Module:
    from torchvision.ops import StochasticDepth  # here, not above: the other regularizers need torch alone

    return StochasticDepth(p, mode="row")


REGULARIZERS: dict[str, Callable[..., nn.Module]] = {
    "none": lambda p, **dropblock: nn.Identity(),
    "dropout": lambda p, **dropblock: nn.Dropout(p),
    "spatial_dropout": lambda p, **dropblock: nn.Dropout2d(p),
    "dropblock": DropBlock2d,
    "stochastic_depth": _stochastic_depth,
}
"""Factories by name, all called as ``factory(p, block_size=..., per_channel=..., calibration=...)``.

``stochastic_depth`` drops whole samples; it belongs at the ends of residual branches, ``at="residual"``.
"""


def make_regularizer(
    name: str, p: float, block_size: BlockSize = 7, per_channel: bool = True, calibration: str = "paper"
) -> nn.Module:
    """Builds the regularizer of a name in :data:`REGULARIZERS`.

    Args:
        name: one of them; ``none`` is the identity.
        p: drop probability in [0, 1].
        block_size: of DropBlock; the others ignore it, like the two below.
        per_channel: as for :class:`DropBlock2d`.
        calibration: as for :class:`DropBlock2d`.

    Raises:
        InputError: the name is unknown or an argument is out of range.
    """
    if not isinstance(name, str) or name not in REGULARIZERS:
        raise InputError(f"regularizer must be one of {', '.join(REGULARIZERS)}, not {name!r}")
    check_arguments(p, block_size, per_channel, calibration)
    return REGULARIZERS[name](p, block_size=block_size, per_channel=per_channel, calibration=calibration)
