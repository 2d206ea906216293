"""Augmentation through torchvision's v2 transforms."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes, Image

from dropblock_det.errors import InputError


@dataclass(frozen=True)
class Augmentation:
    """Which augmentations the training images get.

    Args:
        flip: Probability of a horizontal flip.
        scale_jitter: Smallest and largest factor by which objects are scaled; (1, 1) is off. The paper's
            range is (0.8, 1.2). Magnified images are cropped, shrunk ones padded.
        color_jitter: Strength of random brightness, contrast and saturation changes, from 0 (off) to 1.
    """

    flip: float = 0.5
    scale_jitter: tuple[float, float] = (1.0, 1.0)
    color_jitter: float = 0.0

    def __post_init__(self) -> None:
        low, high = self.scale_jitter
        if not 0 <= self.flip <= 1:
            raise InputError(f"augmentation.flip: got {self.flip}, give a probability from 0 to 1")
        if not 0.25 <= low <= high <= 4:
            raise InputError(f"augmentation.scale_jitter: got {low}, {high}; give two factors from 0.25 to 4")
        if not 0 <= self.color_jitter <= 1:
            raise InputError(
                f"augmentation.color_jitter: got {self.color_jitter}, give a strength from 0 to 1"
            )

    def pipeline(self) -> v2.Compose:
        """Returns the v2 transforms of what is on, for an image and a target with boxes and ``labels``."""
        chosen: list[v2.Transform] = []
        if self.scale_jitter != (1, 1):
            chosen += [ScaleJitter(self.scale_jitter), v2.SanitizeBoundingBoxes(min_size=1)]
        if self.flip:
            chosen.append(v2.RandomHorizontalFlip(self.flip))
        if self.color_jitter:
            strength = self.color_jitter
            chosen.append(v2.ColorJitter(brightness=strength, contrast=strength, saturation=strength))
        return v2.Compose([*chosen, v2.ToPureTensor()])


class ScaleJitter(v2.Transform):
    """Scales what is seen by a random factor, log-uniform in a range, without resizing.

    torchvision's detectors resize every image to the same size, which would undo a mere resize. So a factor
    ``s > 1`` crops a random window of ``1/s`` of each side, and ``s < 1`` pads to ``1/s`` of each side, the
    image at a random place; the detector's own resize then does the scaling.
    """

    def __init__(self, scale_range: tuple[float, float]) -> None:
        super().__init__()
        self.log_low, self.log_high = map(math.log, scale_range)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draws the window: top, left, height and width in pixels, beyond the image where it pads."""
        height, width = v2.query_size(flat_inputs)
        log_scale, at_y, at_x = torch.rand(3).tolist()
        scale = math.exp(self.log_low + (self.log_high - self.log_low) * log_scale)
        new_height, new_width = max(1, round(height / scale)), max(1, round(width / scale))
        top, left = round((height - new_height) * at_y), round((width - new_width) * at_x)
        return {"top": top, "left": left, "height": new_height, "width": new_width}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Cuts the window out; what lies outside the image is black."""
        return v2.functional.crop(inpt, **params)


def draw(
    pipeline: v2.Compose, image: Tensor, boxes: Tensor, labels: Tensor, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Augments an image with its boxes (x1, y1, x2, y2) and labels; every draw comes from ``seed``.

    The global random state is left as it was.
    """
    wrapped = BoundingBoxes(boxes, format="XYXY", canvas_size=tuple(image.shape[-2:]))
    state = torch.get_rng_state()
    try:
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed CUDA too
        image, target = pipeline(Image(image), {"boxes": wrapped, "labels": labels})
    finally:
        torch.set_rng_state(state)
    return image, target["boxes"], target["labels"]
