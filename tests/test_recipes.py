"""The README's recipes: a regularizer, a schedule and a placement are each one registration in one place."""

import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader
from torchvision.models import resnet18

from dropblock_det import layers, schedule
from dropblock_det.callbacks import Regularize
from dropblock_det.errors import InputError
from dropblock_det.inject import placement
from dropblock_det.inject.inject import regularize_
from dropblock_det.layers import DropBlock2d, make_regularizer

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def follow(recipe):
    """Runs the README's code."""
    code = re.search(f"<!-- recipe: {recipe} -->\n```python\n(.*?)```", README, re.DOTALL)[1]
    assert code.count("\n") <= 10
    exec(code, {"torch": torch})


@pytest.fixture(autouse=True)
def _tables_afterwards_as_they_were():
    tables = (layers.REGULARIZERS, schedule.P_SCHEDULES, placement.PRESETS)
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


def test_add_a_regularizer():
    with pytest.raises(InputError, match="regularizer must be one of"):
        make_regularizer("alpha_dropout", 0.2)
    follow("regularizer")
    model = resnet18(num_classes=3).train()
    handle = regularize_(model, lambda: make_regularizer("alpha_dropout", 0.2))
    x = torch.randn(2, 3, 64, 64)
    model(x).sum().backward()
    assert handle.idle_sites == ()
    assert "AlphaDropout(p=0.2" in repr(handle)


def test_add_a_schedule():
    with pytest.raises(InputError, match="schedule: got 'square'"):
        Regularize("dropblock", schedule="square")
    follow("schedule")
    assert schedule.scheduled_p(0.4, 5, 11, "square") == pytest.approx(0.1)


def test_add_a_placement():
    with pytest.raises(InputError, match="matches no module"):
        regularize_(resnet18(), DropBlock2d, "stem")
    follow("placement")
    assert regularize_(resnet18(), DropBlock2d, "stem").sites == ("bn1",)


def test_all_three_in_a_training(tmp_path):
    for recipe in ("regularizer", "schedule", "placement"):
        follow(recipe)
    seen = []

    class Theirs(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = resnet18(num_classes=3)

        def training_step(self, batch, batch_idx):
            seen.append((type(self.net.bn1.regularizer).__name__, self.net.bn1.regularizer.p))
            return self.net(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    trainer = Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        callbacks=[Regularize("alpha_dropout", p=0.4, at="net:stem", schedule="square")],
    )  # fmt: skip
    trainer.fit(Theirs(), DataLoader(torch.rand(6, 3, 32, 32), batch_size=2))
    assert seen == [("AlphaDropout", pytest.approx(0.4 * share)) for share in (0, 0.25, 1)]
