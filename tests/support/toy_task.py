"""A task as small as can be, for what every task's runs do: its metric is written down beforehand."""

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer
from PIL import Image
from torch.utils.data import DataLoader

from dropblock_det.runs.checkpoints import AtomicCheckpointIO, Checkpoints
from dropblock_det.runs.folder import newest_checkpoint
from dropblock_det.runs.recorder import RunRecord
from dropblock_det.tasks.evaluation import Evaluation, Mark, Outcomes, Sample
from dropblock_det.tasks.metric import LOSSES, Metric
from dropblock_det.tasks.module import TaskModule


class ToyModule(TaskModule):
    task = "toy"
    metrics = (*LOSSES, Metric("quality", "quality", "higher"))
    headline = "quality"

    def __init__(self, categories, qualities, picture, _load_weights=True, **optimization):
        super().__init__(**optimization)
        self.weight = torch.nn.Parameter(torch.ones(3))

    def parts_to_compile(self):
        return []

    def losses(self, batch):
        return {"squared": (self.weight**2).mean() * len(batch[0])}

    def losses_and_predictions(self, batch):
        return self.losses(batch), self.image_ids(batch)

    def evaluate(self, image_ids, predictions):
        assert sorted(predictions) == sorted(image_ids)
        mark = Mark("blue")
        picture = self.hparams["picture"]
        samples = (
            (Sample("1", "label", 8, 8, (mark,), (Mark("red", score=0.7),), picture),) if picture else ()
        )
        images = len(image_ids)
        one = np.ones(images, np.int32)
        outcomes = Outcomes(
            columns={"quality": (0,)},
            images=np.array(sorted(image_ids), np.int64),
            categories=("blue",),
            truths=one[:, None],
            image=np.arange(images, dtype=np.int32),
            category=one * 0,
            score=one.astype(np.float32),
            hit=np.ones((images, 1), bool),
            ignored=np.zeros((images, 1), bool),
        )
        return Evaluation({"quality": self.hparams["qualities"][self.current_epoch]}, samples, outcomes)


class ToyData(LightningDataModule):
    def __init__(self, content="data"):
        super().__init__()
        self.content = content

    def data_hash(self):
        return self.content

    def validation_arguments(self):
        return {}

    def train_dataloader(self):
        items = [(torch.zeros(1), {"image_id": n}) for n in range(4)]
        return DataLoader(items, 2, collate_fn=lambda items: tuple(zip(*items, strict=True)))

    val_dataloader = train_dataloader


def train_toy(folder, qualities, *callbacks, data=None, bar=False, **arguments):
    """Trains, or resumes, for as many epochs as there are qualities."""
    picture = folder.parent / "blue.png"
    Image.new("RGB", (8, 8), "blue").save(picture)
    recorder = RunRecord(folder)
    trainer = Trainer(
        max_epochs=len(qualities),
        accelerator="cpu",
        logger=False,
        callbacks=[recorder, Checkpoints(recorder), *callbacks],
        plugins=[AtomicCheckpointIO()],
        enable_progress_bar=bar,
        enable_model_summary=False,
        **arguments,
    )
    categories = [{"label": 1, "id": 1, "name": "blue"}]
    module = ToyModule(categories, qualities, str(picture), warmup_steps=0)
    trainer.fit(module, data or ToyData(), ckpt_path=newest_checkpoint(folder), weights_only=True)
