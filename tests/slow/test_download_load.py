"""Fetching thousands of images: the rate and the memory; and fetching that is killed again and again."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.coco_like import PEAK_MB
from support.faulty_server import FaultyServer
from support.local_coco import archive_of, tree
from support.the_tools import TOOLS

SERVE = """
import sys
sys.path.insert(0, sys.argv[1])
from support.local_coco import serve_many
serve_many(int(sys.argv[2]))
"""


FETCH = """
import sys, time
from pathlib import Path
from dropblock_det.coco_subset.download import ANNOTATIONS, Archive, Network
from dropblock_det.coco_subset.prepare import prepare
from dropblock_det.coco_subset.choose import Options
url, size, sha256, count, out = sys.argv[1:]
times = []
report = lambda what, done, total: times.append(time.monotonic()) if what == "images" else None
network = Network(url, Archive(ANNOTATIONS.path, int(size), sha256))
assert network.connections == 16
prepare(Path(out), Options(int(count), 0), network=network, report=report)
rate = len(times) / (times[-1] - times[0])
print(rate, peak_mb())
"""


@pytest.mark.slow
def test_rate_and_memory(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    peaks = []
    for count in (1000, 4000):
        command = [sys.executable, "-c", SERVE, str(Path(__file__).parents[1]), str(count)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as serving:
            assert serving.stdout
            address = serving.stdout.readline().split()
            fetch = [
                sys.executable,
                "-c",
                PEAK_MB + FETCH,
                *address,
                str(count),
                str(tmp_path / str(count) / "coco"),
            ]
            result = subprocess.run(fetch, capture_output=True, text=True, check=True)
            serving.communicate()
        rate, peak = map(float, result.stdout.split())
        print(f"{count} images: {rate:.0f} images/s, peak {peak:.0f} MB")
        assert rate > 200
        peaks.append(peak)
    # 300 MB for all 118,287 images, from the slope.
    assert peaks[1] + (peaks[1] - peaks[0]) / 3000 * (118_287 - 4000) < 300


# -------------------------------------------------------------------------------- SIGKILL


KILLABLE = """
import runpy, sys
from dropblock_det.coco_subset import download
url, size, sha256, *sys.argv[1:] = sys.argv[1:]
class Local(download.Network):
    def __init__(self, mirror=None):
        archive = download.Archive(download.ANNOTATIONS.path, int(size), sha256)
        super().__init__(url, archive, 4)
download.Network = Local
runpy.run_path({tool!r}, run_name="__main__")
"""


def start(server: FaultyServer, out: Path) -> "subprocess.Popen[bytes]":
    archive = archive_of(server)
    arguments = [server.url, str(archive.size), archive.sha256, "--out", str(out)]
    arguments += ["--train", "30", "--val", "10"]
    command = [sys.executable, "-c", KILLABLE.format(tool=str(TOOLS / "prepare_coco.py")), *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def count_files(folder: Path) -> int:
    return sum(len(files) for _, _, files in os.walk(folder))


def killed_and_restarted(tmp_path: Path, server: FaultyServer, kills: int) -> None:
    server.delay = 0.02  # 40 images over 4 connections: 0.2 s of fetching, between start and plot
    undisturbed = start(server, tmp_path / "a" / "coco")
    assert undisturbed.wait(60) == 0, undisturbed.stderr.read()  # type: ignore[union-attr]
    rng = random.Random(0)
    seen = set()
    for _ in range(kills):
        process = start(server, tmp_path / "b" / "coco")
        enough = count_files(tmp_path / "b") + rng.randrange(15)
        while count_files(tmp_path / "b") < enough and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        half = tree(tmp_path / "b")
        seen.add(len(half))
        final = {name: sha for name, sha in half.items() if ".part" not in name and ".lock" not in name}
        assert final.items() <= tree(tmp_path / "a").items(), "a half file under a final name"
        if rng.random() < 0.3:  # from the beginning again, or all kills but the first would find it complete
            subprocess.run(["rm", "-r", str(tmp_path / "b")], check=False)
    last = start(server, tmp_path / "b" / "coco")
    assert last.wait(60) == 0, last.stderr.read()  # type: ignore[union-attr]
    assert tree(tmp_path / "b") == tree(tmp_path / "a")
    assert "coco/classes.png" in tree(tmp_path / "b")
    assert len(seen) > 1, "every kill came at the same point"


def test_three_kills(tmp_path, server):
    killed_and_restarted(tmp_path, server, 3)


@pytest.mark.slow
def test_twenty_kills(tmp_path, server):
    killed_and_restarted(tmp_path, server, 20)
