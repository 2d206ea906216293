"""Predicts on images: ``dropblock-det predict``."""

from dropblock_det.__main__ import main

if __name__ == "__main__":
    main("predict")
