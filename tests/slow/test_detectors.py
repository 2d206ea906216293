"""Every detector, trained, killed, resumed and evaluated on real images; and the table of them.

``OMP_NUM_THREADS=1 pytest -m slow tests/slow/test_detectors.py -k one_pass`` takes minutes; ``-k learns``
trains each with the quickstart's budget, which takes hours, and goes on where it stopped, for the runs stay
in runs/detectors. Both write data/results/detectors.csv and .md and, a row at a time, the table in the
training's README. ``-k real_images`` takes minutes.
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
README = ROOT / "dropblock_det" / "training" / "README.md"
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


def cost(detector, images, targets, rounds=7):
    """Median of the ratios of paired CPU times: both in one pass, and an ordinary eval forward."""
    ratios = []
    for _ in range(rounds + 1):
        start = time.process_time()
        detector(images)
        between = time.process_time()
        losses_and_detections(detector, images, targets)
        ratios.append((time.process_time() - between) / (between - start))
    return statistics.median(ratios[1:])


def batches(root):
    """Two batches of two scenes."""
    data = ScenesDataModule(str(root), train_size=8, val_size=4, batch_size=2, num_workers=0)
    data.prepare_data()
    data.setup("fit")
    return data, list(data.val_dataloader())


@pytest.mark.parametrize("name", DETECTORS)
@torch.no_grad()
def test_one_pass(name, tmp_path):
    """Losses are torchvision's own, and so are the detections; both at once cost little more than these."""
    torch.manual_seed(0)
    data, (first, second) = batches(tmp_path)
    sizes = {"min_size": 128, "max_size": 128} if DETECTORS[name].has_sizes else {}
    anchors = {"anchor_sizes": [16, 32, 64, 96, 128]} if DETECTORS[name].anchors else {}
    module = DetectionModule(data.categories, name, **sizes, **anchors, score_thresh=0.0)
    detector = module.detector
    norms = [m for m in detector.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # an average
    detector.train()(*first)  # norms get the scale of the images: without, scores are all the same
    detector.eval()
    losses, detections = losses_and_detections(detector, *second)
    theirs, stock = training_losses(detector, *second), detector(second[0])
    difference = max(abs(losses[key] - theirs[key]).item() for key in theirs)
    identical = all(
        torch.equal(mine[key], other[key])
        for mine, other in zip(detections, stock, strict=True)
        for key in other
    )
    write_row(
        {
            "detector": name,
            "loss - torchvision's": f"{difference:.1e}",
            "detections": "identical" if identical else "differ",
            "cost of both, eval forwards": f"{cost(detector, *second):.2f}",
        }
    )
    assert losses.keys() == theirs.keys()
    assert difference <= 1e-6
    assert all(len(found["scores"]) for found in stock)
    assert identical


@pytest.mark.parametrize("name", DETECTORS)
def test_learns(name):
    """Trained as the quickstart trains RetinaNet, with DropBlock on, each finds at least 0.15 AP50."""
    run = RUNS / name
    ended_well([f"--output={run}", f"--data.root={RUNS / 'scenes'}", *of_detector(name)])
    ap50 = max(epoch["AP50"] for epoch in json.loads((run / "record.json").read_text())["epochs"])
    write_row({"detector": name, "AP50": f"{ap50:.2f}"})
    assert ap50 >= 0.15


COLUMNS = ("detector", "loss - torchvision's", "detections", "cost of both, eval forwards", "AP50")


def write_row(row):
    """Adds to the detector's row of the CSV, and writes the tables anew."""
    rows = {}
    if TABLE.exists():
        with TABLE.open(newline="") as file:
            rows = {old["detector"]: old for old in csv.DictReader(file)}
    rows[row["detector"]] = dict.fromkeys(COLUMNS, "") | rows.get(row["detector"], {}) | row
    rows = [rows[name] for name in DETECTORS if name in rows]
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    shown = [column for column in COLUMNS if any(row[column] for row in rows)]
    lines = [shown, ["---"] * len(shown), *([row[column] for column in shown] for row in rows)]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    TABLE.with_suffix(".md").write_text(text)
    before, rest = README.read_text().split(START)
    README.write_text(before + START + "\n" + text + "\n" + END + rest.split(END)[1])
