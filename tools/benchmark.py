"""Measures DropBlock against its peers: ``dropblock-det benchmark``."""

from dropblock_det.__main__ import main

if __name__ == "__main__":
    main("benchmark")
