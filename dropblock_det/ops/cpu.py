"""The fast CPU path: one draw per seed, one scaled copy, and zeros written where the blocks are.

No mask is kept: both operators are pure functions of a seed that is drawn outside, by PyTorch's generator,
and backward draws the same blocks again. So compiling, recomputing under activation checkpointing and
reseeding behave as for ``F.dropout``.

A mask is thought of as flat memory of ``(planes, H, W, inner)``: ``(N*C, H, W, 1)`` for a contiguous map and
``(N, H, W, C)`` for a channels_last one. A block is then the same few offsets from its corner everywhere.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dropblock_det.ops.gradients import differentiable
from dropblock_det.ops.reference import block_and_grid, seed_probability

# Share of seeds above which one draw per position is faster than one logarithm per seed.
DENSE = 0.25
PIECE = 1 << 23  # elements


def draw_seeds(count: int, gamma: float, generator: torch.Generator) -> Tensor:
    """Successes of ``count`` Bernoulli(gamma) trials: their sorted indices, float64.

    Mostly at one draw per success: the gap from a success to the next is geometric, which is the floor of an
    exponential variable, plus one.
    """
    if gamma > DENSE:
        return (torch.rand(count, generator=generator) < gamma).nonzero().view(-1).double()
    if gamma == 0:
        return torch.empty(0, dtype=torch.float64)
    found, last = [], -1.0
    while last < count:
        expected = (count - 1 - last) * gamma
        draws = int(expected + 5 * math.sqrt(expected)) + 16
        uniform = torch.rand(draws, dtype=torch.float64, generator=generator)
        gaps = uniform.neg_().log1p_().mul_(1 / math.log1p(-gamma)).floor_().add_(1)
        found.append(gaps.cumsum_(0).add_(last))
        last = found[-1][-1].item()
    seeds = torch.cat(found) if len(found) > 1 else found[0]
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


def count_dropped(corners: Tensor, shape: Sequence[int], block_size: int) -> int:
    """How many elements of the mask the blocks cover, counted in pieces that stay in the caches."""
    planes, *plane = shape
    size = math.prod(plane)
    step = max(1, PIECE // size)
    starts = torch.arange(0, planes + step, step) * size
    bounds = torch.searchsorted(corners, starts).tolist()
    dropped = 0
    for i, (begin, end) in enumerate(itertools.pairwise(bounds)):
        piece = (min(step, planes - i * step), *plane)
        dropped += int(
            mask_from_corners(corners[begin:end] - i * step * size, piece, block_size).count_nonzero()
        )
    return dropped


torch.library.define(
    "dropblock_det::drop_seed",
    "(Tensor x, Tensor p, Tensor seed, bool exact, int block_size, bool per_channel, bool channels_last)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "dropblock_det::apply_seed",
    "(Tensor x, Tensor seed, Tensor gamma, Tensor scale,"
    " int block_size, bool per_channel, bool channels_last) -> Tensor",
)


@torch.library.impl("dropblock_det::drop_seed", "default")
def drop_seed(
    x: Tensor,
    p: Tensor,
    seed: Tensor,
    exact: bool,
    block_size: int,
    per_channel: bool,
    channels_last: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``x * mask / kept share`` for a new mask, and what :func:`apply_seed` needs to know of the mask.

    Args:
        x: ``(N, C, H, W)``.
        p: 0-dim drop probability.
        seed: 0-dim int64, stands for the mask.
        exact: whether the calibration is ``"exact"``.
        block_size: side of the block.
        per_channel: whether the mask has the channels of ``x`` or one for all.
        channels_last: whether the mask, and so the result, is in that memory format.

    Returns:
        The result; the seed, 0-dim int64; gamma and the scale, 0-dim float64.
    """
    shape = mask_shape(x, per_channel, channels_last)
    calibration = "exact" if exact else "paper"
    gamma = seed_probability(min(max(p.item(), 0.0), 1.0), block_size, *shape[1:3], calibration)
    corners = draw_corners(gamma, int(seed.item()), shape, block_size)
    elements = math.prod(shape)
    scale = elements / max(elements - count_dropped(corners, shape, block_size), 1)
    y = scaled_and_filled(x, scale, corners, block_size, per_channel, channels_last)
    return y, seed.clone(), torch.tensor(gamma, dtype=torch.float64), torch.tensor(scale, dtype=torch.float64)


@torch.library.impl("dropblock_det::apply_seed", "default")
def apply_seed(
    x: Tensor,
    seed: Tensor,
    gamma: Tensor,
    scale: Tensor,
    block_size: int,
    per_channel: bool,
    channels_last: bool,
) -> Tensor:
    """``x * mask / kept share`` for the mask of an earlier :func:`drop_seed`."""
    shape = mask_shape(x, per_channel, channels_last)
    corners = draw_corners(gamma.item(), int(seed.item()), shape, block_size)
    return scaled_and_filled(x, scale.item(), corners, block_size, per_channel, channels_last)


@torch.library.register_fake("dropblock_det::drop_seed")
def _(x: Tensor, p: Tensor, seed: Tensor, *numbers: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=memory_format(bool(numbers[-1])))
    gamma, scale = (x.new_empty((), dtype=torch.float64) for _ in range(2))
    return y, torch.empty_like(seed), gamma, scale


@torch.library.register_fake("dropblock_det::apply_seed")
def _(x: Tensor, *mask_and_numbers: Tensor | int) -> Tensor:
    return torch.empty_like(x, memory_format=memory_format(bool(mask_and_numbers[-1])))


def scaled_and_filled(
    x: Tensor, scale: float, corners: Tensor, block_size: int, per_channel: bool, channels_last: bool
) -> Tensor:
    """``x`` times ``scale``, a Python number that no dtype rounds, with zeros in the blocks."""
    shape = mask_shape(x, per_channel, channels_last)
    y = torch.empty_like(x, memory_format=memory_format(channels_last))
    torch.mul(x, scale, out=y)
    if per_channel:
        flat = (y.permute(0, 2, 3, 1) if channels_last else y).view(-1)
        fill_blocks(flat, corners, shape, block_size, 0)
        return y
    n, _, height, width = x.shape
    return y.masked_fill_(mask_from_corners(corners, shape, block_size).view(n, 1, height, width), 0)


def memory_format(channels_last: bool) -> torch.memory_format:
    """The format as an argument of PyTorch's functions."""
    return torch.channels_last if channels_last else torch.contiguous_format


def mask_shape(x: Tensor, per_channel: bool, channels_last: bool) -> tuple[int, int, int, int]:
    """Planes, H, W and inner of the mask of ``x``."""
    n, c, height, width = x.shape
    c = c if per_channel else 1
    return (n, height, width, c) if channels_last else (n * c, height, width, 1)


drop = differentiable(torch.ops.dropblock_det.drop_seed, torch.ops.dropblock_det.apply_seed, numbers=3)
