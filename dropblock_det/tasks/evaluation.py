"""What a validation leaves: values of the metrics, images to look at, and what was right on each image."""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from msgspec import Meta
from numpy.typing import NDArray


@dataclass(frozen=True)
class Mark:
    """What an image shows, or what the model sees there.

    Attributes:
        category: the category's name.
        bbox: COCO's ``x, y, width, height`` in pixels; ``None`` where the category is the whole image's.
        score: the model's, between 0 and 1; ``None`` for the truth.
    """

    category: str
    bbox: tuple[float, float, float, float] | None = None
    score: float | None = None


@dataclass(frozen=True)
class Sample:
    """A validation image to look at.

    Attributes:
        id: names its thumbnail.
        kind: what is to be seen on it: ``boxes``, or a ``label`` for the whole image.
        width: pixels.
        height: pixels.
        truth: the annotations.
        predicted: the model's, best first.
        file: the image on the disk of the training.
    """

    id: Annotated[str, Meta(pattern=r"^[\w-]{1,100}\Z")]
    kind: Literal["boxes", "label"]
    width: Annotated[int, Meta(ge=1, lt=2**31)]
    height: Annotated[int, Meta(ge=1, lt=2**31)]
    truth: tuple[Mark, ...] = ()
    predicted: tuple[Mark, ...] = ()
    file: str | None = None


@dataclass(frozen=True)
class Outcomes:
    """Which predictions were right, image by image: enough to compute the metrics again on resampled images.

    There are ``n`` predictions, ``I`` images, ``K`` categories and ``T`` ways to count a prediction as right,
    such as IoU thresholds. A category's predictions lie together, in the order of the images, those of an
    image from the highest score down. A stable sort by score gives the order in which the metrics saw them.

    Attributes:
        columns: metric -> the columns of ``hit`` over which it is a mean.
        measure: what a column gives: ``average_precision``, a mean over the categories, or the ``share`` of
            objects for which the prediction is right, where each image has one object and one prediction.
        images: (I,) int64, ids of all validated images.
        categories: K names.
        truths: (I, K) int32, how many objects there were to find.
        image: (n,) int32, position in ``images``.
        category: (n,) int32, position in ``categories``; for a share, the object's.
        score: (n,) float32.
        hit: (n, T) bool, whether the prediction is right.
        ignored: (n, T) bool, whether it counts neither as right nor as wrong, as in a crowd.
    """

    columns: dict[str, tuple[int, ...]]
    images: NDArray[np.int64]
    categories: tuple[str, ...]
    truths: NDArray[np.int32]
    image: NDArray[np.int32]
    category: NDArray[np.int32]
    score: NDArray[np.float32]
    hit: NDArray[np.bool_]
    ignored: NDArray[np.bool_]
    measure: Literal["average_precision", "share"] = "average_precision"


@dataclass(frozen=True)
class Evaluation:
    """A whole validation set, evaluated.

    Attributes:
        values: metric -> value; more names than the task declares may be among them.
        samples: a few images, always the same ones.
        outcomes: of all images, where the metrics can be computed from them.
    """

    values: dict[str, float]
    samples: tuple[Sample, ...]
    outcomes: Outcomes | None = None
