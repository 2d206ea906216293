"""Draws what the regularizers remove from a feature map: ``dropblock-det show-masks``."""

from dropblock_det.__main__ import main

if __name__ == "__main__":
    main("show-masks")
