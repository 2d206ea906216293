import pytest

from dropblock_det.report.columns import COSTS, columns
from dropblock_det.runs.record import Record
from dropblock_det.tasks.metric import LOSSES, Metric

METRICS = (*LOSSES, Metric("quality", "quality", "higher"))


def record_of(*epochs):
    names = ("loss", "val_loss", "quality", "wall_s")
    numbered = tuple(
        {"epoch": n, "step": n + 1} | dict(zip(names, e, strict=True)) for n, e in enumerate(epochs)
    )
    return Record("any", METRICS, "quality", "finished", epochs=numbered, peak_memory_bytes=2**30)


RECORD = record_of((3.0, 2.5, None, 60), (2.0, 1.9, 0.4, 61), (1.0, 2.4, 0.3, 62))


def test_what_is_read_from_a_record():
    assert {name: column.of(RECORD) for name, column in columns(METRICS).items()} == {
        "loss": 1.0,
        "val_loss": 2.4,
        "quality": 0.3,
        "gap": pytest.approx(1.4),
        "best_loss": 1.0,
        "best_val_loss": 1.9,
        "best_quality": 0.4,
        "best_gap": pytest.approx(-0.1),
        "wall_s": 183.0,
        "images_per_s": None,
        "peak_memory": 2**30,
        "drop_share": None,
    }


def test_the_mean_of_the_last_epochs():
    of_two = {name: column.of(RECORD) for name, column in columns(METRICS, last=2).items()}
    assert of_two["val_loss"] == pytest.approx(2.15)
    assert of_two["quality"] == pytest.approx(0.35)
    assert of_two["gap"] == pytest.approx((1.4 - 0.1) / 2)
    assert of_two["best_quality"] == 0.4
    assert columns(METRICS, last=9)["quality"].of(RECORD) == pytest.approx(0.35)  # of those there are


def test_nothing_measured_is_nothing():
    empty = Record("any", METRICS, "quality", "finished")
    assert all(column.of(empty) is None for column in columns(METRICS).values())


def test_a_task_without_losses_has_no_gap():
    only = Metric("quality", "quality", "higher")
    assert [*columns([only])] == ["quality", "best_quality", *(cost.metric.name for cost in COSTS)]


def test_time_is_not_given_when_an_epoch_lacks_it():
    assert columns(METRICS)["wall_s"].of(record_of((1, 1, 1, 5), (1, 1, 1, None))) is None
