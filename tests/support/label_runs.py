"""A comparison's folder of another task, which judges whole images: nothing in it has a box."""

import math
import random
from pathlib import Path

from PIL import Image, ImageDraw

from dropblock_det.runs.record import Record, write_record
from dropblock_det.tasks.evaluation import Mark, Sample
from dropblock_det.tasks.metric import LOSSES, Metric

METRICS = (*LOSSES, Metric("accuracy", "accuracy, %", "higher", 1, 100, "share of images given their class"))
CLASSES = ("disc", "square", "cross")
SETTINGS = ("none", "dropblock_bs7_kp0.9", "dropout_0.25")


def label_record(setting: str, seed: int, effect=0.0, epochs: int = 12) -> Record:
    noise = random.Random(f"{setting}/{seed}")
    level = random.Random(seed).gauss(0, 0.02)

    def epoch(e: int) -> dict[str, float | None]:
        fall = math.exp(-e / 4)
        overfit = max(0, e - 5) * 0.02
        return {
            "epoch": e,
            "step": 20 * (e + 1),
            "loss": 0.2 + fall + noise.gauss(0, 0.01),
            "val_loss": 0.5 + 0.7 * fall + overfit - effect + noise.gauss(0, 0.01),
            "accuracy": 0.4 + (1 - fall) * 0.4 + level + effect + noise.gauss(0, 0.004),
            "wall_s": 12.0,
        }

    def guesses(truth: str) -> tuple[Mark, ...]:
        first = truth if noise.random() < 0.7 else noise.choice(CLASSES)
        rest = [name for name in CLASSES if name != first]
        return tuple(
            Mark(name, None, score) for name, score in zip([first, *rest], (0.8, 0.15, 0.05), strict=True)
        )

    samples = tuple(
        Sample(f"{n:03d}", "label", 96, 96, (Mark(CLASSES[n % 3]),), guesses(CLASSES[n % 3]))
        for n in range(4)
    )
    return Record(
        "classification",
        METRICS,
        "accuracy",
        "finished",
        epochs=tuple(epoch(e) for e in range(epochs)),
        max_epochs=epochs,
        seed=seed,
        setting=setting,
        versions={"torch": "2.15.0"},
        hardware={"device": "cpu", "cores": 2},
        data_hash="data",
        init_hash=f"init{seed}",
        samples=samples,
    )


def label_runs(root: Path, settings=SETTINGS, seeds=(0, 1, 2), effects=None) -> Path:
    for setting in settings:
        for seed in seeds:
            write_record(
                root / setting / f"seed{seed}", label_record(setting, seed, (effects or {}).get(setting, 0))
            )
    for n in range(4):
        picture = Image.new("RGB", (96, 96), (40 * n, 90, 120))
        draw = ImageDraw.Draw(picture)
        (draw.ellipse, draw.rectangle, draw.line)[n % 3]([24, 24, 72, 72], fill="white")
        path = root / "images" / f"{n:03d}.jpg"
        path.parent.mkdir(exist_ok=True)
        picture.save(path)
    return root
