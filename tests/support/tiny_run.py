"""A training small enough for a test, started as a user would."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


# SSDlite, for its checkpoints take 30 MB, a RetinaNet's 390; it has none of these settings of the quickstart.
DETECTOR = (
    "--model.name=ssdlite320_mobilenet_v3_large",
    *("--model.min_size=null", "--model.max_size=null", "--model.anchor_sizes=null"),
)


def options(scenes):
    """For a training of four steps that shows everything a long one does."""
    return [
        *DETECTOR,
        *(f"--data.root={scenes}", "--data.train_size=8", "--data.val_size=5", "--data.batch_size=4"),
        *("--data.num_workers=0", "--trainer.max_epochs=2", "--trainer.accelerator=cpu"),
        "--trainer.enable_progress_bar=false",
        *("--trainer.log_every_n_steps=1", "--trainer.enable_model_summary=false"),
        "--model.score_thresh=0.005",  # so low that there are detections after four steps
    ]


def arguments(scenes, output, *more):
    """The same with a folder to write to."""
    return [f"--output={output}", *options(scenes), *more]


def train(args, monkeypatch):
    from dropblock_det.training import cli  # Lightning takes ten seconds, which most tests do without

    monkeypatch.setattr(sys, "argv", ["train.py"])
    cli.train(args)


def start(args, program=(ROOT / "tools" / "train.py",), **kwargs):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *program, *args], env=environment, **kwargs)
