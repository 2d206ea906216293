"""Stands in for tools/train.py: same arguments and files, invented figures, epochs of a few milliseconds.

Its figures depend on setting, seed and epoch alone, and it resumes from its last whole checkpoint.
Settings steer it: ``fail: WORDS`` ends it with an error after the first epoch, ``sleep: SECONDS`` slows it.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from pathlib import Path

import yaml


def replace(path: Path, content) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content))
    temporary.replace(path)


parser = argparse.ArgumentParser()
parser.add_argument("--config", action="append", type=Path)
parser.add_argument("--seed_everything", type=int)
parser.add_argument("--output", type=Path)
parser.add_argument("--trainer.enable_progress_bar")
parser.add_argument("--max_epochs", type=int, default=4)
options = parser.parse_args()
config = {}
for path in options.config:
    config |= yaml.safe_load(path.read_text())

out = options.output
with (out / "starts.txt").open("a") as starts:
    starts.write(f"{os.environ.get('CUDA_VISIBLE_DEVICES')}\n")
(out / "config.yaml").write_text(yaml.safe_dump(config))
checkpoint = out / "last.ckpt"
epochs = json.loads(checkpoint.read_text()) if checkpoint.exists() else []
summary = {
    "finished": False,
    "max_epochs": options.max_epochs,
    "versions": {"fake": "1"},
    "data_hash": "same",
}
for epoch in range(len(epochs), options.max_epochs):
    time.sleep(config.get("sleep", 0.01))
    digest = hashlib.sha256(f"{config.get('name')}/{options.seed_everything}/{epoch}".encode()).digest()
    noise = int.from_bytes(digest[:6], "big") / 2**48
    figures = {"loss": 2 - 0.1 * epoch + noise, "val_loss": 3 - 0.1 * epoch + noise, "mAP": 0.1 * noise}
    epochs.append({"epoch": epoch, "step": 5 * epoch + 5, **figures, "wall_s": 0.01})
    replace(checkpoint, epochs)
    replace(out / "summary.json", summary | {"epochs": epochs})
    if "fail" in config:
        print("Traceback (most recent call last):\n  somewhere")
        print(f"error: {config['fail']}", file=sys.stderr)
        sys.exit(2)
picture = {"image_id": 7, "file": config.get("picture", ""), "width": 64, "height": 48}
replace(out / "val_detections.json", [{**picture, "ground_truth": [], "detections": []}])
replace(out / "summary.json", summary | {"epochs": epochs, "finished": True})
