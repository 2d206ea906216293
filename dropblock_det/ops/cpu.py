"""The fast CPU path: sparse seeds, a mask of one byte per element, and nothing slower than a few copies.

Both operators are pure functions: the random numbers follow from a seed which is drawn outside, by PyTorch's
generator. So compiling, recomputing under activation checkpointing and reseeding behave as for ``F.dropout``.

The mask is treated as flat memory of ``(planes, H, W, inner)``: ``(N*C, H, W, 1)`` for a contiguous map and
``(N, H, W, C)`` for a channels_last one. As every block fits into its plane, widening a seed to a block is to
OR the flat mask with copies of itself shifted by ``inner`` per column and by ``W * inner`` per row.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dropblock_det.ops.reference import block_and_grid, seed_probability

# Share of seeds above which one draw per position is faster than one logarithm per seed.
DENSE = 0.25


def draw_positions(count: int, gamma: float, generator: torch.Generator) -> Tensor:
    """Successes of ``count`` Bernoulli(gamma) trials: their sorted indices, float64, at one draw per success.

    The gap from a success to the next is geometric: the floor of an exponential variable, plus one.
    """
    rate = -math.log1p(-gamma)
    found, last = [], -1.0
    while last < count:
        expected = (count - 1 - last) * gamma
        draws = int(expected + 5 * math.sqrt(expected)) + 16
        uniform = torch.rand(draws, dtype=torch.float64, generator=generator)
        positions = uniform.neg_().log1p_().div_(-rate).floor_().add_(1).cumsum_(0).add_(last)
        found.append(positions)
        last = positions[-1].item()
    positions = torch.cat(found)
    return positions[: torch.searchsorted(positions, count)]


def draw_seeds(
    planes: int,
    height: int,
    width: int,
    inner: int,
    block_size: int,
    gamma: float,
    generator: torch.Generator,
) -> Tensor:
    """Seeds at their place in the map: uint8 ``(planes, H, W, inner)``, 1 for a seed."""
    _, _, grid_h, grid_w = block_and_grid(height, width, block_size)
    seeds = torch.zeros(planes, height, width, inner, dtype=torch.uint8)
    if gamma > DENSE:
        seeds[:, :grid_h, :grid_w] = torch.rand(planes, grid_h, grid_w, inner, generator=generator) < gamma
    elif gamma > 0:
        # From the index among the positions where a block fits to the index in the map: every row and plane
        # before it adds its positions where none fits. The half keeps the division of floats exact.
        index = draw_positions(planes * grid_h * grid_w * inner, gamma, generator)
        row = torch.div(index + 0.5, grid_w * inner).floor_()
        plane = torch.div(row + 0.5, grid_h).floor_()
        index += row.mul_((width - grid_w) * inner) + plane.mul_((height - grid_h) * width * inner)
        seeds.view(-1).index_fill_(0, index.long(), 1)
    return seeds


def spread(mask: Tensor, step: int, length: int) -> Tensor:
    """ORs a flat mask with itself shifted by ``step``, ``2 step``, ... ``(length - 1) step``, by doubling."""
    reach = 1
    while reach < length:
        shift = min(reach, length - reach)
        wider = mask.clone()
        torch.bitwise_or(mask[shift * step :], mask[: -shift * step], out=wider[shift * step :])
        mask, reach = wider, reach + shift
    return mask


def mask_from_seeds(seeds: Tensor, block_size: int) -> Tensor:
    """The mask of seeds at their place in the map: uint8 ``(planes, H, W, inner)``, 1 where kept."""
    _, height, width, inner = seeds.shape
    kh, kw, _, _ = block_and_grid(height, width, block_size)
    dropped = spread(spread(seeds.view(-1), inner, kw), width * inner, kh)
    return dropped.bitwise_xor_(1).view(seeds.shape)


@torch.library.custom_op("dropblock_det::draw_mask", mutates_args=())
def draw_mask(
    p: Tensor, seed: Tensor, shape: Sequence[int], block_size: int, exact: bool
) -> tuple[Tensor, Tensor]:
    """Draws the mask and counts what it keeps.

    Args:
        p: 0-dim drop probability.
        seed: int64, one element.
        shape: planes, H, W, inner.
        block_size: side of the block.
        exact: whether the calibration is ``"exact"``.

    Returns:
        The mask, uint8 of ``shape``, 1 where kept, and the number of elements kept, 0-dim int64.
    """
    planes, height, width, inner = shape
    calibration = "exact" if exact else "paper"
    gamma = seed_probability(min(max(p.item(), 0.0), 1.0), block_size, height, width, calibration)
    generator = torch.Generator().manual_seed(int(seed.item()))
    seeds = draw_seeds(planes, height, width, inner, block_size, gamma, generator)
    mask = mask_from_seeds(seeds, block_size)
    return mask, mask.count_nonzero()


@draw_mask.register_fake
def _(p: Tensor, seed: Tensor, shape: Sequence[int], block_size: int, exact: bool) -> tuple[Tensor, Tensor]:
    return p.new_empty(shape, dtype=torch.uint8), p.new_empty((), dtype=torch.int64)


@torch.library.custom_op("dropblock_det::apply_mask", mutates_args=())
def apply(x: Tensor, mask: Tensor, kept: Tensor) -> Tensor:
    """``x * mask / kept share``.

    Args:
        x: ``(N, C, H, W)``.
        mask: uint8 ``(N, C or 1, H, W)``, 1 where kept.
        kept: 0-dim int64, the number of ones.
    """
    factor = mask.to(x.dtype)
    # The product with 0 and 1 is exact; the scale is a Python number, which half precision does not round.
    y = factor.mul_(x) if factor.shape == x.shape else x * factor
    return y.mul_(mask.numel() / max(int(kept.item()), 1))


@apply.register_fake
def _(x: Tensor, mask: Tensor, kept: Tensor) -> Tensor:
    return torch.empty_like(mask, dtype=x.dtype) if mask.shape == x.shape else x * mask.to(x.dtype)


def flat_shape(x: Tensor, per_channel: bool) -> tuple[tuple[int, int, int, int], bool]:
    """Planes, H, W and inner of the mask in the memory order of ``x``, and whether it is channels_last."""
    n, c, height, width = x.shape
    c = c if per_channel else 1
    channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return (n, height, width, c) if channels_last else (n * c, height, width, 1), channels_last


def draw(x: Tensor, p: Tensor, block_size: int, per_channel: bool, calibration: str) -> tuple[Tensor, Tensor]:
    """Mask and count for :func:`apply`, the mask in the memory format of ``x``."""
    shape, channels_last = flat_shape(x, per_channel)
    seed = torch.randint(2**62, (), device=x.device)
    mask, kept = draw_mask(p, seed, shape, block_size, calibration == "exact")
    channels = x.shape[1] if per_channel else 1
    mask = mask.permute(0, 3, 1, 2) if channels_last else mask.view(-1, channels, *x.shape[2:])
    return mask, kept
