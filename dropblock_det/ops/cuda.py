# ruff: noqa: N803  (Triton's custom: compile-time constants are upper case)
# mypy: disable-error-code="no-untyped-def"
"""The GPU path in Triton; the only file that imports it. Under ``TRITON_INTERPRET=1`` it runs on the CPU.

As on the CPU, the mask is flat memory of ``(planes, H, W, inner)``, here with one bit per element packed into
words of 32, and widening seeds to blocks is to OR it with itself shifted. The host reads nothing back: p, the
seed, the count and the scale stay on the device, so that a captured graph draws new masks and follows p.

Traffic per element: forward reads ``x`` and writes ``y``, backward does the same with the gradients; a bit is
written three times and read a few times, mostly from cache. One Philox call mostly seeds 32 elements.
"""

from collections.abc import Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from dropblock_det.ops.gradients import MaskedCopy
from dropblock_det.ops.layout import is_channels_last, mask_shape, memory_format
from dropblock_det.ops.reference import BlockSize, block_and_grid

WORDS = 256  # words of 32 bits per program: 8,192 elements


@triton.jit
def _prepare(
    p_ptr, gamma_ptr, kept_ptr, elements, height, width, kh, kw, EXACT: tl.constexpr, COVER: tl.constexpr
):
    """One program: gamma from p, float64, and the count of kept elements set to all of them."""
    tl.store(kept_ptr, elements)
    p = tl.minimum(tl.maximum(tl.load(p_ptr).to(tl.float64), 0.0), 1.0)
    grid_h, grid_w = height - kh + 1, width - kw + 1
    gamma = tl.minimum(p / kh / kw * height * width / grid_h / grid_w, 1.0)  # no int32 product
    if EXACT:
        # Bisection for t = -log(1 - gamma) in mean(exp(-n t)) = 1 - p, where a position that nh rows and nw
        # columns of seeds can drop has n = nh * nw. The sum over nw is a geometric series.
        most_h, most_w = tl.minimum(kh, grid_h), tl.minimum(kw, grid_w)
        nh = tl.arange(0, COVER) + 1
        rows = tl.where(nh < most_h, 2, tl.where(nh == most_h, height - 2 * (most_h - 1), 0)).to(tl.float64)
        kept_share = tl.maximum(1.0 - p, 1e-12)
        high = -tl.log(kept_share)
        low = high / most_h / most_w
        for _ in range(50):
            t = (low + high) / 2
            r = tl.exp(-nh * tl.maximum(t, 1e-30))
            last = tl.exp(-nh * t * (most_w - 1))
            series = tl.where(r < 1.0, r * (1.0 - last) / (1.0 - r), most_w - 1.0)
            mean = tl.sum(rows * (2 * series + (width - 2 * (most_w - 1)) * last * r)) / height / width
            low = tl.where(mean > kept_share, t, low)
            high = tl.where(mean > kept_share, high, t)
        gamma = tl.where(p < 1.0, 1.0 - tl.exp(-(low + high) / 2), 1.0)
    tl.store(gamma_ptr, gamma)


@triton.jit
def _place(bits, left, random):
    """Sets one more random bit where ``left`` says one is missing, unless it is set already."""
    bit = tl.full(bits.shape, 1, tl.uint32) << (random >> 27)
    new = (left > 0) & ((bits & bit) == 0)
    return tl.where(new, bits | bit, bits), left - new.to(tl.int32)


@triton.jit
def _draw_seeds(
    gamma_ptr, seed_ptr, seeds_ptr, words, lines, height, row, grid_h, grid_row,
    INDEX: tl.constexpr, RUNS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Bernoulli(gamma) bits: how many of a word's 32 are set is binomial, which ones a random subset."""
    word = tl.program_id(0).to(INDEX) * WORDS + tl.arange(0, WORDS)
    seed = tl.load(seed_ptr)
    counter = word.to(tl.int32)
    zero = tl.zeros_like(counter)
    uniform, random1, random2, random3 = tl.philox(seed, counter, zero, zero, zero)

    gamma = tl.load(gamma_ptr)
    rare = tl.minimum(gamma, 1.0 - gamma)  # the rarer of set and clear is drawn
    odds = rare / (1.0 - rare)
    mass = tl.exp(32.0 * tl.log(1.0 - rare))
    more = 1.0 - mass  # P(more than `drawn` bits)
    count = tl.zeros([WORDS], tl.int32)
    smallest = tl.min(uniform.to(tl.int64))
    drawn = 0
    while (drawn < 32) & (more * 4294967296.0 > smallest):
        count += (uniform.to(tl.int64) < (more * 4294967296.0).to(tl.int64)).to(tl.int32)
        mass = mass * odds * (32 - drawn) / (drawn + 1)
        more -= mass
        drawn += 1

    bits = tl.zeros([WORDS], tl.uint32)
    left = tl.minimum(count, 32 - count)
    bits, left = _place(bits, left, random1)
    bits, left = _place(bits, left, random2)
    bits, left = _place(bits, left, random3)
    call = zero
    while tl.max(left) > 0:
        call += 1
        random0, random1, random2, random3 = tl.philox(seed, counter, call, zero, zero)
        bits, left = _place(bits, left, random0)
        bits, left = _place(bits, left, random1)
        bits, left = _place(bits, left, random2)
        bits, left = _place(bits, left, random3)
    bits = tl.where((count > 16) != (gamma > 0.5), bits ^ 0xFFFFFFFF, bits)

    # Where a block fits: the first grid_row bits of a row, of the first grid_h rows of a plane.
    first = word * 32
    index = first // row
    start = (first - index * row).to(tl.int32)
    line = (index % height).to(tl.int32)
    begin = tl.zeros([WORDS], tl.int32)
    fits = tl.zeros([WORDS], tl.uint64)
    one = tl.full([WORDS], 1, tl.uint64)
    for _ in range(RUNS):  # the rows that a word touches
        end = tl.minimum(begin + tl.maximum(tl.minimum(grid_row - start, 32), 0), 32)
        run = (one << end.to(tl.uint64)) - (one << begin.to(tl.uint64))
        fits |= tl.where((line < grid_h) & (index < lines), run, 0)
        begin = tl.minimum(begin + tl.minimum(row - start, 32), 32)
        start = tl.zeros([WORDS], tl.int32)
        index += 1
        line = tl.where(line + 1 < height, line + 1, 0)
    tl.store(seeds_ptr + word, (bits & fits.to(tl.uint32)).to(tl.int32, bitcast=True), word < words)


@triton.jit
def _spread(
    from_ptr, to_ptr, kept_ptr, words, step,
    LENGTH: tl.constexpr, COUNT: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """ORs the bits with themselves shifted by step, 2 step, ... (LENGTH - 1) step; counts the set ones."""
    word = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    bits = tl.zeros([WORDS], tl.uint32)
    shift = tl.zeros([], tl.int64)
    for _ in range(LENGTH):
        source = word - shift // 32
        high = tl.load(from_ptr + source, (source >= 0) & (source < words), 0).to(tl.uint32, bitcast=True)
        low = tl.load(from_ptr + source - 1, (source >= 1) & (source <= words), 0).to(tl.uint32, bitcast=True)
        pair = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
        bits |= (pair >> (32 - shift % 32).to(tl.uint64)).to(tl.uint32)
        shift += step
    tl.store(to_ptr + word, bits.to(tl.int32, bitcast=True), word < words)
    if COUNT:
        ones = bits - ((bits >> 1) & 0x55555555)
        ones = (ones & 0x33333333) + ((ones >> 2) & 0x33333333)
        ones = (ones + (ones >> 4)) & 0x0F0F0F0F
        ones = (ones + (ones >> 8)) & 0x00FF00FF
        ones = (ones + (ones >> 16)) & 0x3F
        tl.atomic_add(kept_ptr, -tl.sum(tl.where(word < words, ones, 0).to(tl.int64)), sem="relaxed")


@triton.jit
def _scale(
    x_ptr, y_ptr, bits_ptr, kept_ptr, elements, masked, sharing, pixels,
    INDEX: tl.constexpr, SHARED: tl.constexpr, CHANNELS_LAST: tl.constexpr, WORDS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """``y = x * mask * scale`` in the order of memory, so the same for every memory format."""
    scale = (masked / tl.maximum(tl.load(kept_ptr), 1).to(tl.float64)).to(WIDE)
    word = tl.program_id(0).to(INDEX) * WORDS + tl.arange(0, WORDS)
    place = tl.arange(0, 32)[None, :]
    element = word[:, None] * 32 + place
    inside = element < elements
    if SHARED:
        bit = element // sharing
        if not CHANNELS_LAST:
            bit = bit * pixels + element % pixels
        packed = tl.load(bits_ptr + bit // 32, inside, 0)
        dropped = (packed >> (bit % 32).to(tl.int32)) & 1
    else:
        packed = tl.load(bits_ptr + word, word * 32 < elements, 0)
        dropped = (packed[:, None] >> place) & 1
    x = tl.load(x_ptr + element, inside, 0.0)
    y = tl.where(dropped != 0, 0.0, x.to(WIDE) * scale)  # 0 also where x is inf or nan
    tl.store(y_ptr + element, y.to(x.dtype), inside)


torch.library.define(
    "dropblock_det::draw_bits",
    "(Tensor p, Tensor seed, SymInt[] shape, int[2] block_size, bool exact) -> (Tensor, Tensor)",
)
torch.library.define(
    "dropblock_det::apply_bits",
    "(Tensor x, Tensor bits, Tensor kept, bool per_channel, bool channels_last) -> Tensor",
)


@torch.library.impl("dropblock_det::draw_bits", "default")
def draw_bits(
    p: Tensor, seed: Tensor, shape: Sequence[int], block_size: BlockSize, exact: bool
) -> tuple[Tensor, Tensor]:
    """Draws the mask and counts what it keeps.

    Args:
        p: 0-dim float32, the drop probability.
        seed: 0-dim int64.
        shape: planes, H, W, inner.
        block_size: of the block.
        exact: whether the calibration is ``"exact"``.

    Returns:
        The mask, int32 words of 32 elements each, a set bit for a dropped element, and the number of elements
        kept, 0-dim int64.
    """
    elements = shape[0] * shape[1] * shape[2] * shape[3]
    gamma = p.new_empty((), dtype=torch.float64)
    kept = p.new_empty((), dtype=torch.int64)
    _, height, width, _ = shape
    kh, kw, grid_h, _ = block_and_grid(height, width, block_size)
    cover = triton.next_power_of_2(min(kh, grid_h))
    with torch.cuda.device_of(p):
        _prepare[(1,)](p, gamma, kept, elements, height, width, kh, kw, EXACT=exact, COVER=cover)
        seeds = draw_seeds(gamma, seed, shape, block_size)
        return spread_seeds(seeds, kept, shape, block_size), kept


@torch.library.register_fake("dropblock_det::draw_bits")
def _(
    p: Tensor, seed: Tensor, shape: Sequence[int], block_size: BlockSize, exact: bool
) -> tuple[Tensor, Tensor]:
    elements = shape[0] * shape[1] * shape[2] * shape[3]
    return p.new_empty((elements + 31) // 32, dtype=torch.int32), p.new_empty((), dtype=torch.int64)


def draw_seeds(gamma: Tensor, seed: Tensor, shape: Sequence[int], block_size: BlockSize) -> Tensor:
    """Bernoulli(gamma) seeds at their place in the map of ``shape`` (planes, H, W, inner), packed."""
    planes, height, width, inner = shape
    _, _, grid_h, grid_w = block_and_grid(height, width, block_size)
    row = width * inner
    words = (planes * height * row + 31) // 32
    seeds = gamma.new_empty(words, dtype=torch.int32)
    _draw_seeds[(triton.cdiv(words, WORDS),)](
        gamma, seed, seeds, words, planes * height, height, row, grid_h, grid_w * inner,
        INDEX=tl.int64 if words >= 2**26 - WORDS else tl.int32, RUNS=31 // row + 2, WORDS=WORDS,
    )  # fmt: skip
    return seeds


def spread_seeds(seeds: Tensor, kept: Tensor, shape: Sequence[int], block_size: BlockSize) -> Tensor:
    """Widens packed seeds to blocks and subtracts the number of dropped elements from ``kept``."""
    _, height, width, inner = shape
    kh, kw, _, _ = block_and_grid(height, width, block_size)
    words = seeds.numel()
    grid = (triton.cdiv(words, WORDS),)
    rows, blocks = torch.empty_like(seeds), torch.empty_like(seeds)
    _spread[grid](seeds, rows, kept, words, inner, LENGTH=kw, COUNT=False, WORDS=WORDS)
    _spread[grid](rows, blocks, kept, words, width * inner, LENGTH=kh, COUNT=True, WORDS=WORDS)
    return blocks


@torch.library.impl("dropblock_det::apply_bits", "default")
def apply_bits(x: Tensor, bits: Tensor, kept: Tensor, per_channel: bool, channels_last: bool) -> Tensor:
    """``x * mask / kept share``.

    Args:
        x: ``(N, C, H, W)``.
        bits: the packed mask.
        kept: 0-dim int64, the number of elements that the mask keeps.
        per_channel: whether the mask has the channels of ``x`` or one for all.
        channels_last: whether the mask, and so the result, is in that memory format.
    """
    x = x.contiguous(memory_format=memory_format(channels_last))
    y = torch.empty_like(x)
    _, channels, height, width = x.shape
    elements, pixels = x.numel(), height * width
    masked = elements if per_channel else elements // channels
    sharing = channels if channels_last else channels * pixels  # here: a kernel's product would be int32
    words = WORDS // 4
    with torch.cuda.device_of(x):
        _scale[(triton.cdiv(elements, 32 * words),)](
            x, y, bits, kept, elements, masked, sharing, pixels,
            INDEX=tl.int64 if elements >= 2**31 - 32 * words else tl.int32,
            SHARED=not per_channel, CHANNELS_LAST=channels_last, WORDS=words,
            WIDE=tl.float64 if x.dtype == torch.float64 else tl.float32,
        )  # fmt: skip
    return y


@torch.library.register_fake("dropblock_det::apply_bits")
def _(x: Tensor, bits: Tensor, kept: Tensor, per_channel: bool, channels_last: bool) -> Tensor:
    return torch.empty_like(x, memory_format=memory_format(channels_last))


def drop(x: Tensor, p: float | Tensor, block_size: BlockSize, calibration: str, per_channel: bool) -> Tensor:
    """``x * mask / kept share`` for a new mask."""
    if not isinstance(p, Tensor):
        p = torch.full((), p, dtype=torch.float32, device=x.device)
    seed = torch.randint(2**62, (), device=x.device)
    channels_last = is_channels_last(x)
    shape = mask_shape(x, per_channel, channels_last)
    operators = torch.ops.dropblock_det
    bits, kept = operators.draw_bits(p, seed, shape, block_size, calibration == "exact")
    apply = partial(operators.apply_bits, per_channel=per_channel, channels_last=channels_last)
    return MaskedCopy.apply(x, apply, bits, kept)


def draw_mask(
    p: Tensor,
    seed: Tensor,
    shape: Sequence[int],
    block_size: BlockSize,
    calibration: str,
    channels_last: bool,
) -> tuple[Tensor, Tensor]:
    """The mask as bool, True where kept, and how many it keeps; like the CPU path's operator.

    Only the packed bits come from an operator: unpacking is fused into what uses the mask, and the bits are
    what is kept for backward.
    """
    n, c, height, width = shape
    flat = (n, height, width, c) if channels_last else (n * c, height, width, 1)
    operator = torch.ops.dropblock_det.draw_bits
    bits, kept = operator(p, seed, flat, block_size, calibration == "exact")
    places = torch.arange(32, device=bits.device, dtype=torch.int32)
    mask = ((bits[:, None] >> places) & 1 == 0).flatten()[: n * c * height * width]
    if channels_last:
        return mask.view(n, height, width, c).permute(0, 3, 1, 2), kept
    return mask.view(n, c, height, width), kept
