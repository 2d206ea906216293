"""Trains a detector; ``--help`` lists the settings, ``--config`` files in configs/ hold them."""

from pathlib import Path

from dropblock_det.errors import run_tool
from dropblock_det.training.cli import train

if __name__ == "__main__":
    run_tool(lambda: train(Path(__file__).parents[1] / "configs" / "quickstart.yaml"))
