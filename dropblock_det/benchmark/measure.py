"""Paired measurements of DropBlock implementations, as functions and inside a RetinaNet's training step."""

import contextlib
import importlib.metadata
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from msgspec import Meta
from torch import Tensor, nn
from torch.nn import functional

from dropblock_det.errors import InputError
from dropblock_det.inject.inject import regularize_
from dropblock_det.layers import make_regularizer
from dropblock_det.ops import dropblock, reference

# The outputs of a ResNet-50's four stages for images of 800 x 1088: channels, H, W.
STAGES = {1: (256, 200, 272), 2: (512, 100, 136), 3: (1024, 50, 68), 4: (2048, 25, 34)}
BASELINE = "F.dropout"
WARM_UP = 2  # rounds before those that count
HEAD_START = 4_000_000  # cycles of a GPU, about 2 ms, in which the host launches what is timed


Figure = Annotated[float, Meta(ge=0, le=1e12)]


@dataclass(frozen=True)
class Row:
    """One provider in one setting; milliseconds of forward and backward (and optimizer)."""

    what: str
    setting: str
    shape: Annotated[str, Meta(pattern=r"^[1-9]\d{0,9}(x[1-9]\d{0,9})*$")]
    provider: str
    rounds: int
    median_ms: Figure
    q10_ms: Figure
    q90_ms: Figure
    mean_ms: Figure | None
    relative_to: str
    relative: Annotated[float, Meta(gt=0, le=1e12)]  # median of the ratios within a round
    relative_q10: Figure
    relative_q90: Figure
    relative_mean: Figure | None  # ratio of the means
    peak_memory_mib: Figure | None
    hardware: str
    versions: str
    measured: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime()))


@dataclass(frozen=True)
class Case:
    """What is timed against one another, by name, and what the rows say of it."""

    what: str
    setting: str
    shape: tuple[int, ...]
    device: str
    baseline: str
    works: Mapping[str, Callable[[], Any]]


def ours(path: str, x: Tensor, p: float | Tensor, block_size: int, per_channel: bool = True) -> Tensor:
    """:func:`drop_block2d` forced onto one path."""
    with dropblock.forced_path(path):
        return dropblock.drop_block2d(x, p, block_size, per_channel=per_channel)


def mmdetection(x: Tensor, p: float, block_size: int) -> Tensor:
    """The formulation of mmdetection's layer: seeds drawn inside, widened by max-pooling, float mask kept."""
    n, c, h, w = x.shape
    gamma = reference.corner_probability(p, block_size, h, w)
    seeds = (torch.rand(n, c, h - block_size + 1, w - block_size + 1, device=x.device) < gamma).to(x.dtype)
    half = block_size // 2
    mask = 1 - functional.max_pool2d(functional.pad(seeds, [half] * 4), block_size, 1, half)
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


def milliseconds(work: Callable[[], Any], device: str) -> float:
    """Wall time of one call; on a GPU the time between two events on its stream.

    The GPU sleeps first, so that the host runs ahead, as it does in a training step. Of an idle GPU the
    events would tell how long Python takes to launch small kernels.
    """
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(HEAD_START)
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    begun = time.perf_counter()
    work()
    return (time.perf_counter() - begun) * 1e3


def peak_memory(work: Callable[[], Any], device: str) -> float:
    """The most that one call holds beyond what was allocated before, results included, in MiB."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler chats on stderr
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    held = peak = 0
    events = profile.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Keeps so many processes busy beside what is measured inside, as a data loader's workers are."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def time_rounds(case: Case, rounds: int, on_round: Callable[[], None]) -> dict[str, list[float]]:
    """Times all works in every round, one after the other, each round starting at another one."""
    names = list(case.works)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-WARM_UP, rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            elapsed = milliseconds(case.works[name], case.device)
            if turn >= 0:
                times[name].append(elapsed)
        on_round()
    return times


def measure(case: Case, rounds: int, on_round: Callable[[], None] = lambda: None, busy: int = 0) -> list[Row]:
    """Measures the works of a case, and the memory of each map's.

    Args:
        case: What to time.
        rounds: How often each is timed.
        on_round: Called after every round.
        busy: Processes to keep busy meanwhile.
    """
    memory = {name: peak_memory(work, case.device) for name, work in case.works.items() if case.what == "op"}
    with busy_processes(busy):
        times = time_rounds(case, rounds, on_round)
    setting = f"{case.setting}, {busy} busy" if busy else case.setting
    base, mean = times[case.baseline], statistics.fmean
    made = []
    for name, own in times.items():
        ratios = [a / b for a, b in zip(own, base, strict=True)]
        made.append(
            Row(case.what, setting, "x".join(map(str, case.shape)), name, rounds,
                statistics.median(own), *quantiles(own), mean(own),
                case.baseline, statistics.median(ratios), *quantiles(ratios), mean(own) / mean(base),
                memory.get(name), hardware(case.device), versions())
        )  # fmt: skip
    return made


def versions() -> str:
    """Of what was measured."""
    packages = ("torch", "torchvision", "timm", "dropblock", "triton")
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return ", ".join(f"{name} {found[name]}" for name in packages if name in found)


def quantiles(values: list[float]) -> tuple[float, float]:
    """The 10 % and 90 % quantiles."""
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[0], cuts[-1]


def hardware(device: str) -> str:
    """The processor that did the work; of a CPU also its threads, and how malloc was told to keep memory."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    malloc = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_")]
    return ", ".join(
        [names[0] if names else platform.processor(), f"{torch.get_num_threads()} threads", *malloc]
    )


def check_memory(what: str, needed: float, device: str) -> None:
    """Raises :class:`InputError` where a measurement would not fit, before the system ends it."""
    if device == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > free:
        raise InputError(
            f"{what}: takes about {needed / 2**30:.3g} GiB, and there are {free / 2**30:.3g};"
            " give a smaller batch or size"
        )


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
    works = {}
    for name, function in providers(p, block_size, device).items():
        if isinstance(function, str):
            log(f"{name}: left out, {function}")
            continue
        work = partial(forward_backward, function, x, grad)
        try:
            work()
        except Exception as error:  # a peer's fault is a finding, not ours
            if name.startswith("ours"):
                raise
            log(f"{name}: left out, it fails here: {error}")
            continue
        works[name] = work
    layout = " channels_last" if channels_last else ""
    setting = f"{str(dtype).removeprefix('torch.')}{layout} k={block_size} p={p:g}"
    return Case("op", setting, shape, device, BASELINE, works)


def train_step_case(
    size: tuple[int, int], batch: int, block_size: int, p: float, device: str, compiled: bool = False
) -> Case:
    """Training steps of torchvision's RetinaNet R50-FPN with each regularizer at the ``paper`` placement.

    ``compiled``: the backbone, by torch.compile.
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

    works = {
        "none": training_step(None),
        "ours": training_step(lambda: make_regularizer("dropblock", p, block_size)),
        "F.dropout": training_step(lambda: make_regularizer("dropout", p)),
        "torchvision": training_step(lambda: DropBlock2d(p, block_size)),
    }
    dtype = "bfloat16" if device == "cuda" else "float32"
    setting = f"RetinaNet R50-FPN {dtype}{' compiled' if compiled else ''} k={block_size} p={p:g}"
    return Case("train-step", setting, (batch, 3, height, width), device, "none", works)
