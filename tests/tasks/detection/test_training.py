"""Losses that are not finite, several processes, and what the module logs."""

import csv
import json
import math
import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from support.detectors import batch
from support.tiny_run import arguments, train
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.ssd import SSD

from dropblock_det.datasets.coco import CocoDataModule
from dropblock_det.datasets.coco_dataset import CocoDataset, collate
from dropblock_det.datasets.scenes import ScenesDataModule
from dropblock_det.errors import InputError
from dropblock_det.runs.folder import newest_checkpoint
from dropblock_det.runs.recorder import RunRecord
from dropblock_det.tasks.detection.eval_losses import losses_and_detections
from dropblock_det.tasks.detection.module import DetectionModule

SIZES = [8, 16, 32, 64, 128]


def test_what_would_fail_in_the_midst_is_refused_at_the_start():
    module = DetectionModule([{"label": 1, "id": 1, "name": "cat"}], "ssdlite320_mobilenet_v3_large")
    data = CocoDataModule("coco", batch_size=8)
    module._trainer = SimpleNamespace(precision="bf16-mixed", datamodule=data, world_size=1)
    for images, processes in ((16, 1), (20, 2)):
        data.train_dataset, module._trainer.world_size = range(images), processes
        module.on_fit_start()
    for images, processes in ((17, 1), (17, 2)):
        data.train_dataset, module._trainer.world_size = range(images), processes
        with pytest.raises(InputError, match=r"data\.batch_size: 8 leaves one image for the last batch"):
            module.on_fit_start()
    module._trainer.precision = "bf16-true"
    with pytest.raises(InputError, match=r"trainer\.precision: bf16-true does not suit the detectors' boxes"):
        module.on_fit_start()


@pytest.fixture
def nan_at_the_third_step(monkeypatch):
    stock, calls = SSD.compute_loss, []

    def compute_loss(self, *args):
        losses = stock(self, *args)
        if self.training:
            calls.append(losses)
            if len(calls) == 3:
                losses["bbox_regression"] = losses["bbox_regression"] * math.nan
        return losses

    monkeypatch.setattr(SSD, "compute_loss", compute_loss)


def test_a_loss_that_is_not_finite_stops_the_run(nan_at_the_third_step, scenes, tmp_path, monkeypatch):
    with pytest.raises(
        InputError, match=r"step 2: .*bbox_regression nan, .* on the images \d+, \d+, \d+, \d+; the last"
    ) as e:
        train(arguments(scenes, tmp_path / "run"), monkeypatch)
    assert "\n" not in str(e.value)
    checkpoint = torch.load(newest_checkpoint(tmp_path / "run"), weights_only=True)
    assert checkpoint["epoch"] == 0
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())
    assert json.loads((tmp_path / "run" / "record.json").read_text())["status"] == "running"


def test_a_loss_that_is_not_finite_can_be_skipped(nan_at_the_third_step, scenes, tmp_path, monkeypatch):
    train(arguments(scenes, tmp_path / "run", "--model.on_nonfinite=skip"), monkeypatch)
    summary = json.loads((tmp_path / "run" / "record.json").read_text())
    assert summary["status"] == "finished"
    assert all(math.isfinite(epoch["loss"]) for epoch in summary["epochs"])
    header, *rows = (tmp_path / "run" / "logs" / "version_0" / "metrics.csv").read_text().splitlines()
    column = header.split(",").index("skipped_steps")
    assert {row.split(",")[column] for row in rows} == {"", "1.0"}


def small_module():
    categories = [{"label": 1, "id": 1, "name": "disk"}]
    return DetectionModule(categories, min_size=64, max_size=64, anchor_sizes=SIZES)


def test_a_checkpoint_that_names_no_detector_is_a_retinanets():
    """As those written before there were others."""
    module = small_module()
    earlier = {"trainable_stages": 5, "norm": "batch", "score_thresh": 0.05}
    settings = {name: value for name, value in module.hparams.items() if name != "name"} | earlier
    content = {"hyper_parameters": settings, "state_dict": module.state_dict()}
    again = DetectionModule.from_checkpoint(content)
    assert isinstance(again.detector, RetinaNet)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in module.state_dict().items())


def test_an_image_of_one_pixel_by_ten_thousand(content, write, line_of):
    """Named where its narrow side would vanish, in training and in evaluation; otherwise it is used."""
    for width, height in ((1, 10_000), (10_000, 1)):
        content["images"][0] |= {"width": width, "height": height}
        content["annotations"] = [content["annotations"][0] | {"bbox": [0, 0, width, height]}]
        batch = collate([CocoDataset(*write(content))[1]])
        module = small_module().train()
        line = line_of(lambda module=module, batch=batch: module.training_step(batch, 0))
        assert f"image 7: {width}x{height} pixels" in line
        module.eval()
        assert line == line_of(lambda module=module, batch=batch: module.validation_step(batch, 0))
    pixel, stays, vanishes = (
        (
            [torch.rand(3, 1, size)],
            [{"boxes": torch.tensor([[0.0, 0, size, 1]]), "labels": torch.tensor([1]), "image_id": 7}],
        )
        for size in (1, 64, 65)
    )
    module.validation_step(pixel, 0)
    module.validation_step(stays, 0)
    assert "image 7: 65x1" in line_of(lambda: module.validation_step(vanishes, 0))
    with pytest.raises(RuntimeError):  # what torchvision says by itself
        losses_and_detections(module.detector, *vanishes)
    module.detector.train()
    losses = [*module.detector(*pixel).values(), *module.detector(*stays).values()]
    assert all(loss.isfinite() for loss in losses)


@pytest.mark.parametrize("name", ["fasterrcnn_mobilenet_v3_large_320_fpn", "fcos_resnet50_fpn"])
@torch.no_grad()
def test_val_loss_does_not_depend_on_the_batches(name):
    """Of images of one size: others are padded, which every detector sees."""
    images, targets = batch((3, 4, 5, 6))
    categories = [{"label": label, "id": label, "name": str(label)} for label in (1, 2)]
    module = DetectionModule(categories, name=name, min_size=96, max_size=128).eval()

    def val_loss(*batches):
        total = 0.0
        for numbers in batches:
            chosen = [images[number] for number in numbers], [targets[number] for number in numbers]
            losses, _ = module.losses_and_predictions(chosen)
            total += float(sum(losses.values())) * len(numbers)
        return total / len(images)

    one = val_loss([0, 1, 2, 3])
    assert one == pytest.approx(val_loss([3], [1, 0, 2]), rel=1e-5)
    assert one == pytest.approx(val_loss([2], [0], [3], [1]), rel=1e-5)


def test_an_overflow_in_float16_is_seen_in_the_log(scenes, tmp_path):
    """A loss scale far too large: each step is left out and the scale halved."""
    data = ScenesDataModule(str(scenes), train_size=8, val_size=5, batch_size=1, num_workers=0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    trainer = Trainer(
        max_epochs=1,
        limit_train_batches=2,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        accelerator="cpu",
        logger=CSVLogger(tmp_path),
        callbacks=[RunRecord(tmp_path)],
        plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        log_every_n_steps=1,
        gradient_clip_val=5.0,
    )
    module = DetectionModule(data.categories, min_size=64, max_size=64, anchor_sizes=SIZES)
    trainer.fit(module, data)
    rows = list(csv.DictReader((tmp_path / "lightning_logs" / "version_0" / "metrics.csv").open()))
    scales = [float(row["loss_scale"]) for row in rows if row["loss_scale"]]
    assert scales == [2.0**29, 2.0**28]
    assert scaler.get_scale() == 2.0**28
    assert all(value.isfinite().all() for value in module.state_dict().values())


EVALUATE = """
import json, os, sys
from pathlib import Path
from dropblock_det.training.evaluate import evaluate
checkpoint, results, devices = sys.argv[1:]
figures = evaluate(
    Path(checkpoint), batch_size=2, results=Path(results), accelerator="cpu", devices=int(devices)
)
Path(f"{results}.{os.environ.get('LOCAL_RANK', 0)}").write_text(json.dumps(figures))
"""


@pytest.mark.slow
def test_the_figures_do_not_depend_on_the_number_of_processes(run, tmp_path):
    """Five images in batches of 2, 2 and 1, which one, two and three processes share out.

    With one thread each: Lightning gives several processes fewer threads, which changes the order of sums.
    """
    (tmp_path / "evaluate.py").write_text(EVALUATE)
    command = [sys.executable, tmp_path / "evaluate.py", run / "checkpoints" / "best.ckpt"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        ports = [server.getsockname()[1] for server in (one, other)]  # left to themselves both may find one
    started = [
        subprocess.Popen(
            [*command, tmp_path / f"{devices}.json", str(devices)],
            env=environment | {"MASTER_PORT": str(ports[devices % 2])},
        )
        for devices in (1, 2, 3)
    ]
    assert [process.wait(timeout=300) for process in started] == [0, 0, 0]
    detections = [json.loads((tmp_path / f"{devices}.json").read_text()) for devices in (1, 2, 3)]
    assert detections[0] == detections[1] == detections[2]
    assert len(detections[0]) > 100
    figures = [json.loads(path.read_text()) for path in tmp_path.glob("*.json.*")]
    assert len(figures) == 1 + 2 + 3
    assert all(math.isfinite(figures[0][name]) for name in ("val_loss", "mAP", "AP50", "AP75"))
    assert [repr(each) for each in figures] == [repr(figures[0])] * 6
