"""A comparison's folder -> all that a report is made of."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from dropblock_det.comparison.plan import NAME, PLAN_NAME, REFERENCE, read_plan, run_folder
from dropblock_det.errors import InputError
from dropblock_det.runs.record import RECORD_NAME, Record, read_record
from dropblock_det.tasks.metric import Metric


@dataclass(frozen=True)
class Absent:
    """A run without a result, and why."""

    setting: str
    seed: int
    status: str  # "failed", "unfinished" or "not started"
    reason: str
    epochs: int = 0


@dataclass(frozen=True)
class Comparison:
    """All that a report is made of.

    Attributes:
        root: the comparison's folder.
        base: the base config's name.
        settings: the reference first.
        seeds: in rising order.
        late_seeds: those of them that were added when there were results to look at already.
        vary_subset: each seed drew a training subset of its own.
        records: of the finished runs, by setting and seed.
        absent: the runs without a result.
        metrics: those of the records, the same in all.
        headline: the name of the one by which the best epoch is chosen.
    """

    root: Path
    base: str
    settings: tuple[str, ...]
    seeds: tuple[int, ...]
    late_seeds: tuple[int, ...]
    vary_subset: bool
    records: tuple[Record, ...]
    absent: tuple[Absent, ...]
    metrics: tuple[Metric, ...]
    headline: str


def gather(root: Path) -> Comparison:
    """Reads a comparison's folder: its plan if there is one, and every record.

    Raises:
        InputError: the folder does not exist, holds no record and no plan, one of them is damaged, or the
            records are of different tasks.
    """
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give the folder that `compare.py run --runs` wrote")
    plan = read_plan(root)
    found = _read_records(root)
    if not found and plan is None:
        raise InputError(
            f"{root}: holds no {PLAN_NAME} and no */seed*/{RECORD_NAME}: not a comparison's folder"
        )
    settings = sorted(
        {*(plan.settings if plan else ()), *(setting for setting, _ in found)},
        key=lambda name: (name != REFERENCE, name),
    )
    seeds = sorted({*(plan.seeds if plan else ()), *(seed for _, seed in found)})
    runs = [(setting, seed) for setting in settings for seed in seeds]
    finished = [found[run] for run in runs if run in found and found[run].finished]
    for record in finished[1:]:
        if (mine := _measures(record)) != (first := _measures(finished[0])):
            folder = run_folder(root, record.setting, record.seed)
            raise InputError(f"{folder}: measures {mine}, others {first}; no table can compare them")
    return Comparison(
        root,
        plan.base.name if plan else root.resolve().name,
        tuple(settings),
        tuple(seeds),
        plan.late_seeds if plan else (),
        plan.vary_subset if plan else False,
        tuple(finished),
        tuple(_absent(*run, found.get(run)) for run in runs if run not in found or not found[run].finished),
        finished[0].metrics if finished else (),
        finished[0].headline if finished else "",
    )


def _read_records(root: Path) -> dict[tuple[str, int], Record]:
    """The records by setting and seed, which their folders are named after."""
    found: dict[tuple[str, int], Record] = {}
    for path in sorted(root.glob("*/seed*")):
        setting, number = path.parent.name, path.name.removeprefix("seed")
        if not re.fullmatch("0|[1-9][0-9]{0,9}", number) or (record := read_record(path)) is None:
            continue
        if not re.match(NAME, setting):
            raise InputError(f"{str(path.parent)!r}: not a setting's name; rename the folder")
        own = record.setting or setting, record.seed
        if (path / RECORD_NAME).exists() and own != (setting, int(number)):
            raise InputError(f"{path}: holds the record of {own[0]} seed {own[1]}; remove the copy")
        for other, known in found.items():
            if record.epochs and record.epochs == known.epochs:
                raise InputError(
                    f"{path}: holds the same record as {run_folder(root, *other)}; remove the copy"
                )
        found[setting, int(number)] = replace(record, setting=setting, seed=int(number))
    return found


def _measures(record: Record) -> tuple[str, tuple[str, ...], str]:
    return record.task, tuple(metric.name for metric in record.metrics), record.headline


def _absent(setting: str, seed: int, record: Record | None) -> Absent:
    if record is None:
        return Absent(setting, seed, "not started", "no record yet")
    done = len(record.epochs)
    if record.status == "failed":
        return Absent(setting, seed, "failed", record.reason or "no reason recorded", done)
    return Absent(setting, seed, "unfinished", f"{done} of {record.max_epochs or '?'} epochs done", done)
