"""Did it help? Trains a config under every setting of a folder with several seeds, and shows the answer.

    compare run CONFIG [--runs RUNS] [--seeds 0 1 2] [--devices 0 1] [-- TRAINING ARGUMENTS]
    compare report RUNS [--output FOLDER] [--last 3]

Stop it whenever you like: started again, it skips what is finished and goes on with the rest. On a cluster,
submit `compare run CONFIG --runs RUNS --seeds 0 1 2 --only SETTING --seed S` as single jobs with one
shared RUNS folder.
"""

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from dropblock_det.arguments import Count, Seed
from dropblock_det.commands import MAIN, PlainConsole, command
from dropblock_det.comparison.gather import gather
from dropblock_det.comparison.plan import (
    Run,
    find_settings,
    make_plan,
    record_plan,
    run_folder,
    training_arguments,
)
from dropblock_det.comparison.runner import Runner, epochs_done
from dropblock_det.errors import InputError
from dropblock_det.report.page import write_report
from dropblock_det.runs.record import Record
from dropblock_det.shipped import config_file, settings_folder

# -P: not from the working directory, where another copy may lie; unless this process imports from there too.
SAFE_PATH = [] if Path(sys.argv[0]) == MAIN else ["-P"]
TRAINING = [sys.executable, *SAFE_PATH, "-m", "dropblock_det", "train"]
OVERRIDES: list[str] = []  # what follows --
console = PlainConsole()


def check_devices(devices: list[str]) -> None:
    """Refuses what names no device here.

    Raises:
        InputError: It does not.
    """
    for device in devices:
        if device == "cpu":
            continue
        if not device.isdecimal():
            raise InputError(f"--devices {device}: give GPU numbers or cpu")
        from torch.cuda import device_count

        if int(device) >= device_count():  # else that training would go on on the CPU
            raise InputError(f"--devices {device}: {device_count()} GPUs here, numbered from 0; or give cpu")


def run(
    config: Path,
    runs: Path | None = None,
    settings: Path | None = None,
    seeds: list[Seed] | None = None,
    vary_subset: bool = False,
    devices: list[str] | None = None,
    only: str | None = None,
    seed: Seed | None = None,
) -> None:
    """Trains what is not trained yet, then reports.

    Args:
        config: Shared by all runs: a file, or the name of a shipped one.
        runs: Folder for all of it (default: runs/compare_CONFIG).
        settings: Every *.yaml in this folder is a setting (default: the shipped detection; there is
            classification too).
        seeds: Each setting runs once with each (default: 0 1 2).
        vary_subset: Each seed draws a training subset of its own, the same for all settings.
        devices: GPU numbers or cpu: a run at a time on each.
        only: A single run of this setting, with --seed.
        seed: The seed for --only.
    """
    if (only is None) != (seed is None):
        raise InputError("--only SETTING and --seed S go together")
    check_devices(devices or [])
    if seeds is None:
        seeds = [0, 1, 2] if seed is None else [seed]
    if seed is not None and seed not in seeds:
        raise InputError(f"--seed {seed}: not among --seeds {' '.join(map(str, seeds))}")
    config, files = config_file(config), find_settings(settings_folder(settings))
    if only is not None and only not in files:
        raise InputError(f"--only {only}: no such setting; there are {', '.join(files)}")
    overrides = ["--trainer.enable_progress_bar", "false", *OVERRIDES]
    plan = make_plan(config, files, seeds, overrides, vary_subset)
    root = runs or Path("runs") / f"compare_{config.stem}"
    record_plan(root, plan)
    chosen = [Run(s, n) for n in plan.seeds for s in files if only in (None, s) and seed in (None, n)]
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        runner = Runner(
            root,
            lambda run: [*TRAINING, *training_arguments(plan, config, files, run)],
            chosen,
            devices or [None],
            print_result,
        )
        whole = progress.add_task("runs", total=len(chosen))
        bars = [progress.add_task("", total=None, visible=False) for _ in runner.devices]

        def on_progress() -> None:
            waiting = " (waiting for another process)" if runner.waiting else ""
            progress.update(whole, completed=len(chosen) - runner.left, description="runs" + waiting)
            for worker, bar in enumerate(bars):
                now = runner.active.get(worker)
                done, total = epochs_done(run_folder(root, now.setting, now.seed)) if now else (0, None)
                progress.update(
                    bar, description=f"{now}, epochs", completed=done, total=total, visible=now is not None
                )

        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's way to say Ctrl-C
        runner.work(on_progress)
        on_progress()
    report(root)
    if {Run(absent.setting, absent.seed) for absent in gather(root).absent} & {*chosen}:
        sys.exit(1)


def print_result(run: Run, record: Record) -> None:
    """Prints a run's last epoch, or why it failed."""
    if record.finished:
        last = record.epochs[-1] if record.epochs else {}
        values = "  ".join(f"{m.name} {m.format(last.get(m.name))}" for m in record.metrics)
        console.print(Text("finished", "green"), f"{run}  {values}")
    else:
        console.print(Text("failed", "red"), f"{run}\n  {record.reason}")


def report(runs: Path, output: Path | None = None, last: Count = 1) -> None:
    """Rebuilds the report from the records alone.

    Args:
        runs: The comparison's folder.
        output: Where to write it (default: RUNS/report).
        last: How many of the last epochs to average: steadier than the very last.
    """
    output = output or runs / "report"
    result = write_report(runs, output, last)
    names = result.leading[:4]  # more don't fit a terminal; the report has all
    metrics = [result.columns[name].metric for name in names]
    table = Table(Column("setting", no_wrap=True), "seeds", *(metric.title for metric in metrics))
    for row in result.results:
        cells = (m.format(row.cells[m.name].mean, row.cells[m.name].sd) for m in metrics)
        table.add_row(row.setting, str(len(row.finished)), *cells)
    console.print(table)
    for name in names[:2]:
        console.print(result.answers[name])
    if result.headline in result.power:
        console.print(result.power[result.headline])
    for absent in result.absent:
        line = f"{absent.status}: {absent.setting} seed {absent.seed}: {absent.reason}"
        console.print(line, style="red")
    console.print(f"report  {output / 'report.html'}")


def compare(words: Sequence[str]) -> None:
    """Runs or reports, as the first word says; what follows ``--`` is for every training."""
    cut = words.index("--") if "--" in words else len(words)
    OVERRIDES[:] = words[cut + 1 :]
    command({"run": run, "report": report}, words[:cut], "compare")
