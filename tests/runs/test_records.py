"""The record: written and read back; damaged ones are named, those of older versions understood."""

import json
import os
from dataclasses import replace

import msgspec
import pytest
from support.synthetic_runs import invented_record, invented_runs

from dropblock_det.comparison.gather import gather
from dropblock_det.comparison.plan import run_folder
from dropblock_det.errors import InputError
from dropblock_det.files import read_json, write_json
from dropblock_det.runs.folder import config_differences, is_finished
from dropblock_det.runs.record import Record, finite, read_record, write_record


def test_a_record_survives_the_disk_to_the_last_digit(tmp_path):
    record = invented_record("dropout", 3)
    write_record(tmp_path, record)
    assert read_record(tmp_path) == record
    assert read_record(tmp_path / "elsewhere") is None


def test_json_on_disk_is_strict_and_nan_never_reaches_it(tmp_path):
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []  # not even the temporary file
    assert [finite(value) for value in (1.5, float("nan"), float("inf"))] == [1.5, None, None]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    write_json(path, {"old": 1})

    def no_rename(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", no_rename)
    with pytest.raises(OSError, match="disk full"):
        write_json(path, {"new": 2})
    assert read_json(path) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


def edited(change) -> str:
    """A whole record's JSON, with one thing changed."""
    content = json.loads(msgspec.json.encode(invented_record("none", 0)))
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"version": 2', "not valid JSON"),
        ("[]", "Expected `object`, got `array`"),
        ("[" * 100_000, "nested too deeply"),
        (edited(lambda r: r.pop("task")), "missing required field `task`"),
        (edited(lambda r: r.update(seed="0")), "Expected `int`, got `str` - at `$.seed`"),
        (edited(lambda r: r.update(status="maybe")), "Invalid enum value 'maybe'"),
        (edited(lambda r: r.update(version=3)), "`$.version`"),
        (edited(lambda r: r.update(headline="nonsense")), "headline 'nonsense' is none of the metrics"),
        (edited(lambda r: r["metrics"].append(r["metrics"][0])), "two metrics have the same name"),
        (edited(lambda r: r["epochs"][3].pop("epoch")), "an epoch has no whole number 'epoch'"),
        (edited(lambda r: r["epochs"][3].update(step=None)), "an epoch has no whole number 'step'"),
        (edited(lambda r: r["epochs"][3].update(epoch=-1)), "an epoch has no whole number 'epoch'"),
        (edited(lambda r: r["epochs"].reverse()), "its epochs are not in rising order"),
        (edited(lambda r: r["epochs"].append(r["epochs"][-1])), "its epochs are not in rising order"),
        (edited(lambda r: r["epochs"][3].update(mAP="x")), "`$.epochs[3][...]`"),
        (edited(lambda r: r["epochs"][3].update(mAP=1e200)), "`float` <= 1e+100"),
        (edited(lambda r: r["epochs"][3].update(mAP=10**400)), "- at `$.epochs[3][...]`"),
        (edited(lambda r: r["samples"][0].update(id="../../x")), "`$.samples[0].id`"),
        (edited(lambda r: r["samples"][0].update(id="7\n")), "`$.samples[0].id`"),
        (edited(lambda r: r["samples"][0].update(width=0)), "`$.samples[0].width`"),
        (
            edited(lambda r: r["samples"][0]["truth"][0].update(bbox=[1, 2, 3])),
            "`$.samples[0].truth[0].bbox`",
        ),
    ],
)
def test_a_damaged_record_is_named_in_one_line(tmp_path, text, words):
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(InputError) as caught:
        read_record(tmp_path)
    assert words in str(caught.value)
    assert str(tmp_path / "record.json") in str(caught.value)
    assert "\n" not in str(caught.value)


VERSION_1 = {
    "setting": "dropout",
    "seed": 4,
    "status": "finished",
    "epochs": [{"epoch": 0, "step": 5, "loss": 2.5, "val_loss": 2.25, "mAP": 0.5, "AP50": None, "p": 0.1}],
    "images_per_s": 9.5,
    "detections": [
        {
            "image_id": 7,
            "width": 64,
            "height": 48,
            "ground_truth": [{"bbox": [1, 2, 3, 4], "category": "dog"}],
            "detections": [{"bbox": [1, 2, 3, 5], "category": "cat", "score": 0.5}],
        }
    ],
}


def test_a_record_of_the_first_version_is_read(tmp_path):
    write_json(tmp_path / "record.json", VERSION_1)
    record = read_record(tmp_path)
    assert (record.setting, record.seed, record.finished, record.images_per_s) == ("dropout", 4, True, 9.5)
    assert (record.task, record.headline) == ("detection", "mAP")
    assert record.epochs == tuple(VERSION_1["epochs"])
    assert record.best("mAP")["step"] == 5
    (sample,) = record.samples
    assert (sample.id, sample.kind, sample.truth[0].category, sample.predicted[0].score) == (
        "7",
        "boxes",
        "dog",
        0.5,
    )
    for damage in ({"detections": [5]}, {"detections": 5}, {"epochs": [{"epoch": "x"}]}, {"status": "maybe"}):
        write_json(tmp_path / "record.json", VERSION_1 | damage)
        with pytest.raises(InputError, match=r"record.json: not "):
            read_record(tmp_path)


@pytest.mark.parametrize("finished", [False, True])
def test_a_run_of_the_first_version_has_its_record_in_another_file(finished, tmp_path):
    """In flight it goes on; ended, it is left alone."""
    epochs = VERSION_1["epochs"]
    write_json(tmp_path / "summary.json", {"finished": finished, "max_epochs": 2, "epochs": epochs})
    assert is_finished(tmp_path) is finished
    assert read_record(tmp_path).epochs == tuple(epochs)


def test_the_best_epoch_is_the_first_of_equals_in_the_metric_s_direction():
    record = invented_record("none", 0)
    values = [0.1, 0.4, None, 0.4]
    epochs = tuple({"epoch": e, "step": e, "mAP": v, "val_loss": v} for e, v in enumerate(values))
    record = replace(record, epochs=epochs)
    assert record.best("mAP")["epoch"] == 1
    assert record.best("val_loss")["epoch"] == 0
    assert record.best("AP50") is None
    assert record.values("mAP") == [(0, 0.1), (1, 0.4), (3, 0.4)]


def test_absent_runs_say_why(tmp_path):
    invented_runs(tmp_path, settings=("none", "a", "b"), seeds=(0, 1))
    failed = Record("", (), "", "failed", "loss is not finite", seed=0)
    write_record(run_folder(tmp_path, "a", 0), failed)
    (run_folder(tmp_path, "a", 1) / "record.json").unlink()
    running = replace(invented_record("b", 1, epochs=2), status="running", max_epochs=9)
    write_record(run_folder(tmp_path, "b", 1), running)
    runs = gather(tmp_path)
    assert [(a.setting, a.seed, a.status, a.reason) for a in runs.absent] == [
        ("a", 0, "failed", "loss is not finite"),
        ("a", 1, "not started", "no record yet"),
        ("b", 1, "unfinished", "2 of 9 epochs done"),
    ]
    assert [(r.setting, r.seed) for r in runs.records] == [("none", 0), ("none", 1), ("b", 0)]
    assert runs.settings[0] == "none"


def test_records_alone_are_enough(tmp_path):
    invented_runs(tmp_path, settings=("none", "a"), seeds=(0, 1))
    (tmp_path / "plan.json").unlink()
    runs = gather(tmp_path)
    assert len(runs.records) == 4
    assert runs.absent == ()


@pytest.mark.parametrize("make", [False, True])
def test_a_wrong_folder_is_an_input_error(tmp_path, make):
    root = tmp_path / "runs"
    if make:
        root.mkdir()
    with pytest.raises(InputError, match="runs"):
        gather(root)


def test_records_are_valid_json_for_anyone(tmp_path):
    write_json(tmp_path / "r.json", invented_record("none", 0))
    json.loads((tmp_path / "r.json").read_text(), parse_constant=lambda name: pytest.fail(name))


def test_a_setting_that_an_older_version_lacked_is_no_difference():
    old = {"output": "a", "model": {"lr": 0.1, "gone": None}, "seed_everything": 0}
    assert list(config_differences(old, {**old, "model": {"lr": 0.1, "name": "new"}})) == []
    new = {"output": "a", "model": {"lr": 0.2}, "seed_everything": 1}
    assert list(config_differences(old, new)) == [
        "model.lr: 0.1 before, 0.2 now",
        "seed_everything: 0 before, 1 now",
    ]
