"""Losses that are not finite, several processes, and what the module logs."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from tiny_run import ROOT, arguments, train
from torchvision.models.detection import RetinaNet

from dropblock_det.errors import InputError
from dropblock_det.runs import newest_checkpoint


@pytest.fixture
def nan_at_the_third_step(monkeypatch):
    stock, calls = RetinaNet.compute_loss, []

    def compute_loss(self, targets, head_outputs, anchors):
        losses = stock(self, targets, head_outputs, anchors)
        if self.training:
            calls.append(losses)
            if len(calls) == 3:
                losses["bbox_regression"] = losses["bbox_regression"] * math.nan
        return losses

    monkeypatch.setattr(RetinaNet, "compute_loss", compute_loss)


def test_a_loss_that_is_not_finite_stops_the_run(nan_at_the_third_step, scenes, tmp_path, monkeypatch):
    with pytest.raises(
        InputError, match=r"step 2: .*bbox_regression nan\) on the images \d+, \d+, \d+, \d+; the last"
    ) as e:
        train(arguments(scenes, tmp_path / "run"), monkeypatch)
    assert "\n" not in str(e.value)
    checkpoint = torch.load(newest_checkpoint(tmp_path / "run"), weights_only=True)
    assert checkpoint["epoch"] == 0
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())
    assert not json.loads((tmp_path / "run" / "summary.json").read_text())["finished"]


def test_a_loss_that_is_not_finite_can_be_skipped(nan_at_the_third_step, scenes, tmp_path, monkeypatch):
    train(arguments(scenes, tmp_path / "run", "--model.on_nonfinite=skip"), monkeypatch)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["finished"]
    assert all(math.isfinite(epoch["loss"]) for epoch in summary["epochs"])
    header, *rows = (tmp_path / "run" / "logs" / "version_0" / "metrics.csv").read_text().splitlines()
    column = header.split(",").index("skipped_steps")
    assert {row.split(",")[column] for row in rows} == {"", "1.0"}


def test_the_figures_do_not_depend_on_the_number_of_processes(run, tmp_path):
    """Five images in batches of 2, 2 and 1, which one, two and three processes share out.

    With one thread each: Lightning gives several processes fewer threads, which changes the order of sums.
    """
    found, environment = {}, {**os.environ, "OMP_NUM_THREADS": "1"}
    for devices in (1, 2, 3):
        results = tmp_path / f"{devices}.json"
        command = [sys.executable, ROOT / "tools" / "evaluate.py", run / "checkpoints" / "best.ckpt"]
        command += [
            "--devices",
            str(devices),
            "--accelerator",
            "cpu",
            "--batch-size",
            "2",
            "--results",
            results,
        ]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=300, check=False, env=environment
        )
        assert done.returncode == 0, done.stderr
        found[devices] = (done.stdout[done.stdout.index("mAP") :], json.loads(results.read_text()))
    assert found[1] == found[2] == found[3]
    assert len(found[1][1]) > 100
