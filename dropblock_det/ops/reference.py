"""The definition of DropBlock in plain PyTorch. Every fast path is tested against this file.

The input is ``(N, C, H, W)``. The block is ``kh x kw``, each side clipped to the map. The corner of a dropped
block is its top-left element (the paper's "seed"), so corners lie on a grid of
``(H - kh + 1) x (W - kw + 1)`` positions: every corner has room for its whole block.

A block size is an integer, the side of a square, or a pair ``(kh, kw)``.

Source: Ghiasi, Lin and Le, *DropBlock: A regularization method for convolutional networks*, 2018, section 3.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d, pad

from dropblock_det.errors import InputError
from dropblock_det.ops.layout import is_channels_last, memory_format

CALIBRATIONS = ("paper", "exact")
BlockSize = int | Sequence[int]


def clamped(p: float | Tensor) -> float:
    """The drop probability as a number in [0, 1]; it waits for the device where ``p`` is a tensor."""
    p = float(p)
    if math.isnan(p):
        raise InputError("p must be a number in [0, 1], not nan")
    return min(max(p, 0.0), 1.0)


def block_sides(block_size: BlockSize) -> tuple[int, int]:
    """Height and width of a block."""
    kh, kw = block_size if isinstance(block_size, (tuple, list)) else (block_size, block_size)
    return int(kh), int(kw)


def block_and_grid(height: int, width: int, block_size: BlockSize) -> tuple[int, int, int, int]:
    """The block clipped to the map and the grid of positions where it fits: ``kh, kw, grid_h, grid_w``."""
    kh, kw = block_sides(block_size)
    kh, kw = min(kh, height), min(kw, width)
    return kh, kw, height - kh + 1, width - kw + 1


def corner_probability(
    p: float, block_size: BlockSize, height: int, width: int, calibration: str = "paper"
) -> float:
    """The probability gamma that a position of the grid is a corner.

    Args:
        p: drop probability, in [0, 1].
        block_size: of the block, before it is clipped to the map.
        height: H of the map, at least 1.
        width: W of the map, at least 1.
        calibration: ``"paper"`` is the paper's ``p / (kh kw) * (H W) / (grid_h grid_w)``, clamped to 1;
            blocks overlap, so the share it drops is lower than ``p``. ``"exact"`` makes that share ``p``.
    """
    kh, kw, grid_h, grid_w = block_and_grid(height, width, block_size)
    if calibration == "paper":
        return min(1.0, p / (kh * kw) * (height * width) / (grid_h * grid_w))
    if not 0.0 < p < 1.0:
        return p
    # With t = -log(1 - gamma), the expected kept share is mean(exp(-n t)), n being the number of corners
    # whose block covers a position. Its logarithm is convex and falls from 0, so that Newton's method
    # started at t = 0 climbs to the root without passing it.
    t, target = 0.0, math.log1p(-p)
    for _ in range(100):
        kept = slope = 0.0
        for n, share in _cover(height, width, kh, kw).items():
            kept += share * math.exp(-n * t)
            slope += share * n * math.exp(-n * t)
        step = (math.log(kept) - target) * kept / slope
        t += step
        if step <= 1e-12 * t:
            break
    return -math.expm1(-t)


def expected_drop_share(gamma: float, block_size: BlockSize, height: int, width: int) -> float:
    """The exact expectation of the share of elements dropped, given the corners' probability."""
    kh, kw, _, _ = block_and_grid(height, width, block_size)
    cover = _cover(height, width, kh, kw).items()
    return min(1.0, sum(share * (1.0 - (1.0 - gamma) ** n) for n, share in cover))


def _cover(height: int, width: int, kh: int, kw: int) -> dict[int, float]:
    """How many corners can drop a position: ``{number of corners: share of the map's positions}``."""

    def axis(size: int, k: int) -> dict[int, int]:
        most = min(k, size - k + 1)
        return dict.fromkeys(range(1, most), 2) | {most: size - 2 * (most - 1)}

    cover: dict[int, float] = {}
    for nh, rows in axis(height, kh).items():
        for nw, columns in axis(width, kw).items():
            cover[nh * nw] = cover.get(nh * nw, 0.0) + rows * columns / (height * width)
    return cover


def draw_corners(x: Tensor, gamma: float, block_size: BlockSize, per_channel: bool = True) -> Tensor:
    """Independent Bernoulli(gamma) corners: bool ``(N, C or 1, grid_h, grid_w)`` on the device of ``x``."""
    n, c, h, w = x.shape
    _, _, grid_h, grid_w = block_and_grid(h, w, block_size)
    corners = torch.empty(n, c if per_channel else 1, grid_h, grid_w, dtype=torch.bool, device=x.device)
    return corners.bernoulli_(gamma)


def mask_from_corners(corners: Tensor, block_size: BlockSize, height: int, width: int) -> Tensor:
    """The mask, True where kept: bool ``(N, C or 1, H, W)``."""
    kh, kw, _, _ = block_and_grid(height, width, block_size)
    if corners.numel() == 0:
        return corners.new_ones(*corners.shape[:2], height, width)
    dropped = pad(corners.float(), (kw - 1, kw - 1, kh - 1, kh - 1))
    dropped = max_pool2d(max_pool2d(dropped, (kh, 1), stride=1), (1, kw), stride=1)
    return dropped == 0


def apply_mask(x: Tensor, mask: Tensor, kept: Tensor | None = None) -> Tensor:
    """``x * mask / kept share``, the share counted over the whole mask; zeros when nothing is kept.

    What is dropped is 0 also where ``x`` is inf or nan. The count is an integer and the scale at least
    float32, whatever the dtype of ``x``: in float16 the count would overflow above 65,504 elements.

    Args:
        x: ``(N, C, H, W)``.
        mask: bool ``(N, C or 1, H, W)``, True where kept.
        kept: how many elements the mask keeps, 0-dim int64, where it is known already.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    kept = mask.sum() if kept is None else kept
    scale = mask.numel() / kept.clamp(min=1).to(wide)
    return torch.where(mask, x.to(wide) * scale, 0).to(x.dtype)


def drop_block2d(x: Tensor, p: float, block_size: BlockSize, per_channel: bool, calibration: str) -> Tensor:
    """DropBlock of a checked input, in training mode."""
    height, width = x.shape[2:]
    gamma = corner_probability(p, block_size, height, width, calibration)
    mask = mask_from_corners(draw_corners(x, gamma, block_size, per_channel), block_size, height, width)
    mask = mask.contiguous(memory_format=memory_format(is_channels_last(x)))  # decides the result's
    return apply_mask(x, mask)
