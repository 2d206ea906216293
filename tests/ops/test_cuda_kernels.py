"""The Triton kernels: anywhere in Triton's interpreter and through its compiler, on a GPU with ``-m gpu``."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dropblock_det.layers import DropBlock2d
from dropblock_det.ops import reference
from dropblock_det.ops.dropblock import drop_block2d

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter, in its own process")
compiled = pytest.mark.skipif(INTERPRETED, reason="needs Triton's compiler")
DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]

# Each planes, H, W, inner for a reason: several rows in a word, a word in several rows, one column, one row,
# one element, channels_last, more than one program, rows of a whole number of words.
SHAPES = [
    (9, 7, 11, 1),
    (4, 6, 50, 1),
    (70, 5, 1, 1),
    (70, 1, 5, 1),
    (1, 1, 1, 1),
    (2, 5, 6, 8),
    (4, 60, 40, 1),
]
SHAPES += [(3, 4, 64, 1), (2, 9, 4, 32)]


@compiled
def test_in_the_interpreter():
    """Runs this file and test_ops.py on the ``cuda`` path, on the CPU."""
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "--noconftest", "-k", "cuda", "-p", "no:cacheprovider",
         str(here / "test_cuda_kernels.py"), str(here / "test_ops.py")],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=here.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.fixture(autouse=True)
def _large_programs(monkeypatch):
    """The interpreter's time goes by programs, not by elements."""
    if INTERPRETED:
        from dropblock_det.ops import cuda

        monkeypatch.setattr(cuda, "WORDS", 1 << 14)


def unpack(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Packed words as a bool tensor; the bits behind the last element must be clear."""
    flat = ((bits[:, None] >> torch.arange(32, device=bits.device)) & 1).flatten().bool()
    elements = torch.Size(shape).numel()
    assert not flat[elements:].any()
    return flat[:elements].view(shape)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("block_size", [1, 3, 7, 40])
def test_mask_is_the_references_bit_for_bit(device, gamma, block_size, monkeypatch):
    from dropblock_det.ops import cuda

    monkeypatch.setattr(cuda, "WORDS", 64)
    for shape in SHAPES if (gamma, block_size) == (0.3, 3) else SHAPES[:3]:
        _, height, width, _ = shape
        _, _, grid_h, grid_w = reference.block_and_grid(height, width, block_size)
        probability = torch.tensor(gamma, dtype=torch.float64, device=device)
        seed = torch.tensor(2**40 + 11, device=device)
        packed = cuda.draw_seeds(probability, seed, shape, block_size)
        seeds = unpack(packed, shape)
        grid = seeds[:, :grid_h, :grid_w]
        assert seeds.sum() == grid.sum()  # none where a block does not fit
        if gamma in (0.0, 1.0):
            assert (grid == bool(gamma)).all()
        expected = reference.mask_from_corners(grid.permute(0, 3, 1, 2), block_size, height, width)
        kept = torch.tensor(seeds.numel(), device=device)
        dropped = unpack(cuda.spread_seeds(packed, kept, shape, block_size), shape)
        assert torch.equal(~dropped, expected.permute(0, 2, 3, 1))
        assert kept == expected.sum()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gamma", [0.003, 0.04, 0.3, 0.5, 0.9])
def test_seeds_are_independent_bernoulli(device, gamma):
    """Rate, each of the 32 places, pairs within a word and across words: all within 4.5 standard errors."""
    from dropblock_det.ops import cuda

    words = 1 << 18 if gamma < 0.1 else 1 << 16
    probability = torch.tensor(gamma, dtype=torch.float64, device=device)
    packed = cuda.draw_seeds(probability, torch.tensor(77, device=device), (words, 1, 32, 1), 1)
    seeds = unpack(packed, (words, 32)).double()

    def check(observed: Tensor, expected: float, samples: int) -> None:
        error = (expected * (1 - expected) / samples) ** 0.5
        assert ((observed - expected).abs() < 4.5 * error).all(), (observed, expected, error)

    check(seeds.mean(), gamma, seeds.numel())
    check(seeds.mean(0), gamma, words)
    for shift in (1, 2, 16):
        check((seeds[:, shift:] * seeds[:, :-shift]).mean(), gamma**2, words * (32 - shift) // 4)
    check((seeds[1:] * seeds[:-1]).mean(), gamma**2, words * 8)
    count = seeds.sum(1)
    assert count.var().item() == pytest.approx(32 * gamma * (1 - gamma), rel=0.03)
    other = cuda.draw_seeds(probability, torch.tensor(78, device=device), (words, 1, 32, 1), 1)
    check((seeds * unpack(other, (words, 32))).mean(), gamma**2, words * 8)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("calibration", ["paper", "exact"])
@pytest.mark.parametrize(
    ("height", "width", "block_size", "p"),
    [(7, 11, 7, 0.1), (100, 136, 9, 0.5), (1, 1, 3, 0.3), (1000, 1000, 500, 0.1), (50, 68, 7, 1.0),
     (6, 6, 6, 0.99), (50, 68, 7, 0.0), (1, 40, 3, 0.3), (50, 68, 7, 1e-3), (33, 20, 33, 0.2)],
)  # fmt: skip
def test_gamma_on_the_device_is_the_references(device, height, width, block_size, p, calibration):
    import triton

    from dropblock_det.ops import cuda

    kh, kw, grid_h, _ = reference.block_and_grid(height, width, block_size)
    p = torch.tensor(p, device=device)
    gamma = torch.empty((), dtype=torch.float64, device=device)
    kept = torch.empty((), dtype=torch.int64, device=device)
    cover = triton.next_power_of_2(min(kh, grid_h))
    exact = calibration == "exact"
    cuda._prepare[(1,)](p, gamma, kept, 12345, height, width, kh, kw, EXACT=exact, COVER=cover)
    expected = reference.corner_probability(p.item(), block_size, height, width, calibration)
    assert gamma.item() == pytest.approx(expected, rel=1e-6)
    assert kept == 12345


@interpreted
def test_operators_pass_opcheck():
    from dropblock_det.ops import cuda  # noqa: F401  (defines them)

    p, seed, operators = torch.tensor(0.3), torch.tensor(5), torch.ops.dropblock_det
    for shape, per_channel, channels_last in [
        ((6, 9, 7, 1), True, False),
        ((2, 9, 7, 3), True, True),
        ((2, 9, 7, 1), False, False),
        ((2, 9, 7, 1), False, True),
    ]:
        torch.library.opcheck(operators.draw_bits, (p, seed, shape, 3, channels_last))
        bits, kept = operators.draw_bits(p, seed, shape, 3, False)
        torch.library.opcheck(
            operators.apply_bits, (torch.randn(2, 3, 9, 7), bits, kept, per_channel, channels_last)
        )


@compiled
def test_every_kernel_compiles_for_hopper():
    """To machine code, for every dtype and option, and with arguments of 1, which Triton makes constants."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dropblock_det.ops import cuda

    i32, i64, f32, f64 = (getattr(triton.language, name) for name in ("int32", "int64", "float32", "float64"))
    pointers = {"p_ptr": "*fp32", "gamma_ptr": "*fp64", "kept_ptr": "*i64", "seed_ptr": "*i64"}
    variants = [
        *[(cuda._prepare, "i32", {"EXACT": exact, "COVER": 8}) for exact in (False, True)],
        *[(cuda._draw_seeds, "i32", {"INDEX": index, "RUNS": 2, "WORDS": 256}) for index in (i32, i64)],
        *[(cuda._spread, "i32", {"LENGTH": 7, "COUNT": count, "WORDS": 256}) for count in (False, True)],
        *[
            (
                cuda._scale,
                x,
                {
                    "INDEX": index,
                    "SHARED": shared,
                    "CHANNELS_LAST": last,
                    "WORDS": 64,
                    "WIDE": f64 if x == "fp64" else f32,
                },
            )
            for x, index, (shared, last) in itertools.product(
                ("fp16", "bf16", "fp32", "fp64"), (i32, i64), ((False, False), (True, False), (True, True))
            )
        ],
    ]
    for (kernel, x, constants), ones in itertools.product(variants, (False, True)):
        signature = {}
        for name in kernel.arg_names:
            if name in constants:
                signature[name] = "constexpr"
            elif name in ("x_ptr", "y_ptr"):
                signature[name] = "*" + x
            elif name.endswith("_ptr"):
                signature[name] = pointers.get(name, "*i32")
            else:
                large = kernel is cuda._scale and constants["INDEX"] is i64
                signature[name] = "constexpr" if ones else "i64" if large else "i32"
        values = {name: constants.get(name, 1) for name, kind in signature.items() if kind == "constexpr"}
        source = ASTSource(kernel, signature, {(kernel.arg_names.index(n),): v for n, v in values.items()})
        assert "cubin" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm


@pytest.mark.gpu
class TestOnAGpu:
    """What only a device can show."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("per_channel", [True, False])
    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    def test_output_and_gradient(self, dtype, per_channel, memory_format):
        # None so small that float16 has fewer digits for it.
        x = torch.rand(4, 24, 25, 34, device="cuda").add(0.5).to(dtype, memory_format=memory_format)
        x.requires_grad_()
        y = drop_block2d(x, 0.3, 5, per_channel=per_channel)
        kept = (y != 0) if per_channel else (y != 0).any(1, keepdim=True).expand_as(y)
        scale = 1 / kept.double().mean()
        grad = torch.rand_like(y) + 0.5
        (found,) = torch.autograd.grad(y, x, grad)
        rtol = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
        assert y.is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(y.double(), x.double() * kept * scale, rtol=rtol, atol=0)
        torch.testing.assert_close(found.double(), grad.double() * kept * scale, rtol=rtol, atol=0)

    @pytest.mark.parametrize("calibration", ["paper", "exact"])
    @pytest.mark.parametrize(
        ("size", "block_size", "p"), [((7, 11), 7, 0.1), ((50, 68), 7, 0.1), ((100, 136), 3, 0.3)]
    )
    def test_realised_share(self, size, block_size, p, calibration):
        """Within 1 % at a standard error of at most 0.25 %."""
        gamma = reference.corner_probability(p, block_size, *size, calibration)
        expected = reference.expected_drop_share(gamma, block_size, *size)
        x = torch.ones(1, 100_000_000 // (size[0] * size[1]), *size, device="cuda")
        shares = (drop_block2d(x, p, block_size, calibration=calibration) == 0).flatten(2).float().mean(2)
        assert shares.std() / shares.numel() ** 0.5 < 0.0025 * expected
        assert shares.mean().item() == pytest.approx(expected, rel=0.01)

    def test_no_synchronization_and_memory_for_backward(self):
        x = torch.randn(8, 256, 50, 68, device="cuda", requires_grad=True)
        p = torch.tensor(0.1, device="cuda")
        drop_block2d(x, p, 7)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.set_sync_debug_mode("error")
        try:
            y = drop_block2d(x, p, 7)
            kept_for_backward = torch.cuda.memory_allocated() - before - y.numel() * y.element_size()
            y.sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert kept_for_backward <= x.numel() / 8 + 4096

    def test_captured_graph_draws_new_masks_and_follows_p(self):
        x = torch.ones(2, 16, 50, 68, device="cuda")
        p = torch.tensor(0.1, device="cuda")
        drop_block2d(x, p, 7)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = drop_block2d(x, p, 7)
        masks = []
        for value in (0.1, 0.1, 0.5):
            p.fill_(value)
            graph.replay()
            masks.append((y == 0).clone())
        assert not torch.equal(masks[0], masks[1])
        assert masks[2].float().mean() > 2 * masks[1].float().mean()

    def test_graph_of_a_layer_captured_at_p_0_follows_p(self):
        """A linear schedule starts at 0."""
        x = torch.ones(2, 16, 50, 68, device="cuda")
        layer = DropBlock2d(0.1, 7)
        layer(x)
        layer.p = 0.0
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        graph.replay()
        assert torch.equal(y, x)
        layer.p = 0.3
        graph.replay()
        assert 0.2 < (y == 0).float().mean() < 0.3

    def test_manual_seed(self):
        x = torch.randn(2, 16, 50, 68, device="cuda")
        torch.manual_seed(1)
        first = drop_block2d(x, 0.3, 5)
        assert not torch.equal(drop_block2d(x, 0.3, 5), first)
        torch.manual_seed(1)
        assert torch.equal(drop_block2d(x, 0.3, 5), first)

    def test_compiled(self):
        torch._dynamo.reset()
        p = torch.tensor(0.1, device="cuda")
        compiled = torch.compile(lambda x: drop_block2d(x, p, 3) * 2, fullgraph=True)
        x = torch.ones(2, 16, 50, 68, device="cuda", requires_grad=True)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for value in (0.1, 0.5, 0.0):
                p.fill_(value)
                y = compiled(x)
                (gradient,) = torch.autograd.grad(y.sum(), x)
                torch.testing.assert_close(gradient, y)

    @pytest.mark.parametrize("size", [(1, 1), (1, 1000), (1000, 1000)])
    @pytest.mark.parametrize("block_size", [1, 7, 1000])
    def test_extreme_maps(self, size, block_size):
        x = torch.ones(2, 3, *size, device="cuda")
        kept = drop_block2d(x, 0.3, block_size) != 0
        dropped = torch.nn.functional.avg_pool2d(
            (~kept).float(), [min(block_size, s) for s in size], stride=1
        )
        assert torch.equal(reference.mask_from_corners(dropped > 0.9999, block_size, *size), kept)

    def test_more_than_2_to_31_elements(self):
        x = torch.ones(9, 256, 1000, 1000, dtype=torch.bfloat16, device="cuda")
        kept = drop_block2d(x, 0.1, 7)[-1] != 0
        assert (~kept).float().mean().item() == pytest.approx(0.0951, rel=0.01)

    def test_a_sample_of_more_than_2_to_31_elements_with_a_shared_mask(self):
        x = torch.ones(1, 250, 3000, 3000, dtype=torch.bfloat16, device="cuda")
        kept = drop_block2d(x, 0.1, 7, per_channel=False)[0] != 0
        assert (kept == kept[0]).all()
        assert (~kept[0]).float().mean().item() == pytest.approx(0.0951, rel=0.03)  # four standard errors
