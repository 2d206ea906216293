"""What a run leaves in its folder, of whatever task: its record, its pictures, its checkpoints.

Qualities are sums of powers of two, for Lightning logs in float32.
"""

import os

import pytest
import torch
from lightning.pytorch import Callback
from support.toy_task import ToyData, ToyModule, train_toy

from dropblock_det.errors import InputError
from dropblock_det.runs.checkpoints import load_checkpoint
from dropblock_det.runs.folder import best_checkpoint, last_checkpoints
from dropblock_det.runs.outcomes import read_outcomes
from dropblock_det.runs.record import read_record
from dropblock_det.runs.recorder import RunRecord


class Interrupt(Callback):
    """Ends the training when an epoch begins."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, *_):
        if trainer.current_epoch == self.epoch:
            raise InputError("power cut")


def interrupted(folder, qualities, epoch, **arguments):
    with pytest.raises(InputError, match="power cut"):
        train_toy(folder, qualities, Interrupt(epoch), **arguments)


def best_epoch(folder):
    return load_checkpoint(best_checkpoint(folder))["epoch"]


def test_a_run_leaves_the_record_of_its_own_task(tmp_path):
    train_toy(tmp_path / "run", [0.5, 0.25])
    record = read_record(tmp_path / "run")
    assert (record.task, record.metrics, record.headline) == ("toy", ToyModule.metrics, "quality")
    assert (record.status, record.max_epochs) == ("finished", 2)
    assert [(e["epoch"], e["step"], e["quality"]) for e in record.epochs] == [(0, 2, 0.5), (1, 4, 0.25)]
    assert 0 < record.epochs[1]["loss"] < record.epochs[0]["loss"] <= 2.0
    assert 0 < record.epochs[1]["val_loss"] < record.epochs[0]["val_loss"] < 2.0
    assert all(epoch[name] > 0 for epoch in record.epochs for name in ("wall_s", "images_per_s"))
    assert record.trainable_parameters == 3
    assert record.samples[0].predicted[0].category == "red"
    assert read_outcomes(tmp_path / "run").images.tolist() == [0, 1, 2, 3]
    for name in ("curves.png", "samples.png"):
        assert (tmp_path / "run" / name).read_bytes().startswith(b"\x89PNG")


def test_the_best_and_the_last_two_checkpoints_stay(tmp_path):
    train_toy(tmp_path / "run", [0.125, 0.5, 0.375, 0.5, 0.25])
    assert [path.name for path in last_checkpoints(tmp_path / "run")] == [
        "last-00004.ckpt",
        "last-00003.ckpt",
    ]
    assert best_epoch(tmp_path / "run") == 1
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 3


def test_moved_and_resumed_the_best_checkpoint_stays_the_best(tmp_path):
    qualities = [0.125, 0.5, 0.375, 0.4375, 0.25]
    interrupted(tmp_path / "run", qualities, 3)
    (tmp_path / "run").rename(tmp_path / "moved")
    train_toy(tmp_path / "moved", qualities)
    assert best_epoch(tmp_path / "moved") == 1
    assert [epoch["quality"] for epoch in read_record(tmp_path / "moved").epochs] == qualities
    assert not (tmp_path / "run").exists()


def test_however_often_resumed_no_more_checkpoints_stay(tmp_path):
    qualities = [0.125, 0.25, 0.375, 0.4375, 0.5]
    for epoch in (1, 2, 3, 4):
        interrupted(tmp_path / "run", qualities, epoch)
    train_toy(tmp_path / "run", qualities)
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 3
    assert best_epoch(tmp_path / "run") == 4


def test_killed_before_a_checkpoint_has_its_name_the_epoch_is_done_again(tmp_path, monkeypatch):
    """The best one was there before: it must not be from an epoch that the resumed run knows nothing of."""
    qualities = [0.125, 0.5, 0.375]
    stock = type(tmp_path).replace

    def replace(path, target):
        if path.name == ".last.ckpt" and "00001" in str(target):
            raise InputError("power cut")
        return stock(path, target)

    monkeypatch.setattr(type(tmp_path), "replace", replace)
    with pytest.raises(InputError, match="power cut"):
        train_toy(tmp_path / "run", qualities)
    monkeypatch.undo()
    assert best_epoch(tmp_path / "run") == 1
    assert [path.name for path in last_checkpoints(tmp_path / "run")] == ["last-00000.ckpt"]
    train_toy(tmp_path / "run", qualities)
    assert best_epoch(tmp_path / "run") == 1
    assert [epoch["epoch"] for epoch in read_record(tmp_path / "run").epochs] == [0, 1, 2]


def test_where_the_disk_knows_no_hard_links_the_best_is_a_copy(tmp_path, monkeypatch):
    def no_link(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_link)
    train_toy(tmp_path / "run", [0.5, 0.125, 0.25])
    assert best_epoch(tmp_path / "run") == 0
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 3


def test_without_a_measured_headline_the_best_is_the_last(tmp_path):
    train_toy(tmp_path / "run", [float("nan"), float("nan")])
    assert best_epoch(tmp_path / "run") == 1
    assert [epoch["quality"] for epoch in read_record(tmp_path / "run").epochs] == [None, None]


def test_an_epoch_without_validation_has_no_value_of_an_earlier_one(tmp_path):
    train_toy(tmp_path / "run", [0.125, 0.25, 0.375, 0.4375], check_val_every_n_epoch=2)
    epochs = read_record(tmp_path / "run").epochs
    assert [epoch["quality"] for epoch in epochs] == [None, 0.25, None, 0.4375]
    assert [epoch["val_loss"] is None for epoch in epochs] == [True, False, True, False]
    assert best_epoch(tmp_path / "run") == 3


def test_other_data_is_not_resumed(tmp_path):
    interrupted(tmp_path / "run", [0.125, 0.25], 1)
    with pytest.raises(InputError, match="run: the annotations or the choice of images have changed"):
        train_toy(tmp_path / "run", [0.125, 0.25], data=ToyData("other"))
    train_toy(tmp_path / "run", [0.125, 0.25])
    assert read_record(tmp_path / "run").data_hash == "data"


def test_a_run_in_flight_of_an_older_version_goes_on(tmp_path):
    """Its checkpoints hold the epochs with other names beside, and no hash of the data."""
    folder = tmp_path / "run"
    interrupted(folder, [0.125, 0.25], 1)
    checkpoint = torch.load(last_checkpoints(folder)[0], weights_only=True)
    state = checkpoint["callbacks"]["RunRecord"]
    assert state.pop("data_hash") == "data"
    state["epochs"][0]["AP50"] = None
    torch.save(checkpoint, last_checkpoints(folder)[0])
    (folder / "record.json").unlink()
    train_toy(folder, [0.125, 0.25])
    assert [epoch["quality"] for epoch in read_record(folder).epochs] == [0.125, 0.25]


def test_the_initial_weights_hash_is_theirs_in_any_precision():
    def init_hash(module):
        recorder = RunRecord(None)
        recorder.setup(None, module, "fit")
        return recorder.state_dict()["init_hash"]

    modules = [torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3).bfloat16()]
    hashes = [init_hash(module) for module in modules]
    assert hashes[0] == hashes[1] != hashes[2]
    torch.nn.init.constant_(modules[1].bias, 1)
    assert init_hash(modules[1]) != hashes[0]
