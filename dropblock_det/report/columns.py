"""The columns of a report: the metrics at the last epoch and at their best, and what a run costs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from dropblock_det.runs.record import Record
from dropblock_det.tasks.metric import LOSSES, Metric

LOSS, VAL_LOSS = (metric.name for metric in LOSSES)
GAP, BEST_GAP = "gap", "best_gap"


@dataclass(frozen=True)
class Column:
    """One number per run.

    Attributes:
        metric: how it is named, shown and judged.
        of: reads it from a run; ``None`` where it was not measured.
        epoch: whether it is of the ``last`` epochs, of the ``best`` one, or of the whole ``run``.
        source: name of the metric that it is made of; ``None``: of something else.
    """

    metric: Metric
    of: Callable[[Record], float | None]
    epoch: Literal["last", "best", "run"]
    source: str | None = None


def columns(metrics: Sequence[Metric], last: int = 1) -> dict[str, Column]:
    """The columns by name, in the order of the table.

    Args:
        metrics: what the task declared.
        last: the last epochs that are averaged. The last epoch is not chosen on the images that judge it,
            as the best one is; the mean over several is less noisy.
    """
    when = "at the last epoch" if last == 1 else f"mean of the last {last} epochs"
    found = [
        Column(replace(m, meaning=f"{m.meaning}; {when}"), _last(m.name, last), "last", m.name)
        for m in metrics
    ]
    has_losses = {LOSS, VAL_LOSS} <= {metric.name for metric in metrics}
    if has_losses:
        found.append(
            Column(Metric(GAP, "gap", meaning=f"{VAL_LOSS} - {LOSS}; {when}"), _last_gap(last), "last")
        )
    for metric in metrics:
        extreme = "highest" if metric.better == "higher" else "lowest"
        best = replace(
            metric,
            name=f"best_{metric.name}",
            title=f"best {metric.title}",
            meaning=f"{metric.meaning}; {extreme} of any epoch",
        )
        found.append(Column(best, _best(metric.name), "best", metric.name))
    if has_losses:
        at = f"at the epoch with the lowest {VAL_LOSS}"
        found.append(
            Column(Metric(BEST_GAP, "best gap", meaning=f"{VAL_LOSS} - {LOSS} {at}"), _best_gap, "best")
        )
    return {column.metric.name: column for column in (*found, *COSTS)}


def _last(name: str, last: int) -> Callable[[Record], float | None]:
    return lambda record: _mean([value for _, value in record.values(name)][-last:])


def _best(name: str) -> Callable[[Record], float | None]:
    return lambda record: None if (epoch := record.best(name)) is None else epoch[name]


def _gaps(record: Record) -> list[tuple[float, float]]:
    """``val_loss`` and the gap of each epoch that has both losses."""
    losses = dict(record.values(LOSS))
    return [(value, value - losses[epoch]) for epoch, value in record.values(VAL_LOSS) if epoch in losses]


def _last_gap(last: int) -> Callable[[Record], float | None]:
    return lambda record: _mean([gap for _, gap in _gaps(record)][-last:])


def _best_gap(record: Record) -> float | None:
    gaps = _gaps(record)
    return min(gaps)[1] if gaps else None


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _wall(record: Record) -> float | None:
    times = [value for _, value in record.values("wall_s")]
    return math.fsum(times) if times and len(times) == len(record.epochs) else None


def _cost(
    name: str, title: str, digits: int, scale: float, meaning: str, of: Callable[[Record], float | None]
) -> Column:
    return Column(Metric(name, title, None, digits, scale, meaning, compared=False), of, "run")


COSTS = (
    _cost("wall_s", "time, min", 1, 1 / 60, "training and validation", _wall),
    _cost("images_per_s", "images/s", 1, 1, "while training", lambda record: record.images_per_s),
    _cost(
        "peak_memory", "memory, GiB", 2, 2**-30, "peak: GPU allocator, or process",
        lambda record: record.peak_memory_bytes,
    ),
    _cost(
        "drop_share", "dropped", 3, 1, "share of elements really dropped, mean over the epochs",
        lambda record: (record.drop_share or {}).get("realised"),
    ),
)  # fmt: skip
"""What a run costs and what it dropped, whatever the task."""
