"""How fast the loader is, beside torchvision's reference detection pipeline on the same images.

Run by hand: ``DROPBLOCK_DET_COCO=... pytest -m slow -s tests/test_loader_rate.py``
"""

import statistics
import time

import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from dropblock_det.benchmark.reference_loop import ReferenceImages
from dropblock_det.datasets.coco import CocoDataModule
from dropblock_det.datasets.coco_dataset import collate

ROUNDS = 7
SIDE = 512  # pixels, what the detector resizes to


def reference_loader(root):
    """torchvision's own way, by the default of its detection reference: flip in Pillow, then to tensors."""
    data = CocoDataModule(str(root))
    return DataLoader(ReferenceImages(data), batch_size=2, shuffle=True, collate_fn=collate)


def seconds(loader, resize=None):
    start = time.process_time()
    count = 0
    for images, targets in loader:
        if resize:
            resize(images, targets)
        count += len(images)
    return (time.process_time() - start) / count


@pytest.mark.slow
def test_loader_keeps_up_with_torchvisions_reference(real_coco):
    torch.set_num_threads(1)  # per core
    reference = reference_loader(real_coco)
    plain, cached = (
        CocoDataModule(str(real_coco), num_workers=0, batch_size=2, cache_mb=cache).train_dataloader()
        for cache in (0, 1024)
    )
    resize = GeneralizedRCNNTransform(SIDE, SIDE, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    seconds(cached)  # fills the cache
    ratios = {}
    for name, transform in (("loader alone", None), (f"with the detector's resize to {SIDE}", resize)):
        # Paired and alternating, so that a slower moment of the machine hits all three.
        times = [[seconds(loader, transform) for loader in (reference, plain, cached)] for _ in range(ROUNDS)]
        rates = [1 / statistics.median(column) for column in zip(*times, strict=True)]
        print(f"\n{name}, images/s: reference {rates[0]:.0f}, ours {rates[1]:.0f}, cached {rates[2]:.0f}")
        for number, which in ((1, "ours"), (2, "cached")):
            paired = sorted(row[0] / row[number] for row in times)
            ratios[name, which] = ratio = statistics.median(paired)
            print(f"  {which}: {ratio:.2f} times the reference, from {paired[0]:.2f} to {paired[-1]:.2f}")
    assert ratios["loader alone", "ours"] >= 1
    assert ratios["loader alone", "cached"] > ratios["loader alone", "ours"]
