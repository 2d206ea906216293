"""Measures DropBlock against its peers: on one map (op) or in a RetinaNet's training step (train-step).

python tools/benchmark.py op --stage 1 3 --busy 2
python tools/benchmark.py train-step --size 800 1088 --compiled
"""

from dropblock_det.errors import run_tool


def main() -> None:
    from dropblock_det.benchmark.tool import op, train_step
    from dropblock_det.commands import command

    command({"op": op, "train-step": train_step})


if __name__ == "__main__":
    run_tool(main)
