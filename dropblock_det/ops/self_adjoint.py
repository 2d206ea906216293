"""Gradients for operators that are linear in their input and their own adjoint, as scaling by a mask is."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def self_adjoint(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Makes ``operator(x, *tensors, *numbers)`` differentiable in ``x``, any number of times.

    By an autograd function, not by autograd registered for the operator, because that one gives no gradient
    to ``torch.func`` and lets forward-mode differentiation lose the tangent in silence; here it raises.
    """

    class SelfAdjoint(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x: Tensor, *state: Tensor | int) -> Tensor:
            return operator(x, *state)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            state = inputs[1:]
            tensors = [value for value in state if isinstance(value, Tensor)]
            ctx.save_for_backward(*tensors)
            ctx.numbers = state[len(tensors) :]

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            state = (*ctx.saved_tensors, *ctx.numbers)
            return apply(grad, *state), *[None for _ in state]

    # PyTorch asks for the signature at every call, and finding it out takes longer than a small map.
    SelfAdjoint.forward.__signature__ = inspect.signature(SelfAdjoint.forward)  # type: ignore[attr-defined]

    def apply(x: Tensor, *state: Tensor | int) -> Tensor:
        # torch 2.11 compiles such a function only where a gradient is wanted, and not in its own backward.
        if torch.compiler.is_compiling() and not (x.requires_grad and torch.is_grad_enabled()):
            return operator(x, *state)
        return SelfAdjoint.apply(x, *state)

    return apply
