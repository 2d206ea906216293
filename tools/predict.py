"""Predicts on images: pictures with what a checkpoint's model sees, and COCO results JSON."""

import sys

from dropblock_det.errors import run_tool


def main() -> None:
    from dropblock_det.commands import command  # here, so that Ctrl-C ends the imports too
    from dropblock_det.training.predict import predict_files

    if command(predict_files):  # images that it had to leave out
        sys.exit(1)


if __name__ == "__main__":
    run_tool(main)
