"""Evaluates a checkpoint: ``dropblock-det evaluate``."""

from dropblock_det.__main__ import main

if __name__ == "__main__":
    main("evaluate")
