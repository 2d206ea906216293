"""Did it help? ``dropblock-det compare``."""

from dropblock_det.__main__ import main

if __name__ == "__main__":
    main("compare")
