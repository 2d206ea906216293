"""By hand, with -m slow: many steps, many kills, a process that dies."""

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from support.tiny_run import ROOT, arguments, start
from torchvision.io import encode_png

from dropblock_det.callbacks import Regularize
from dropblock_det.datasets.scenes import ScenesDataModule
from dropblock_det.files import write_bytes
from dropblock_det.runs.folder import check_whole, is_finished, newest_checkpoint
from dropblock_det.runs.record import read_record
from dropblock_det.tasks.detection.module import DetectionModule

pytestmark = pytest.mark.slow


class Resources(Callback):
    """Resident memory in bytes, open files and threads after given steps."""

    def __init__(self, steps):
        self.steps, self.seen = steps, {}

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step in self.steps:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            files = len(os.listdir("/proc/self/fd"))
            memory = pages * os.sysconf("SC_PAGE_SIZE")
            self.seen[trainer.global_step] = {
                "memory": memory,
                "files": files,
                "threads": threading.active_count(),
            }


def test_two_thousand_steps_neither_grow_nor_leak(tmp_path):
    """Resident memory after step 2,000 is within 5 % of that after step 200; as many files and threads."""
    data = ScenesDataModule(str(tmp_path / "scenes"), train_size=40, val_size=2, batch_size=2, num_workers=1)
    module = DetectionModule(
        data.categories, min_size=64, max_size=64, anchor_sizes=[8, 16, 32, 64, 128], warmup_steps=0
    )
    resources = Resources({200, 1000, 2000})
    trainer = Trainer(
        max_steps=2000,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        callbacks=[Regularize("dropblock", p=0.1, block_size=3), resources],
        check_val_every_n_epoch=20,
        gradient_clip_val=5.0,
    )
    trainer.fit(module, data)
    early, _, late = resources.seen.values()
    print(resources.seen)
    assert late["memory"] < 1.05 * early["memory"]
    assert (late["files"], late["threads"]) == (early["files"], early["threads"])


def classifier(root, output):
    """Arguments for a training of seconds, whose checkpoints take 3.5 MB."""
    for part, name, number in itertools.product(("train", "test"), ("cat", "dog"), range(6)):
        pixels = np.random.default_rng(number).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        write_bytes(
            root / part / name / f"{number}.png",
            encode_png(torch.from_numpy(pixels).permute(2, 0, 1)).numpy().tobytes(),
        )
    config = ROOT / "configs" / "classification" / "cifar10_small_cnn.yaml"
    return [
        *(f"--config={config}", f"--data.root={root}", "--data.source=folder", "--data.batch_size=4"),
        *("--trainer.max_epochs=3", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"),
        f"--output={output}",
    ]


def ends(process):
    """The exit status and the last line of stderr; nothing in it is a traceback."""
    _, messages = process.communicate(timeout=600)
    assert "Traceback" not in messages
    return process.returncode, messages.splitlines()[-1] if messages else ""


def test_of_two_starts_at_once_one_trains_and_the_other_says_so(tmp_path):
    args = classifier(tmp_path / "data", tmp_path / "run")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    (ended_well, _), (refused, line) = sorted(map(ends, [start(args, **quiet) for _ in range(2)]))
    assert (ended_well, refused) == (0, 2)
    assert re.fullmatch(rf"error: {tmp_path}/run: process \d+ on \S+ is working on it; .*", line)
    record = read_record(tmp_path / "run")
    assert record.finished
    assert [epoch["epoch"] for epoch in record.epochs] == [0, 1, 2]
    assert [path.name for path in (tmp_path / "run" / "logs").iterdir()] == ["version_0"]


@pytest.mark.parametrize("size", ["16k", "64k", "2m", "6m", "9m"])
def test_a_full_disk_ends_a_training_in_one_line_and_it_goes_on_when_there_is_room(size, tmp_path):
    """Full while the first files are written, at the first checkpoint or at a later one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        args = classifier(tmp_path / "data", disk / "run")
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        status, line = ends(start(args, **quiet))
        assert status == 2
        assert re.fullmatch(rf"error: {disk}/run.*: No space left on device \(make room .*\)", line)
        assert not list(disk.rglob("*.part"))
        assert all(check_whole(path) is None for path in disk.rglob("*.ckpt"))
        assert not is_finished(disk / "run")
        subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
        assert ends(start(args, **quiet))[0] == 0
        assert [epoch["epoch"] for epoch in read_record(disk / "run").epochs] == [0, 1, 2]
    finally:
        subprocess.run(["umount", disk], check=True)


def ended(pid):
    """Whether a process that need not be our child is gone; a zombie is."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def seconds_until(condition, limit):
    start = time.monotonic()
    while not condition():
        assert time.monotonic() < start + limit
        time.sleep(0.1)
    return time.monotonic() - start


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_run_within_a_minute(victim, scenes, tmp_path):
    """One line that says so and how to go on, whichever of two dies, by whichever of two ways."""
    args = arguments(
        scenes, tmp_path / "run", "--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_epochs=500"
    )
    with (tmp_path / "stderr").open("w") as stderr:
        first = start(args, stdout=subprocess.DEVNULL, stderr=stderr)
    seconds_until(lambda: first.poll() is not None or newest_checkpoint(tmp_path / "run"), 180)
    assert first.poll() is None, (tmp_path / "stderr").read_text()
    children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    second = next(int(pid) for pid in children if "train.py" in Path(f"/proc/{pid}/cmdline").read_text())
    os.kill((first.pid, second)[victim], signal.SIGKILL)
    waited = seconds_until(lambda: first.poll() is not None and ended(second), 60)
    line = (tmp_path / "stderr").read_text().splitlines()[-1]
    print(f"\nended {waited:.1f} s after process {victim} was killed: {line}")
    assert first.returncode != 0
    said = f"error: process {1 - victim} lost another", f"[rank: {victim}] Child process with PID {second}"
    assert line.startswith(said)  # by Lightning's launcher, if that is the faster


LAUNCHED = "import time; from dropblock_det.training.launch import end_with_launcher; end_with_launcher(); "
LAUNCHER = f"""
import os, subprocess, sys, time
from dropblock_det.training.launch import end_with_launcher
end_with_launcher()
code = {LAUNCHED + "print('ready', flush=True); time.sleep(600)"!r}
child = subprocess.Popen([sys.executable, "-c", code], env={{**os.environ, "LOCAL_RANK": "1"}})
print(child.pid, flush=True)
time.sleep(600)
"""


def test_a_process_does_not_outlive_its_launcher(tmp_path):
    """Also one that waits for ever, as with NCCL, which does not notice that the others are gone."""
    with (tmp_path / "stderr").open("w") as stderr:
        launcher = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE, stderr=stderr, text=True
        )
    child = int(launcher.stdout.readline())
    assert launcher.stdout.readline() == "ready\n"
    time.sleep(6)
    assert not ended(child)
    launcher.kill()
    launcher.wait()
    print(f"\nended {seconds_until(lambda: ended(child), 60):.1f} s after its launcher")
    assert f"the first process ({launcher.pid}) has died" in (tmp_path / "stderr").read_text()


def test_killed_at_random_moments_it_ends_with_the_same_bits(run, scenes, tmp_path):
    """Ten SIGKILLs at random moments, most of them before the first epoch ends or while one is written."""
    folder, rng = tmp_path / "killed", random.Random(0)
    for _ in range(10):
        process = start(arguments(scenes, folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=rng.uniform(6, 20))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
    process = start(arguments(scenes, folder), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    _, messages = process.communicate(timeout=300)
    assert process.returncode == 0, messages
    straight, resumed = (json.loads((path / "record.json").read_text())["epochs"] for path in (run, folder))
    figures = ("epoch", "step", "loss", "val_loss", "mAP", "AP50", "AP75", "p", "drop_share")
    assert [[e[name] for name in figures] for e in resumed] == [
        [e[name] for name in figures] for e in straight
    ]
    weights, expected = (
        torch.load(newest_checkpoint(path), weights_only=True)["state_dict"] for path in (folder, run)
    )
    assert all(torch.equal(value, expected[key]) for key, value in weights.items())
