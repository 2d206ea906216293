import contextlib
import fcntl
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from PIL import Image
from support.synthetic_runs import invented_runs
from support.the_tools import TOOLS, one_error_line, run_tool, tool_module
from support.tiny_run import options

from dropblock_det.comparison.runner import Plan, Run, Runner, make_plan, record_plan
from dropblock_det.errors import InputError
from dropblock_det.files import read_json, write_json
from dropblock_det.runs.record_v1 import read_comparison, read_record, run_folder

ROOT = Path(__file__).parents[2]
FAKE = [sys.executable, str(ROOT / "tests/support/fake_training.py")]


def configs(folder: Path, **settings) -> tuple[Path, Path]:
    """A base config and a folder of settings; ``none`` is always there."""
    (folder / "settings").mkdir(parents=True)
    base = folder / "base.yaml"
    base.write_text("trainer: {max_epochs: 4}\n")
    for name, content in ({"none": {}} | settings).items():
        (folder / "settings" / f"{name}.yaml").write_text(yaml.safe_dump({"name": name} | content))
    return base, folder / "settings"


def all_runs(plan: Plan) -> list[Run]:
    return [Run(setting, seed) for seed in plan.seeds for setting in plan.settings]


def compare(folder: Path, plan: Plan, **kwargs) -> list[tuple[Run, bool]]:
    record_plan(folder, plan)
    done = []
    Runner(
        folder,
        plan,
        FAKE,
        all_runs(plan),
        on_record=lambda run, record: done.append((run, record.finished)),
        **kwargs,
    ).work()
    return done


def starts(folder: Path, run: Run) -> list[str]:
    return (run_folder(folder, run.setting, run.seed) / "starts.txt").read_text().split()


def figures(root: Path) -> dict:
    """All that must not depend on how often a comparison was interrupted."""
    names = ("epoch", "step", "loss", "val_loss", "mAP", "AP50", "AP75", "p")
    return {
        (r.setting, r.seed): [tuple(getattr(e, n) for n in names) for e in r.epochs]
        for r in read_comparison(root).records
    }


def test_every_setting_with_every_seed_once(tmp_path):
    plan = make_plan(*configs(tmp_path, a={}, b={}), [3, 4])
    root = tmp_path / "runs"
    done = compare(root, plan)
    assert done == [(run, True) for run in all_runs(plan)]
    assert [run.setting for run, _ in done[:3]] == ["none", "a", "b"]
    comparison = read_comparison(root)
    assert (comparison.base, comparison.settings, comparison.seeds) == ("base", ("none", "a", "b"), (3, 4))
    assert comparison.absent == ()
    assert all(len(record.epochs) == 4 for record in comparison.records)
    assert compare(root, plan) == []  # nothing left, nothing started
    assert all(len(starts(root, run)) == 1 for run in all_runs(plan))


def test_a_new_setting_and_a_new_seed_join(tmp_path):
    base, settings = configs(tmp_path, a={})
    compare(tmp_path / "runs", make_plan(base, settings, [0]))
    (settings / "mine.yaml").write_text("name: mine\n")
    done = compare(tmp_path / "runs", make_plan(base, settings, [1]))
    assert [run for run, _ in done] == [Run("none", 1), Run("a", 1), Run("mine", 1)]
    absent = read_comparison(tmp_path / "runs").absent
    assert [(a.setting, a.seed, a.status) for a in absent] == [("mine", 0, "not started")]


def test_other_configs_do_not_mix(tmp_path):
    base, settings = configs(tmp_path, a={})
    root = tmp_path / "runs"
    record_plan(root, make_plan(base, settings, [0]))
    with pytest.raises(InputError, match="another overrides"):
        record_plan(root, make_plan(base, settings, [0], ["--max_epochs", "9"]))
    base.write_text("# a comment changes nothing\ntrainer: {max_epochs: 4}\n")
    record_plan(root, make_plan(base, settings, [0]))
    (settings / "a.yaml").write_text("p: 0.5\n")
    with pytest.raises(InputError, match="another a; give another --runs"):
        record_plan(root, make_plan(base, settings, [0]))
    base.write_text("trainer: {max_epochs: 5}\n")
    with pytest.raises(InputError, match="another base, another a"):
        record_plan(root, make_plan(base, settings, [0]))


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
        make_plan(base, settings, seeds)
    assert "\n" not in str(caught.value)


def test_a_failed_run_says_why_keeps_its_epochs_and_is_tried_again(tmp_path):
    base, settings = configs(tmp_path, bad={"fail": "loss is not finite"}, good={})
    root, plan = tmp_path / "runs", make_plan(base, settings, [0])
    assert dict(compare(root, plan)) == {Run("none", 0): True, Run("bad", 0): False, Run("good", 0): True}
    (absent,) = read_comparison(root).absent
    assert (absent.setting, absent.status, absent.epochs) == ("bad", "failed", 1)
    assert absent.reason == "loss is not finite (exit status 2)"
    assert compare(root, plan) == [(Run("bad", 0), False)]
    assert read_record(run_folder(root, "bad", 0)).epochs[-1].epoch == 1  # it went on from its checkpoint


def test_a_training_killed_from_outside_is_failed_with_the_reason(tmp_path):
    base, settings = configs(tmp_path, slow={"sleep": 30})
    root, plan = tmp_path / "runs", make_plan(base, settings, [0])
    killer = threading.Thread(target=lambda: os.kill(wait_for_training(root / "slow/seed0"), signal.SIGKILL))
    killer.start()
    assert dict(compare(root, plan))[Run("slow", 0)] is False
    killer.join()
    assert read_comparison(root).absent[0].reason == "ended by SIGKILL (out of memory?)"


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
    base, settings = configs(tmp_path, a={}, b={}, c={})
    root, plan = tmp_path / "runs", make_plan(base, settings, [0, 1])
    done = compare(root, plan, devices=["3", "cpu"])
    assert sorted(map(str, (run for run, _ in done))) == sorted(map(str, all_runs(plan)))
    seen = [starts(root, run) for run in all_runs(plan)]
    assert all(len(s) <= 1 for s in seen)  # CUDA_VISIBLE_DEVICES: "3", or empty for cpu
    assert {s[0] if s else "" for s in seen} == {"3", ""}


def test_a_run_that_another_process_holds_is_left_to_it(tmp_path):
    base, settings = configs(tmp_path, a={})
    root, plan = tmp_path / "runs", make_plan(base, settings, [0])
    record_plan(root, plan)
    folder = run_folder(root, "none", 0)
    folder.mkdir(parents=True)
    lock = (folder / ".lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    runner = Runner(root, plan, FAKE, all_runs(plan))
    seen = []

    def tick():
        if read_record(run_folder(root, "a", 0)) is not None and runner.waiting and not lock.closed:
            seen.append((folder / "starts.txt").exists())
            write_json(
                folder / "record.json", {**read_record(run_folder(root, "a", 0)).to_dict(), "setting": "none"}
            )
            lock.close()  # the other process has finished it

    runner.work(tick)
    assert seen == [False]
    assert not (folder / "starts.txt").exists()
    assert read_comparison(root).absent == ()


def test_a_worker_s_fault_reaches_the_caller(tmp_path):
    plan = make_plan(*configs(tmp_path), [0])
    with pytest.raises(FileNotFoundError):
        Runner(tmp_path / "runs", plan, ["/no/such/program"], all_runs(plan)).work()


def test_thumbnails_are_kept_once_and_no_path_is_recorded(tmp_path):
    Image.new("RGB", (1000, 500), "red").save(tmp_path / "big.png")
    base, settings = configs(tmp_path, a={"picture": str(tmp_path / "big.png")})
    root = tmp_path / "runs"
    compare(root, make_plan(base, settings, [0]))
    with Image.open(root / "images/7.jpg") as image:
        assert image.size == (480, 240)
    assert [p.name for p in (root / "images").iterdir()] == ["7.jpg"]
    assert "file" not in read_record(run_folder(root, "a", 0)).detections[0]


# --- killed ------------------------------------------------------------------------------------


DRIVER = """
import sys
from pathlib import Path
from dropblock_det.comparison.runner import Run, Runner, make_plan, record_plan
folder, *command = sys.argv[1:]
plan = make_plan(Path(folder) / "base.yaml", Path(folder) / "settings", [0, 1])
root = Path(folder) / "runs"
record_plan(root, plan)
Runner(root, plan, command, [Run(s, n) for n in plan.seeds for s in plan.settings]).work()
"""


def driver(folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", DRIVER, str(folder), *FAKE]
    return subprocess.Popen(command, start_new_session=True, cwd=ROOT, stderr=subprocess.PIPE)


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
    assert read_comparison(tmp_path / "runs").absent == ()


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
    """As above, through the tool and with the real RetinaNet; equal to the last digit, on the CPU."""
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
        {(r.setting, r.seed): r.detections for r in read_comparison(tmp_path / name).records}
        for name in ("calm", "killed")
    ]
    assert shown[0] == shown[1]
    inits = [
        {r.seed: r.init_hash for r in read_comparison(tmp_path / name).records} for name in ("calm", "killed")
    ]
    assert inits[0] == inits[1]


def test_ctrl_c_ends_the_training_and_writes_no_record(tmp_path):
    configs(tmp_path, slow={"sleep": 30})
    process = driver(tmp_path)
    training = wait_for_training(tmp_path / "runs/slow/seed0")
    os.kill(process.pid, signal.SIGINT)  # to it alone: it must see to its training itself
    assert process.wait(20) != 0
    assert b"KeyboardInterrupt" in process.stderr.read()
    assert not Path(f"/proc/{training}").exists()
    comparison = read_comparison(tmp_path / "runs")
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
        (["run", "--only", "none"], "--only SETTING and --seed S go together"),
        (["run", "--only", "nine", "--seed", "0"], "no such setting; there are none, "),
        (["run", "--devices", "gpu"], "--devices gpu: give GPU numbers or cpu"),
        (["run", "--devices", "cpu", "99"], "--devices 99: "),
        (["run", "--seeds", "-1"], "seed -1: give whole numbers"),
        (["run", "--runs", "/proc/no"], "/proc/no: No such file or directory; choose a folder"),
    ],
)
def test_bad_arguments_give_one_line_and_status_2(tmp_path, arguments, words):
    assert words in one_error_line(run_tool("compare.py", *arguments, cwd=tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def tool(monkeypatch):
    """tools/compare.py as a function of its arguments, with the invented training."""
    module = tool_module("compare.py")
    monkeypatch.setattr(module, "TRAINING", FAKE)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, arguments)])
        module.main()

    before = signal.getsignal(signal.SIGTERM)
    yield call
    signal.signal(signal.SIGTERM, before)


def test_single_runs_of_a_cluster_merge_into_one_report(tool, tmp_path, capsys):
    base, settings = configs(tmp_path, a={})
    root = tmp_path / "runs"
    for setting in ("a", "none"):
        for seed in (0, 1):
            common = ["run", base, "--runs", root, "--settings", settings]
            tool(*common, "--only", setting, "--seed", seed, "--", "--max_epochs", 2)
    comparison = read_comparison(root)
    assert comparison.absent == ()
    assert [(r.setting, r.seed, len(r.epochs)) for r in comparison.records] == [
        (setting, seed, 2) for setting in ("none", "a") for seed in (0, 1)
    ]
    lowest = min(epoch.loss for epoch in read_record(run_folder(root, "a", 0)).epochs)
    assert f"finished a seed 0  loss {lowest:.4f}" in capsys.readouterr().out
    tool("run", base, "--runs", root, "--settings", settings, "--seeds", 0, 1, "--", "--max_epochs", 2)
    out = capsys.readouterr().out
    assert "finished" not in out  # nothing was left to do
    assert "4/4" in out
    assert (root / "report/report.html").exists()


def test_a_failed_run_is_told_and_shows_in_the_exit_status(tool, tmp_path, capsys):
    base, settings = configs(tmp_path, bad={"fail": "the loss is [not] finite"})
    with pytest.raises(SystemExit) as caught:
        tool("run", base, "--runs", tmp_path / "runs", "--settings", settings, "--seeds", 0)
    assert caught.value.code == 1
    assert "the loss is [not] finite (exit status 2)" in " ".join(capsys.readouterr().out.split())


def test_a_report_that_cannot_be_read_or_written_is_one_line(tool, tmp_path, line_of):
    root = invented_runs(tmp_path / "runs", settings=("none", "dropout"))
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    for output in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/no")):
        assert "; choose a folder that you may write to" in line_of(
            lambda output=output: tool("report", root, "--output", output)
        )
    record = run_folder(root, "dropout", 1) / "record.json"
    for content in (record.read_text()[:500], "", "[]", "{}"):
        record.write_text(content)
        assert "dropout/seed1/record.json: not " in line_of(lambda: tool("report", root))
    assert sorted(tmp_path.rglob("*")) == before
    plan = (root / "plan.json").read_text()
    for content in ("[1]", "{}", plan.replace('"quickstart"', "3"), plan.replace(" 0,", ' "a",'), plan[:50]):
        (root / "plan.json").write_text(content)
        assert "plan.json: not " in line_of(lambda: tool("report", root))
        assert "plan.json: not " in line_of(lambda: tool("run", "--runs", root))


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
