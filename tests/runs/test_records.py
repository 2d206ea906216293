import json
import os

import pytest
from support.synthetic_runs import invented_record, invented_runs

from dropblock_det.errors import InputError
from dropblock_det.files import read_json, write_json
from dropblock_det.runs.record_v1 import (
    Epoch,
    Record,
    read_comparison,
    read_record,
    record_from_run,
    run_folder,
)


def test_a_record_survives_the_disk_to_the_last_digit(tmp_path):
    record = invented_record("dropout", 3)
    write_json(tmp_path / "record.json", record.to_dict())
    assert read_record(tmp_path) == record
    assert read_record(tmp_path / "elsewhere") is None


def test_json_on_disk_is_strict_and_nan_never_reaches_it(tmp_path):
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []  # not even the temporary file
    assert (
        Epoch.from_dict({"epoch": 0, "step": 1, "loss": float("nan"), "val_loss": float("inf")}).loss is None
    )


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


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"setting": "none"', "not valid JSON"),
        ("[]", "not a run record"),
        ('{"setting": "none", "seed": "0", "status": "finished", "epochs": []}', "'seed' is '0'"),
        ('{"setting": "none", "seed": 0, "status": "maybe", "epochs": []}', "'status' is 'maybe'"),
        ('{"setting": "none", "seed": 0, "status": "finished", "epochs": [{"loss": 1}]}', "without 'epoch'"),
        (
            '{"setting": "none", "seed": 0, "status": "finished", "epochs": [{"epoch": 0, "step": "x"}]}',
            "'step' is 'x'",
        ),
        (
            '{"setting": "none", "seed": 0, "status": "finished", "epochs": [],'
            ' "detections": [{"image_id": "../../x"}]}',
            "'image_id'",
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


def test_the_record_takes_what_training_leaves(tmp_path):
    summary = {
        "finished": True,
        "max_epochs": 2,
        "epochs": [
            {"epoch": 0, "step": 5, "loss": 2.5, "val_loss": 2.25, "mAP": None, "AP50": None, "AP75": None}
        ],
        "images_per_s": 9.5,
        "peak_memory_bytes": 1000,
        "drop_share": {"asked": 0.1, "realised": 0.09},
        "trainable_parameters": 10,
        "versions": {"torch": "2.11"},
        "hardware": {"device": "cpu"},
        "data_hash": "d",
        "init_hash": None,
    }
    write_json(tmp_path / "summary.json", summary)
    write_json(tmp_path / "val_detections.json", [{"image_id": 1, "ground_truth": [], "detections": []}])
    record = record_from_run(tmp_path, "dropout", 4, config={"a": 1})
    assert (record.setting, record.seed, record.finished, record.images_per_s) == ("dropout", 4, True, 9.5)
    assert record.epochs == (Epoch(0, 5, 2.5, 2.25),)
    assert record.drop_share == {"asked": 0.1, "realised": 0.09}
    assert len(record.detections) == 1

    failed = record_from_run(tmp_path, "dropout", 4, config={}, failure="out of memory")
    assert (failed.status, failed.reason, len(failed.epochs)) == ("failed", "out of memory", 1)
    assert record_from_run(tmp_path / "never", "dropout", 4, config={}, failure="died at once").epochs == ()
    with pytest.raises(InputError, match="cannot be read"):
        record_from_run(tmp_path / "never", "dropout", 4, config={})


def test_absent_runs_say_why(tmp_path):
    invented_runs(tmp_path, settings=("none", "a", "b"), seeds=(0, 1))
    folder = run_folder(tmp_path, "a", 0)
    write_json(folder / "record.json", Record("a", 0, "failed", "loss is not finite").to_dict())
    (run_folder(tmp_path, "a", 1) / "record.json").unlink()
    (run_folder(tmp_path, "b", 1) / "record.json").unlink()
    write_json(run_folder(tmp_path, "b", 1) / "summary.json", {"max_epochs": 9, "epochs": [{}, {}]})
    runs = read_comparison(tmp_path)
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
    runs = read_comparison(tmp_path)
    assert len(runs.records) == 4
    assert runs.absent == ()


@pytest.mark.parametrize("make", [False, True])
def test_a_wrong_folder_is_an_input_error(tmp_path, make):
    root = tmp_path / "runs"
    if make:
        root.mkdir()
    with pytest.raises(InputError, match="runs"):
        read_comparison(root)


def test_records_are_valid_json_for_anyone(tmp_path):
    write_json(tmp_path / "r.json", invented_record("none", 0).to_dict())
    json.loads((tmp_path / "r.json").read_text(), parse_constant=lambda name: pytest.fail(name))
