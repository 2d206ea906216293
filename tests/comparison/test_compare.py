import contextlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from PIL import Image
from support.synthetic_runs import invented_runs
from support.the_tools import TOOLS, one_error_line, run_tool
from support.tiny_run import options

from dropblock_det.comparison.gather import gather
from dropblock_det.comparison.plan import (
    Plan,
    Run,
    find_settings,
    make_plan,
    read_plan,
    record_plan,
    run_folder,
    training_arguments,
)
from dropblock_det.comparison.runner import LOCK_NAME, Runner
from dropblock_det.errors import InputError
from dropblock_det.files import read_json, write_json
from dropblock_det.locks import take_lock
from dropblock_det.runs.record import read_record, write_record
from dropblock_det.training import compare as tool_module

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs/quickstart.yaml"
FAKE = [sys.executable, str(ROOT / "tests/support/fake_training.py")]


def configs(folder: Path, **settings) -> tuple[Path, Path]:
    """A base config and a folder of settings; ``none`` is always there."""
    (folder / "settings").mkdir(parents=True)
    base = folder / "base.yaml"
    base.write_text("trainer: {max_epochs: 4}\n")
    for name, content in ({"none": {}} | settings).items():
        (folder / "settings" / f"{name}.yaml").write_text(yaml.safe_dump({"name": name} | content))
    return base, folder / "settings"


def planned(base: Path, settings: Path, *args, **kwargs) -> Plan:
    return make_plan(base, find_settings(settings), *args, **kwargs)


def all_runs(plan: Plan) -> list[Run]:
    return [Run(setting, seed) for seed in plan.seeds for setting in plan.settings]


def runner(root: Path, folder: Path, plan: Plan, command=FAKE, **kwargs) -> Runner:
    """Of all the plan's runs, whose configs :func:`configs` has written to ``folder``."""
    base, settings = folder / "base.yaml", find_settings(folder / "settings")

    def training(run):
        return [*command, *training_arguments(plan, base, settings, run)]

    return Runner(root, training, all_runs(plan), **kwargs)


def compare(folder: Path, seeds, *overrides, **kwargs) -> list[tuple[Run, bool]]:
    """Compares the settings in ``folder``; the runs that were trained, and whether they finished."""
    devices = {"devices": kwargs.pop("devices")} if "devices" in kwargs else {}
    plan = planned(folder / "base.yaml", folder / "settings", seeds, overrides, **kwargs)
    record_plan(folder / "runs", plan)
    done = []
    runner(
        folder / "runs",
        folder,
        plan,
        on_result=lambda run, record: done.append((run, record.finished)),
        **devices,
    ).work()
    return done


def starts(folder: Path, run: Run) -> list[str]:
    return (run_folder(folder, run.setting, run.seed) / "starts.txt").read_text().split()


def figures(root: Path) -> dict:
    """All that must not depend on how often a comparison was interrupted."""
    names = ("epoch", "step", "loss", "val_loss", "mAP", "AP50", "AP75", "p")
    return {
        (r.setting, r.seed): [tuple(e.get(n) for n in names) for e in r.epochs] for r in gather(root).records
    }


def test_every_setting_with_every_seed_once(tmp_path):
    configs(tmp_path, a={}, b={})
    root = tmp_path / "runs"
    done = compare(tmp_path, [3, 4])
    everything = [Run(setting, seed) for seed in (3, 4) for setting in ("none", "a", "b")]
    assert done == [(run, True) for run in everything]
    comparison = gather(root)
    assert (comparison.base, comparison.settings, comparison.seeds) == ("base", ("none", "a", "b"), (3, 4))
    assert comparison.absent == ()
    assert all(len(record.epochs) == 4 for record in comparison.records)
    assert compare(tmp_path, [3, 4]) == []  # nothing left, nothing started
    assert all(len(starts(root, run)) == 1 for run in everything)


def test_a_new_setting_and_a_new_seed_join(tmp_path):
    _, settings = configs(tmp_path, a={})
    compare(tmp_path, [0])
    (settings / "mine.yaml").write_text("name: mine\n")
    done = compare(tmp_path, [1])
    assert [run for run, _ in done] == [Run("none", 1), Run("a", 1), Run("mine", 1)]
    absent = gather(tmp_path / "runs").absent
    assert [(a.setting, a.seed, a.status) for a in absent] == [("mine", 0, "not started")]


def test_seeds_added_after_looking_are_marked(tmp_path):
    """Those named before anything was finished are announced, as a cluster's jobs do one by one."""
    base, settings = configs(tmp_path)
    root = tmp_path / "runs"
    record_plan(root, planned(base, settings, [2]))
    record_plan(root, planned(base, settings, [5, 1]))
    assert read_plan(root).announced_seeds == (1, 2, 5)
    assert gather(root).late_seeds == ()
    compare(tmp_path, [2])
    compare(tmp_path, [7, 1])
    assert read_plan(root).seeds == (1, 2, 5, 7)
    assert gather(root).late_seeds == (7,)


def test_a_plan_of_an_older_version_marks_no_seed(tmp_path):
    base, settings = configs(tmp_path)
    plan = planned(base, settings, [0, 1])
    old = {"base": plan.base, "settings": plan.settings, "seeds": [0, 1], "overrides": []}
    write_json(tmp_path / "runs/plan.json", old)
    assert gather(tmp_path / "runs").late_seeds == ()
    compare(tmp_path, [0])
    compare(tmp_path, [2])
    assert gather(tmp_path / "runs").late_seeds == (2,)


def test_each_seed_can_draw_another_training_subset(tmp_path):
    base, _ = configs(tmp_path, a={})
    with pytest.raises(InputError, match="no subset is drawn; give data"):
        compare(tmp_path, [0], vary_subset=True)
    base.write_text("data: {init_args: {train_subset: 8}}\n")
    compare(tmp_path, [3, 4], vary_subset=True)
    root = tmp_path / "runs"
    assert gather(root).vary_subset
    for setting in ("none", "a"):
        for seed in (3, 4):
            words = (run_folder(root, setting, seed) / "arguments.txt").read_text().splitlines()
            assert words[words.index("--data.train_subset_seed") + 1] == str(seed)
    with pytest.raises(InputError, match="another vary_subset; give another --runs"):
        compare(tmp_path, [3, 4])


def test_other_configs_do_not_mix(tmp_path):
    base, settings = configs(tmp_path, a={})
    root = tmp_path / "runs"
    record_plan(root, planned(base, settings, [0]))
    with pytest.raises(InputError, match="another overrides"):
        record_plan(root, planned(base, settings, [0], ["--max_epochs", "9"]))
    base.write_text("# a comment changes nothing\ntrainer: {max_epochs: 4}\n")
    record_plan(root, planned(base, settings, [0]))
    (settings / "a.yaml").write_text("p: 0.5\n")
    with pytest.raises(InputError, match="another a; give another --runs"):
        record_plan(root, planned(base, settings, [0]))
    base.write_text("trainer: {max_epochs: 5}\n")
    with pytest.raises(InputError, match="another base, another a"):
        record_plan(root, planned(base, settings, [0]))


@pytest.mark.parametrize(
    "argument",
    [
        *("--seed_everything=5", "--seed_everything", "--config", "-c", "--config=x.yaml", "--output=x"),
        *("--resume", "--regularize.p=0.3", "--regularize", "--print_config", "--help", "-h"),
    ],
)
def test_overrides_of_what_makes_the_runs_differ_are_refused(argument, tmp_path):
    with pytest.raises(InputError, match=f"{argument.split('=')[0]}: the comparison sets it"):
        planned(*configs(tmp_path), [0], ["--data.root", "x", argument, "5"])


def test_the_subset_s_seed_is_compare_s_own_where_it_varies(tmp_path):
    base, settings = configs(tmp_path)
    for name in ("--data.train_subset_seed", "--data.init_args.subset_seed"):
        overrides = ["--data.train_subset=8", f"{name}=3"]
        assert planned(base, settings, [0], overrides).overrides == tuple(overrides)
        with pytest.raises(InputError, match=f"{name}: the comparison sets it"):
            planned(base, settings, [0], overrides, vary_subset=True)


@pytest.mark.parametrize("name", ["..", ".hidden", "-x", "a\x1b[31m", "a\n", "x" * 101, "a\udc80"])
def test_names_that_cannot_be_folders_are_refused(name, tmp_path):
    """``...yaml`` is called ``..``, and its runs would be written beside the comparison's folder."""
    _, settings = configs(tmp_path)
    (settings / f"{name}.yaml").touch()
    with pytest.raises(InputError, match="its name becomes a folder's") as caught:
        find_settings(settings)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("break_it", "seeds", "words"),
    [
        (lambda b, s: b.unlink(), [0], "base.yaml: cannot be read"),
        (lambda b, s: b.write_text("a: [1"), [0], "base.yaml: not valid YAML"),
        (lambda b, s: (s / "a.yaml").write_text("- 1"), [0], "a.yaml: not a config"),
        (lambda b, s: (s / "none.yaml").unlink(), [0], "holds no none.yaml"),
        (lambda b, s: None, [], "at least one seed"),
        (lambda b, s: None, [1, 1], "each one once"),
        (lambda b, s: None, [0, -1], "seed -1: give whole numbers from 0 to 4294967295"),
        (lambda b, s: None, [2**32], "seed 4294967296: give"),
    ],
)
def test_wrong_plans_are_input_errors(tmp_path, break_it, seeds, words):
    base, settings = configs(tmp_path, a={})
    break_it(base, settings)
    with pytest.raises(InputError, match=words) as caught:
        planned(base, settings, seeds)
    assert "\n" not in str(caught.value)


def test_a_failed_run_says_why_keeps_its_epochs_and_is_tried_again(tmp_path):
    configs(tmp_path, bad={"fail": "loss is not finite"}, dead={"die": "no memory"}, good={})
    root = tmp_path / "runs"
    assert dict(compare(tmp_path, [3])) == {
        Run("none", 3): True,
        Run("bad", 3): False,
        Run("dead", 3): False,
        Run("good", 3): True,
    }
    assert [(a.setting, a.status, a.epochs, a.reason) for a in gather(root).absent] == [
        ("bad", "failed", 1, "loss is not finite (exit status 2)"),
        ("dead", "failed", 0, "no memory (exit status 1)"),
    ]
    assert compare(tmp_path, [3]) == [(Run("bad", 3), False), (Run("dead", 3), False)]
    assert read_record(run_folder(root, "bad", 3)).epochs[-1]["epoch"] == 1  # it went on from its checkpoint


def test_only_a_failed_run_keeps_what_it_resumes_from(tmp_path):
    configs(tmp_path, bad={"fail": "loss is not finite"})
    compare(tmp_path, [0])
    assert [path.parts[-4] for path in tmp_path.glob("runs/*/*/checkpoints/*")] == ["bad"]


def test_a_training_killed_from_outside_is_failed_with_the_reason(tmp_path):
    configs(tmp_path, slow={"sleep": 30})
    root = tmp_path / "runs"
    killer = threading.Thread(target=lambda: os.kill(wait_for_training(root / "slow/seed0"), signal.SIGKILL))
    killer.start()
    assert dict(compare(tmp_path, [0]))[Run("slow", 0)] is False
    killer.join()
    assert gather(root).absent[0].reason == "ended by SIGKILL (out of memory?)"


def wait_for_training(folder: Path, seconds: float = 20) -> int:
    """The id of the process that trains in ``folder``."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for process in Path("/proc").glob("[0-9]*"):
            try:
                arguments = (process / "cmdline").read_text().split("\0")
                started = (folder / "starts.txt").exists()
            except OSError:
                continue
            if started and str(folder) in arguments and FAKE[1] in arguments:
                return int(process.name)
        time.sleep(0.02)
    raise AssertionError(f"nothing trains in {folder}")


def test_two_workers_share_the_runs_and_see_their_own_device(tmp_path):
    configs(tmp_path, a={}, b={}, c={})
    everything = [Run(setting, seed) for seed in (0, 1) for setting in ("none", "a", "b", "c")]
    done = compare(tmp_path, [0, 1], devices=["3", "cpu"])
    assert sorted(map(str, (run for run, _ in done))) == sorted(map(str, everything))
    seen = [starts(tmp_path / "runs", run) for run in everything]
    assert all(len(s) <= 1 for s in seen)  # CUDA_VISIBLE_DEVICES: "3", or empty for cpu
    assert {s[0] if s else "" for s in seen} == {"3", ""}


def test_a_run_that_another_process_holds_is_left_to_it(tmp_path):
    plan = planned(*configs(tmp_path, a={}), [0])
    root = tmp_path / "runs"
    record_plan(root, plan)
    folder = run_folder(root, "none", 0)
    lock = take_lock(folder / LOCK_NAME)
    work = runner(root, tmp_path, plan)
    seen = []

    def on_progress():
        other = read_record(run_folder(root, "a", 0))
        if other is not None and other.finished and work.waiting and not seen:
            seen.append((folder / "starts.txt").exists())
            write_record(folder, replace(other, epochs=other.epochs[:1]))
            lock.release()  # the other process has finished it

    work.work(on_progress)
    assert seen == [False]
    assert not (folder / "starts.txt").exists()
    assert gather(root).absent == ()


def test_a_worker_s_fault_reaches_the_caller(tmp_path):
    plan = planned(*configs(tmp_path), [0])
    with pytest.raises(FileNotFoundError):
        runner(tmp_path / "runs", tmp_path, plan, ["/no/such/program"]).work()


def test_thumbnails_are_kept_once(tmp_path):
    Image.new("RGB", (1000, 500), "red").save(tmp_path / "big.png")
    configs(tmp_path, a={"picture": str(tmp_path / "big.png")})
    compare(tmp_path, [0])
    with Image.open(tmp_path / "runs/images/7.jpg") as image:
        assert image.size == (480, 240)
    assert [p.name for p in (tmp_path / "runs/images").iterdir()] == ["7.jpg"]


def test_a_copied_record_is_named(tmp_path):
    """Under another seed its own seed gives it away, under another setting its epochs do."""
    root = invented_runs(tmp_path / "runs", settings=("none", "a"), seeds=(0, 1))
    record = (run_folder(root, "a", 1) / "record.json").read_text()
    for setting, seed, message in (
        ("a", 0, "a/seed0: holds the record of a seed 1; remove the copy"),
        ("none", 1, "none/seed1: holds the same record as .*a/seed1; remove the copy"),
    ):
        target = run_folder(root, setting, seed) / "record.json"
        own = target.read_text()
        target.write_text(record)
        with pytest.raises(InputError, match=message):
            gather(root)
        target.write_text(own)
    assert len(gather(root).records) == 4


def test_runs_that_measure_other_things_are_not_compared(tmp_path):
    root = invented_runs(tmp_path / "runs", settings=("none", "a"), seeds=(0,))
    folder = run_folder(root, "a", 0)
    record = read_record(folder)
    for other in (
        replace(record, task="classification"),
        replace(record, headline="AP50"),
        replace(record, metrics=record.metrics[:3]),
    ):
        write_record(folder, other)
        with pytest.raises(InputError, match=r"a/seed0: measures .*; no table can compare them"):
            gather(root)


# --- killed ------------------------------------------------------------------------------------


DRIVER = """
import fcntl, os, sys
from pathlib import Path
from dropblock_det import files, locks
if "MACHINE" in os.environ:  # as if on a machine of that name, which no kernel's lock reaches
    files.MACHINE, files.SILENT_S, locks.BEAT_S = os.environ["MACHINE"], 2.0, 0.2
    fcntl.flock = fcntl.lockf = lambda *_: None
from dropblock_det.comparison.plan import Run, find_settings, make_plan, record_plan, training_arguments
from dropblock_det.comparison.runner import Runner
folder, command = Path(sys.argv[1]), sys.argv[2:]
base, settings, root = folder / "base.yaml", find_settings(folder / "settings"), folder / "runs"
plan = make_plan(base, settings, [0, 1])
record_plan(root, plan)
runs = [Run(s, n) for n in plan.seeds for s in settings]
Runner(root, lambda run: [*command, *training_arguments(plan, base, settings, run)], runs).work()
"""


def driver(folder: Path, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-c", DRIVER, str(folder), *FAKE]
    environment = os.environ | environment
    return subprocess.Popen(
        command, start_new_session=True, cwd=ROOT, stderr=subprocess.PIPE, env=environment
    )


def all_starts(root: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in root.glob("*/*/starts.txt"))


def test_killed_again_and_again_it_ends_with_the_same_records(tmp_path):
    """SIGKILL, five times, in turn to all its processes and to it alone (its training lives on)."""
    for name in ("calm", "killed"):
        configs(tmp_path / name, a={"sleep": 0.2}, b={"sleep": 0.2})
    assert driver(tmp_path / "calm").wait(60) == 0
    killed = tmp_path / "killed/runs"
    moment = random.Random(4)
    for kill in range(5):
        before = all_starts(killed)
        process = driver(tmp_path / "killed")
        while all_starts(killed) == before:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        time.sleep(moment.uniform(0, 0.4))
        if kill % 2:
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    process = driver(tmp_path / "killed")
    assert process.wait(60) == 0, process.stderr.read()
    calm = figures(tmp_path / "calm/runs")
    assert len(calm) == 6
    assert figures(killed) == calm
    assert all_starts(killed) > 6  # some were really cut short
    assert not list(killed.glob("**/.record.json.*"))


def test_a_training_that_outlives_its_comparison_is_waited_for(tmp_path):
    configs(tmp_path, slow={"sleep": 0.4})
    process = driver(tmp_path)
    training = wait_for_training(tmp_path / "runs/slow/seed0")
    process.kill()
    process.wait()
    assert Path(f"/proc/{training}").exists()
    process = driver(tmp_path)
    assert process.wait(60) == 0, process.stderr.read()
    assert starts(tmp_path / "runs", Run("slow", 0)) == ["None"]  # started once, by the first
    assert gather(tmp_path / "runs").absent == ()


def test_two_machines_share_a_comparison_and_one_follows_the_other_that_died(tmp_path):
    """Each run is done once, and the one that a whole machine took with it goes on from its checkpoint."""
    configs(tmp_path, a={"sleep": 0.1}, b={"sleep": 0.1})
    root = tmp_path / "runs"
    machines = [driver(tmp_path, MACHINE=name) for name in ("0" * 8, "1" * 8)]
    for machine in machines:
        assert machine.wait(60) == 0, machine.stderr.read()
    assert [len(starts(root, run)) for run in all_runs(read_plan(root))] == [1] * 6

    (tmp_path / "settings" / "slow.yaml").write_text("{name: slow, sleep: 1}")
    died = driver(tmp_path, MACHINE="0" * 8)
    wait_for_training(root / "slow/seed0")
    left = driver(tmp_path, MACHINE="1" * 8)
    wait_for_training(root / "slow/seed1")
    while read_record(root / "slow/seed0") is None:
        time.sleep(0.01)
    os.killpg(died.pid, signal.SIGKILL)
    assert left.wait(60) == 0, left.stderr.read()
    assert gather(root).absent == ()
    assert [len(starts(root, Run("slow", seed))) for seed in (0, 1)] == [2, 1]
    assert [epoch["epoch"] for epoch in read_record(root / "slow/seed0").epochs] == [0, 1, 2, 3]


def states(root: Path) -> set[tuple[Path, int]]:
    """Every file below ``root`` with the time of its last change."""
    found = set()
    for path in root.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # a temporary file, renamed just now
            found.add((path, path.stat().st_mtime_ns))
    return found


def changes_until(process: subprocess.Popen, root: Path, wanted: float = math.inf) -> int:
    """Waits for that many file changes below ``root``, or for the end of the process; how many it saw."""
    deadline, seen, before = time.monotonic() + 400, 0, states(root)
    while seen < wanted and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
        now = states(root)
        seen, before = seen + len(now - before), now
    assert process.poll() in (None, 0)
    return seen


@pytest.mark.slow
def test_real_training_killed_five_times_ends_with_the_same_records(tmp_path):
    """As above, through the tool and with a real detector; equal to the last digit, on the CPU."""
    settings = tmp_path / "settings"
    settings.mkdir()
    for name in ("none", "dropblock_bs3_kp0.9"):
        source = ROOT / "configs/settings" / f"{name}.yaml"
        (settings / source.name).write_text(source.read_text())
    tiny = [*options(tmp_path / "scenes"), "--data.num_workers=1", "--trainer.max_epochs=6"]

    def start(root: Path) -> subprocess.Popen:
        arguments = ["run", str(ROOT / "configs/quickstart.yaml"), "--runs", str(root)]
        arguments += ["--settings", str(settings), "--seeds", "0", "--", *tiny]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, TOOLS / "compare.py", *arguments], start_new_session=True, env=environment
        )

    # Killed after a random number of file changes, not of seconds: however fast or slow the machine is at
    # that moment, kills come at every stage, many in the midst of writing, and none after the end.
    whole = changes_until(start(tmp_path / "calm"), tmp_path / "calm")
    moment = random.Random()
    moments = [(moment.randint(1, whole // 10), moment.uniform(0, 0.3)) for _ in range(5)]
    for changes, seconds in moments:
        process = start(tmp_path / "killed")
        changes_until(process, tmp_path / "killed", changes)
        time.sleep(seconds)
        assert process.poll() is None, "it finished before it could be killed"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert start(tmp_path / "killed").wait(600) == 0
    calm = figures(tmp_path / "calm")
    assert [len(epochs) for epochs in calm.values()] == [6, 6]
    assert figures(tmp_path / "killed") == calm, f"killed after (changes, seconds) {moments}"
    shown = [
        {(r.setting, r.seed): [s.predicted for s in r.samples] for r in gather(tmp_path / name).records}
        for name in ("calm", "killed")
    ]
    assert shown[0] == shown[1]
    inits = [{r.seed: r.init_hash for r in gather(tmp_path / name).records} for name in ("calm", "killed")]
    assert inits[0] == inits[1]


def test_ctrl_c_ends_the_training_and_writes_no_record(tmp_path):
    configs(tmp_path, slow={"sleep": 30})
    process = driver(tmp_path)
    training = wait_for_training(tmp_path / "runs/slow/seed0")
    os.kill(process.pid, signal.SIGINT)  # to it alone: it must see to its training itself
    assert process.wait(20) != 0
    assert b"KeyboardInterrupt" in process.stderr.read()
    assert not Path(f"/proc/{training}").exists()
    comparison = gather(tmp_path / "runs")
    assert [(a.setting, a.seed, a.status) for a in comparison.absent][:2] == [
        ("none", 1, "not started"),
        ("slow", 0, "not started"),
    ]


# --- the tool ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["report", "/no/such/folder"], "/no/such/folder: no such folder"),
        (["run", "/no/such.yaml"], "/no/such.yaml: cannot be read"),
        (["run", CONFIG, "--only", "none"], "--only SETTING and --seed S go together"),
        (["run", CONFIG, "--only", "nine", "--seed", "0"], "no such setting; there are none, "),
        (["run", CONFIG, "--seeds", "1", "--only", "none", "--seed", "0"], "--seed 0: not among --seeds 1"),
        (["run", CONFIG, "--devices", "gpu"], "--devices gpu: give GPU numbers or cpu"),
        (["run", CONFIG, "--devices", "cpu", "99"], "--devices 99: "),
        (["run", CONFIG, "--seeds", "-1"], "seeds: got [-1]"),
        (["run", CONFIG, "--runs", "/proc/no"], "/proc/no: No such file or directory"),
        (
            ["run", CONFIG, "--", "--seed_everything", "5"],
            "--seed_everything: the comparison sets it",
        ),
    ],
)
def test_bad_arguments_give_one_line_and_status_2(tmp_path, arguments, words):
    assert words in one_error_line(run_tool("compare.py", *arguments, cwd=tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def tool(monkeypatch):
    """The compare command as a function of its arguments, with the invented training."""
    monkeypatch.setattr(tool_module, "TRAINING", FAKE)

    def call(*arguments):
        tool_module.compare([*map(str, arguments)])

    before = signal.getsignal(signal.SIGTERM)
    yield call
    signal.signal(signal.SIGTERM, before)


def test_single_runs_of_a_cluster_merge_into_one_report(tool, tmp_path, capsys):
    base, settings = configs(tmp_path, a={})
    root = tmp_path / "runs"
    for setting in ("a", "none"):
        for seed in (0, 1):
            common = ["run", base, "--runs", root, "--settings", settings]
            tool(*common, "--seeds", 0, 1, "--only", setting, "--seed", seed, "--", "--max_epochs", 2)
    comparison = gather(root)
    assert comparison.absent == ()
    assert [(r.setting, r.seed, len(r.epochs)) for r in comparison.records] == [
        (setting, seed, 2) for setting in ("none", "a") for seed in (0, 1)
    ]
    lowest = min(epoch["loss"] for epoch in read_record(run_folder(root, "a", 0)).epochs)
    assert f"finished a seed 0  loss {lowest:.4f}" in capsys.readouterr().out
    tool("run", base, "--runs", root, "--settings", settings, "--seeds", 0, 1, "--", "--max_epochs", 2)
    out = capsys.readouterr().out
    assert "finished" not in out  # nothing was left to do
    assert "4/4" in out
    assert (root / "report/report.html").exists()


def test_a_failed_run_is_told_and_shows_in_the_exit_status(tool, tmp_path, capsys):
    base, settings = configs(tmp_path, **{"a[b]d": {"fail": "the loss is [not] finite"}})
    with pytest.raises(SystemExit) as caught:
        tool("run", base, "--runs", tmp_path / "runs", "--settings", settings, "--seeds", 0)
    assert caught.value.code == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "failed a[b]d seed 0 the loss is [not] finite (exit status 2)" in out
    assert "failed: a[b]d seed 0: the loss is [not] finite (exit status 2)" in out


def test_a_report_that_cannot_be_read_or_written_is_one_line(tool, tmp_path, line_of):
    root = invented_runs(tmp_path / "runs", settings=("none", "dropout"))
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    for output in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/no")):
        assert str(output) in line_of(lambda output=output: tool("report", root, "--output", output))
    record = run_folder(root, "dropout", 1) / "record.json"
    for content in (record.read_text()[:500], "", "[]", "{}"):
        record.write_text(content)
        assert "dropout/seed1/record.json: not " in line_of(lambda: tool("report", root))
    assert sorted(tmp_path.rglob("*")) == before
    plan = (root / "plan.json").read_text()
    for content in ("[1]", "{}", plan.replace('"quickstart"', "3"), plan.replace(" 0,", ' "a",'), plan[:50]):
        (root / "plan.json").write_text(content)
        assert "plan.json: not " in line_of(lambda: tool("report", root))
        assert "plan.json: not " in line_of(lambda: tool("run", CONFIG, "--runs", root))


def test_report_is_rebuilt_from_records_alone(tmp_path):
    invented_runs(tmp_path / "runs", settings=("none", "dropout"))
    begin = time.monotonic()
    result = run_tool("compare.py", "report", tmp_path / "runs", "--output", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert time.monotonic() - begin < 30
    assert "val_loss: " in result.stdout
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"report.html", "report.md", "report.csv", "report.json", "report.png"} == written
    assert len(read_json(tmp_path / "out/report.json")["records"]) == 6
    json.loads((tmp_path / "out/report.json").read_text(), parse_constant=lambda name: pytest.fail(name))
