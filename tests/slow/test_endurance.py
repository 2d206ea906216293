"""By hand, with -m slow: many steps, many kills, a process that dies."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from support.tiny_run import arguments, start

from dropblock_det.callbacks import Regularize
from dropblock_det.datasets.scenes import ScenesDataModule
from dropblock_det.runs.folder import newest_checkpoint
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
