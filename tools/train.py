"""Trains a detector; ``--help`` lists the settings, ``--config`` files in configs/ hold them."""

from pathlib import Path

from dropblock_det.errors import run_tool


def main() -> None:
    from dropblock_det.training.cli import train  # here, so that Ctrl-C ends the imports too

    train(Path(__file__).parents[1] / "configs" / "quickstart.yaml")


if __name__ == "__main__":
    run_tool(main)
