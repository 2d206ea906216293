"""Training and evaluation as a user runs them: arguments in, a run's folder out."""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import yaml
from pycocotools.coco import COCO
from tiny_run import arguments, start, train
from torchvision.models.detection import retinanet_resnet50_fpn

from dropblock_det import cli
from dropblock_det.errors import InputError
from dropblock_det.runs import newest_checkpoint

FIGURES = ("loss", "val_loss", "mAP", "AP50", "AP75")


def weights(run):
    return torch.load(newest_checkpoint(run), weights_only=True)["state_dict"]


def test_a_run_leaves_its_whole_record(run):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["finished"]
    assert [epoch["epoch"] for epoch in summary["epochs"]] == [0, 1]
    assert all(epoch[name] is not None for epoch in summary["epochs"] for name in FIGURES)
    assert 0 < summary["drop_share"]["realised"] < summary["drop_share"]["asked"] <= 0.1
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["regularize"]["regularizer"] == "dropblock"
    assert config["data"]["init_args"]["root"] is not None
    for name in ("curves.png", "detections.png", "checkpoints/best.ckpt", "val_detections.json"):
        assert (run / name).stat().st_size > 0
    metrics = (run / "logs" / "version_0" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {
        "loss",
        "loss_classification",
        "loss_bbox_regression",
        "val_loss",
        "mAP",
        "AP50",
        "AP75",
        "lr",
        "p",
    } <= set(metrics)
    assert list((run / "logs" / "version_0").glob("events.out.tfevents.*"))


def test_it_ends_with_the_table_and_the_next_command(run):
    output = (run / "stdout.txt").read_text()
    assert all(name in output for name in FIGURES)
    assert f"python tools/evaluate.py {run}/checkpoints/best.ckpt" in output


def test_evaluating_the_checkpoint_gives_the_same_figures(run, tmp_path, capsys):
    best = max(json.loads((run / "summary.json").read_text())["epochs"], key=lambda epoch: epoch["mAP"])
    figures = cli.evaluate(
        run / "checkpoints" / "best.ckpt", {}, tmp_path / "results.json", {"accelerator": "cpu"}
    )
    for name in ("val_loss", "mAP", "AP50", "AP75"):
        assert figures[name] == pytest.approx(best[name], abs=1e-6)
    assert "AR_large" in capsys.readouterr().out
    scenes = yaml.safe_load((run / "config.yaml").read_text())["data"]["init_args"]["root"]
    COCO(Path(scenes, "annotations", "val.json")).loadRes(str(tmp_path / "results.json"))


def test_its_weights_load_into_plain_torchvision(run):
    checkpoint = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    state = {key.removeprefix("detector."): value for key, value in checkpoint["state_dict"].items()}
    names = checkpoint["hyper_parameters"]["categories"]
    stock = retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=len(names) + 1)
    assert stock.load_state_dict(state, strict=True)


def test_a_finished_run_is_left_alone(run, scenes, tmp_path, monkeypatch, capsys):
    """Also where it was moved to, and without the checkpoints that only a resume needs."""
    shutil.copytree(run, tmp_path / "moved", ignore=shutil.ignore_patterns("last-*"))
    before = (run / "summary.json").read_bytes()
    train(arguments(scenes, tmp_path / "moved"), monkeypatch)
    assert (tmp_path / "moved" / "summary.json").read_bytes() == before
    assert "val_loss" in capsys.readouterr().out


def test_other_settings_in_the_same_folder_are_refused(run, scenes, monkeypatch):
    with pytest.raises(InputError, match=r"model.lr: 0.001 before, 0.1 now"):
        train(arguments(scenes, run, "--model.lr=0.1"), monkeypatch)


def test_killed_and_started_again_it_ends_with_the_same_bits(run, scenes, tmp_path):
    """SIGKILL after the first epoch's checkpoint; one broken checkpoint lies in the way."""
    folder = tmp_path / "killed"
    process = start(arguments(scenes, folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while newest_checkpoint(folder) is None:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (folder / "checkpoints" / "last-00009.ckpt").write_bytes(b"half a checkpoint")
    again = start(arguments(scenes, folder), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    _, messages = again.communicate(timeout=300)
    assert again.returncode == 0, messages
    assert "last-00009.ckpt: not a whole checkpoint" in messages
    straight, resumed = (json.loads((path / "summary.json").read_text())["epochs"] for path in (run, folder))
    for mine, other in zip(resumed, straight, strict=True):
        assert {name: mine[name] for name in (*FIGURES, "p", "drop_share")} == {
            name: other[name] for name in (*FIGURES, "p", "drop_share")
        }
    expected = weights(run)
    (folder / "checkpoints" / "last-00009.ckpt").unlink()
    assert all(torch.equal(value, expected[key]) for key, value in weights(folder).items())
