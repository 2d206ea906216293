"""``drop_block2d``: checks the arguments and picks the path.

A path is a module with two functions. ``drop`` is DropBlock in ordinary eager code, as fast as its device
allows. ``draw_mask`` is an operator that only draws a mask, for compiled code and for ``torch.func``.
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from types import ModuleType

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from dropblock_det.errors import InputError
from dropblock_det.ops import cpu, reference
from dropblock_det.ops.layout import is_channels_last
from dropblock_det.ops.reference import CALIBRATIONS, BlockSize, block_sides, clamped

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PATHS = ("reference", "cpu", "cuda")
FORCED_PATH = os.environ.get("DROPBLOCK_DET_PATH")  # for debugging; read once, when first imported
HAS_TRITON = importlib.util.find_spec("triton") is not None


def check_p(p: float) -> None:
    """Raises :class:`InputError` for what is no probability."""
    if not isinstance(p, Real) or isinstance(p, bool) or not 0.0 <= p <= 1.0:
        raise InputError(f"p must be a number between 0 and 1, not {p!r}")


def check_arguments(p: float, block_size: BlockSize, per_channel: bool, calibration: str) -> None:
    """Raises :class:`InputError`, naming the argument and its value, for what no input could make right."""
    check_p(p)
    sides = block_size if isinstance(block_size, (tuple, list)) else (block_size, block_size)
    if len(sides) != 2 or not (_is_side(sides[0]) and _is_side(sides[1])):
        raise InputError(
            f"block_size must be an integer from 1 to 2**63 - 1, or a pair of them, not {block_size!r}"
        )
    if not isinstance(per_channel, bool):
        raise InputError(f"per_channel must be True or False, not {per_channel!r}")
    if calibration not in CALIBRATIONS:
        raise InputError(f"calibration must be one of {', '.join(CALIBRATIONS)}, not {calibration!r}")


def _is_side(side: object) -> bool:
    return isinstance(side, Integral) and not isinstance(side, bool) and 1 <= int(side) < 2**63


def check_map(x: Tensor) -> None:
    """Raises where ``x`` is not a map: a TypeError for what is no tensor, else :class:`InputError`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, not {type(x).__name__}")
    if x.layout != torch.strided:
        raise InputError(f"x must be a dense tensor, not {x.layout}")
    if x.dim() != 4:
        raise InputError(f"x must have 4 dimensions (N, C, H, W), not shape {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        raise InputError(f"x must be float16, bfloat16, float32 or float64, not {x.dtype}")


def drop_block2d(
    x: Tensor,
    p: float | Tensor,
    block_size: BlockSize,
    training: bool = True,
    per_channel: bool = True,
    calibration: str = "paper",
) -> Tensor:
    """Drops whole blocks of a feature map and scales up what is kept.

    It does not know whether a model is in training mode: in a ``forward``, use the module
    :class:`~dropblock_det.layers.DropBlock2d`, or pass ``training=self.training``. Otherwise it drops in
    evaluation too.

    The first three arguments are those of ``torchvision.ops.drop_block2d``. Random numbers come from the
    generator of the device of ``x``, as for ``F.dropout``.

    Args:
        x: ``(N, C, H, W)``, float16, bfloat16, float32 or float64, in any memory format, which is kept.
        p: drop probability in [0, 1]; as a 0-dim float32 tensor on the device of ``x`` it may change from
            call to call at no cost (no synchronization, no recompilation), and values outside are clamped.
        block_size: side of the dropped block, or its height and width: at least 1, odd or even. Clipped to
            the map, per axis.
        training: if False the input itself is returned, as it is when ``p`` is the number 0.
        per_channel: one mask per channel, which the paper found better, or one for all channels of a sample.
        calibration: ``"paper"`` (the published tables' gamma; the share dropped is lower than ``p`` because
            blocks overlap) or ``"exact"`` (the expected share dropped is ``p``).

    Returns:
        ``x * mask / kept share`` with the shape, dtype and memory format of ``x``; zeros if all is dropped.

    Raises:
        InputError: an argument is out of range, or ``x`` is not a dense 4-dimensional floating-point tensor.
        TypeError: ``x`` is no tensor.

    Source: Ghiasi, Lin and Le 2018, algorithm 1.
    """
    if has_torch_function_unary(x):  # subclasses of Tensor, and symbolic tracing
        return handle_torch_function(drop_block2d, (x,), x, p, block_size, training, per_channel, calibration)
    check_map(x)
    check_arguments(0.0 if isinstance(p, Tensor) else p, block_size, per_channel, calibration)
    if isinstance(p, Tensor) and (p.dim() != 0 or p.dtype != torch.float32 or p.device != x.device):
        raise InputError(
            f"p must be a number or a 0-dim float32 tensor on {x.device},"
            f" not {p.dtype} of shape {tuple(p.shape)} on {p.device}"
        )
    if not training or x.numel() == 0 or (not isinstance(p, Tensor) and p == 0):
        return x
    block_size, path = block_sides(block_size), _path(x)
    if path is reference:
        return reference.drop_block2d(x, clamped(p), block_size, per_channel, calibration)
    if not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active():
        return path.drop(x, p, block_size, calibration, per_channel)
    # Only drawing the mask is an operator. Applying it is plain tensor code, which torch.compile fuses into
    # the operations before and after it, and which torch.func can transform.
    if not isinstance(p, Tensor):
        p = torch.full((), p, dtype=torch.float32, device=x.device)
    seed = torch.randint(2**62, (), device=x.device)
    shape = (x.shape[0], x.shape[1] if per_channel else 1, *x.shape[2:])
    mask, kept = path.draw_mask(p, seed, shape, block_size, calibration, is_channels_last(x))
    return reference.apply_mask(x, mask, kept)


@contextmanager
def forced_path(name: str) -> Iterator[None]:
    """Every call inside takes the path of this name, whatever the device of ``x``."""
    global FORCED_PATH
    before, FORCED_PATH = FORCED_PATH, name
    try:
        yield
    finally:
        FORCED_PATH = before


def _path(x: Tensor) -> ModuleType:
    if FORCED_PATH is not None and FORCED_PATH not in PATHS:
        raise InputError(f"DROPBLOCK_DET_PATH must be one of {', '.join(PATHS)}, not {FORCED_PATH!r}")
    name = FORCED_PATH or x.device.type
    if name == "cuda" and HAS_TRITON:
        from dropblock_det.ops import cuda  # here, not above: triton may be missing and is slow to import

        return cuda
    return cpu if name == "cpu" else reference
