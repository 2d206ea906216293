"""Stands in for tools/train.py: same arguments and files, invented values, epochs of a few milliseconds.

Its values depend on setting, seed and epoch alone, and it resumes from its last whole checkpoint.
Settings steer it: ``fail: WORDS`` ends it with an error after the first epoch, ``die: WORDS`` before it,
``sleep: SECONDS`` slows it.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from pathlib import Path

import yaml

from dropblock_det.files import write_json
from dropblock_det.runs.record import Record, write_record
from dropblock_det.tasks.detection.metrics import HEADLINE, METRICS
from dropblock_det.tasks.evaluation import Sample

parser = argparse.ArgumentParser()
parser.add_argument("--config", action="append", type=Path)
parser.add_argument("--seed_everything", type=int)
parser.add_argument("--output", type=Path)
parser.add_argument("--trainer.enable_progress_bar")
parser.add_argument("--data.train_subset_seed", type=int)
parser.add_argument("--max_epochs", type=int, default=4)
options = parser.parse_args()
config = {}
for path in options.config:
    config |= yaml.safe_load(path.read_text())

out = options.output
with (out / "starts.txt").open("a") as starts:
    starts.write(f"{os.environ.get('CUDA_VISIBLE_DEVICES')}\n")
(out / "arguments.txt").write_text("\n".join(sys.argv[1:]))
if "die" in config:
    sys.exit(f"error: {config['die']}")
checkpoint = out / "checkpoints" / "last-00000.ckpt"
epochs = json.loads(checkpoint.read_text()) if checkpoint.exists() else []
samples = (Sample("7", "boxes", 64, 48, file=config["picture"]),) if "picture" in config else ()


def write(status: str) -> None:
    record = Record(
        "detection",
        METRICS,
        HEADLINE,
        status,
        epochs=tuple(epochs),
        max_epochs=options.max_epochs,
        seed=options.seed_everything,
        versions={"fake": "1"},
        data_hash="same",
        samples=samples,
    )
    write_record(out, record)


for epoch in range(len(epochs), options.max_epochs):
    time.sleep(config.get("sleep", 0.01))
    digest = hashlib.sha256(f"{config.get('name')}/{options.seed_everything}/{epoch}".encode()).digest()
    noise = int.from_bytes(digest[:6], "big") / 2**48
    values = {"loss": 2 - 0.1 * epoch + noise, "val_loss": 3 - 0.1 * epoch + noise, "mAP": 0.1 * noise}
    epochs.append({"epoch": epoch, "step": 5 * epoch + 5, **values, "wall_s": 0.01})
    write_json(checkpoint, epochs)
    write("running")
    if "fail" in config:
        print("Traceback (most recent call last):\n  somewhere")
        print(f"error: {config['fail']}", file=sys.stderr)
        sys.exit(2)
write("finished")
