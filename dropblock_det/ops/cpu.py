"""The fast CPU path: one draw per corner, one scaled copy, and zeros written where the blocks are.

Where corners are dense (block size 1) it draws once per position instead, and a mask shared by all channels
is small: both are made as masks, which clear the bits of what they drop.

Backward applies the same corners, which are kept: 8 bytes each; for blocks of 7 at p = 0.1 that is a fiftieth
of a byte per element, and at most 2 bytes.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dropblock_det.ops.gradients import MaskedCopy
from dropblock_det.ops.layout import is_channels_last, mask_shape, memory_format
from dropblock_det.ops.reference import BlockSize, block_and_grid, clamped, corner_probability

# Share of corners above which one draw per position is faster than one logarithm per corner.
DENSE = 0.25
# Elements that are scaled and then filled before the next ones are. Smaller pieces stay in faster caches, but
# each operation shares its work among threads and waits for all of them: with a million elements, and other
# processes busy on the cores, these waits took several times as long as the work.
PIECE = 1 << 23
CACHED = 1 << 23  # bytes up to which writing row after row is faster than block after block
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes per element


def successes(count: int, gamma: float, generator: torch.Generator) -> NDArray[np.int64]:
    """Successes of ``count`` Bernoulli(gamma) trials: their sorted indices.

    At about one draw per success: the gap from a success to the next is geometric, which is an exponential
    variable rounded up. In NumPy, which does not share such short work among threads.
    """
    if gamma == 0:
        return np.empty(0, np.int64)
    found, last = [], -1.0
    while last < count:
        expected = (count - 1 - last) * gamma
        draws = int(expected + 5 * math.sqrt(expected)) + 16
        uniform = torch.rand(draws, dtype=torch.float64, device="cpu", generator=generator).numpy()
        with np.errstate(divide="ignore"):  # of a 0 the gap is infinite; below 1: no gap is 0
            gaps = np.ceil(np.log(uniform) / math.log1p(-gamma))
        found.append(np.cumsum(gaps) + last)
        last = found[-1][-1]
    indices = np.concatenate(found)
    return indices[: np.searchsorted(indices, count)].astype(np.int64)


def draw_dropped(gamma: float, seed: int, shape: Sequence[int], block_size: BlockSize, dense: bool) -> Tensor:
    """What is dropped of a mask of ``shape`` (planes, H, W, inner).

    Returns:
        Offsets of the blocks' top-left corners in the flat mask, int64, sorted; if ``dense``, or where these
        would be too many, the mask itself, bool, True where dropped.
    """
    planes, height, width, inner = shape
    kh, kw, grid_h, grid_w = block_and_grid(height, width, block_size)
    generator = torch.Generator().manual_seed(seed)
    if gamma > DENSE:
        grid = (planes, grid_h, grid_w, inner)
        corners = torch.rand(grid, dtype=torch.float32, device="cpu", generator=generator) < gamma
        return widened(widened(corners, 1, kh), 2, kw)
    index = successes(planes * grid_h * grid_w * inner, gamma, generator)
    # From the index among the positions where a block fits to the offset in the map: every row and plane
    # before it adds its positions where none fits.
    row = index // (grid_w * inner)
    index += row * ((width - grid_w) * inner) + row // grid_h * ((height - grid_h) * width * inner)
    offsets = torch.from_numpy(index)
    if dense:
        return fill_blocks(
            torch.zeros(shape, dtype=torch.bool, device="cpu"), offsets, shape, block_size, True
        )
    return offsets


def widened(corners: Tensor, dim: int, k: int) -> Tensor:
    """``corners`` and the ``k - 1`` positions after each along ``dim``, which grows by as many."""
    dropped = corners.new_zeros([n + k - 1 if i == dim else n for i, n in enumerate(corners.shape)])
    dropped.narrow(dim, 0, corners.shape[dim]).copy_(corners)
    reach = 1
    while reach < k:  # what covers r positions, ored with itself s <= r further on, covers r + s
        step = min(reach, k - reach)
        size = dropped.shape[dim] - step
        dropped.narrow(dim, step, size).logical_or_(dropped.narrow(dim, 0, size).clone())
        reach += step
    return dropped


def fill_blocks(
    memory: Tensor, corners: Tensor, shape: Sequence[int], block_size: BlockSize, value: float
) -> Tensor:
    """Writes ``value`` into the blocks at ``corners``; ``memory`` is whole planes of the mask."""
    _, height, width, inner = shape
    kh, kw, _, _ = block_and_grid(height, width, block_size)
    last = ((kh - 1) * width + kw - 1) * inner  # from a block's first element to its last
    blocks = memory.as_strided((memory.numel() - last, kh, kw), (1, width * inner, inner))
    # Blocks share memory with one another. That is safe: every write is of the same value. All are written in
    # one call: each call shares its work among threads, and waits for them.
    if memory.nbytes > CACHED:
        blocks.index_fill_(0, corners, value)  # block after block, once through the memory
    else:
        blocks.transpose(0, 1).index_fill_(1, corners, value)  # the first row of all blocks, then the second
    return memory


def pieces(corners: Tensor, shape: Sequence[int]) -> Iterator[tuple[int, int, Tensor]]:
    """Cuts flat memory between planes: where a piece begins and ends, and the corners, counted from there."""
    planes, *plane = shape
    size = math.prod(plane)
    bounds = [*range(0, planes * size, max(1, PIECE // size) * size), planes * size]
    if len(bounds) == 2:  # a small map is spared the calls below
        yield *bounds, corners
        return
    inside = np.searchsorted(corners.numpy(), bounds).tolist()
    for (begin, end), (first, last) in zip(pairwise(bounds), pairwise(inside), strict=True):
        yield begin, end, corners[first:last] - begin


def count_dropped(mask: Tensor, shape: Sequence[int], block_size: BlockSize) -> int:
    """How many elements are dropped by what ``draw_dropped`` returned for this ``shape``."""
    if mask.dtype == torch.bool:
        return count_true(mask.view(-1))
    count, memory = 0, torch.empty(0, dtype=torch.bool, device="cpu")
    for begin, end, corners in pieces(mask, shape):
        memory = memory[: end - begin] if begin else memory.new_empty(end)  # the first piece is the largest
        count += count_true(fill_blocks(memory.zero_(), corners, shape, block_size, True))
    return count


def count_true(memory: Tensor) -> int:
    """``memory.count_nonzero()`` for flat bools, in a tenth of its time.

    Eight bytes make an integer, and adding 255 of them carries nothing from one byte into the next. So every
    byte of the sums is a count of its own.
    """
    integers = len(memory) // (255 * 8)
    whole = 255 * 8 * integers
    sums = memory[:whole].view(torch.int64).view(255, integers).sum(0)
    return int(sums.view(torch.uint8).sum() + memory[whole:].sum())


def apply_mask(x: Tensor, mask: Tensor, scale: float, block_size: BlockSize, channels_last: bool) -> Tensor:
    """``x`` times ``scale``, a Python number that no dtype rounds, and 0 where ``draw_dropped`` drops."""
    x = x.contiguous(memory_format=memory_format(channels_last))
    y = torch.empty_like(x, memory_format=memory_format(channels_last))
    # In the order of memory: (N, H, W, C) or (N, C, H, W).
    source, result = (t.permute(0, 2, 3, 1) if channels_last else t for t in (x, y))
    if mask.dtype != torch.bool:
        source, result, shape = source.view(-1), result.view(-1), mask_shape(x, True, channels_last)
        for begin, end, corners in pieces(mask, shape):
            torch.mul(source[begin:end], scale, out=result[begin:end])
            fill_blocks(result[begin:end], corners, shape, block_size, 0)
        return y
    n, _, height, width = x.shape
    dropped = mask.view(n, height, width, -1) if channels_last else mask.view(n, -1, height, width)
    bits = BITS[x.element_size()]
    samples = max(1, PIECE // x[0].numel())
    for some in (slice(i, i + samples) for i in range(0, n, samples)):
        torch.mul(source[some], scale, out=result[some])
        # And with -1 keeps, and with 0 drops, also what is inf or nan.
        result[some].view(bits).bitwise_and_(dropped[some].to(bits).sub_(1))
    return y


def drop(x: Tensor, p: float | Tensor, block_size: BlockSize, calibration: str, per_channel: bool) -> Tensor:
    """``x * mask / kept share`` for a new mask."""
    channels_last = is_channels_last(x)
    shape = mask_shape(x, per_channel, channels_last)
    gamma = corner_probability(clamped(p), block_size, *shape[1:3], calibration)
    dropped = draw_dropped(
        gamma, int(torch.randint(2**62, (), device="cpu")), shape, block_size, dense=not per_channel
    )
    elements = math.prod(shape)
    scale = elements / max(elements - count_dropped(dropped, shape, block_size), 1)
    apply = partial(apply_mask, scale=scale, block_size=block_size, channels_last=channels_last)
    return MaskedCopy.apply(x, apply, dropped)


@torch.library.custom_op("dropblock_det::draw_mask", mutates_args=())
def draw_mask(
    p: Tensor,
    seed: Tensor,
    shape: Sequence[int],
    block_size: Sequence[int],
    calibration: str,
    channels_last: bool,
) -> tuple[Tensor, Tensor]:
    """Draws a mask.

    Args:
        p: 0-dim drop probability.
        seed: 0-dim int64, stands for the mask.
        shape: of the mask, ``(N, C or 1, H, W)``.
        block_size: height and width of the block.
        calibration: ``"paper"`` or ``"exact"``.
        channels_last: whether the mask is in that memory format.

    Returns:
        The mask, bool, True where kept; how many it keeps, 0-dim int64.
    """
    n, c, height, width = shape
    flat = (n, height, width, c) if channels_last else (n * c, height, width, 1)
    gamma = corner_probability(clamped(p), block_size, height, width, calibration)
    dropped = draw_dropped(gamma, int(seed), flat, block_size, dense=True)
    kept = dropped.numel() - count_dropped(dropped, flat, block_size)
    mask = dropped.logical_not_().view((n, height, width, c) if channels_last else (n, c, height, width))
    return mask.permute(0, 3, 1, 2) if channels_last else mask, torch.tensor(kept, device="cpu")


@draw_mask.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    p, seed, shape, _, _, channels_last = arguments  # draw_mask's; torch gives them by position
    mask = p.new_empty(shape, dtype=torch.bool).contiguous(memory_format=memory_format(channels_last))
    return mask, torch.empty_like(seed)
