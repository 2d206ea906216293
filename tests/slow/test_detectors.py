"""Every detector, trained, killed, resumed and evaluated on real images; and the README's table of them.

``OMP_NUM_THREADS=1 pytest -m slow tests/slow/test_detectors.py -k table`` takes hours, for it trains each
with the quickstart's budget; stopped, the same command goes on, for the runs stay in runs/detectors. The
table goes to data/results/detectors.csv and .md, and into the README, a row at a time. ``-k real_images``
takes minutes.
"""

import csv
import json
import re
import signal
import statistics
import subprocess
import time

import pytest
import torch
from support.detectors import training_losses
from support.tiny_run import ROOT, start

from dropblock_det.datasets.scenes import ScenesDataModule
from dropblock_det.runs.checkpoints import load_checkpoint
from dropblock_det.runs.folder import newest_checkpoint
from dropblock_det.tasks.detection import losses_and_detections
from dropblock_det.tasks.detection.models import DETECTORS
from dropblock_det.tasks.detection.module import DetectionModule

pytestmark = pytest.mark.slow
TABLE = ROOT / "data" / "results" / "detectors.csv"
README = ROOT / "README.md"
RUNS = ROOT / "runs" / "detectors"
START, END = "<!-- detectors table -->\n", "<!-- end of detectors table -->"


def of_detector(name):
    """The detector, and null for settings of configs/quickstart.yaml that it does not have."""
    absent = () if DETECTORS[name].has_sizes else ("min_size", "max_size")
    absent += () if DETECTORS[name].anchors else ("anchor_sizes",)
    return [f"--model.name={name}", *(f"--model.{setting}=null" for setting in absent)]


def ended_well(args, program=(ROOT / "tools" / "train.py",)):
    process = start(args, program, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    _, messages = process.communicate()
    assert process.returncode == 0, messages


@pytest.mark.parametrize("name", DETECTORS)
def test_real_images(name, real_coco, tmp_path):
    """Killed after its first epoch and resumed it ends with the same bits; evaluate.py gives the same."""
    args = [
        *("--data=dropblock_det.datasets.coco.CocoDataModule", f"--data.root={real_coco}"),
        *("--data.train_subset=8", "--data.val_subset=5", "--data.batch_size=4", "--data.num_workers=0"),
        *("--trainer.max_epochs=2", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"),
        *("--model.score_thresh=0.005", *of_detector(name)),
    ]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    ended_well([f"--output={straight}", *args])
    process = start([f"--output={killed}", *args], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while newest_checkpoint(killed) is None:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert json.loads((killed / "record.json").read_text())["status"] == "running"
    ended_well([f"--resume={killed}"])

    metrics = ("loss", "val_loss", "mAP", "AP50", "AP75")
    expected, resumed = (
        json.loads((run / "record.json").read_text())["epochs"] for run in (straight, killed)
    )
    assert [[epoch[key] for key in metrics] for epoch in resumed] == [
        [epoch[key] for key in metrics] for epoch in expected
    ]
    weights, others = (load_checkpoint(newest_checkpoint(run))["state_dict"] for run in (straight, killed))
    assert all(torch.equal(value, others[key]) for key, value in weights.items())

    last = newest_checkpoint(straight)
    results = tmp_path / "results.json"
    evaluate = (ROOT / "tools" / "evaluate.py", last, f"--results={results}", "--accelerator=cpu")
    process = start([], evaluate, stdout=subprocess.PIPE, text=True)
    printed, _ = process.communicate()
    assert process.returncode == 0
    for key in metrics[1:]:
        assert float(re.search(rf"{key}\W+([\d.]+)", printed)[1]) == pytest.approx(
            expected[-1][key], abs=6e-5
        )
    assert json.loads(results.read_text())


def cost(detector, images, targets, rounds=15):
    """Median of the ratios of paired CPU times: both in one pass, and an ordinary eval forward."""
    ratios = []
    for _ in range(rounds + 2):
        start = time.process_time()
        detector(images)
        between = time.process_time()
        losses_and_detections(detector, images, targets)
        ratios.append((time.process_time() - between) / (between - start))
    return statistics.median(ratios[2:])


@pytest.mark.parametrize("name", DETECTORS)
@torch.no_grad()
def test_table(name):
    """Trained as the quickstart trains RetinaNet, with DropBlock on, each finds at least 0.15 AP50."""
    run, scenes = RUNS / name, RUNS / "scenes"
    budget = [f"--output={run}", f"--data.root={scenes}", "--trainer.precision=bf16-mixed"]
    ended_well([*budget, *of_detector(name)])
    summary = json.loads((run / "record.json").read_text())
    detector = DetectionModule.from_checkpoint(load_checkpoint(newest_checkpoint(run))).detector.eval()
    data = ScenesDataModule(str(scenes), num_workers=0)
    data.prepare_data()
    data.setup("fit")
    images, targets = next(iter(data.val_dataloader()))
    losses, detections = losses_and_detections(detector, images, targets)
    stock = detector(images)
    identical = all(
        torch.equal(mine[key], other[key])
        for mine, other in zip(detections, stock, strict=True)
        for key in other
    )
    theirs = training_losses(detector, images, targets)
    row = {
        "detector": name,
        "val_loss - training loss": f"{abs(sum(losses.values()) - sum(theirs.values())):.1e}",
        "identical detections": "yes" if identical else "no",
        "cost": f"{cost(detector, images, targets):.2f}",
        "AP50": f"{max(epoch['AP50'] for epoch in summary['epochs']):.2f}",
    }
    write_row(row)
    assert losses.keys() == theirs.keys()
    assert float(row["val_loss - training loss"]) <= 1e-6
    assert identical
    assert float(row["AP50"]) >= 0.15
    assert float(row["cost"]) <= 1.3


def write_row(row):
    """Adds the row to the CSV, in place of an earlier one, and writes the table anew."""
    rows = {row["detector"]: row}
    if TABLE.exists():
        with TABLE.open(newline="") as file:
            rows = {old["detector"]: old for old in csv.DictReader(file)} | rows
    rows = [rows[name] for name in DETECTORS if name in rows]
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    lines = [row, dict.fromkeys(row, "---"), *rows]
    text = "".join(
        f"| {' | '.join(line if number == 0 else line.values())} |\n" for number, line in enumerate(lines)
    )
    TABLE.with_suffix(".md").write_text(text)
    readme = README.read_text()
    if START in readme:
        before, rest = readme.split(START)
        README.write_text(before + START + "\n" + text + "\n" + END + rest.split(END)[1])
