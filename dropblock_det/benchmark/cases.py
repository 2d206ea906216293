"""What is measured against one another: DropBlock implementations on one map, and in a training step."""

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from dropblock_det.benchmark.measure import Case, check_memory
from dropblock_det.inject.inject import regularize_
from dropblock_det.layers import make_regularizer
from dropblock_det.ops import dropblock, reference

# The outputs of a ResNet-50's four stages for images of 800 x 1088: channels, H, W.
STAGES = {1: (256, 200, 272), 2: (512, 100, 136), 3: (1024, 50, 68), 4: (2048, 25, 34)}
BASELINE = "F.dropout"


def ours(path: str, x: Tensor, p: float | Tensor, block_size: int, per_channel: bool = True) -> Tensor:
    """:func:`drop_block2d` forced onto one path."""
    with dropblock.forced_path(path):
        return dropblock.drop_block2d(x, p, block_size, per_channel=per_channel)


def mmdetection(x: Tensor, p: float, block_size: int) -> Tensor:
    """Mmdetection's formulation: corners drawn inside, widened by max-pooling, a float mask kept."""
    n, c, h, w = x.shape
    gamma = reference.corner_probability(p, block_size, h, w)
    corners = (torch.rand(n, c, h - block_size + 1, w - block_size + 1, device=x.device) < gamma).to(x.dtype)
    half = block_size // 2
    mask = 1 - functional.max_pool2d(functional.pad(corners, [half] * 4), block_size, 1, half)
    return x * mask * (mask.numel() / (1e-6 + mask.sum()))


def providers(p: float, block_size: int, device: str) -> dict[str, Callable[[Tensor], Tensor] | str]:
    """Name to function of a map, or to the reason why it is left out."""
    path = "cuda" if device == "cuda" else "cpu"
    p_tensor = torch.tensor(p, dtype=torch.float32, device=device)  # as the layer keeps it
    made: dict[str, Callable[[Tensor], Tensor] | str] = {
        BASELINE: lambda x: functional.dropout(x, p),
        f"ours, {path}": lambda x: ours(path, x, p_tensor, block_size),
        f"ours, {path}, shared mask": lambda x: ours(path, x, p_tensor, block_size, per_channel=False),
        "ours, reference": lambda x: ours("reference", x, p, block_size),
        "floor: a scaled copy": lambda x: x * 1.1,
        "F.dropout2d": lambda x: functional.dropout2d(x, p),
        "mmdetection's formulation": lambda x: mmdetection(x, p, block_size),
    }
    try:
        from torchvision.ops import drop_block2d

        made["torchvision"] = lambda x: drop_block2d(x, p, block_size)
    except ImportError:
        made["torchvision"] = "torchvision is not installed"
    try:
        from timm.layers import drop_block_2d

        made["timm, per channel"] = lambda x: drop_block_2d(x, p, block_size, couple_channels=False)
        made["timm, shared mask"] = lambda x: drop_block_2d(x, p, block_size)
    except ImportError:
        made["timm"] = 'timm is not installed: pip install "dropblock_det[peers]"'
    try:
        from dropblock import DropBlock2D

        made["dropblock (PyPI), shared mask"] = DropBlock2D(p, block_size).train()
    except ImportError:
        made["dropblock (PyPI)"] = 'dropblock is not installed: pip install "dropblock_det[peers]"'
    return made


def forward_backward(function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> None:
    """What is timed: the output and the gradient of ``x``."""
    torch.autograd.grad(function(x), x, grad)


def working(
    works: Mapping[str, Callable[[], None]], log: Callable[[str], None]
) -> dict[str, Callable[[], None]]:
    """Calls each work once and leaves out peers that fail: their fault is a finding, not ours."""
    left = {}
    for name, work in works.items():
        try:
            work()
        except Exception as error:
            if name == "none" or name.startswith("ours"):
                raise
            log(f"{name}: left out, it fails here: {error}")
        else:
            left[name] = work
    return left


def op_case(
    shape: tuple[int, ...],
    block_size: int,
    p: float,
    device: str,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    log: Callable[[str], None] = print,
) -> Case:
    """Forward and backward of every provider on one map; ``log`` gets why one is left out."""
    check_memory(f"a map of {shape}", 8 * math.prod(shape) * dtype.itemsize, device)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(shape, dtype=dtype, device=device).contiguous(memory_format=memory_format)
    x.requires_grad_()
    grad = torch.randn_like(x)
    works: dict[str, Callable[[], None]] = {}
    for name, function in providers(p, block_size, device).items():
        if isinstance(function, str):
            log(f"{name}: left out, {function}")
        else:
            works[name] = partial(forward_backward, function, x, grad)
    works = working(works, log)
    layout = " channels_last" if channels_last else ""
    setting = f"{str(dtype).removeprefix('torch.')}{layout} k={block_size} p={p:g}"
    return Case("op", setting, shape, device, BASELINE, works)


def train_step_case(
    size: tuple[int, int],
    batch: int,
    block_size: int,
    p: float,
    device: str,
    compiled: bool = False,
    log: Callable[[str], None] = print,
) -> Case:
    """Training steps of torchvision's RetinaNet R50-FPN with each regularizer at the ``paper`` placement.

    ``compiled``: the backbone, by torch.compile; without torchvision's DropBlock, whose compilation takes the
    longest. ``log`` gets why one is left out.
    """
    from torchvision.models.detection import retinanet_resnet50_fpn
    from torchvision.ops import DropBlock2d

    height, width = size
    # About: 2.5 KB of activations per pixel, and four models with their gradients.
    check_memory(f"batch {batch} at {height}x{width}", 2500.0 * batch * height * width + 2**30, device)
    images = [torch.rand(3, height, width, device=device) for _ in range(batch)]
    box = torch.tensor([[width * 0.2, height * 0.2, width * 0.6, height * 0.7]], device=device)
    targets = [{"boxes": box, "labels": torch.tensor([1], device=device)} for _ in range(batch)]

    def training_step(make: Callable[[], nn.Module] | None) -> Callable[[], None]:
        torch.manual_seed(0)
        model = retinanet_resnet50_fpn(
            weights=None, weights_backbone=None, min_size=min(size), max_size=max(size)
        )
        model.to(device).train()
        if make:
            regularize_(model, make, at="paper")
        if compiled:
            model.backbone.compile()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

        def step() -> None:
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss = sum(model(images, targets).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return step

    if compiled:  # or the sizes of an earlier case, which the code is then general for, would cost time
        torch._dynamo.reset()
    works = {
        "none": training_step(None),
        "ours": training_step(lambda: make_regularizer("dropblock", p, block_size)),
        BASELINE: training_step(lambda: make_regularizer("dropout", p)),
    }
    if not compiled:
        works["torchvision"] = training_step(lambda: DropBlock2d(p, block_size))
    works = working(works, log)
    dtype = "bfloat16" if device == "cuda" else "float32"
    setting = f"RetinaNet R50-FPN {dtype}{' compiled' if compiled else ''} k={block_size} p={p:g}"
    return Case("train-step", setting, (batch, 3, height, width), device, "none", works)
