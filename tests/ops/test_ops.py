"""``drop_block2d`` on every path: the peers' faults, rates, gradients, dtypes, memory formats, compilation.

The ``cuda`` path runs here in Triton's interpreter, in a process of its own: see ``test_cuda_kernels.py``.
"""

import os

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dropblock_det.errors import InputError
from dropblock_det.ops import dropblock, reference
from dropblock_det.ops.dropblock import drop_block2d

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(params=["reference", "cpu", *(["cuda"] if INTERPRETED else [])])
def path(request, monkeypatch):
    monkeypatch.setattr(dropblock, "FORCED_PATH", request.param)
    if request.param == "cuda":
        from dropblock_det.ops import cuda

        # The interpreter's time goes by programs, not by elements.
        monkeypatch.setattr(cuda, "TILES", (1 << 13, 1 << 13))
        monkeypatch.setattr(cuda, "PIXELS", 1 << 10)
    return request.param


def test_drops_whole_blocks_and_scales_by_the_kept_share(path):
    torch.manual_seed(0)
    x = torch.rand(3, 5, 20, 31) + 1
    y = drop_block2d(x, 0.3, 4)
    kept = y != 0
    assert 0 < kept.float().mean() < 1
    torch.testing.assert_close(y, x * kept / kept.float().mean())
    dropped = (~kept).float()
    corners = torch.nn.functional.avg_pool2d(dropped, 4, stride=1) == 1  # every 4x4 block wholly dropped
    # Together they explain all of it.
    assert torch.equal(reference.mask_from_corners(corners, 4, 20, 31), kept)


@pytest.mark.parametrize("calibration", ["paper", "exact"])
@pytest.mark.parametrize(
    ("height", "width", "block_size", "p"),
    [
        (1, 1, 1, 0.1),
        (1, 1, 9, 0.5),
        (1, 30, 4, 0.3),
        (6, 6, 7, 0.2),  # torchvision raises
        (7, 7, 7, 0.3),  # timm at p=0.1 drops 93 %
        (7, 11, 7, 0.1),  # timm drops 61 %
        (25, 34, 9, 0.5),
        (25, 34, 1, 0.5),
        (25, 34, 2, 0.3),
        (50, 68, 7, 0.1),
        (100, 136, 3, 0.3),
        (100, 136, 9, 0.5),
    ],
)
def test_realised_share_is_the_expected_one(path, height, width, block_size, p, calibration):
    """Within 1 % relative, the standard error at most 0.3 %: an error of 3 % fails by six of them."""
    if path == "cuda" and (width, block_size) != (34, 9):
        pytest.skip("the interpreter is slow: one map; test_cuda_kernels.py tests the corners and the mask")
    gamma = reference.corner_probability(p, block_size, height, width, calibration)
    expected = reference.expected_drop_share(gamma, block_size, height, width)
    if calibration == "exact":
        assert expected == pytest.approx(p)
    torch.manual_seed(1)
    x = torch.ones(1, max(1, 2_000_000 // (height * width)), height, width)
    shares = torch.empty(0)
    for _ in range(200):
        dropped = drop_block2d(x, p, block_size, calibration=calibration) == 0
        shares = torch.cat([shares, dropped.flatten(2).float().mean(2).flatten()])
        error = shares.std() / len(shares) ** 0.5
        if error < 0.003 * expected:
            break
    assert error < 0.003 * expected
    assert shares.mean() == pytest.approx(expected, rel=0.01)


def test_half_precision_does_not_overflow_the_count(path):
    """torchvision returns zeros: it sums the mask, of more than 65,504 elements, in float16."""
    x = torch.ones(2, 64, 32, 32, dtype=torch.float16)
    y = drop_block2d(x, 0.1, 7)
    assert torch.isfinite(y).all()
    assert y.float().mean() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)],
)
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_output_and_gradient(path, dtype, tolerance, per_channel, memory_format):
    """One rounding at most: 2**-11 in float16 and 2**-8 in bfloat16, relative."""
    torch.manual_seed(2)
    x = torch.rand(3, 6, 13, 17, dtype=dtype).add(0.5)  # none is 0: zeros in y are dropped
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    y = drop_block2d(x, 0.3, 4, per_channel=per_channel)
    kept = (y != 0) if per_channel else (y != 0).any(1, keepdim=True).expand_as(y)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=memory_format)
    scale = 1 / kept.double().mean()
    torch.testing.assert_close(y.double(), x.double() * kept * scale, rtol=tolerance, atol=0)
    grad = torch.rand_like(y).add(0.5)  # tiny numbers are subnormal in float16
    (found,) = torch.autograd.grad(y, x, grad)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), grad.double() * kept * scale, rtol=tolerance, atol=0)
    if not per_channel:
        assert ((y != 0) == (y != 0)[:, :1]).all()


def test_strided_input_and_gradient(path):
    x = torch.randn(4, 18, 12, 9, requires_grad=True)
    y = drop_block2d(x.transpose(0, 1)[::2].transpose(2, 3), 0.2, 3)
    y.backward(torch.randn(9, 12, 4, 9).permute(0, 2, 3, 1)[..., :12])
    assert torch.equal(x.grad.ne(0)[:, ::2], y.ne(0).transpose(0, 1).transpose(2, 3))
    assert (x.grad[:, 1::2] == 0).all()


@pytest.mark.parametrize("p", [1.0, 1])
def test_all_dropped_is_zero_not_nan(path, p):
    x = torch.randn(2, 3, 7, 7, requires_grad=True)
    y = drop_block2d(x, p, 7)
    y.sum().backward()
    assert (y == 0).all()
    assert (x.grad == 0).all()


def test_a_tensor_p(path):
    x = torch.randn(2, 3, 20, 20)
    torch.manual_seed(3)
    y = drop_block2d(x, 0.25, 3)
    torch.manual_seed(3)
    assert torch.equal(drop_block2d(x, torch.tensor(0.25), 3), y)
    assert torch.equal(drop_block2d(x, torch.tensor(0.0), 3), x)
    for calibration in reference.CALIBRATIONS:  # clamped: there is no synchronization to complain
        assert torch.equal(drop_block2d(x, torch.tensor(-1.0), 3, calibration=calibration), x)
        assert (drop_block2d(x, torch.tensor(2.0), 1, calibration=calibration) == 0).all()


def test_manual_seed_and_generator_state(path):
    x = torch.randn(2, 8, 20, 20)
    torch.manual_seed(4)
    first, state = drop_block2d(x, 0.3, 5), torch.get_rng_state()
    second = drop_block2d(x, 0.3, 5)
    assert not torch.equal(first, second)
    torch.manual_seed(4)
    assert torch.equal(drop_block2d(x, 0.3, 5), first)
    torch.set_rng_state(state)
    assert torch.equal(drop_block2d(x, 0.3, 5), second)


@pytest.mark.parametrize(
    ("block_size", "p", "per_channel"), [(1, 0.5, True), (3, 0.1, True), (3, 0.1, False)]
)
def test_the_default_device_does_not_matter(path, block_size, p, per_channel):
    """What the path makes for itself lies where ``x`` does."""
    x, drawn = torch.randn(2, 4, 9, 9), []
    for device in ("cpu", "meta"):
        torch.manual_seed(16)
        with torch.device(device):
            drawn.append(drop_block2d(x, p, block_size, per_channel=per_channel))
    assert torch.equal(*drawn)


def test_identity_cases(path):
    x = torch.randn(2, 3, 5, 5)
    empty = torch.randn(0, 3, 5, 5)
    assert drop_block2d(x, 0.5, 3, training=False) is x
    assert drop_block2d(x, 0.0, 3) is x
    assert drop_block2d(empty, 0.5, 3).shape == empty.shape
    assert drop_block2d(torch.randn(2, 3, 0, 5), 0.5, 3).numel() == 0


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"p": 1.5}, ("p", "1.5")),
        ({"p": -0.1}, ("p", "-0.1")),
        ({"p": float("nan")}, ("p", "nan")),
        ({"p": "0.1"}, ("p", "'0.1'")),
        ({"p": True}, ("p", "True")),
        ({"p": torch.tensor(float("nan"))}, ("p", "nan")),
        ({"p": torch.tensor([0.1])}, ("p", "(1,)")),
        ({"p": torch.tensor(0.1, dtype=torch.float64)}, ("p", "float64")),
        ({"block_size": 0}, ("block_size", "0")),
        ({"block_size": 3.0}, ("block_size", "3.0")),
        ({"block_size": True}, ("block_size", "True")),
        ({"block_size": 2**63}, ("block_size", str(2**63))),
        ({"block_size": (3, 0)}, ("block_size", "(3, 0)")),
        ({"block_size": (3,)}, ("block_size", "(3,)")),
        ({"block_size": (3, 3, 3)}, ("block_size", "(3, 3, 3)")),
        ({"block_size": "33"}, ("block_size", "'33'")),
        ({"calibration": "timm"}, ("calibration", "timm")),
        ({"x": torch.randn(3, 4, 4)}, ("x", "(3, 4, 4)")),
        ({"x": torch.ones(1, 1, 4, 4, dtype=torch.int32)}, ("x", "int32")),
        ({"x": torch.ones(1, 1, 4, 4, dtype=torch.complex64)}, ("x", "complex64")),
        ({"x": torch.ones(1, 1, 4, 4).to_sparse()}, ("x", "sparse")),
    ],
)
def test_bad_arguments_are_named(path, arguments, names):
    if path == "cuda" and names == ("p", "nan") and isinstance(arguments["p"], torch.Tensor):
        pytest.skip("a tensor p stays on the device: there is no number to refuse")
    with pytest.raises(InputError) as caught:
        drop_block2d(**{"x": torch.randn(1, 1, 4, 4), "p": 0.1, "block_size": 3} | arguments)
    assert all(name in str(caught.value) for name in names)
    assert "\n" not in str(caught.value)


def test_what_is_no_tensor_is_a_type_error():
    with pytest.raises(TypeError, match="x must be a tensor, not str"):
        drop_block2d("x", 0.1, 3)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("block_size", [(2, 5), (4, 1), (1, 7), (50, 3)])
def test_rectangular_blocks(path, block_size, per_channel):
    torch.manual_seed(12)
    x = (torch.rand(3, 5, 20, 31) + 1).requires_grad_()
    y = drop_block2d(x, 0.3, block_size, per_channel=per_channel)
    kept = y != 0
    assert 0 < kept.float().mean() < 1
    kh, kw, _, _ = reference.block_and_grid(20, 31, block_size)
    corners = torch.nn.functional.avg_pool2d((~kept).float(), (kh, kw), stride=1) > 0.9999
    assert torch.equal(reference.mask_from_corners(corners, block_size, 20, 31), kept)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient * x, y)


@pytest.mark.parametrize("calibration", reference.CALIBRATIONS)
def test_the_share_of_rectangular_blocks(path, calibration):
    """Within 1 %, at a standard error of at most 0.25 %."""
    if path == "cuda":
        pytest.skip("the interpreter is slow")
    gamma = reference.corner_probability(0.3, (2, 9), 12, 10, calibration)
    expected = reference.expected_drop_share(gamma, (2, 9), 12, 10)
    torch.manual_seed(13)
    dropped = drop_block2d(torch.ones(2, 40_000, 12, 10), 0.3, (2, 9), calibration=calibration) == 0
    shares = dropped.float().mean((2, 3)).flatten()
    assert shares.std() / len(shares) ** 0.5 < 0.0025 * expected
    assert shares.mean() == pytest.approx(expected, rel=0.01)


def test_numpys_integers_and_equal_sides_are_the_integer(path):
    x, drawn = torch.randn(2, 3, 20, 20), []
    for block_size in (3, np.int64(3), (3, 3), [np.int32(3), 3]):
        torch.manual_seed(14)
        drawn.append(drop_block2d(x, 0.3, block_size))
    assert all(torch.equal(y, drawn[0]) for y in drawn)


def test_an_unknown_path_is_named(monkeypatch):
    monkeypatch.setattr(dropblock, "FORCED_PATH", "gpu")
    with pytest.raises(InputError, match=r"DROPBLOCK_DET_PATH.*'gpu'"):
        drop_block2d(torch.randn(1, 1, 4, 4), 0.1, 3)


def test_gradients_to_any_order(path):
    if path == "cuda":
        pytest.skip("the interpreter is slow, and the autograd function is the CPU path's")

    def f(x):
        torch.manual_seed(5)
        return drop_block2d(x, 0.3, 3) ** 2

    x = torch.randn(2, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(f, x)
    assert torch.autograd.gradgradcheck(f, x)


def test_func_transforms_are_right_or_refused():
    x = torch.randn(2, 3, 9, 9)
    torch.manual_seed(6)
    gradient = torch.func.grad(lambda x: drop_block2d(x, 0.3, 3).sum())(x)
    torch.manual_seed(6)
    torch.testing.assert_close(gradient * x, drop_block2d(x, 0.3, 3))
    several = x.expand(4, -1, -1, -1, -1)
    masks = torch.func.vmap(lambda x: drop_block2d(x, 0.3, 3), randomness="different")(several).ne(0)
    assert not torch.equal(masks[0], masks[1])
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(lambda x: drop_block2d(x, 0.3, 3))(several)
    y, tangent = torch.func.jvp(lambda x: drop_block2d(x, 0.3, 3), (x,), (x,))
    torch.testing.assert_close(tangent, y)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        drop_block2d(torch.autograd.forward_ad.make_dual(x, x), 0.3, 3)


def test_compiled_it_keeps_the_gradient_of_func_transforms():
    torch._dynamo.reset()
    x = torch.rand(2, 3, 9, 9) + 0.5
    gradient = torch.compile(torch.func.grad(lambda x: (drop_block2d(x, 0.3, 3) ** 2).sum()))(x)
    kept = gradient != 0
    assert 0.5 < kept.float().mean() < 1
    torch.testing.assert_close(gradient, 2 * x * kept / kept.float().mean() ** 2)


@pytest.mark.parametrize(("block_size", "p"), [(1, 0.5), (7, 0.3), (3, 0.1)])
def test_the_default_dtype_may_change_before_backward(path, block_size, p):
    """Lightning's ``64-true`` sets it around each hook."""
    x = torch.rand(2, 4, 6, 6).add(0.5).requires_grad_()
    y = drop_block2d(x, p, block_size)
    torch.set_default_dtype(torch.float64)
    try:
        (gradient,) = torch.autograd.grad(y.sum(), x)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(gradient * x, y)


@pytest.mark.parametrize(("block_size", "p"), [(1, 0.5), (3, 0.1)])
def test_the_default_dtype_does_not_change_the_mask(path, block_size, p):
    x = torch.ones(2, 4, 6, 6)
    torch.manual_seed(15)
    y = drop_block2d(x, p, block_size)
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(15)
        assert torch.equal(drop_block2d(x, p, block_size), y)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize(("block_size", "p"), [(1, 0.5), (3, 0.2)])
def test_what_is_dropped_is_0_whatever_it_was(path, value, per_channel, block_size, p):
    x = torch.full((2, 4, 9, 9), value, requires_grad=True)
    y = drop_block2d(x, p, block_size, per_channel=per_channel)
    dropped = y == 0
    assert 0.05 < dropped.float().mean() < 0.8
    assert not y[~dropped].isfinite().any()
    (gradient,) = torch.autograd.grad(y, x, torch.full_like(y, value))
    assert torch.equal(gradient == 0, dropped)


def test_activation_checkpointing_draws_the_same_mask(path):
    x = torch.randn(2, 4, 15, 15, requires_grad=True)
    torch.manual_seed(7)
    y = checkpoint(lambda x: drop_block2d(x.exp(), 0.3, 3), x, use_reentrant=False)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, y)


def test_autocast(path):
    x = torch.randn(2, 4, 15, 15)
    with torch.autocast("cpu", torch.bfloat16):
        assert drop_block2d(x, 0.3, 3).dtype == torch.float32
        assert drop_block2d(x.bfloat16(), 0.3, 3).dtype == torch.bfloat16


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_without_break_or_recompilation(path, backend):
    if path == "reference":
        pytest.skip("plain PyTorch reads p on the host")
    if path == "cuda" and backend == "inductor":
        pytest.skip("the interpreter covers the operators; Inductor itself imports the real Triton")
    torch._dynamo.reset()
    p = torch.tensor(0.1)
    compiled = torch.compile(
        lambda x: drop_block2d(x, p, 3) + drop_block2d(x, p, 3), fullgraph=True, backend=backend
    )
    x = torch.ones(2, 4, 15, 15, requires_grad=True)
    shares = []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for value in (0.1, 0.3, 0.6, 0.0):
            p.fill_(value)
            y = compiled(x)
            (gradient,) = torch.autograd.grad(y.sum(), x)
            torch.testing.assert_close(gradient, y)
            shares.append((y == 0).float().mean().item())
            if 0 < value < 0.5:
                assert len(y.unique()) == 4  # two masks, not one used twice
    assert shares[0] < shares[1] < shares[2]
    assert torch.equal(y, 2 * x)
