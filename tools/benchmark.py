"""Measures DropBlock against its peers: on one map (op) or in a RetinaNet's training step (train-step)."""

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

import torch

from dropblock_det import benchmark, benchmark_report
from dropblock_det.errors import InputError, run_tool

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
    if (given.p is None) != (given.block_size is None):
        raise InputError("--p and --block-size belong together")
    if given.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch finds no CUDA device here")
    gpu = given.device == "cuda"
    for made in settings(given, gpu):
        for row in made:
            ratio = f"{row.relative:6.2f} x {row.relative_to}"
            print(
                f"{row.shape:14} {row.setting:22} {row.provider:30} {row.median_ms:9.2f} ms  {ratio}",
                flush=True,
            )
        benchmark_report.append_csv(given.output, made)  # now: a run that is cut short keeps what it has
    given.output.with_suffix(".md").write_text(benchmark_report.markdown(given.output))
    benchmark_report.plot(given.output, given.output.with_suffix(".png"))
    print(f"rows appended to {given.output}; table and plot beside it")


def settings(given: argparse.Namespace, gpu: bool) -> Iterator[list[benchmark.Row]]:
    """Measures one setting after the other."""
    styles = STYLES if given.p is None else ((given.block_size, given.p),)
    if given.what == "train-step":
        size = tuple(given.size or ((800, 1088) if gpu else (320, 416)))
        rounds = given.rounds or (50 if gpu else 10)
        for batch, (block_size, p) in itertools.product(given.batch or (2,), styles):
            yield benchmark.benchmark_train_step(size, batch, block_size, p, rounds, given.device)
        return
    rounds = given.rounds or (50 if gpu else 20)
    for batch, stage, dtype, (block_size, p) in itertools.product(
        given.batch or ((2, 8) if gpu else (2,)),
        given.stage or (benchmark.STAGES if gpu else (3,)),
        given.dtype or (DTYPES if gpu else DTYPES[:1]),
        styles,
    ):
        shape = (batch, *benchmark.STAGES[stage])
        dtype = getattr(torch, dtype)
        yield benchmark.benchmark_op(
            shape, dtype, given.channels_last, block_size, p, rounds, given.device, print
        )


if __name__ == "__main__":
    run_tool(main)
