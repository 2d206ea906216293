"""Makes a subset of COCO 2017: ``dropblock-det prepare-coco``."""

from dropblock_det.__main__ import main

if __name__ == "__main__":
    main("prepare-coco")
