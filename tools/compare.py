"""Did it help? Trains a config under every setting of a folder with several seeds, and shows the answer.

    compare.py run [CONFIG] [--runs RUNS] [--seeds 0 1 2] [--devices 0 1] [-- TRAINING ARGUMENTS]
    compare.py report RUNS [--output FOLDER]

Stop it whenever you like: started again, it skips what is finished and goes on with the rest. On a cluster,
submit `compare.py run CONFIG --runs RUNS --only SETTING --seed S` as single jobs with one shared RUNS folder.
"""

import argparse
import signal
import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from dropblock_det.comparison.gather import gather
from dropblock_det.comparison.runner import Run, Runner, epochs_done, make_plan, record_plan
from dropblock_det.errors import InputError, disk_errors, printable, run_tool
from dropblock_det.report.page import write_report
from dropblock_det.report.words import number
from dropblock_det.runs.record import read_record
from dropblock_det.runs.record_v1 import Record, run_folder

ROOT = Path(__file__).parents[1]
TRAINING = [sys.executable, str(ROOT / "tools/train.py")]
console = Console()


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train what is not trained yet, then report")
    run.add_argument(
        "config", type=Path, nargs="?", default=ROOT / "configs/quickstart.yaml", help="shared by all runs"
    )
    run.add_argument("--runs", type=Path, help="folder for all of it (default: runs/compare_CONFIG)")
    run.add_argument(
        "--settings", type=Path, default=ROOT / "configs/settings", help="every *.yaml in it is a setting"
    )
    run.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="each setting runs once with each"
    )
    run.add_argument(
        "--devices", nargs="+", default=[None], metavar="DEVICE", help="GPU numbers or cpu: a run on each"
    )
    run.add_argument("--only", metavar="SETTING", help="a single run of this setting, with --seed")
    run.add_argument("--seed", type=int, help="the seed for --only")
    report = commands.add_parser("report", help="rebuild the report from the records alone")
    report.add_argument("runs", type=Path)
    report.add_argument("--output", type=Path, help="where to write it (default: RUNS/report)")
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:cut])
    options.overrides = arguments[cut + 1 :]
    return options


def check_devices(devices: list[str | None]) -> None:
    for device in devices:
        if device in (None, "cpu"):
            continue
        if not device.isdecimal():
            raise InputError(f"--devices {device}: give GPU numbers or cpu")
        from torch.cuda import device_count

        if int(device) >= device_count():  # else that training would go on on the CPU
            raise InputError(f"--devices {device}: {device_count()} GPUs here, numbered from 0; or give cpu")


def run(options: argparse.Namespace) -> None:
    if (options.only is None) != (options.seed is None):
        raise InputError("--only SETTING and --seed S go together")
    check_devices(options.devices)
    plan = make_plan(
        options.config,
        options.settings,
        options.seeds if options.seed is None else [options.seed],
        ["--trainer.enable_progress_bar", "false", *options.overrides],
    )
    if options.only is not None and options.only not in plan.settings:
        raise InputError(f"--only {options.only}: no such setting; there are {', '.join(plan.settings)}")
    root = options.runs or Path("runs") / f"compare_{options.config.stem}"
    with disk_errors(root):
        record_plan(root, plan)
    chosen = [Run(s, seed) for seed in plan.seeds for s in plan.settings if options.only in (None, s)]

    def told(run: Run, record: Record) -> None:
        kept = read_record(run_folder(root, run.setting, run.seed))
        last = kept.epochs[-1] if kept and kept.epochs else {}
        values = "  ".join(f"{m.name} {number(m, last.get(m.name))}" for m in (kept.metrics if kept else ()))
        said = f"[green]finished[/] {run}  {values}" if record.finished else f"[red]failed[/] {run}"
        progress.console.print(said, highlight=False)
        if record.reason:
            progress.console.print(f"  {record.reason}", markup=False, highlight=False)

    runner = Runner(root, plan, TRAINING, chosen, options.devices, told)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        whole = progress.add_task("runs", total=len(chosen))
        bars = [progress.add_task("", total=None, visible=False) for _ in options.devices]

        def tick() -> None:
            waiting = " (waiting for another process)" if runner.waiting else ""
            progress.update(whole, completed=len(chosen) - runner.left, description="runs" + waiting)
            for number, bar in enumerate(bars):
                now = runner.active.get(number)
                done, total = epochs_done(run_folder(root, now.setting, now.seed)) if now else (0, None)
                progress.update(
                    bar, description=f"{now}, epochs", completed=done, total=total, visible=now is not None
                )

        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's way to say Ctrl-C
        with disk_errors(root):
            runner.work(tick)
        tick()
    report(root, root / "report")
    if {Run(absent.setting, absent.seed) for absent in gather(root).absent} & {*chosen}:
        sys.exit(1)


def report(runs: Path, output: Path) -> None:
    with disk_errors(output):
        result = write_report(runs, output)
    names = result.leading[:4]  # more don't fit a terminal; the report has all
    metrics = [result.columns[name].metric for name in names]
    table = Table(Column("setting", no_wrap=True), "seeds", *(escape(metric.title) for metric in metrics))
    for row in result.results:
        cells = (number(m, row.cells[m.name].mean, row.cells[m.name].sd) for m in metrics)
        table.add_row(escape(printable(row.setting)), str(len(row.finished)), *cells)
    console.print(table)
    for name in names[:2]:
        console.print(result.answers[name], markup=False, highlight=False)
    for absent in result.absent:
        line = printable(f"{absent.status}: {absent.setting} seed {absent.seed}: {absent.reason}")
        console.print(line, markup=False, highlight=False, style="red")
    console.print(f"report  {output / 'report.html'}", soft_wrap=True)


def main() -> None:
    options = parse(sys.argv[1:])
    if options.command == "run":
        run(options)
    else:
        report(options.runs, options.output or options.runs / "report")


if __name__ == "__main__":
    run_tool(main)
