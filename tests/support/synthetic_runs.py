"""A comparison's folder made of invented records, for the tests of everything that reads one."""

import math
import random
from pathlib import Path

from PIL import Image, ImageDraw

from dropblock_det.comparison.plan import Base, Plan, run_folder
from dropblock_det.files import write_json
from dropblock_det.runs.record import Epoch, Record, write_record
from dropblock_det.tasks.detection.metrics import HEADLINE, METRICS
from dropblock_det.tasks.evaluation import Mark, Sample

SETTINGS = (
    "none",
    "dropout",
    "spatial_dropout",
    "dropblock_bs3_kp0.7",
    "dropblock_bs3_kp0.9",
    "dropblock_bs7_kp0.7",
    "dropblock_bs7_kp0.9",
)
CLASSES = ("circle", "square", "star")


def invented_record(setting: str, seed: int, effect=0.0, epochs: int = 20, images: int = 4) -> Record:
    """An overfitting run: ``effect`` lowers val_loss and raises mAP by about that much."""
    noise = random.Random(f"{setting}/{seed}")
    level = random.Random(seed).gauss(0, 0.05)  # shared by all settings of a seed, as the pairing assumes

    def epoch(e: int) -> Epoch:
        fall = math.exp(-e / 5)
        overfit = max(0, e - 10) * (0.03 - 0.1 * effect)
        val_loss = 1.1 + 1.4 * fall + level - effect + overfit + noise.gauss(0, 0.01)
        quality = (1 - fall) * (0.3 + effect - level) + noise.gauss(0, 0.004)
        return {
            "epoch": e,
            "step": 40 * (e + 1),
            "loss": 0.4 + 2 * fall + level + (0.1 if setting != "none" else 0) + noise.gauss(0, 0.01),
            "val_loss": val_loss,
            "mAP": quality,
            "AP50": min(1.0, quality * 1.8),
            "AP75": quality * 0.8,
            "p": 0.0 if setting == "none" else 0.1 * e / epochs,
            "wall_s": 30 + noise.random(),
        }

    return Record(
        "detection",
        METRICS,
        HEADLINE,
        "finished",
        seed=seed,
        epochs=tuple(epoch(e) for e in range(epochs)),
        max_epochs=epochs,
        config={"seed_everything": seed, "model": {"lr": 0.02}},
        images_per_s=41 + noise.random(),
        peak_memory_bytes=int(1.4e9),
        drop_share=None if setting == "none" else {"asked": 0.1, "realised": 0.091},
        versions={"torch": "2.11.0", "torchvision": "0.26.0"},
        hardware={"device": "cpu", "cores": 2},
        data_hash="5d41402abc4b2a76",
        init_hash=f"init{seed}",
        samples=tuple(_sample(i, noise, effect) for i in range(images)),
    )


def _truth(image: int) -> tuple[Mark, ...]:
    place = random.Random(image)
    boxes = []
    for _ in range(2 + image):
        side = place.randint(30, 90)
        corner = place.randint(0, 319 - side), place.randint(0, 239 - side)
        boxes.append(Mark(place.choice(CLASSES), (*corner, side, side)))
    return tuple(boxes)


def _sample(image: int, noise: random.Random, effect: float) -> Sample:
    predicted = []
    for truth in _truth(image):
        if noise.random() < 0.8 + effect:
            box = tuple(round(v + noise.gauss(0, 4), 1) for v in truth.bbox)
            predicted.append(Mark(truth.category, box, round(noise.uniform(0.3, 1), 3)))
    if noise.random() < 0.6:
        predicted.append(Mark("star", (200, 20, 50, 70), round(noise.uniform(0.05, 0.6), 3)))
    return Sample(str(image), "boxes", 320, 240, _truth(image), tuple(predicted))


def write_plan(root: Path, settings, seeds, base="quickstart") -> None:
    seeds = tuple(seeds)
    write_json(root / "plan.json", Plan(Base(base, {}), {s: {} for s in settings}, seeds, (), seeds))


def invented_runs(root: Path, settings=SETTINGS, seeds=(0, 1, 2), effects=None) -> Path:
    """Writes plan, records and thumbnails as a comparison leaves them."""
    effects = effects or {}
    write_plan(root, settings, seeds)
    for setting in settings:
        for seed in seeds:
            record = invented_record(setting, seed, effects.get(setting, 0.0))
            write_record(run_folder(root, setting, seed), record)
    for image in range(4):
        picture = Image.linear_gradient("L").resize((320, 240)).convert("RGB")
        draw = ImageDraw.Draw(picture)
        for truth in _truth(image):
            x, y, w, h = truth.bbox
            shapes = {"circle": draw.ellipse, "square": draw.rectangle, "star": draw.pieslice}
            shape = shapes[truth.category]
            extra = (30, 290) if truth.category == "star" else ()
            shape([x, y, x + w, y + h], *extra, fill=(60 * image, 120, 200 - 30 * image))
        path = root / "images" / f"{image}.jpg"
        path.parent.mkdir(exist_ok=True)
        picture.save(path)
    return root
