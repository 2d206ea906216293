"""How a mask lies in memory.

A mask of ``(N, C, H, W)`` is flat memory of ``(planes, H, W, inner)``: ``(N*C, H, W, 1)`` for a contiguous
map and ``(N, H, W, C)`` for a channels_last one. So a block is the same few offsets from its corner
everywhere.
"""

import torch
from torch import Tensor


def memory_format(channels_last: bool) -> torch.memory_format:
    """The format as an argument of PyTorch's functions."""
    return torch.channels_last if channels_last else torch.contiguous_format


def mask_shape(x: Tensor, per_channel: bool, channels_last: bool) -> tuple[int, int, int, int]:
    """Planes, H, W and inner of the mask of ``x``."""
    n, c, height, width = x.shape
    c = c if per_channel else 1
    return (n, height, width, c) if channels_last else (n * c, height, width, 1)


def is_channels_last(x: Tensor) -> bool:
    """Whether the result for ``x`` is in that memory format; what is both counts as contiguous."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
