"""By hand, with -m slow, as root: two machines, which are two network namespaces joined by a cable."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.tiny_run import ROOT, arguments, options

from dropblock_det.comparison.gather import gather
from dropblock_det.comparison.plan import run_folder
from dropblock_det.runs.folder import best_checkpoint, is_finished, newest_checkpoint
from dropblock_det.runs.record import read_record
from dropblock_det.training.evaluate import evaluate

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"), reason="needs root and ip"),
]


def ip(*words):
    subprocess.run(["ip", *map(str, words)], check=True)


@pytest.fixture
def nodes():
    """Names of two network namespaces; 10.77.0.1 and 10.77.0.2 are the ends of the cable, named cable."""
    names = [f"dropblock{node}" for node in (0, 1)]
    for name in names:
        ip("netns", "add", name)
    ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "cable", "netns", names[1])
    for node, name in enumerate(names):
        ip("-n", name, "addr", "add", f"10.77.0.{node + 1}/24", "dev", "cable")
        for device in ("lo", "cable"):
            ip("-n", name, "link", "set", device, "up")
    yield names
    for name in names:
        ip("netns", "del", name)


@pytest.fixture
def start(nodes, tmp_path):
    """Starts a training on both, with one process each; what they print is in tmp_path/err0 and err1."""
    started = []

    def start(args):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
        torchrun += ["--rdzv-backend=c10d", "--rdzv-endpoint=10.77.0.1:29400"]
        several = ["--trainer.num_nodes=2", "--trainer.devices=1", "--trainer.strategy=ddp"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "cable"}
        both = []
        for node, name in enumerate(nodes):
            own = [f"--local-addr=10.77.0.{node + 1}", f"--rdzv-conf=is_host={node == 0}"]
            own += [ROOT / "tools" / "train.py"]
            with (tmp_path / f"err{node}").open("w") as err:
                command = ["ip", "netns", "exec", name, *torchrun, *own, *args, *several]
                both.append(subprocess.Popen(command, env=environment, stdout=err, stderr=err))
        started.extend(both)
        return both

    yield start
    end(started)


def compare(node, scenes, tmp_path):
    """The tool on a node with process ids of its own."""
    command = ["ip", "netns", "exec", node, "unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    command += [sys.executable, ROOT / "tools" / "compare.py", "run", ROOT / "configs" / "quickstart.yaml"]
    command += [f"--runs={tmp_path}/runs", f"--settings={tmp_path}/settings", "--seeds", "0", "1", "--"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, *options(scenes), "--trainer.max_epochs=4"], env=environment)


def test_two_nodes_share_a_comparison(nodes, scenes, tmp_path):
    """Each run is done once; that of a node that dies goes on, on the other, from its last epoch."""
    (tmp_path / "settings").mkdir()
    for name in ("none", "dropblock_bs3_kp0.9"):
        shutil.copy(ROOT / "configs" / "settings" / f"{name}.yaml", tmp_path / "settings")
    first = compare(nodes[0], scenes, tmp_path)
    wait_for((tmp_path / "runs/none/seed0/.training.lock.1").exists, 200)
    second = compare(nodes[1], scenes, tmp_path)
    wait_for(lambda: newest_checkpoint(tmp_path / "runs/none/seed0"), 200)
    first.kill()  # and with it its whole node
    first.wait()
    assert second.wait(1800) == 0
    comparison = gather(tmp_path / "runs")
    assert comparison.absent == ()
    for record in comparison.records:
        assert [epoch["epoch"] for epoch in record.epochs] == [0, 1, 2, 3]
    starts = {
        (record.setting, record.seed): len(
            list((run_folder(tmp_path / "runs", record.setting, record.seed) / "logs").iterdir())
        )
        for record in comparison.records
    }
    assert starts == {(name, seed): 1 for name in comparison.settings for seed in (0, 1)} | {("none", 0): 2}


def end(processes):
    for process in processes:
        if process.poll() is None:
            for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
                os.kill(int(child), signal.SIGKILL)
            process.kill()
            process.wait()


def wait_for(condition, limit):
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + limit
        time.sleep(0.2)
    return time.monotonic() - began


def test_two_nodes_train_as_one_process_validates(start, scenes, tmp_path):
    for process in start(arguments(scenes, tmp_path / "run")):
        assert process.wait(400) == 0, (tmp_path / "err0").read_text()
    record = read_record(tmp_path / "run")
    assert record.finished
    assert record.hardware["processes"] == 2
    best = record.best(record.headline)
    values = evaluate(best_checkpoint(tmp_path / "run"), accelerator="cpu")
    for name in ("val_loss", "mAP", "AP50", "AP75"):
        assert values[name] == pytest.approx(best[name], abs=1e-6)


def test_a_cut_cable_ends_both_within_a_minute(start, nodes, scenes, tmp_path):
    """Each with one line of ours; mended, the same command goes on from the last epoch."""
    args = arguments(scenes, tmp_path / "run", "--trainer.max_epochs=500")
    both = start(args)
    wait_for(lambda: newest_checkpoint(tmp_path / "run"), 300)
    assert all(process.poll() is None for process in both)
    ip("-n", nodes[0], "link", "set", "cable", "down")
    errors = [tmp_path / f"err{node}" for node in (0, 1)]
    waited = wait_for(lambda: all("lost another" in file.read_text() for file in errors), 60)
    print(f"\nboth ended {waited:.1f} s after the cut")
    end(both)  # torchrun itself waits longer for the one that keeps its store
    for node, file in enumerate(errors):
        lines = re.findall("^.*error: .*--resume.*$", file.read_text(), re.MULTILINE)
        assert len(lines) == 1
        assert f"error: process {node} lost another" in lines[0]
    before = newest_checkpoint(tmp_path / "run")
    assert not is_finished(tmp_path / "run")
    ip("-n", nodes[0], "link", "set", "cable", "up")
    start(args)
    wait_for(lambda: newest_checkpoint(tmp_path / "run").name > before.name, 300)
    epochs = [epoch["epoch"] for epoch in read_record(tmp_path / "run").epochs]
    assert epochs == list(range(len(epochs)))
