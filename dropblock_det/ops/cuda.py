"""The GPU path: plans and launches the kernels of ``cuda_kernels.py``, where the design is explained.

Under ``TRITON_INTERPRET=1`` it runs on the CPU. Nothing is read back from the device. In eager code the
random seed travels as a number, and p may. Compiled code and captured graphs keep both in tensors, so that a
replay draws new masks and follows p.
"""

import math
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dropblock_det.ops import cuda_kernels as kernels
from dropblock_det.ops.gradients import MaskedCopy
from dropblock_det.ops.layout import is_channels_last, memory_format
from dropblock_det.ops.reference import BlockSize, block_and_grid

TILES = (512, 4096)  # the least and the most pixels that a program draws at a time, halo included
PARTS = 512  # the most programs that draw a mask, each with its part of the count
PIXELS = 128  # that a program copies of each of 32 channels

Key = tuple[object, ...]
compiled_kernels: dict[Key, Any] = {}


def launch(
    kernel: Any, variant: Key, programs: int, *arguments: object, warps: int = 4, **constants: object
) -> None:
    """Launches a kernel in half the time that Triton's ``kernel[grid](...)`` takes.

    Triton looks at all arguments at every launch, to find the compiled kernel for their types. Here
    ``variant`` names what these depend on, besides the constants.
    """
    if not isinstance(kernel, triton.runtime.JITFunction):  # in the interpreter
        kernel[(programs,)](*arguments, **constants)
        return
    key = (kernel.fn, torch.cuda.current_device(), *variant, *constants.values())
    compiled = compiled_kernels.get(key)
    if compiled is None:
        compiled = kernel.warmup(*arguments, grid=(programs,), num_warps=warps, **constants)
        compiled_kernels[key] = compiled
    compiled[programs, 1, 1](*arguments, *constants.values())


def drop(x: Tensor, p: float | Tensor, block_size: BlockSize, calibration: str, per_channel: bool) -> Tensor:
    """``x * mask / kept share`` for a new mask: two launches, and one more for the gradient."""
    n, c, height, width = x.shape
    shape = (n * c if per_channel else n, height, width)
    with torch.cuda.device_of(x):
        words, dropped = draw(p, new_seed(x.device), shape, block_size, calibration, x.device)
        apply = partial(apply_mask, per_channel=per_channel, channels_last=is_channels_last(x))
        return MaskedCopy.apply(x, apply, words, dropped)


def new_seed(device: torch.device) -> tuple[int | Tensor, int, int]:
    """What stands for a new mask: the device's seed, in two parts of 31 bits, and its generator's offset.

    The generator moves on, so reseeding, its states and checkpointing work as for PyTorch's own kernels.
    While a graph is captured, the offsets of its replays are unknown: there the device draws the seed.
    """
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        generator = torch.cuda.default_generators[device.index]
        seed, offset = generator.initial_seed(), generator.get_offset()
        generator.set_offset(offset + 4)  # PyTorch wants multiples of 4
        return seed & 0x7FFFFFFF, seed >> 31 & 0x7FFFFFFF, offset & 0x7FFFFFFF
    return torch.randint(2**62, (), device=device), 0, 0


@lru_cache
def unread(dtype: torch.dtype, device: torch.device) -> Tensor:
    """What stands in the place of a tensor p or seed that is a number.

    Never made under ``torch.compile``, where both are tensors: CUDA graph trees refuse memory that was taken
    while they record and is kept afterwards.
    """
    return torch.empty((), dtype=dtype, device=device)


@lru_cache(maxsize=1024)
def plan(height: int, width: int, block_size: BlockSize, exact: bool) -> tuple[int, int, int, int, int, bool]:
    """How masks of these maps are drawn: kh, kw, halo, TILE, ROWS, and whether one launch does."""
    kh, kw, grid_h, _ = block_and_grid(height, width, block_size)
    halo = (kh - 1) * width + kw - 1
    at_once = 2 * halo <= TILES[1]
    if not at_once:
        halo = 0
    tile = max(min(triton.next_power_of_2(4 * halo), TILES[1]), TILES[0])
    rows = triton.next_power_of_2(min(kh, grid_h)) if exact else 0
    return kh, kw, halo, tile, rows, at_once


def draw(
    p: float | Tensor,
    seed: tuple[int | Tensor, int, int],
    shape: tuple[int, int, int],
    block_size: BlockSize,
    calibration: str,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Draws a mask and counts what it drops.

    Args:
        p: drop probability; if not a number, a 0-dim float32 tensor on ``device``.
        seed: three numbers below 2**31; the first may be a 0-dim int64 tensor on ``device`` instead.
        shape: planes, H and W.
        block_size: of the block.
        calibration: ``"paper"`` or ``"exact"``.
        device: of the mask; it must be the current one.

    Returns:
        The mask, int32 ``(ceil(planes / 32), H, W)``, and the number of its set bits in parts, int32.
    """
    planes, height, width = shape
    kh, kw, halo, tile, rows, at_once = plan(height, width, block_size, calibration == "exact")
    tiles = -(-(-(-planes // 64) * height * width) // (tile - halo))
    programs = min(tiles, PARTS)
    words = torch.empty((planes + 31) // 32, height, width, dtype=torch.int32, device=device)
    dropped = torch.empty(programs, dtype=torch.int32, device=device)
    reach = (kh, kw) if at_once else (1, 1)
    # The same compiled kernel takes numbers and tensors, so a graph being captured finds it loaded.
    low, high, offset = seed
    launch(
        kernels.draw_mask, (), programs,
        *((-1.0, p) if isinstance(p, Tensor) else (float(p), unread(torch.float32, device))),
        *((-1, 0, low) if isinstance(low, Tensor) else (low, high, unread(torch.int64, device))), offset,
        words, dropped, planes, height, width, kh, kw, *reach, halo, tiles,
        ROWS=rows, TILE=tile, warps=min(max(tile // 128, 1), 16),
    )  # fmt: skip
    if not at_once:
        for step, length in ((1, kw), (width, kh)):
            narrow, words = words, torch.empty_like(words)
            launch(
                kernels.widen, (), programs, narrow, words, dropped, words.numel(), step, length, TILE=1024
            )
    return words, dropped


def apply_mask(x: Tensor, words: Tensor, dropped: Tensor, per_channel: bool, channels_last: bool) -> Tensor:
    """``x * mask / kept share``.

    Args:
        x: ``(N, C, H, W)``.
        words: the mask, see :func:`draw`.
        dropped: the number of elements that it drops, in parts.
        per_channel: whether the mask has the channels of ``x`` or one for all.
        channels_last: the memory format of the result.

    The device of ``x`` must be the current one, as it is wherever autograd calls this.
    """
    x = x.contiguous(memory_format=memory_format(channels_last))
    y = torch.empty_like(x)
    n, c, height, width = x.shape
    pixels = height * width
    programs = n * -(-c // 32) * -(-pixels // PIXELS)
    launch(
        kernels.scaled_copy, (x.dtype, x.data_ptr() % 16), programs,
        x, y, words, dropped, n, c, pixels, dropped.numel(),
        SHARED=not per_channel, CHANNELS_LAST=channels_last, PIXELS=PIXELS,
        VECTOR=math.gcd(c if channels_last else pixels, 16), PARTS=PARTS,
        INDEX=tl.int64 if programs * 32 * PIXELS >= 2**31 else tl.int32,
        WIDE=tl.float64 if x.dtype == torch.float64 else tl.float32,
    )  # fmt: skip
    return y


@torch.library.custom_op("dropblock_det::draw_words", mutates_args=())
def draw_words(
    p: Tensor, seed: Tensor, shape: Sequence[int], block_size: Sequence[int], calibration: str
) -> tuple[Tensor, Tensor]:
    """:func:`draw` as an operator with a whole count, 0-dim int64: for compiled code and ``torch.func``."""
    planes, height, width = shape
    with torch.cuda.device_of(p):
        words, dropped = draw(
            p, (seed, 0, 0), (planes, height, width), tuple(block_size), calibration, p.device
        )
        return words, dropped.sum()


@draw_words.register_fake
def _(
    p: Tensor, seed: Tensor, shape: Sequence[int], block_size: Sequence[int], calibration: str
) -> tuple[Tensor, Tensor]:
    planes, height, width = shape
    words = p.new_empty(((planes + 31) // 32, height, width), dtype=torch.int32)
    return words, p.new_empty((), dtype=torch.int64)


def draw_mask(
    p: Tensor,
    seed: Tensor,
    shape: Sequence[int],
    block_size: BlockSize,
    calibration: str,
    channels_last: bool,
) -> tuple[Tensor, Tensor]:
    """The mask as bool, True where kept, and how many it keeps; like the CPU path's operator.

    Only the packed words come from an operator: unpacking is fused into what uses the mask, and the words are
    what is kept for backward.
    """
    n, c, height, width = shape
    words, dropped = draw_words(p, seed, (n * c, height, width), block_size, calibration)
    bits = torch.arange(32, dtype=torch.int32, device=words.device)[:, None, None]
    mask = ((words[:, None] >> bits) & 1 == 0).flatten(0, 1)[: n * c].view(n, c, height, width)
    return mask.contiguous(memory_format=memory_format(channels_last)), mask.numel() - dropped
