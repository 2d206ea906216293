"""Shows where a placement puts regularizers: ``dropblock-det list-sites``."""

from dropblock_det.__main__ import main

if __name__ == "__main__":
    main("list-sites")
