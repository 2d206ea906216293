"""Reading image files whose writer isn't trusted, and keeping decoded ones in memory."""

import re
import shutil
import stat
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from dropblock_det.errors import InputError

# What Pillow decodes itself; others would start foreign programs (EPS) or are no photographs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
MAX_PIXELS = 2**27  # 134 million: 400 MB decoded


def read_image(path: Path, width: int | None = None, height: int | None = None) -> Tensor:
    """Reads an image of any mode as RGB.

    The stored pixels are read as they are: an EXIF rotation isn't applied, as COCO's own tools don't apply
    it and boxes refer to stored pixels. Transparency is dropped, 16-bit gray keeps its high byte, of an
    animation the first frame is read.

    Args:
        path: The file; the format is read from its content, not its name.
        width: Expected width in pixels; None for any.
        height: Expected height in pixels; None for any.

    Returns:
        uint8 tensor (3, height, width), in channels-last memory order.

    Raises:
        InputError: The file is missing, broken, in an unknown format, too large or of another size.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would hang
            raise InputError(f"{path}: not a regular file; give an image")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's word on large images and odd metadata
            with Image.open(path, formats=FORMATS) as image:
                if width is not None and image.size != (width, height):
                    raise InputError(
                        f"{path}: {image.width}x{image.height} pixels, the annotations say {width}x{height}; "
                        "give the image they were made for (its EXIF rotation is not applied)"
                    )
                if image.width * image.height > MAX_PIXELS:
                    raise InputError(
                        f"{path}: {image.width}x{image.height} is over {MAX_PIXELS} pixels; cut it into tiles"
                    )
                if image.mode in ("I", "F"):
                    raise InputError(f"{path}: 32-bit pixels have no fixed range; convert it to 8 or 16 bit")
                if image.format == "JPEG" and image.mode in ("RGB", "L"):
                    # libjpeg-turbo as in Pillow, without two copies of the pixels
                    return decode_jpeg(torch.from_numpy(np.fromfile(path, np.uint8)), ImageReadMode.RGB)
                if image.mode.startswith("I;16"):
                    gray = (np.asarray(image) >> 8).astype(np.uint8)
                    pixels = np.repeat(gray[:, :, None], 3, axis=2)
                else:
                    pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such image; check the image folder and the file names") from None
    except InputError:
        raise
    except Exception as error:  # Pillow raises many kinds for broken files; each becomes one line
        reason = re.sub(r"^\w+, \S+\.cpp:\d+, ", "", " ".join(str(error).split())) or type(error).__name__
        raise InputError(
            f"{path}: can't be read as an image ({reason[:200]}); replace or remove it"
        ) from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


class ImageCache:
    """Decoded images in one block of shared memory, filled by whichever worker reads an image first.

    Which images have a place is settled beforehand: in order, as many as fit. So memory is bounded exactly,
    nothing is evicted, and worker processes share one copy.

    Args:
        sizes: (n, 2) heights and widths in pixels of all images.
        megabytes: Size limit, in units of 2**20 bytes.
    """

    def __init__(self, sizes: np.ndarray, megabytes: int) -> None:
        ends = np.cumsum(sizes.prod(axis=1, dtype=np.int64) * 3)
        self.sizes = sizes
        self.places = int(np.searchsorted(ends, megabytes << 20, side="right"))
        self.starts = np.concatenate([[0], ends[: self.places]])
        needed = int(self.starts[-1])
        shared_memory = Path("/dev/shm")
        if shared_memory.is_dir() and shutil.disk_usage(shared_memory).free < needed:
            free = shutil.disk_usage(shared_memory).free >> 20
            raise InputError(
                f"cache_mb: {megabytes} is more than the {free} MB of shared memory free in {shared_memory}; "
                "give less (in a container, raise its --shm-size)"
            )
        self.block = torch.empty(needed, dtype=torch.uint8).share_memory_()
        self.filled = torch.zeros(self.places, dtype=torch.bool).share_memory_()

    def get(self, index: int) -> Tensor | None:
        """Returns the image as (3, H, W) uint8 on the shared memory (don't write to it), or None."""
        return self._view(index) if index < self.places and self.filled[index] else None

    def put(self, index: int, image: Tensor) -> None:
        """Keeps an image if it has a place."""
        if index < self.places:
            self._view(index).copy_(image)
            self.filled[index] = True

    def _view(self, index: int) -> Tensor:
        height, width = self.sizes[index].tolist()
        flat = self.block[self.starts[index] : self.starts[index + 1]]
        return flat.view(height, width, 3).permute(2, 0, 1)
