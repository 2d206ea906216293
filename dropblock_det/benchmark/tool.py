"""Measures DropBlock against its peers: on one map, or in a training step of RetinaNet.

dropblock-det benchmark op --stage 1 3 --busy 2
dropblock-det benchmark train-step --size 800 1088 --compiled

Case after case is measured, and each one's rows are written before the next.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from msgspec import Meta
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dropblock_det.arguments import Count, Share
from dropblock_det.benchmark.measure import STAGES, WARM_UP, Case, measure, op_case, train_step_case
from dropblock_det.benchmark.report import markdown, read_rows, write_rows
from dropblock_det.commands import PlainConsole
from dropblock_det.errors import InputError, disk_errors
from dropblock_det.files import write_text

Rounds = Annotated[int, Meta(ge=2, le=10**6)]  # there are quantiles to give
Stage = Annotated[int, Meta(ge=1, le=4)]
Side = Annotated[int, Meta(ge=64, le=2**13)]  # below, the last stage's batch norms have one value
Busy = Annotated[int, Meta(ge=0, le=256)]
Device = Literal["cpu", "cuda"]
Dtype = Literal["float32", "float16", "bfloat16"]

DTYPES: tuple[Dtype, ...] = ("float32", "float16", "bfloat16")
STYLES = ((7, 0.1), (3, 0.3))  # block size, p
OUTPUT = Path("data/results/benchmark.csv")


def op(
    batch: list[Count] | None = None,
    stage: list[Stage] | None = None,
    dtype: list[Dtype] | None = None,
    channels_last: bool = False,
    block_size: Count | None = None,
    p: Share | None = None,
    busy: Busy = 0,
    rounds: Rounds | None = None,
    device: Device | None = None,
    output: Path = OUTPUT,
) -> None:
    """Times forward and backward on one map.

    Args:
        batch: Default: 2; on a GPU 2 and 8.
        stage: Of a ResNet-50, whose output the map is. Default: 3; on a GPU all.
        dtype: float32, float16, bfloat16. Default: float32; on a GPU all.
        channels_last: The map in that memory format.
        block_size: With --p. Default: 7 with p 0.1, and 3 with p 0.3.
        p: With --block-size.
        busy: So many processes keep the cores busy meanwhile.
        rounds: Default: 20; on a GPU 50.
        device: cpu or cuda. Default: a GPU where there is one.
        output: CSV file to which rows are appended; a .md and a .png are written beside it.
    """
    device = checked_device(device)
    gpu = device == "cuda"
    cases = [
        partial(op_case, (n, *STAGES[s]), *style, device, getattr(torch, d), channels_last)
        for n, s, d, style in itertools.product(
            batch or ((2, 8) if gpu else (2,)),
            stage or (STAGES if gpu else (3,)),
            dtype or (DTYPES if gpu else DTYPES[:1]),
            styles(block_size, p),
        )
    ]
    measure_all(cases, rounds or (50 if gpu else 20), output, busy)


def train_step(
    size: tuple[Side, Side] | None = None,
    batch: list[Count] | None = None,
    compiled: bool = False,
    block_size: Count | None = None,
    p: Share | None = None,
    rounds: Rounds | None = None,
    device: Device | None = None,
    output: Path = OUTPUT,
) -> None:
    """Times a training step of RetinaNet with each regularizer.

    Args:
        size: Height and width of the images. Default: 320 416; on a GPU 800 1088.
        batch: Default: 2; on a GPU 2 and 8.
        compiled: The backbone compiled by torch.compile.
        block_size: With --p. Default: 7 with p 0.1, and 3 with p 0.3.
        p: With --block-size.
        rounds: Default: 10; on a GPU 50.
        device: cpu or cuda. Default: a GPU where there is one.
        output: CSV file to which rows are appended; a .md and a .png are written beside it.
    """
    device = checked_device(device)
    gpu = device == "cuda"
    size = size or ((800, 1088) if gpu else (320, 416))
    cases = [
        partial(train_step_case, size, n, *style, device, compiled)
        for n, style in itertools.product(batch or ((2, 8) if gpu else (2,)), styles(block_size, p))
    ]
    measure_all(cases, rounds or (50 if gpu else 10), output)


def checked_device(device: Device | None) -> Device:
    """The device to measure."""
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise InputError("--device cuda: PyTorch finds no CUDA device here")
    return device or ("cuda" if available else "cpu")


def styles(block_size: int | None, p: float | None) -> Sequence[tuple[int, float]]:
    """Pairs of block size and p."""
    if (p is None) != (block_size is None):
        raise InputError("--p and --block-size belong together")
    return STYLES if block_size is None or p is None else ((block_size, p),)


def measure_all(cases: Sequence[Callable[[], Case]], rounds: int, output: Path, busy: int = 0) -> None:
    """Measures cases and appends their rows; a run that is cut short keeps what it has."""
    rows = read_rows(output)
    console = PlainConsole()
    columns = (TextColumn("rounds"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Drawn between two rounds only: a thread that redraws would be measured too.
    progress = Progress(*columns, console=console, auto_refresh=False)
    with progress, disk_errors(output.parent):
        bar = progress.add_task("", total=len(cases) * (rounds + WARM_UP))

        def on_round() -> None:
            progress.advance(bar)
            progress.refresh()

        for case in cases:
            made = measure(case(), rounds, on_round, busy)
            for row in made:
                console.print(
                    f"{row.shape:14} {row.setting:22} {row.provider:30} {row.median_ms:9.2f} ms"
                    f"  {row.relative:6.2f} x {row.relative_to} (means {row.relative_mean:.2f} x)"
                )
            rows += made
            write_rows(output, rows)
        write_text(output.with_suffix(".md"), markdown(rows))
        try:
            from dropblock_det.benchmark.figure import plot
        except ImportError as error:  # a machine lent for measuring may lack it
            console.print(f"no picture: {error}")
        else:
            plot(rows, output.with_suffix(".png"))
    console.print(f"rows appended to {output}; what is shown of them lies beside it")


MEASUREMENTS: dict[str, Callable[..., None]] = {"op": op, "train-step": train_step}
"""The functions by the word that chooses one on the command line."""
