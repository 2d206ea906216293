"""What other images would say: the metrics of a run's last validation, computed again on resampled images.

A bootstrap: from the validation's own images as many are drawn as there are, with repetition, and an image
that is drawn twice counts twice. All runs see the same draws, so what they share, the difficulty of the
images, drops out of the difference between two of them. With few objects the interval is too narrow.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dropblock_det.comparison.gather import REFERENCE
from dropblock_det.tasks.evaluation import Outcomes

RESAMPLES, FEWEST_RESAMPLES = 1000, 20
ENOUGH = 30  # objects of a category; fewer say little about it
FEWEST_IMAGES = 10  # with objects; of a single one all resamples are alike, and no interval is wide enough
THRESHOLDS = np.linspace(0, 1, 101)  # of the recall, as COCO has them
AT_ONCE = 2**20  # elements of an array
MOST_WEIGHTS = 2**27  # a gigabyte
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Runs = Mapping[str, Mapping[int, Outcomes]]
"""By setting and seed."""


@dataclass(frozen=True)
class ImageInterval:
    """A setting's difference from the reference over the seeds that both have, for other validation images.

    Attributes:
        mean: on the images as they are.
        low: lower end of the 95 % percentile interval over the resamples.
        high: its upper end.
    """

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class OtherImages:
    """What resampling the validation images says.

    Attributes:
        images: their number.
        metrics: metric -> setting -> its difference.
        categories: category -> setting -> its difference in the first metric, for those with enough objects.
        objects: category -> how many objects it has.
    """

    images: int
    metrics: dict[str, dict[str, ImageInterval]]
    categories: dict[str, dict[str, ImageInterval]]
    objects: dict[str, int]


def draws(images: int, number: int = RESAMPLES) -> Floats:
    """How often each image counts in each resample, (1 + number, images); in the first one each once."""
    generator = np.random.default_rng(0)
    drawn = generator.multinomial(images, np.full(images, 1 / images), number)
    return np.vstack([np.ones(images), drawn]).astype(np.float64)


def average_precisions(outcomes: Outcomes, weights: Floats) -> Floats:
    """COCO's average precision of each category, as pycocotools accumulates it over repeated images.

    Args:
        outcomes: of a run with T ways to count a prediction as right and K categories.
        weights: (B, images), how often each image counts.

    Returns:
        (B, T, K); NaN where the drawn images hold no object of the category.
    """
    ways, categories = outcomes.hit.shape[1], len(outcomes.categories)
    result = np.empty((len(weights), ways, categories))
    for k in range(categories):
        rows = np.flatnonzero(outcomes.category == k)
        rows = rows[np.argsort(-outcomes.score[rows], kind="stable")]
        image, hit, ignored = outcomes.image[rows], outcomes.hit[rows], outcomes.ignored[rows]
        step = max(1, AT_ONCE // max(1, len(rows)))
        for start in range(0, len(weights), step):
            some = weights[start : start + step]
            truths = some @ outcomes.truths[:, k]
            result[start : start + step, :, k] = _of_category(some[:, image], hit, ignored, truths)
    return result


def _of_category(weights: Floats, hit: Flags, ignored: Flags, truths: Floats) -> Floats:
    """Average precisions (B, T) from the weighted predictions of one category, best score first."""
    result = np.full((len(weights), hit.shape[1]), np.nan)
    present = truths > 0
    weights, truths = weights[present], truths[present, None]
    total = np.cumsum(weights, axis=1)
    for way in range(hit.shape[1]):
        # Between two right predictions precision only falls: nothing but the right ones decides.
        right, skipped = np.flatnonzero(hit[:, way] & ~ignored[:, way]), np.flatnonzero(ignored[:, way])
        skipped_so_far = np.cumsum(weights[:, skipped], axis=1)
        skipped_so_far = np.pad(skipped_so_far, ((0, 0), (1, 0)))[:, np.searchsorted(skipped, right)]
        found = np.cumsum(weights[:, right], axis=1)
        precision = found / np.maximum(total[:, right] - skipped_so_far, 1)
        best_from_here = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        reached = np.diff(_thresholds_up_to(found / truths), axis=1, prepend=0)
        result[present, way] = (best_from_here * reached).sum(axis=1) / len(THRESHOLDS)
    return result


def _thresholds_up_to(recall: Floats) -> NDArray[np.int64]:
    """How many of the recall thresholds are at or below each value."""
    nearest = np.floor(recall * (len(THRESHOLDS) - 1) + 0.5).astype(np.int64)
    return nearest + (recall >= THRESHOLDS[nearest])


def other_images(runs: Runs, resamples: int = RESAMPLES) -> OtherImages | None:
    """Compares every setting with the reference on resampled images.

    Args:
        runs: outcomes by setting and seed.
        resamples: how many draws.

    Returns:
        ``None`` where there is nothing to compare, the runs were not validated on the same images, or there
        are too few of these.
    """
    every = [outcomes for seeds in runs.values() for outcomes in seeds.values()]
    if not runs.get(REFERENCE) or not all(_comparable(every[0], outcomes) for outcomes in every):
        return None
    first = every[0]
    resamples = min(resamples, MOST_WEIGHTS // max(1, len(first.images)))
    if np.count_nonzero(first.truths.any(axis=1)) < FEWEST_IMAGES or resamples < FEWEST_RESAMPLES:
        return None
    weights = draws(len(first.images), resamples)
    values = {
        setting: {seed: _values(outcomes, weights) for seed, outcomes in seeds.items()}
        for setting, seeds in runs.items()
    }
    shown = [k for k, objects in enumerate(first.truths.sum(axis=0)) if objects >= ENOUGH]
    metrics: dict[str, dict[str, ImageInterval]] = {name: {} for name in first.columns}
    categories: dict[str, dict[str, ImageInterval]] = {first.categories[k]: {} for k in shown}
    for setting, seeds in values.items():
        both = sorted(seeds.keys() & values[REFERENCE].keys())
        if setting == REFERENCE or not both:
            continue
        of_metrics, of_categories = (
            np.mean([seeds[seed][part] - values[REFERENCE][seed][part] for seed in both], axis=0)
            for part in (0, 1)
        )
        for column, name in enumerate(first.columns):
            if not np.isnan(of_metrics[0, column]):
                metrics[name][setting] = _interval(of_metrics[:, column])
        for k in shown:
            categories[first.categories[k]][setting] = _interval(of_categories[:, k])
    objects = {first.categories[k]: int(first.truths[:, k].sum()) for k in shown}
    return OtherImages(len(first.images), metrics, categories, objects)


def _comparable(one: Outcomes, other: Outcomes) -> bool:
    same = np.array_equal(one.images, other.images) and np.array_equal(one.truths, other.truths)
    means = [(outcomes.categories, outcomes.columns, outcomes.measure) for outcomes in (one, other)]
    return same and means[0] == means[1]


def _values(outcomes: Outcomes, weights: Floats) -> tuple[Floats, Floats]:
    """The metrics (B, metrics), and the first of them for each category (B, K)."""
    share = outcomes.measure == "share"
    columns = (shares if share else average_precisions)(outcomes, weights)
    of_columns = [np.mean(columns[:, ways], axis=1) for ways in map(list, outcomes.columns.values())]
    # A share counts every object alike, an average precision every category of which there is an object.
    counts = weights @ outcomes.truths if share else ~np.isnan(of_columns[0])
    total = np.where((total := counts.sum(axis=1)) > 0, total, np.nan)  # NaN where no object was drawn
    means = [np.nansum(of * counts, axis=1) / total for of in of_columns]
    return np.stack(means, axis=1), of_columns[0]


def shares(outcomes: Outcomes, weights: Floats) -> Floats:
    """Share of each category's objects for which the prediction is right, like :func:`average_precisions`."""
    categories, ways = len(outcomes.categories), outcomes.hit.shape[1]
    truths = weights @ outcomes.truths
    result = np.full((len(weights), ways, categories), np.nan)
    for k in range(categories):
        rows, present = outcomes.category == k, truths[:, k] > 0
        right = weights[:, outcomes.image[rows]] @ outcomes.hit[rows]
        result[present, :, k] = right[present] / truths[present, k, None]
    return result


def _interval(values: Floats) -> ImageInterval:
    drawn = values[1:][~np.isnan(values[1:])]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return ImageInterval(float(values[0]), float(low), float(high))
