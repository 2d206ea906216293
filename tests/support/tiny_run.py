"""A training small enough for a test, started as a user would."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def options(scenes):
    """For a training of four steps that shows everything a long one does."""
    return [
        *(f"--data.root={scenes}", "--data.train_size=8", "--data.val_size=5", "--data.batch_size=4"),
        *("--data.num_workers=0", "--model.min_size=64", "--model.max_size=64", "--trainer.max_epochs=2"),
        *("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"),
        *("--trainer.log_every_n_steps=1", "--trainer.enable_model_summary=false"),
        "--model.score_thresh=0.005",  # so low that there are detections after four steps
    ]


def arguments(scenes, output, *more):
    """The same with a folder to write to."""
    return [f"--output={output}", *options(scenes), *more]


def train(args, monkeypatch):
    from dropblock_det.training import cli  # Lightning takes ten seconds, which most tests do without

    monkeypatch.setattr(sys, "argv", ["train.py"])
    cli.train(ROOT / "configs" / "quickstart.yaml", args)


def start(args, program=(ROOT / "tools" / "train.py",), **kwargs):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *program, *args], env=environment, **kwargs)
