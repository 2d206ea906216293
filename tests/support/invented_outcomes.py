"""Invented runs with what their last validation left: one setting finds clearly more, image by image."""

import numpy as np
from support.synthetic_runs import invented_runs

from dropblock_det.comparison.plan import run_folder
from dropblock_det.runs.outcomes import write_outcomes
from dropblock_det.tasks.evaluation import Outcomes


def invented_outcomes(skill, seed, images=60):
    """One category with an object on every image, found with a chance of ``skill``, and clutter."""
    noise, shared = np.random.default_rng(seed), np.random.default_rng(9).random(images)
    hit = np.repeat((shared < skill)[:, None], 10, axis=1)
    rows = np.arange(2 * images, dtype=np.int32)
    return Outcomes(
        columns={"mAP": tuple(range(10)), "AP50": (0,)},
        images=np.arange(images, dtype=np.int64),
        categories=("<b>ship</b>",),
        truths=np.ones((images, 1), np.int32),
        image=rows // 2,
        category=np.zeros(2 * images, np.int32),
        score=noise.random(2 * images).astype(np.float32),
        hit=np.stack([hit, np.zeros_like(hit)], axis=1).reshape(2 * images, 10),
        ignored=np.zeros((2 * images, 10), bool),
    )


def with_outcomes(folder, settings=("none", "dropout", "spatial_dropout")):
    root = invented_runs(folder, settings=settings, effects={"dropout": 0.1})
    for setting in settings:
        for seed in (0, 1, 2):
            skill = 0.9 if setting == "dropout" else 0.5
            write_outcomes(run_folder(root, setting, seed), invented_outcomes(skill, seed))
    return root
