"""The fast CPU path: one draw per seed, one scaled copy, and zeros written where the blocks are.

No mask is kept: both operators are pure functions of a seed that is drawn outside, by PyTorch's generator,
and backward draws the same blocks again. So compiling, recomputing under activation checkpointing and
reseeding behave as for ``F.dropout``.

A mask is thought of as flat memory of ``(planes, H, W, inner)``: ``(N*C, H, W, 1)`` for a contiguous map and
``(N, H, W, C)`` for a channels_last one. A block is then the same few offsets from its corner everywhere.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dropblock_det.ops.reference import block_and_grid, seed_probability
from dropblock_det.ops.self_adjoint import self_adjoint

# Share of seeds above which one draw per position is faster than one logarithm per seed.
DENSE = 0.25


def draw_seeds(count: int, gamma: float, generator: torch.Generator) -> Tensor:
    """Successes of ``count`` Bernoulli(gamma) trials: their sorted indices, float64.

    Mostly at one draw per success: the gap from a success to the next is geometric, which is the floor of an
    exponential variable, plus one.
    """
    if gamma > DENSE:
        return (torch.rand(count, generator=generator) < gamma).nonzero().view(-1).double()
    found, last = [torch.empty(0, dtype=torch.float64)], -1.0
    while gamma > 0 and last < count:
        expected = (count - 1 - last) * gamma
        draws = int(expected + 5 * math.sqrt(expected)) + 16
        uniform = torch.rand(draws, dtype=torch.float64, generator=generator)
        gaps = uniform.neg_().log1p_().mul_(1 / math.log1p(-gamma)).floor_().add_(1)
        found.append(gaps.cumsum_(0).add_(last))
        last = found[-1][-1].item()
    seeds = torch.cat(found)
    return seeds[: torch.searchsorted(seeds, count)]


def draw_corners(gamma: float, seed: int, shape: Sequence[int], block_size: int) -> Tensor:
    """Offsets of the blocks' top-left corners in the flat mask of ``shape``, int64, sorted."""
    planes, height, width, inner = shape
    _, _, grid_h, grid_w = block_and_grid(height, width, block_size)
    generator = torch.Generator().manual_seed(seed)
    corners = draw_seeds(planes * grid_h * grid_w * inner, gamma, generator)
    # From the index among the positions where a block fits to the offset in the map: every row and plane
    # before it adds its positions where none fits. The half keeps the floors of inexact products exact.
    row = corners.add(0.5).mul_(1 / (grid_w * inner)).floor_()
    corners.add_(row, alpha=(width - grid_w) * inner)
    plane = row.add_(0.5).mul_(1 / grid_h).floor_()
    return corners.add_(plane, alpha=(height - grid_h) * width * inner).long()


def fill_blocks(flat: Tensor, corners: Tensor, shape: Sequence[int], block_size: int, value: float) -> None:
    """Writes ``value`` into the blocks at ``corners``; ``flat`` is memory in the order of the mask."""
    _, height, width, inner = shape
    kh, kw, _, _ = block_and_grid(height, width, block_size)
    last = ((kh - 1) * width + kw - 1) * inner  # from a block's first element to its last
    blocks = flat.as_strided((flat.numel() - last, kh, kw), (1, width * inner, inner))
    # Blocks share memory with one another. That is safe: every write is of the same value.
    blocks.index_fill_(0, corners, value)


def mask_from_corners(corners: Tensor, shape: Sequence[int], block_size: int) -> Tensor:
    """The mask of ``shape`` (planes, H, W, inner), bool, True where dropped."""
    dropped = torch.zeros(math.prod(shape), dtype=torch.bool)
    fill_blocks(dropped, corners, shape, block_size, True)
    return dropped.view(*shape)


@torch.library.custom_op("dropblock_det::count_kept", mutates_args=())
def count_kept(
    p: Tensor, seed: Tensor, shape: Sequence[int], block_size: int, exact: bool
) -> tuple[Tensor, Tensor]:
    """What the scale needs to know of the mask that ``seed`` stands for.

    Args:
        p: 0-dim drop probability.
        seed: 0-dim int64.
        shape: planes, H, W, inner.
        block_size: side of the block.
        exact: whether the calibration is ``"exact"``.

    Returns:
        gamma, 0-dim float64, and the number of elements kept, 0-dim int64.
    """
    _, height, width, _ = shape
    calibration = "exact" if exact else "paper"
    gamma = seed_probability(min(max(p.item(), 0.0), 1.0), block_size, height, width, calibration)
    corners = draw_corners(gamma, int(seed.item()), shape, block_size)
    dropped = mask_from_corners(corners, shape, block_size).count_nonzero()
    return torch.tensor(gamma, dtype=torch.float64), math.prod(shape) - dropped


@count_kept.register_fake
def _(p: Tensor, seed: Tensor, shape: Sequence[int], block_size: int, exact: bool) -> tuple[Tensor, Tensor]:
    return p.new_empty((), dtype=torch.float64), p.new_empty((), dtype=torch.int64)


@torch.library.custom_op("dropblock_det::apply_seed", mutates_args=())
def apply_seed(
    x: Tensor,
    seed: Tensor,
    gamma: Tensor,
    kept: Tensor,
    block_size: int,
    per_channel: bool,
    channels_last: bool,
) -> Tensor:
    """``x * mask / kept share`` for the mask that ``seed`` stands for.

    Args:
        x: ``(N, C, H, W)``.
        seed: 0-dim int64.
        gamma: 0-dim float64, the seeds' probability.
        kept: 0-dim int64, the number of elements that the mask keeps.
        block_size: side of the block.
        per_channel: whether the mask has the channels of ``x`` or one for all.
        channels_last: whether the mask, and so the result, is in that memory format.
    """
    shape = mask_shape(x, per_channel, channels_last)
    corners = draw_corners(gamma.item(), int(seed.item()), shape, block_size)
    y = torch.empty_like(x, memory_format=memory_format(channels_last))
    # The scale is a Python number, which half precision does not round.
    torch.mul(x, math.prod(shape) / max(int(kept.item()), 1), out=y)
    if per_channel:
        fill_blocks(
            y.permute(0, 2, 3, 1).view(-1) if channels_last else y.view(-1), corners, shape, block_size, 0
        )
        return y
    n, _, height, width = x.shape
    return y.masked_fill_(mask_from_corners(corners, shape, block_size).view(n, 1, height, width), 0)


@apply_seed.register_fake
def _(
    x: Tensor,
    seed: Tensor,
    gamma: Tensor,
    kept: Tensor,
    block_size: int,
    per_channel: bool,
    channels_last: bool,
) -> Tensor:
    return torch.empty_like(x, memory_format=memory_format(channels_last))


def memory_format(channels_last: bool) -> torch.memory_format:
    """The format as an argument of PyTorch's functions."""
    return torch.channels_last if channels_last else torch.contiguous_format


def mask_shape(x: Tensor, per_channel: bool, channels_last: bool) -> tuple[int, int, int, int]:
    """Planes, H, W and inner of the mask of ``x``."""
    n, c, height, width = x.shape
    c = c if per_channel else 1
    return (n, height, width, c) if channels_last else (n * c, height, width, 1)


def is_channels_last(x: Tensor) -> bool:
    """Whether the mask of ``x`` is to lie in memory as channels_last."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


apply = self_adjoint(torch.ops.dropblock_det.apply_seed)


def draw(
    x: Tensor, p: Tensor, block_size: int, per_channel: bool, calibration: str
) -> tuple[Tensor | int | bool, ...]:
    """What ``apply`` takes after ``x``."""
    channels_last = is_channels_last(x)
    shape = mask_shape(x, per_channel, channels_last)
    seed = torch.randint(2**62, (), device=x.device)
    gamma, kept = count_kept(p, seed, shape, block_size, calibration == "exact")
    return seed, gamma, kept, block_size, per_channel, channels_last
