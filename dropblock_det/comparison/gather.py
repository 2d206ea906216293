"""A comparison's folder -> all that a report is made of."""

from dataclasses import dataclass, replace
from pathlib import Path

from dropblock_det.errors import InputError
from dropblock_det.runs.record import RECORD_NAME, Record, read_record
from dropblock_det.runs.record_v1 import read_plan
from dropblock_det.tasks.metric import Metric

REFERENCE = "none"  # the setting that every other one is compared with


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
        records: of the finished runs, by setting and seed.
        absent: the runs without a result.
        metrics: those of the records, the same in all.
        headline: the name of the one by which the best epoch is chosen.
    """

    root: Path
    base: str
    settings: tuple[str, ...]
    seeds: tuple[int, ...]
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
    plan = read_plan(root) or {}
    found = {}
    for path in sorted(root.glob(f"*/seed*/{RECORD_NAME}")):
        if not (number := path.parent.name.removeprefix("seed")).isdecimal():
            continue
        if record := read_record(path.parent):
            setting, seed = path.parent.parent.name, int(number)
            found[setting, seed] = replace(record, setting=setting, seed=seed)
    if not found and not plan:
        raise InputError(
            f"{root}: holds no plan.json and no */seed*/{RECORD_NAME}: not a comparison's folder"
        )
    settings = sorted(
        {*plan.get("settings", {}), *(setting for setting, _ in found)},
        key=lambda name: (name != REFERENCE, name),
    )
    seeds = sorted({*plan.get("seeds", []), *(seed for _, seed in found)})
    runs = [(setting, seed) for setting in settings for seed in seeds]
    finished = [found[run] for run in runs if run in found and found[run].finished]
    if len({record.task for record in finished}) > 1:
        tasks = ", ".join(sorted({record.task for record in finished}))
        raise InputError(f"{root}: holds runs of different tasks ({tasks}), which no table can compare")
    return Comparison(
        root,
        plan.get("base", {}).get("name", root.name),
        tuple(settings),
        tuple(seeds),
        tuple(finished),
        tuple(_absent(*run, found.get(run)) for run in runs if run not in found or not found[run].finished),
        finished[0].metrics if finished else (),
        finished[0].headline if finished else "",
    )


def _absent(setting: str, seed: int, record: Record | None) -> Absent:
    if record is None:
        return Absent(setting, seed, "not started", "no record yet")
    done = len(record.epochs)
    if record.status == "failed":
        return Absent(setting, seed, "failed", record.reason or "no reason recorded", done)
    return Absent(setting, seed, "unfinished", f"{done} of {record.max_epochs or '?'} epochs done", done)
