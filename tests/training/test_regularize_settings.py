"""The settings below ``regularize:`` as a config or the command line gives them."""

import csv
import json

import pytest
import torchvision
import yaml
from support.tiny_run import ROOT, arguments, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dropblock_det.errors import InputError
from dropblock_det.inject.inject import regularize_
from dropblock_det.layers import make_regularizer


def shares(output):
    """A row per epoch: layer and share, of the last block's last norm in layer3 and layer4."""
    with next(output.glob("logs/version_0/metrics.csv")).open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name.startswith("drop_share/") and name.endswith(".2.bn3")]
    return [{name.split(".")[-3]: float(row[name]) for name in names} for row in rows if row[names[0]]]


@pytest.mark.slow
def test_factors_a_schedule_and_a_class_of_ones_own(scenes, tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text(
        "regularize:\n"
        "  regularizer: {class_path: torch.nn.Dropout, init_args: {p: 0.4}}\n"
        "  at: {stage3: 0.25, stage4: 1.0}\n"
        "  schedule: early\n"
        "  cutoff: 0.5\n"
    )
    output = tmp_path / "run"
    configs = [f"--config={path}" for path in (ROOT / "configs/quickstart.yaml", tmp_path / "mine.yaml")]
    retinanet = ["--model.name=retinanet_resnet50_fpn", "--model.min_size=64", "--model.max_size=64"]
    # float32: torch's bfloat16 gradients of a convolution on maps of one pixel are not finite, now and then.
    train([*configs, *arguments(scenes, output), *retinanet, "--trainer.precision=32-true"], monkeypatch)
    resolved = yaml.safe_load((output / "config.yaml").read_text())["regularize"]
    assert resolved["at"] == {"stage3": 0.25, "stage4": 1.0}
    assert resolved["regularizer"]["class_path"] == "torch.nn.Dropout"
    first, second = shares(output)
    assert first == {"layer3": pytest.approx(0.1, abs=0.05), "layer4": pytest.approx(0.4, abs=0.05)}
    assert second == {"layer3": 0.0, "layer4": 0.0}, "off after half of the training"
    recorded = json.loads((output / "record.json").read_text())["epochs"]
    site = next(name for name in recorded[0] if name.endswith("layer4.2.bn3"))
    expected = pytest.approx([first["layer4"], second["layer4"]])
    assert [epoch[site] for epoch in recorded] == expected
    board = EventAccumulator(str(output / "logs/version_0")).Reload()
    assert [scalar.value for scalar in board.Scalars(site)] == expected


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("regularizer=droppath", "regularizer must be one of none, dropout, "),
        ("at={stage4: -1}", "the factor of 'stage4' must be a number of at least 0"),
        ("at={stage9: 1}", "the stages are 1, 2, 3, 4"),
        ("schedule=square", "schedule: got 'square', give one of linear, "),
    ],
)
def test_settings_that_cannot_be_are_said_in_a_line(scenes, tmp_path, monkeypatch, setting, message):
    with pytest.raises(InputError, match=message) as refusal:
        train(arguments(scenes, tmp_path / "run", f"--regularize.{setting}"), monkeypatch)
    assert "\n" not in str(refusal.value)


def test_a_class_of_another_package_is_not_imported(scenes, tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text("regularize: {regularizer: {class_path: os.system}}\n")
    configs = [f"--config={path}" for path in (ROOT / "configs/quickstart.yaml", tmp_path / "mine.yaml")]
    with pytest.raises(InputError, match=r"os\.system: not imported; a class must be one of dropblock_det,"):
        train([*configs, *arguments(scenes, tmp_path / "run")], monkeypatch)


def test_the_setting_of_stochastic_depth_fits_the_detector():
    setting = yaml.safe_load((ROOT / "configs/settings/stochastic_depth_0.1.yaml").read_text())["regularize"]
    model = torchvision.models.detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None)
    handle = regularize_(model, lambda: make_regularizer(setting["regularizer"], setting["p"]), setting["at"])
    assert len(handle.sites) == 3 + 4 + 6 + 3
    assert all(site.endswith("bn3") for site in handle.sites)
