"""Measures DropBlock against its peers: on one map (op) or in a RetinaNet's training step (train-step)."""

import argparse
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dropblock_det.benchmark import measure as benchmark
from dropblock_det.benchmark import report as benchmark_report
from dropblock_det.errors import InputError, disk_errors, run_tool
from dropblock_det.files import write_text
from dropblock_det.ops.dropblock import check_arguments

DTYPES = ("float32", "float16", "bfloat16")
STYLES = ((7, 0.1), (3, 0.3))  # block size, p


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("op", "train-step"))
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--batch", type=int, nargs="+", help="default: 2; op on a GPU 2 and 8")
    parser.add_argument(
        "--rounds", type=int, help="default: 50 on a GPU, on a CPU 20 (op) or 10 (train-step)"
    )
    parser.add_argument("--block-size", type=int, help="with --p; default: 7 with p 0.1, and 3 with p 0.3")
    parser.add_argument("--p", type=float)
    op = parser.add_argument_group("op")
    op.add_argument("--stage", type=int, nargs="+", choices=benchmark.STAGES, help="default: all; on a CPU 3")
    op.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: all; on a CPU float32")
    op.add_argument("--channels-last", action="store_true")
    step = parser.add_argument_group("train-step")
    step.add_argument(
        "--size", type=int, nargs=2, metavar=("H", "W"), help="default: 800 1088; on a CPU 320 416"
    )
    parser.add_argument("--output", type=Path, default=Path("data/results/benchmark.csv"), metavar="CSV",
                        help="rows are appended, and a .md and a .png are written beside it")  # fmt: skip
    given = parser.parse_args()
    check(given)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    columns = (TextColumn("rounds"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Drawn between two rounds only: a thread that redraws would be measured too.
    with (
        Progress(*columns, console=console, auto_refresh=False) as progress,
        disk_errors(given.output.parent),
    ):
        bar = progress.add_task("", total=None)

        def tick() -> None:
            progress.advance(bar)
            progress.refresh()

        measurements = list(settings(given, console.print, tick))
        progress.update(bar, total=len(measurements) * (given.rounds + benchmark.WARM_UP))
        for measurement in measurements:
            made = measurement()
            for row in made:
                ratio = f"{row.relative:6.2f} x {row.relative_to}"
                console.print(
                    f"{row.shape:14} {row.setting:22} {row.provider:30} {row.median_ms:9.2f} ms  {ratio}"
                )
            benchmark_report.append_csv(given.output, made)  # now: a run that is cut short keeps what it has
        write_text(given.output.with_suffix(".md"), benchmark_report.markdown(given.output))
        benchmark_report.plot(given.output, given.output.with_suffix(".png"))
    print(f"rows appended to {given.output}; table and plot beside it")


def check(given: argparse.Namespace) -> None:
    """Refuses before anything is measured, and fills in what depends on the device."""
    if given.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch finds no CUDA device here")
    if (given.p is None) != (given.block_size is None):
        raise InputError("--p and --block-size belong together")
    if given.p is not None:
        check_arguments(given.p, given.block_size, "paper")
    for name in ("batch", "size"):
        if min(getattr(given, name) or [1]) < 1:
            raise InputError(f"--{name} must be at least 1")
    if given.rounds is None:
        given.rounds = 50 if given.device == "cuda" else {"op": 20, "train-step": 10}[given.what]
    if given.rounds < 2:
        raise InputError("--rounds must be at least 2, for there are quantiles to tell")
    benchmark_report.check_csv(given.output)


def settings(
    given: argparse.Namespace, say: Callable[[str], None], tick: Callable[[], None]
) -> Iterator[Callable[[], list[benchmark.Row]]]:
    """What there is to measure, one setting after the other."""
    gpu = given.device == "cuda"
    styles = STYLES if given.p is None else ((given.block_size, given.p),)
    if given.what == "train-step":
        size = tuple(given.size or ((800, 1088) if gpu else (320, 416)))
        for batch, (block_size, p) in itertools.product(given.batch or (2,), styles):
            yield partial(
                benchmark.benchmark_train_step, size, batch, block_size, p, given.rounds, given.device, tick
            )
        return
    for batch, stage, dtype, (block_size, p) in itertools.product(
        given.batch or ((2, 8) if gpu else (2,)),
        given.stage or (benchmark.STAGES if gpu else (3,)),
        given.dtype or (DTYPES if gpu else DTYPES[:1]),
        styles,
    ):
        yield partial(
            benchmark.benchmark_op, (batch, *benchmark.STAGES[stage]), getattr(torch, dtype),
            given.channels_last, block_size, p, given.rounds, given.device, say, tick,
        )  # fmt: skip


if __name__ == "__main__":
    run_tool(main)
