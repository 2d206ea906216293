"""Evaluates a checkpoint: the twelve COCO figures and val_loss, from the checkpoint and the images alone."""

from dropblock_det.errors import run_tool


def main() -> None:
    from dropblock_det.commands import command  # here, so that Ctrl-C ends the imports too
    from dropblock_det.training.evaluate import evaluate

    command(evaluate)


if __name__ == "__main__":
    run_tool(main)
