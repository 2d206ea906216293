"""The Triton kernels: anywhere in Triton's interpreter and through its compiler; on a GPU with ``-m gpu``."""

import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from support import stubbed_cuda
from torch import Tensor

from dropblock_det.ops import dropblock, reference
from dropblock_det.ops.dropblock import drop_block2d

triton = pytest.importorskip("triton")
tl = triton.language
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter, in its own process")
compiled = pytest.mark.skipif(INTERPRETED, reason="needs Triton's compiler")
DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]

# Planes, H, W, each for a reason: several images of 64 planes, of which the last has one word; a part of a
# word; one column; one row; one element; more pixels than a tile.
SHAPES = [(70, 7, 11), (3, 6, 50), (130, 5, 1), (33, 1, 5), (1, 1, 1), (5, 40, 45)]
BLOCKS = [1, 2, 7, 40, (2, 5), (6, 1)]


def run_in_the_interpreter(*arguments: str) -> None:
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "--noconftest", "-p", "no:cacheprovider", *arguments,
         str(here / "test_cuda_kernels.py"), str(here / "test_ops.py")],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=here.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@compiled
def test_in_the_interpreter():
    """Runs this file and test_ops.py on the ``cuda`` path, on the CPU."""
    run_in_the_interpreter("-k", "cuda")


@compiled
@pytest.mark.slow
def test_all_shapes_in_the_interpreter():
    run_in_the_interpreter("-k", "cuda", "-m", "slow")


def draw(p, shape, block_size, device, seed=2**40 + 11, offset=8, calibration="paper"):
    """The mask, True where dropped; the count is checked, and that no bit is set behind the last plane."""
    from dropblock_det.ops import cuda

    numbers = (seed & 0x7FFFFFFF, seed >> 31, offset)
    words, dropped = cuda.draw(p, numbers, shape, block_size, calibration, torch.device(device))
    bits = torch.arange(32, device=device)[:, None, None]
    mask = ((words[:, None] >> bits) & 1).flatten(0, 1).bool()
    assert dropped.sum() == mask.sum()
    assert not mask[shape[0] :].any()
    return mask[: shape[0]]


def check_mask(p, shape, block_size, device, calibration="paper"):
    """Bit for bit the reference's for the same corners.

    With blocks of one element and p = gamma, the mask is the corners, drawn by the same random numbers.
    """
    _, height, width = shape
    _, _, grid_h, grid_w = reference.block_and_grid(height, width, block_size)
    gamma = reference.corner_probability(p, block_size, height, width, calibration)
    corners = draw(gamma, shape, 1, device)[:, :grid_h, :grid_w]
    if gamma in (0.0, 1.0):
        assert (corners == bool(gamma)).all()
    expected = reference.mask_from_corners(corners[None], block_size, height, width)[0]
    assert torch.equal(draw(p, shape, block_size, device, calibration=calibration), ~expected)


@pytest.fixture(params=[(128, 256), (64, 4096), (512, 1)], ids=["small tiles", "any tile", "no halo fits"])
def tiles(request, monkeypatch):
    """What the mask must not depend on."""
    from dropblock_det.ops import cuda

    monkeypatch.setattr(cuda, "TILES", request.param)
    monkeypatch.setattr(cuda, "PARTS", 4)  # so that programs draw several tiles
    cuda.plan.cache_clear()
    yield
    cuda.plan.cache_clear()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("shape", "block_size", "p"),
    [((70, 7, 11), 3, 0.5), ((70, 7, 11), 7, 0.1), ((5, 40, 45), 3, 0.1), ((5, 40, 45), (2, 9), 0.3),
     ((130, 5, 1), (2, 1), 1.0), ((33, 1, 5), 40, 0.3), ((1, 1, 1), 7, 0.5), ((3, 6, 50), (6, 1), 0.0)],
)  # fmt: skip
def test_mask_is_the_references_bit_for_bit(device, shape, block_size, p, tiles):
    check_mask(p, shape, block_size, device)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("calibration", reference.CALIBRATIONS)
@pytest.mark.parametrize("p", [0.0, 0.01, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("block_size", BLOCKS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_mask_is_the_references_bit_for_bit(device, shape, block_size, p, calibration):
    check_mask(p, shape, block_size, device, calibration)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gamma", [0.003, 0.04, 0.5, 0.9])
def test_corners_are_independent_bernoulli(device, gamma, monkeypatch):
    """Rate, each plane, pairs of planes, of pixels, of seeds and of offsets: within 4.5 standard errors."""
    from dropblock_det.ops import cuda

    if INTERPRETED:  # its time goes by programs
        monkeypatch.setattr(cuda, "TILES", (1 << 15, 1 << 15))
        cuda.plan.cache_clear()
    pixels = 1 << 16 if gamma < 0.1 else 1 << 15
    corners = draw(gamma, (64, 1, pixels), 1, device, seed=77).double().squeeze(1)

    def check(observed: Tensor, expected: float, samples: int) -> None:
        error = (expected * (1 - expected) / samples) ** 0.5
        assert ((observed - expected).abs() < 4.5 * error).all(), (observed, expected, error)

    check(corners.mean(), gamma, corners.numel())
    check(corners.mean(1), gamma, pixels)
    count = corners.sum(0)
    tolerance = 4.5 * ((2 + 1 / (64 * gamma * (1 - gamma))) / pixels) ** 0.5  # of a binomial's variance
    assert count.var().item() == pytest.approx(64 * gamma * (1 - gamma), rel=tolerance)
    for plane in (1, 31, 32, 63):
        pairs = corners[plane:] * corners[:-plane]
        check(pairs.mean(), gamma**2, pairs.numel())
    for pixel in (1, 4, 1000):
        check((corners[:, pixel:] * corners[:, :-pixel]).mean(), gamma**2, 64 * (pixels - pixel))
    for other in ({"seed": 78}, {"offset": 12}, {"seed": 77 + 2**32}):
        check(
            (corners * draw(gamma, (64, 1, pixels), 1, device, **other)[:, 0]).mean(), gamma**2, 64 * pixels
        )


@triton.jit
def _store_rate(p_ptr, rate_ptr, height, width, kh, kw, ROWS: tl.constexpr, rate: tl.constexpr):  # noqa: N803
    tl.store(rate_ptr, rate(tl.load(p_ptr), height, width, kh, kw, ROWS))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("calibration", reference.CALIBRATIONS)
@pytest.mark.parametrize(
    ("height", "width", "block_size", "p"),
    [(7, 11, 7, 0.1), (100, 136, 9, 0.5), (1, 1, 3, 0.3), (200, 150, 70, 0.1), (50, 68, 7, 1.0),
     (6, 6, 6, 0.99), (50, 68, 7, 0.0), (1, 40, 3, 0.3), (50, 68, 7, 1e-3), (33, 20, 33, 0.2),
     (50, 68, (2, 9), 0.9), (50, 68, 7, 1e-6), (25, 34, 7, 0.999), (50, 68, 7, -1.0), (50, 68, 7, 2.0)],
)  # fmt: skip
def test_rate_on_the_device_is_the_references(device, height, width, block_size, p, calibration):
    from dropblock_det.ops import cuda, cuda_kernels

    kh, kw, *_, rows, _ = cuda.plan(height, width, block_size, calibration == "exact")
    p = torch.tensor(p, device=device)
    rate = torch.empty((), device=device)
    _store_rate[(1,)](p, rate, height, width, kh, kw, rows, cuda_kernels.corner_rate)
    expected = reference.corner_probability(reference.clamped(p), block_size, height, width, calibration)
    tolerance = 5e-6 if p <= 0.9 else 1e-3  # a float32 has few digits for a kept share of a thousandth
    assert -torch.expm1(-rate.double()).item() == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("shape", [(3, 40, 9, 13), (2, 64, 12, 12), (35, 3, 5, 7), (1, 1, 1, 1)], ids=str)
def test_mask_is_applied_to_the_elements_it_is_of(device, shape, per_channel, memory_format, monkeypatch):
    """Channels that fill words of the mask and that do not; vectors of 1, 4, 8 and 16 elements."""
    monkeypatch.setattr(dropblock, "FORCED_PATH", "cuda")
    from dropblock_det.ops import cuda

    torch.manual_seed(3)
    seed = torch.tensor(5, device=device)
    monkeypatch.setattr(cuda, "new_seed", lambda device: (seed, 0, 0))
    x = torch.randn(shape, device=device).contiguous(memory_format=memory_format)
    p = torch.tensor(0.3, device=device)
    y = drop_block2d(x, p, 3, per_channel=per_channel)
    n, c, height, width = shape
    mask, kept = cuda.draw_mask(p, seed, (n, c if per_channel else 1, height, width), (3, 3), "paper", False)
    assert kept == mask.sum()
    torch.testing.assert_close(y, reference.apply_mask(x, mask, kept), rtol=1e-6, atol=0)


@interpreted
def test_cuda_operator_passes_opcheck():
    from dropblock_det.ops import cuda

    p, seed = torch.tensor(0.3), torch.tensor(5)
    for block_size in ((3, 2), (1, 1)):
        torch.library.opcheck(cuda.draw_words, (p, seed, (70, 9, 7), block_size, "exact"))


@interpreted
def test_compiled_code_takes_no_memory_that_it_keeps(monkeypatch):
    """CUDA graph trees refuse that."""
    from dropblock_det.ops import cuda

    monkeypatch.setattr(cuda, "unread", None)
    words, _ = cuda.draw_words(torch.tensor(0.3), torch.tensor(5), (3, 9, 7), (3, 3), "paper")
    assert words.any()


def variants(every: bool):
    """Kernel, types of arguments, constants, warps."""
    from dropblock_det.ops import cuda_kernels

    for tile, rows in itertools.product((512, 1024, 2048, 4096), (0, 8)) if every else [(1024, 0), (4096, 8)]:
        types = {"p": "fp32", "p_ptr": "*fp32", "seed_ptr": "*i64"}
        yield cuda_kernels.draw_mask, types, {"ROWS": rows, "TILE": tile}, min(tile // 128, 16)
    yield cuda_kernels.widen, {"from_ptr": "*i32", "to_ptr": "*i32"}, {"TILE": 1024}, 4
    dtypes = ("bf16", "fp16", "fp32", "fp64") if every else ("bf16",)
    for x, shared, last, vector, index in itertools.product(
        dtypes, (False, True), (False, True), (1, 2, 4, 8, 16) if every else (1, 16), ("int32", "int64")
    ):
        if every or (index == "int32" and (vector == 16 or not shared)):
            wide = tl.float64 if x == "fp64" else tl.float32
            constants = {"SHARED": shared, "CHANNELS_LAST": last, "PIXELS": 128, "VECTOR": vector}
            constants |= {"PARTS": 512, "INDEX": getattr(tl, index), "WIDE": wide}
            yield cuda_kernels.scaled_copy, {"x_ptr": "*" + x, "y_ptr": "*" + x}, constants, 4


def check_compiled(every: bool, *architectures: int) -> None:
    """Without spilled registers; and 16 bytes at a time wherever the sizes allow it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    disassembler = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    for architecture, (kernel, types, constants, warps) in itertools.product(architectures, variants(every)):
        types = {"words_ptr": "*i32", "dropped_ptr": "*i32"} | types
        names = kernel.arg_names
        signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
        source = ASTSource(
            kernel,
            signature,
            {(names.index(name),): value for name, value in constants.items()},
            {(names.index(name),): [["tt.divisibility", 16]] for name in names if signature[name][0] == "*"},
        )
        target = GPUTarget("cuda", architecture, 32)
        made = triton.compile(source, target=target, options={"num_warps": warps})
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(made.asm["cubin"])
            file.flush()
            code = subprocess.run([disassembler, "-c", file.name], capture_output=True, text=True, check=True)
        setting = (architecture, kernel.fn.__name__, types, constants)
        assert "EXIT" in code.stdout, setting
        assert not re.search(r"\b(STL|LDL)\b", code.stdout), (setting, "registers are spilled")
        if constants.get("WIDE") != tl.float64:
            assert not re.search(r"\b(DADD|DMUL|DFMA)\b", code.stdout), (setting, "float64 is slow")
        if constants.get("VECTOR") == 16:
            assert "LDG.E.128" in code.stdout, setting
            assert "STG.E.128" in code.stdout, setting


@compiled
def test_kernels_compile_without_spills():
    check_compiled(False, 90)


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("architecture", [75, 80, 86, 89, 90, 100, 120])
def test_every_kernel_compiles_without_spills(architecture):
    check_compiled(True, architecture)


@compiled
def test_a_site_launches_three_kernels():
    """With a stub in place of the driver: two forward, one backward."""
    if not shutil.which("gcc"):
        pytest.skip("gcc builds the stub")
    measured = stubbed_cuda.run()
    assert (measured["launches forward"], measured["launches backward"]) == (2, 1)
