"""``model.compile``: with regularizers and their schedule, images of many sizes, resume and evaluation."""

import functools

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from support.detectors import batch
from support.toy_task import ToyData, ToyModule
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader

from dropblock_det.callbacks import Regularize
from dropblock_det.tasks.detection.module import DetectionModule


@pytest.fixture(autouse=True)
def _without_inductor(monkeypatch):
    """What is traced anew, and when, does not depend on the backend."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="eager"))


def graphs():
    return counters["stats"]["unique_graphs"]


class Net(ToyModule):
    def __init__(self, compile):
        categories = [{"label": 1, "id": 1, "name": "blue"}]
        super().__init__(categories, [0.0] * 9, None, warmup_steps=0, compile=compile)
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
        self.traced = []

    def parts_to_compile(self):
        return [self.net]

    def losses(self, batch):
        loss = self.net(torch.stack(batch[0])).square().mean()
        self.traced.append((self.training, graphs()))
        return {"squared": loss}


class Sizes(ToyData):
    """A batch of another size at each step."""

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        items = [
            (torch.rand(1, 16 + n, 30 - n, generator=generator), {"image_id": 2 * n + k})
            for n in range(6)
            for k in range(2)
        ]
        return DataLoader(items, 2, collate_fn=lambda items: tuple(zip(*items, strict=True)))

    val_dataloader = train_dataloader


class First(Callback):
    def on_train_epoch_end(self, trainer, module):
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/first.ckpt")


def fitted(folder, compile, regularizer="dropblock", resume=None):
    seed_everything(0)
    module = Net(compile)
    callback = Regularize(regularizer, p=0.3, block_size=3, at="net.1", schedule="linear")
    trainer = Trainer(
        max_epochs=3,
        limit_train_batches=6,
        accelerator="cpu",
        logger=False,
        callbacks=[callback, First()],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        log_every_n_steps=100,
        default_root_dir=folder,
    )
    trainer.fit(module, Sizes(), ckpt_path=resume, weights_only=True)
    trainer.save_checkpoint(folder / f"{compile}.ckpt")
    return module, trainer


def test_neither_p_nor_a_size_compiles_anew(tmp_path):
    module, trainer = fitted(tmp_path, True)
    training = [count for of_training, count in module.traced if of_training]
    assert training[0] == 1
    first_epoch, last_epoch = training[1:6], training[12:]
    assert len({*last_epoch}) == 1  # however p and the sizes go on
    assert first_epoch[-1] <= 3
    assert trainer.callback_metrics["drop_share"] > 0.1  # counted, on a step that is not compiled


def test_keys_weights_and_resume_are_as_ever(tmp_path):
    (plain, _), (compiled, _) = (fitted(tmp_path, which, regularizer="none") for which in (False, True))
    states = [module.state_dict() for module in (plain, compiled)]
    assert [*states[0]] == [*states[1]]
    for one, other in zip(*(state.values() for state in states), strict=True):
        torch.testing.assert_close(one, other)
    straight, _ = fitted(tmp_path, True)
    again, _ = fitted(tmp_path, True, resume=tmp_path / "first.ckpt")
    for one, other in zip(again.state_dict().values(), straight.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other)
    checkpoint = torch.load(tmp_path / "True.ckpt", weights_only=True)
    assert [*checkpoint["state_dict"]] == [*states[0]]


def test_a_detector_is_compiled_once_for_all_sizes():
    categories = [{"label": label, "id": label, "name": str(label)} for label in (1, 2)]
    module = DetectionModule(categories, name="ssdlite320_mobilenet_v3_large", compile=True).train()
    assert [*module.state_dict()] == [
        *DetectionModule.from_checkpoint(
            {"hyper_parameters": dict(module.hparams), "state_dict": module.state_dict()}
        ).state_dict()
    ]
    module.setup("fit")
    images, targets = batch()
    seen = []
    for side in (320, 352, 384, 416):
        module.detector.transform.fixed_size = (side, side)
        sum(module.losses((images, targets)).values()).backward()
        seen.append(graphs())
    assert 2 <= seen[0] <= 4  # the backbone and the head
    assert len({*seen[1:]}) == 1, seen
    assert seen[1] - seen[0] <= 2
