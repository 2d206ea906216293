"""Gradients of dropping: ``y = x * mask * scale`` is linear in ``x``, so backward applies the same mask."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def differentiable(
    drop: Callable[..., tuple[Tensor, ...]], apply: Callable[..., Tensor], numbers: int
) -> Callable[..., Tensor]:
    """Makes dropping and applying a mask one function of ``x``, differentiable any number of times.

    By autograd functions, not by autograd registered for the operators, because that one gives no gradient
    to ``torch.func`` and lets forward-mode differentiation lose the tangent in silence; here it raises.

    Args:
        drop: ``(x, *inputs) -> (y, *mask)``.
        apply: ``(x, *mask, *numbers) -> y`` for that mask.
        numbers: how many of the last inputs of ``drop`` are the last of ``apply`` too.

    Returns:
        ``(x, *inputs) -> y``.
    """

    class Drop(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Any) -> tuple[Tensor, ...]:
            if not isinstance(inputs[0], Tensor):
                # Dynamo of torch 2.11 where it thinks that no gradient is wanted: it gives a context all the
                # same. Under torch.func it is mistaken; what raises here is run without compilation.
                if not isinstance(torch._C._functorch.peek_interpreter_stack(), type(None)):
                    raise RuntimeError("torch 2.11 does not compile torch.func transforms of DropBlock")
                inputs = inputs[1:]
            return drop(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            mask = output[1:]
            ctx.mark_non_differentiable(*mask)
            ctx.save_for_backward(*mask)
            ctx.none, ctx.numbers = (None,) * (len(inputs) - 1), inputs[-numbers:]

        @staticmethod
        def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
            return again(grad, *ctx.saved_tensors, *ctx.numbers), *ctx.none

    class Again(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x: Tensor, *inputs: Any) -> Tensor:
            return apply(x, *inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            ctx.save_for_backward(*inputs[1:-numbers])
            ctx.none, ctx.numbers = (None,) * (len(inputs) - 1), inputs[-numbers:]

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            return again(grad, *ctx.saved_tensors, *ctx.numbers), *ctx.none

    functions: tuple[Any, ...] = (Drop, Again)
    for function in functions:
        # PyTorch asks for the signature at every call, and finding it out takes longer than a small map.
        function.forward.__signature__ = inspect.signature(function.forward)

    def first(x: Tensor, *inputs: Any) -> Tensor:
        return Drop.apply(x, *inputs)[0]

    def again(grad: Tensor, *inputs: Any) -> Tensor:
        # Compiled graphs have no second derivative (Dynamo of torch 2.11 traces no function in a backward).
        # Neither has an ordinary backward, where a function costs more than the kernel it launches.
        once = torch.compiler.is_compiling() or not torch.is_grad_enabled()
        return (apply if once else Again.apply)(grad, *inputs)

    return first
