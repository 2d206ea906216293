# ruff: noqa: N803  (Triton's custom: compile-time constants are upper case)
# mypy: disable-error-code="no-untyped-def"
"""The GPU path's kernels in Triton: one draws a mask, one applies it. ``cuda.py`` launches them.

**The aim.** Dropping reads ``x`` and writes ``y``, which takes a GPU as long as its memory needs. A mask
should cost next to nothing beside that: few launches, few instructions, few bytes.

**How a mask lies in memory.** One bit per element, set where it is dropped. Call what one block lies in a
*plane*: a channel of a sample or, if the channels share their mask, a sample. Word ``(g, pixel)`` has one
bit for that pixel of each of the 32 planes from ``32 g`` on, so 32 planes are an image of H x W words. Then

- the mask is the same whatever the memory format of ``x``;
- whether a block fits at a pixel is asked once per word, not once per bit;
- to widen corners to blocks is to OR words with their neighbours, without shifting bits. ORed with the word
  one before it, a word stands for blocks of width 2; that, ORed with the one two before it, for 4; and so
  on.

Every corner has room for its whole block, so no block runs over the end of its row or of its image. The
words may therefore be taken as one long row in which the next line is W words further.

**Drawing** (``draw_mask``). A lane draws one pixel of 64 planes: 64 bits, each a corner with probability
gamma. It jumps from corner to corner, for the gap to the next is geometric: ``floor(log(u) / log(1 -
gamma))`` with a uniform ``u``. Corners are rare, so the four numbers that one call of the Philox generator
returns are mostly enough.

Philox is a function of a key and a counter, here the random seed and the place of the pixel, so any program
can draw any corner. That makes one launch enough: a program writes the words of a tile of consecutive pixels
and needs the corners in the rows above, which belong to other programs. It does not wait for those but draws
the corners again. A tile begins with this *halo* of ``(kh - 1) W + kw - 1`` pixels, whose words it does not
write. There are no atomic operations and nothing to set to zero: each program writes how many bits it set,
and whoever needs the sum adds these few hundred numbers.

If the halo exceeds half of the largest tile (blocks of tens of rows, on large maps), ``draw_mask`` writes
the corners only, and ``widen`` widens them along W and then along H: three launches.

**Applying** (``scaled_copy``), forward and backward alike. A program copies 32 channels of some pixels. It
asks for ``x`` first and adds up the count while ``x`` is on its way.

**Precision.** float64 is used for float64 tensors only: consumer GPUs compute it 64 times slower. Since ``1
- gamma`` would lose the digits of a small gamma in float32, the kernels use the *rate* ``-log(1 - gamma)``
instead.
"""

import triton
import triton.language as tl

DROP = tl.constexpr(0x44726F70)  # in the counters of our random numbers, and in none of PyTorch's kernels
NEWTON_STEPS = tl.constexpr(8)  # 6 exhaust a float32 for p up to 0.999


@triton.jit
def _rate_of(share):
    """``-log(1 - share)``."""
    s = share / (2.0 - share)
    q = s * s
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13))))))
    return tl.where(share < 0.5, 2.0 * s * series, -tl.log(1.0 - share))


@triton.jit
def _share_of(rate):
    """``1 - exp(-rate)``."""
    series = 1 - rate / 4 * (1 - rate / 5 * (1 - rate / 6 * (1 - rate / 7)))
    series = rate * (1 - rate / 2 * (1 - rate / 3 * series))
    return tl.where(rate < 0.5, series, 1.0 - tl.exp(-rate))


@triton.jit
def _exact_rate(p, height, width, kh, kw, ROWS: tl.constexpr):
    """The corners' rate with which the expected dropped share is p: Newton's method, as in the reference.

    A position that nh rows and nw columns of corners can drop is dropped with probability
    ``share_of(nh * nw * rate)``. There are two rows for each nh below the most, and one column likewise.
    """
    most_h, most_w = tl.minimum(kh, height - kh + 1), tl.minimum(kw, width - kw + 1)
    nh = tl.arange(0, ROWS) + 1
    rows = tl.where(nh < most_h, 2, tl.where(nh == most_h, height - 2 * (most_h - 1), 0))
    rows = rows.to(tl.float32) / height
    rate = p * 0.0
    for _ in range(NEWTON_STEPS):
        by_column = _share_of(nh * rate)
        dropped, total, slope = nh * 0.0, nh * 0.0, nh * 0.0
        for nw in range(1, most_w + 1):
            dropped += by_column * (1 - dropped)
            columns = tl.where(nw < most_w, 2, width - 2 * (most_w - 1)).to(tl.float32) / width
            total += columns * dropped
            slope += columns * nw * (1 - dropped)
        share = tl.sum(rows * total)
        # Of log(1 - share), whose graph is nearly straight.
        rate += (_rate_of(p) - _rate_of(share)) * (1 - share) / tl.maximum(tl.sum(rows * nh * slope), 1e-30)
    return rate


@triton.jit
def corner_rate(p, height, width, kh, kw, ROWS: tl.constexpr):
    """``-log(1 - gamma)``, or 100, which is as good as infinite, if every position is a corner.

    ROWS is 0 for the paper's calibration. For the exact one it is a power of two, at least min(kh, grid_h).
    """
    p = tl.minimum(tl.maximum(p, 0.0), 1.0)
    if ROWS > 0:
        gamma = p  # both are 1, or neither
        rate = _exact_rate(p, height, width, kh, kw, ROWS)
    else:
        gamma = tl.minimum(p / kh / kw * height * width / (height - kh + 1) / (width - kw + 1), 1.0)
        rate = _rate_of(gamma)
    return tl.where(gamma < 1.0, rate, 100.0)


@triton.jit
def _jump(bits, plane, random, stretch, planes):
    """From one corner to the next: sets its bit if its plane is below ``planes``."""
    u = (random | 1).to(tl.float32) * 2.3283064365386963e-10  # 2 ** -32
    plane += 1 + tl.minimum(tl.log2(u) * stretch, 64.0).to(tl.int32)
    bit = tl.full(plane.shape, 1, tl.int64) << plane.to(tl.int64)
    return tl.where(plane < planes, bits | bit, bits), tl.minimum(plane, 64)


@triton.jit
def _widened(bits, lane, step, length):
    """Each word ORed with the ``length - 1`` that lie ``step``, ``2 * step``, ... lanes before it."""
    reach = 1
    while reach < length:
        # A word stands for `reach` words by now. ORed with another such, it stands for up to twice as many.
        more = tl.minimum(reach, length - reach)
        bits |= tl.gather(bits, tl.maximum(lane - more * step, 0), 0)  # the maximum is met in the halo only
        reach += more
    return bits


@triton.jit
def _ones(word):
    """The number of set bits of an int32; compilers know this and make it one instruction."""
    word = word.to(tl.uint32, bitcast=True)
    word -= (word >> 1) & 0x55555555
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    return ((((word + (word >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


# Sizes change from batch to batch. Without this, sizes of 1 and multiples of 16 have kernels of their own.
@triton.jit(
    do_not_specialize=["p", "p_ptr", "seed", "seed_high", "seed_ptr", "offset", "planes", "height", "width",
                       "kh", "kw", "reach_h", "reach_w", "halo", "tiles"]
)  # fmt: skip
def draw_mask(
    p, p_ptr,  # the drop probability; if negative, it is read from the address
    seed, seed_high, seed_ptr,  # 62 bits; if the first is negative, they are read from the address
    offset,  # with the seed, it stands for the mask
    words_ptr,  # the mask
    dropped_ptr,  # the number of its set bits, one part per program
    planes, height, width,  # the shape of the mask
    kh, kw,  # the block, clipped to the map
    reach_h, reach_w,  # the same, or 1 and 1 if only the corners are wanted
    halo,  # (reach_h - 1) * width + reach_w - 1
    tiles,  # how many of TILE - halo pixels there are
    ROWS: tl.constexpr,  # see corner_rate
    TILE: tl.constexpr,  # pixels that a program draws at a time, with the halo
):  # fmt: skip
    """Draws a mask and counts its bits."""
    p = tl.full([], p, tl.float32)  # the interpreter gives a Python number; tl.to_tensor is newer than 3.6
    if p < 0:
        p = tl.load(p_ptr)
    key = seed.to(tl.int64) | seed_high.to(tl.int64) << 31
    if seed < 0:
        key = tl.load(seed_ptr)
    stretch = -0.6931471805599453 / tl.maximum(corner_rate(p, height, width, kh, kw, ROWS), 1e-30)
    some_planes = tl.where(p > 0.0, planes, 0)  # none has corners if p is 0
    pixels = height * width
    lane = tl.arange(0, TILE)
    zero = tl.zeros([TILE], tl.int32)
    dropped = 0
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        place = tile * (TILE - halo) - halo + lane
        image, pixel = place // pixels, place % pixels  # an image holds 64 planes here, two words per pixel
        fits = (place >= 0) & (pixel // width <= height - kh) & (pixel % width <= width - kw)
        drawn = tl.where(fits, tl.minimum(some_planes - image * 64, 64), 0)
        bits = tl.zeros([TILE], tl.int64)
        plane = zero - 1
        call = zero
        while tl.max(drawn - 1 - plane) > 0:
            r0, r1, r2, r3 = tl.philox(key, place, call, zero + offset, zero + DROP)
            bits, plane = _jump(bits, plane, r0, stretch, drawn)
            bits, plane = _jump(bits, plane, r1, stretch, drawn)
            bits, plane = _jump(bits, plane, r2, stretch, drawn)
            bits, plane = _jump(bits, plane, r3, stretch, drawn)
            call += 1
        bits = _widened(bits, lane, 1, reach_w)
        bits = _widened(bits, lane, width, reach_h)

        first, second = bits.to(tl.int32), (bits >> 32).to(tl.int32)
        mine = (lane >= halo) & (image * 64 < planes)
        word_ptr = words_ptr + image * 2 * pixels + pixel
        tl.store(word_ptr, first, mine)
        tl.store(word_ptr + pixels, second, mine & (image * 64 + 32 < planes))
        dropped += tl.sum(tl.where(mine, _ones(first) + _ones(second), 0))
    tl.store(dropped_ptr + tl.program_id(0), dropped)


@triton.jit(do_not_specialize=["words", "step", "length"])
def widen(from_ptr, to_ptr, dropped_ptr, words, step, length, TILE: tl.constexpr):
    """Each word ORed with the ``length - 1`` that lie ``step``, ``2 * step``, ... before it; counts bits."""
    dropped = 0
    for first in range(tl.program_id(0) * TILE, words, tl.num_programs(0) * TILE):
        word = first + tl.arange(0, TILE)
        bits = tl.zeros([TILE], tl.int32)
        for i in range(length):
            source = word - i * step
            bits |= tl.load(from_ptr + source, (source >= 0) & (word < words), 0)
        tl.store(to_ptr + word, bits, word < words)
        dropped += tl.sum(_ones(bits))
    tl.store(dropped_ptr + tl.program_id(0), dropped)


@triton.jit(do_not_specialize=["samples", "channels", "pixels", "parts"])
def scaled_copy(
    x_ptr, y_ptr, words_ptr,
    dropped_ptr,  # the number of set bits, in parts
    samples, channels, pixels,  # the shape of x
    parts,
    SHARED: tl.constexpr,  # whether the planes of the mask are samples, and not channels
    CHANNELS_LAST: tl.constexpr,  # the memory format of x and y
    PIXELS: tl.constexpr,  # how many a program copies of each of 32 channels
    VECTOR: tl.constexpr,  # divides pixels (channels_last: channels), so that as many are loaded at once
    PARTS: tl.constexpr,  # a power of two, at least parts
    INDEX: tl.constexpr,  # int64 if int32 can't count the elements
    WIDE: tl.constexpr,  # float64 if that is the dtype of x, else float32
):  # fmt: skip
    """``y = x * mask / kept share``; what is dropped is 0 also where ``x`` is inf or nan."""
    if CHANNELS_LAST:
        channels = channels // VECTOR * VECTOR  # changes nothing but what the compiler knows
    else:
        pixels = pixels // VECTOR * VECTOR
    tiles, groups = tl.cdiv(pixels, PIXELS), tl.cdiv(channels, 32)
    program = tl.program_id(0)
    sample = program // (tiles * groups)
    # Programs that run at the same time copy what lies together.
    if CHANNELS_LAST:
        tile, group = program // groups % tiles, program % groups
        pixel = tile * PIXELS + tl.arange(0, PIXELS)[:, None]
        bit = tl.arange(0, 32)[None, :]
        element = pixel.to(INDEX) * channels + (group * 32 + bit)
    else:
        group, tile = program // tiles % groups, program % tiles
        pixel = tile * PIXELS + tl.arange(0, PIXELS)[None, :]
        bit = tl.arange(0, 32)[:, None]
        element = (group * 32 + bit).to(INDEX) * pixels + pixel
    element += sample.to(INDEX) * channels * pixels
    inside = (group * 32 + bit < channels) & (pixel < pixels)
    x = tl.load(x_ptr + element, inside, 0.0)

    # Of each pixel the word whose bits are these 32 channels.
    if SHARED:
        word = tl.load(words_ptr + sample // 32 * pixels + pixel, pixel < pixels, 0)
        word = -((word >> sample % 32) & 1)  # all bits are the sample's
    else:
        plane = sample * channels + group * 32
        word_ptr = words_ptr + (plane // 32) * pixels + pixel
        word = tl.load(word_ptr, pixel < pixels, 0)
        if channels % 32 > 0:  # they may lie across two words of the mask
            skipped = plane % 32
            ends_in_next = skipped + tl.minimum(channels - group * 32, 32) > 32
            next_word = tl.load(word_ptr + pixels, pixel < tl.where(ends_in_next, pixels, 0), 0)
            both = (next_word.to(tl.int64) << 32) | word.to(tl.uint32, bitcast=True).to(tl.int64)
            word = (both >> skipped).to(tl.int32)

    part = tl.arange(0, PARTS)
    dropped = tl.sum(tl.load(dropped_ptr + part, part < parts, 0).to(tl.int64))
    elements = samples.to(tl.int64) * pixels * (1 if SHARED else channels)  # of the mask
    scale = elements.to(WIDE) / tl.maximum(elements - dropped, 1).to(WIDE)
    y = tl.where((word >> bit) & 1 != 0, 0.0, x.to(WIDE) * scale)
    tl.store(y_ptr + element, y.to(x.dtype), inside)
