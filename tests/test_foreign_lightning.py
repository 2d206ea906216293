"""The Regularize callback in a detector's LightningModule that others wrote: DDP, SyncBatchNorm, resuming."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from dropblock_det.callbacks import Regularize
from dropblock_det.inject.inject import Regularized

STAGES = ["stage3", "stage4"]
SITES = 2 * (2 * 2 + 2)  # two stages of two blocks of two units and a skip


class Scenes(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(index))
        return image, {"boxes": torch.tensor([[4.0, 6.0, 40.0, 50.0]]), "labels": torch.tensor([index % 2])}


class Detector(LightningModule):
    """Knows nothing of this package. Freezes the norms' statistics, as is usual with small batches."""

    def __init__(self):
        super().__init__()
        backbone = resnet_fpn_backbone(
            backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
        )
        self.net = RetinaNet(backbone, num_classes=2, min_size=64, max_size=64)

    def on_train_epoch_start(self):
        for module in self.net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()

    def training_step(self, batch, batch_idx):
        return sum(self.net(*batch).values())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3, momentum=0.9)


class Watch(Callback):
    """Writes what each process saw by step: p, a norm's class, its mask, and what each site dropped."""

    def __init__(self, folder):
        self.folder, self.steps, self.hooks = folder, [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        sites = [module for module in pl_module.modules() if isinstance(module, Regularized)]
        norm = pl_module.net.backbone.body.layer3[0].bn1  # the first: its input has no zeros yet
        step = {"p": norm.regularizer.p, "norm": type(norm).__mro__[2].__name__, "dropped": []}
        self.steps.append(step)

        def note(module, inputs, output):
            mask = (output == 0) & (inputs[0] != 0)
            step["dropped"].append(mask.float().mean().item())
            step.setdefault("mask", mask)

        self.hooks = [site.regularizer.register_forward_hook(note) for site in sites]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for hook in self.hooks:
            hook.remove()

    def on_train_end(self, trainer, pl_module):
        weights = {key: value.clone() for key, value in pl_module.net.state_dict().items()}
        torch.save((self.steps, weights), self.folder / f"rank{trainer.global_rank}.pt")


def fit(folder, ckpt_path=None):
    folder.mkdir()
    seed_everything(3, verbose=False)
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=2,
        strategy="ddp_fork",
        sync_batchnorm=True,
        logger=False,
        callbacks=[
            Regularize("dropblock", p=0.4, block_size=2, at=STAGES),
            Watch(folder),
            ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1),
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches = DataLoader(Scenes(), batch_size=2, collate_fn=lambda items: tuple(zip(*items, strict=True)))
    trainer.fit(Detector(), batches, ckpt_path=ckpt_path)


def train_twice(folder):
    # DDP refuses SyncBatchNorm off the GPU. Frozen norms, as here, have nothing to exchange: it works.
    DistributedDataParallel._passing_sync_batchnorm_handle = lambda self, module: None
    fit(folder / "straight")
    fit(folder / "resumed", folder / "straight" / "epoch=0.ckpt")


@pytest.mark.slow
def test_a_foreign_detector_under_ddp_with_sync_batchnorm_and_resumed(tmp_path):
    # In a process of its own: where autograd's threads have started nothing can fork any more.
    done = subprocess.run([sys.executable, __file__, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    straight, resumed = (
        [torch.load(tmp_path / name / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
        for name in ("straight", "resumed")
    )
    for steps, _ in (*straight, *resumed):
        assert {step["norm"] for step in steps} == {"SyncBatchNorm"}
        assert all(len(step["dropped"]) == SITES for step in steps)
        assert all(min(step["dropped"]) > 0 for step in steps if step["p"] > 0.1)
    (first, weights), (second, _) = straight
    assert len(first) == 4
    assert [step["p"] for step in first] == [step["p"] for step in second] != [0.0] * 4
    assert not any(torch.equal(a["mask"], b["mask"]) for a, b in zip(first[1:], second[1:], strict=True))

    for (steps, trained), (again, trained_again) in zip(straight, resumed, strict=True):
        assert [step["p"] for step in again] == [step["p"] for step in steps[2:]]
        assert all(torch.equal(a["mask"], b["mask"]) for a, b in zip(again, steps[2:], strict=True))
        for key, value in trained.items():
            assert torch.equal(value, trained_again[key]), key
            assert torch.equal(value, weights[key]), f"the processes' {key} differ"
    saved = torch.load(tmp_path / "straight" / "epoch=0.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == Detector().state_dict().keys()


if __name__ == "__main__":
    train_twice(Path(sys.argv[1]))
