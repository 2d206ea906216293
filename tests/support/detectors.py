"""Small batches for detectors, and stand-ins for weights that torchvision publishes."""

import copy
import functools

import torch
from torch import nn
from torchvision import models

from dropblock_det.tasks.detection.models import DETECTORS, build_detector


def batch(ids=(7, 9)):
    """Two images of one size, one of them without objects."""
    images, targets = [], []
    for image_id in ids:
        generator = torch.Generator().manual_seed(image_id)
        images.append(torch.rand(3, 96, 128, generator=generator))
        boxes = torch.tensor([[5.0, 5, 60, 50], [20, 30, 90, 80]]) + torch.rand(1, generator=generator)
        empty = image_id % 2 == 0
        targets.append(
            {
                "boxes": torch.zeros(0, 4) if empty else boxes,
                "labels": torch.zeros(0, dtype=torch.int64) if empty else torch.tensor([1, 2]),
                "image_id": image_id,
            }
        )
    return images, targets


def small(name, names=("a", "b"), **settings):
    """The detector in eval mode, at a size of 96 to 128 pixels where it has sizes."""
    if DETECTORS[name].has_sizes:
        settings = {"min_size": 96, "max_size": 128, **settings}
    torch.manual_seed(0)
    model = build_detector(name, names, **settings).eval()
    if hasattr(model, "rpn"):  # fewer proposals, in less time
        model.rpn._post_nms_top_n = {"training": 90, "testing": 60}
        model.roi_heads.fg_bg_sampler.batch_size_per_image = 50
    return model


@functools.cache
def random_trunk(builder):
    """Like a published file of a classification network."""
    torch.manual_seed(2)
    return getattr(models, builder)(weights=None).state_dict()


def publish(monkeypatch, builder, state):
    """Lets the weights of a torchvision builder be ``state``."""
    enum = models.get_model_weights(builder)
    monkeypatch.setattr(enum, "get_state_dict", lambda self, **_: dict(state))
    return f"{enum.__name__}.DEFAULT"


class DrawsByImage:
    """torchvision's sampler with the same random numbers as ours, drawn in another way."""

    def __init__(self, sampler, ids):
        self.sampler, self.ids = sampler, ids

    def __call__(self, labels):
        drawn = []
        for of_image, seed in zip(labels, self.ids, strict=True):
            torch.manual_seed(seed)
            drawn.append(self.sampler([of_image]))
        return [positive for (positive,), _ in drawn], [negative for _, (negative,) in drawn]


def training_losses(model, images, targets):
    """torchvision's own, of a copy in training mode whose norms and dropouts rest."""
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.Dropout)):
            module.eval()
    if hasattr(model, "roi_heads"):
        for stage in (model.rpn, model.roi_heads):
            stage.fg_bg_sampler = DrawsByImage(stage.fg_bg_sampler, [t["image_id"] for t in targets])
    return model(images, targets)
