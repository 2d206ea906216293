"""Gradients of dropping: ``y = x * mask * scale`` is linear in ``x``, so backward applies the same mask."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class MaskedCopy(torch.autograd.Function):
    """``apply_mask(x, *mask)``, a linear map that is its own transpose: differentiable any number of times.

    For ordinary eager calls only: compiled code and ``torch.func`` differentiate plain tensor code instead.
    Forward-mode differentiation is refused by PyTorch.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, apply_mask: Callable[..., Tensor], *mask: Tensor) -> Tensor:
        """``apply_mask`` holds the mask's numbers, ``mask`` its tensors."""
        ctx.apply_mask = apply_mask
        ctx.save_for_backward(*mask)
        return apply_mask(x, *mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The same mask, applied to the gradient."""
        mask = ctx.saved_tensors
        # A gradient that is not differentiated itself is spared the cost of an autograd function.
        if torch.is_grad_enabled():
            return MaskedCopy.apply(grad, ctx.apply_mask, *mask), None, *[None for _ in mask]
        return ctx.apply_mask(grad, *mask), None, *[None for _ in mask]
