"""The Regularize callback in a LightningModule that someone else wrote."""

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader, Dataset
from torchvision.models import resnet18

from dropblock_det.callbacks import Regularize
from dropblock_det.errors import InputError
from dropblock_det.schedule import scheduled_p


class Pictures(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return torch.rand(3, 64, 64, generator=generator), index % 4


class Classifier(LightningModule):
    """Knows nothing of this package."""

    def __init__(self, lazy=False):
        super().__init__()
        self.net = None if lazy else resnet18(num_classes=4)

    def configure_model(self):
        if self.net is None:
            self.net = resnet18(num_classes=4)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


class Watch(Callback):
    """Notes, at each step, the drop probability and which channels of the last stage were dropped."""

    def __init__(self):
        self.p, self.masks, self.shares = [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        regularizer = pl_module.net.layer4[1].bn2.regularizer
        self.p.append(regularizer.p)
        self.hook = regularizer.register_forward_hook(lambda m, i, output: self.masks.append(output == 0))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.hook.remove()
        self.shares.append(trainer.callback_metrics.get("drop_share"))


def fit(tmp_path, *callbacks, module=None, epochs=2, ckpt_path=None, **arguments):
    seed_everything(3, verbose=False)
    module = module or Classifier()
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **arguments,
    )
    trainer.fit(module, DataLoader(Pictures(), batch_size=2), ckpt_path=ckpt_path)
    return module, trainer


def test_it_injects_schedules_and_leaves_the_stock_model(tmp_path):
    watch = Watch()
    module, trainer = fit(tmp_path, Regularize("dropblock", p=0.4, block_size=1), watch)
    assert watch.p == pytest.approx([scheduled_p(0.4, step, 8) for step in range(8)])
    assert not any(name.endswith("regularizer") for name, _ in module.named_modules()), "gone after fit"
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == {f"net.{key}" for key in resnet18(num_classes=4).state_dict()}


def test_the_dropped_share_is_measured(tmp_path):
    watch = Watch()
    fit(tmp_path, Regularize("dropblock", p=0.3, block_size=1, schedule="constant"), watch)
    # block_size 1 drops p exactly. The 5 norm layers of layer3 alone put out 2 x 256 x 4 x 4 elements,
    # at least 40,000 that are not zero before. Five standard errors are 5 * sqrt(0.21 / 4e4) = 0.0115.
    assert [float(share) for share in watch.shares] == pytest.approx([0.3] * 8, abs=0.0115)


def test_a_resumed_run_has_the_same_p_and_masks(tmp_path):
    straight, resumed = Watch(), Watch()
    regularize = {"regularizer": "dropblock", "p": 0.4, "block_size": 2}
    module, _ = fit(tmp_path, Regularize(**regularize), straight)

    class StopAfterOneEpoch(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

    _, trainer = fit(tmp_path, Regularize(**regularize), StopAfterOneEpoch())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    module_resumed, _ = fit(tmp_path, Regularize(**regularize), resumed, ckpt_path=tmp_path / "one.ckpt")
    assert resumed.p == straight.p[4:]
    assert all(torch.equal(a, b) for a, b in zip(resumed.masks, straight.masks[4:], strict=True))
    for key, value in module.state_dict().items():
        assert torch.equal(value, module_resumed.state_dict()[key]), key


def test_a_model_built_in_configure_model_is_regularized(tmp_path):
    watch = Watch()
    fit(tmp_path, Regularize("dropout", p=0.2), watch, module=Classifier(lazy=True), epochs=1)
    assert len(watch.masks) == 4


def test_a_fit_after_a_failed_one(tmp_path):
    regularize = Regularize("spatial_dropout", p=0.2)

    class Fail(Callback):
        def on_train_start(self, trainer, pl_module):
            raise RuntimeError("planned")

    module = Classifier()
    with pytest.raises(RuntimeError, match="planned"):
        fit(tmp_path, regularize, Fail(), module=module)
    fit(tmp_path, regularize, module=module, epochs=1)


def test_none_changes_nothing_but_the_random_stream(tmp_path):
    module, _ = fit(tmp_path, Regularize("none"), epochs=1)
    other, _ = fit(tmp_path, epochs=1)
    assert all(
        torch.equal(a, b)
        for a, b in zip(module.state_dict().values(), other.state_dict().values(), strict=True)
    )


def test_no_site_is_said_before_training(tmp_path):
    with pytest.raises(InputError, match="layer9"):
        fit(tmp_path, Regularize("dropblock", at="net.layer9"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"p": 1.5}, "p must be"),
        ({"block_size": 0}, "block_size must be"),
        ({"schedule": "cosine"}, "schedule: got 'cosine'"),
        ({"regularizer": "droppath"}, "droppath"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        Regularize(**{"regularizer": "dropblock", **arguments})
