"""The README's recipes: a regularizer, a schedule and a placement are each one registration in one place."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models import resnet18

from dropblock_det.callbacks import Regularize
from dropblock_det.errors import InputError
from dropblock_det.inject.inject import regularize_
from dropblock_det.inject.placement import PRESETS
from dropblock_det.layers import REGULARIZERS, DropBlock2d, make_regularizer
from dropblock_det.schedule import P_SCHEDULES, scheduled_p


class GaussianNoise(nn.Module):
    """A regularizer: multiplies by noise of mean 1."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        return x * (1 + self.p * torch.randn_like(x)) if self.training else x


def test_add_a_regularizer(monkeypatch):
    with pytest.raises(InputError, match="regularizer must be one of"):
        make_regularizer("noise", 0.2)
    monkeypatch.setitem(REGULARIZERS, "noise", lambda p, **dropblock: GaussianNoise(p))

    model = resnet18(num_classes=3).train()
    handle = regularize_(model, lambda: make_regularizer("noise", 0.2))
    x = torch.randn(2, 3, 64, 64)
    model(x).sum().backward()
    assert handle.idle_sites == ()
    assert not torch.equal(model(x), model(x))


def test_add_a_schedule(monkeypatch):
    with pytest.raises(InputError, match="schedule: got 'square'"):
        Regularize("dropblock", schedule="square")
    monkeypatch.setitem(P_SCHEDULES, "square", lambda progress, **_: progress**2)
    assert scheduled_p(0.4, 5, 11, "square") == pytest.approx(0.1)
    Regularize("dropblock", schedule="square")


def test_add_a_placement(monkeypatch):
    model = resnet18()
    with pytest.raises(InputError, match="matches no module"):
        regularize_(model, DropBlock2d, "stem")
    monkeypatch.setitem(PRESETS, "stem", lambda model: {"bn1": 1.0})
    assert regularize_(model, DropBlock2d, "stem").sites == ("bn1",)


def test_all_three_in_a_training(monkeypatch, tmp_path):
    monkeypatch.setitem(REGULARIZERS, "noise", lambda p, **dropblock: GaussianNoise(p))
    monkeypatch.setitem(P_SCHEDULES, "square", lambda progress, **_: progress**2)
    monkeypatch.setitem(PRESETS, r"first(\d)", lambda model, n: {f"net.layer{n}.0.bn1": 1.0})
    seen = []

    class Theirs(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = resnet18(num_classes=3)

        def training_step(self, batch, batch_idx):
            seen.append(self.net.layer2[0].bn1.regularizer.p)
            return self.net(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    trainer = Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        callbacks=[Regularize("noise", p=0.4, at="first2", schedule="square")],
    )  # fmt: skip
    trainer.fit(Theirs(), DataLoader(torch.rand(6, 3, 32, 32), batch_size=2))
    assert seen == pytest.approx([0.0, 0.1, 0.4])
