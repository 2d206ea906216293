"""torchvision's reference training of detectors (references/detection of its repository), for measuring.

Written after it, as it stands: images flipped in Pillow and then made tensors, SGD, a linear warm-up, the
loss read from the device for its check and each loss again for the log, and every 20 steps a line of medians.

Two things are left out. It makes masks of the polygons too, though boxes alone are trained. And ``train.py``
puts images of similar shape together, where here both trainings get the same images in the same batches.
"""

import contextlib
import io
import math
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from typing import Any

import torch
from PIL.Image import Transpose
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import CocoDetection
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor

from dropblock_det.datasets.coco import CocoDataModule
from dropblock_det.datasets.coco_dataset import collate
from dropblock_det.datasets.sampling import epoch_order

PRINT_EVERY = 20  # steps


class Meter:
    """The last values of a quantity, and the sum and number of all."""

    def __init__(self) -> None:
        self.last: deque[float] = deque(maxlen=20)
        self.total, self.count = 0.0, 0

    def update(self, value: float) -> None:
        """Takes one more."""
        self.last.append(value)
        self.total += value
        self.count += 1

    def __str__(self) -> str:
        return f"{statistics.median(self.last):.4f} ({self.total / self.count:.4f})"


class ReferenceImages(CocoDetection):
    """The training images of a data module, read and augmented torchvision's way.

    Args:
        data: Has the places of the images and the categories' labels.
    """

    def __init__(self, data: CocoDataModule) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            super().__init__(data.train_images, data.train_annotations)
        self.label_of = {category["id"]: category["label"] for category in data.categories}
        self.to_float = v2.ToDtype(torch.float32, scale=True)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        image, annotations = super().__getitem__(index)
        width, height = image.size
        annotations = [annotation for annotation in annotations if not annotation.get("iscrowd", 0)]
        boxes = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes[:, 0::2].clamp_(0, width)
        boxes[:, 1::2].clamp_(0, height)
        labels = torch.tensor([self.label_of[a["category_id"]] for a in annotations], dtype=torch.int64)
        kept = (boxes[:, 3] > boxes[:, 1]) & (boxes[:, 2] > boxes[:, 0])
        boxes, labels = boxes[kept], labels[kept]
        if torch.rand(1) < 0.5:
            image = image.transpose(Transpose.FLIP_LEFT_RIGHT)
            boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
        return self.to_float(pil_to_tensor(image)), {"boxes": boxes, "labels": labels}


def reference_batches(data: CocoDataModule) -> Iterator[Any]:
    """Batches without end, of the same images as the data module's in every epoch."""
    dataset = ReferenceImages(data)
    place = {image_id: index for index, image_id in enumerate(dataset.ids)}
    indices = [place[image_id] for image_id in data.train_dataset.ids]
    size, epoch = data.batch_size, 0
    while True:
        order = [indices[i] for i in epoch_order(len(indices), data.seed, epoch).tolist()]
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        yield from DataLoader(
            dataset, batch_sampler=batches, num_workers=data.num_workers, collate_fn=collate
        )
        epoch += 1


def reference_steps(
    model: nn.Module, data: CocoDataModule, device: str, lr: float, bfloat16: bool
) -> Iterator[str]:
    """Trains a detector, a step at each ``next``.

    Args:
        model: On any device and in any memory format.
        data: Where the images are, how many come in a batch, and how many processes load them.
        device: To train on.
        lr: Learning rate after the warm-up.
        bfloat16: Forward under autocast.

    Yields:
        After each step the line that the reference would print last.
    """
    model.to(device).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=1e-4)
    steps = -(-len(data.train_dataset) // data.batch_size)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 1000, total_iters=max(1, min(1000, steps - 1)))
    meters: defaultdict[str, Meter] = defaultdict(Meter)
    line, end = "", time.time()
    for step, (images, targets) in enumerate(reference_batches(data)):
        meters["data"].update(time.time() - end)
        images = [image.to(device) for image in images]
        targets = [{name: value.to(device) for name, value in target.items()} for target in targets]
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            losses = model(images, targets)
            loss = sum(losses.values())
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"the reference loop's loss is {value}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        warm_up.step()
        meters["loss"].update(loss.item())
        for name, part in losses.items():
            meters[name].update(part.item())
        meters["lr"].update(optimizer.param_groups[0]["lr"])
        meters["time"].update(time.time() - end)
        if step % PRINT_EVERY == 0:
            line = "  ".join(f"{name}: {meter}" for name, meter in meters.items())
        yield line
        end = time.time()
