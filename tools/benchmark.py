"""Measures DropBlock against its peers: on one map (op) or in a RetinaNet's training step (train-step)."""

import argparse
from pathlib import Path

import torch

from dropblock_det import benchmark
from dropblock_det.errors import InputError, run_tool

DTYPES = ("float32", "float16", "bfloat16")
STYLES = ((7, 0.1), (3, 0.3))  # block size, p


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("op", "train-step"))
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--batch", type=int, nargs="+", help="default: 2 and 8; op on a CPU 8; train-step 2")
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
    styles = STYLES if given.p is None else ((given.block_size, given.p),)
    made = []
    if given.what == "op":
        for batch in given.batch or ((2, 8) if gpu else (8,)):
            for stage in given.stage or (benchmark.STAGES if gpu else (3,)):
                for dtype in given.dtype or (DTYPES if gpu else DTYPES[:1]):
                    for block_size, p in styles:
                        made += benchmark.benchmark_op(
                            (batch, *benchmark.STAGES[stage]), getattr(torch, dtype), given.channels_last,
                            block_size, p, given.rounds or (50 if gpu else 20), given.device, print,
                        )  # fmt: skip
    else:
        size = tuple(given.size or ((800, 1088) if gpu else (320, 416)))
        for batch in given.batch or (2,):
            for block_size, p in styles:
                rounds = given.rounds or (50 if gpu else 10)
                made += benchmark.benchmark_train_step(size, batch, block_size, p, rounds, given.device)
    for row in made:
        ratio = f"{row.relative:6.2f} x {row.relative_to}"
        print(f"{row.setting:44} {row.provider:30} {row.median_ms:9.2f} ms  {ratio}")
    benchmark.append_csv(given.output, made)
    given.output.with_suffix(".md").write_text(benchmark.markdown(given.output))
    benchmark.plot(given.output, given.output.with_suffix(".png"))
    print(f"rows appended to {given.output}; table and plot beside it")


if __name__ == "__main__":
    run_tool(main)
