"""Measures DropBlock against its peers: on one map, or in a training step of RetinaNet.

dropblock-det benchmark op --stage 1 3 --busy 2
dropblock-det benchmark train-step --size 800 1088 --compiled

Case after case is measured, and each one's rows are written before the next.
"""

import itertools
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from msgspec import Meta
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dropblock_det.arguments import Count, Share, Workers
from dropblock_det.benchmark.cases import STAGES, op_case, train_step_case
from dropblock_det.benchmark.measure import WARM_UP, Case, Row, measure
from dropblock_det.benchmark.report import markdown, read_rows, write_rows
from dropblock_det.commands import PlainConsole
from dropblock_det.errors import InputError
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
    rounds = rounds or (50 if gpu else 20)
    measure_all([partial(measure_case, case, rounds, busy) for case in cases], rounds, output)


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
        batch: Default: 2; on a GPU 2 and 8, compiled 8.
        compiled: The backbone compiled by torch.compile, which takes minutes.
        block_size: With --p. Default: 7 with p 0.1, and, not compiled, 3 with p 0.3.
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
        for n, style in itertools.product(
            batch or ((8,) if gpu and compiled else (2, 8) if gpu else (2,)),
            styles(block_size, p)[: 1 if compiled else None],
        )
    ]
    rounds = rounds or (50 if gpu else 10)
    measure_all([partial(measure_case, case, rounds, 0) for case in cases], rounds, output)


def training(
    root: Path | None = None,
    name: str = "retinanet_resnet50_fpn",
    size: list[Side] | None = None,
    batch: list[Count] | None = None,
    workers: Workers | None = None,
    precision: str = "auto",
    rounds: Rounds | None = None,
    steps: Count | None = None,
    device: Device | None = None,
    output: Path = OUTPUT,
) -> None:
    """Times training on COCO images beside torchvision's reference loop, and the parts of a step of ours.

    Args:
        root: COCO folder. Default: what DROPBLOCK_DET_COCO names.
        name: The detector, as in torchvision.
        size: Shorter side of the images. Default: 256; on a GPU 512 and 800. SSDs have a size of their own.
        batch: Default: 8; on a GPU 8 and 16.
        workers: Processes that load images, for each of both. Default: 2; on a GPU 8.
        precision: Of ours, as --trainer.precision.
        rounds: Default: 12; on a GPU 10.
        steps: Of each in a round. Default: 2; on a GPU 10.
        device: cpu or cuda. Default: a GPU where there is one.
        output: CSV file to which rows are appended; a .md and a .png are written beside it.
    """
    from dropblock_det.benchmark.training import (  # Lightning takes seconds to import
        TrainingCase,
        measure_training,
    )

    device = checked_device(device)
    gpu = device == "cuda"
    folder = root or os.environ.get("DROPBLOCK_DET_COCO")
    if not folder:
        raise InputError("--root: give a COCO folder")
    sizes: Sequence[int | None] = (None,) if name.startswith("ssd") else ((512, 800) if gpu else (256,))
    rounds, steps = rounds or (10 if gpu else 12), steps or (10 if gpu else 2)
    workers = (8 if gpu else 2) if workers is None else workers
    cases = [
        TrainingCase(Path(folder), name, side, n, workers, precision, device, rounds, steps)
        for side, n in itertools.product(size or sizes, batch or ((8, 16) if gpu else (8,)))
    ]
    measure_all([partial(measure_training, case) for case in cases], rounds, output)


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


def heading(row: Row) -> tuple[str, str, str]:
    """What the rows of one measurement have in common."""
    return row.what, row.shape, row.setting


def measure_case(case: Callable[[], Case], rounds: int, busy: int, on_round: Callable[[], None]) -> list[Row]:
    """Makes a case and measures it."""
    return measure(case(), rounds, on_round, busy)


def measure_all(
    measurements: Sequence[Callable[[Callable[[], None]], list[Row]]], rounds: int, output: Path
) -> None:
    """Measures one after the other and appends the rows; a run that is cut short keeps what it has.

    Args:
        measurements: Each gives rows, and calls its argument after every round.
        rounds: Of each, without the warm-up.
        output: The rows' file.
    """
    rows = read_rows(output)
    console = PlainConsole()
    columns = (TextColumn("rounds"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Drawn between two rounds only: a thread that redraws would be measured too.
    progress = Progress(*columns, console=console, auto_refresh=False)
    with progress:
        bar = progress.add_task("", total=len(measurements) * (rounds + WARM_UP))

        def on_round() -> None:
            progress.advance(bar)
            progress.refresh()

        for measurement in measurements:
            made = measurement(on_round)
            for (what, shape, setting), group in itertools.groupby(made, heading):
                console.print(f"{what}, {shape}, {setting}:")
                for row in group:
                    console.print(
                        f"  {row.provider:58} {row.median_ms:9.2f} ms"
                        f"  {row.relative:6.3g} x {row.relative_to} (means {row.relative_mean:.3g} x)"
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


MEASUREMENTS: dict[str, Callable[..., None]] = {
    "op": op,
    "train-step": train_step,
    "training": training,
}
"""The functions by the word that chooses one on the command line."""
