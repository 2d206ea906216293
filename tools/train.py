"""Trains a model, or goes on with a run: ``dropblock-det train``."""

from dropblock_det.__main__ import main

if __name__ == "__main__":
    main("train")
