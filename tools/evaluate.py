"""Evaluates a checkpoint: the twelve COCO figures and val_loss, from the checkpoint and the images alone."""

import argparse
from pathlib import Path

from dropblock_det.errors import run_tool
from dropblock_det.training.cli import evaluate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="a .ckpt file that tools/train.py wrote")
    parser.add_argument("--data", metavar="ROOT", help="COCO folder; default: the one of the training")
    parser.add_argument(
        "--images", metavar="FOLDER", help="image folder below ROOT; default: as in the training"
    )
    parser.add_argument("--annotations", metavar="JSON", help="annotation file below ROOT; default: likewise")
    parser.add_argument("--results", type=Path, metavar="JSON", help="write detections as COCO results JSON")
    parser.add_argument("--batch-size", type=int, help="images per batch; default: as in the training")
    parser.add_argument("--accelerator", default="auto", help="auto (default), cpu, gpu, ...")
    parser.add_argument("--devices", type=int, default=1, help="how many of them (default: 1)")
    given = parser.parse_args()
    data = {
        "root": given.data,
        "val_images": given.images,
        "val_annotations": given.annotations,
        "batch_size": given.batch_size,
    }
    evaluate(
        given.checkpoint,
        {name: value for name, value in data.items() if value is not None},
        given.results,
        {"accelerator": given.accelerator, "devices": given.devices},
    )


if __name__ == "__main__":
    run_tool(main)
