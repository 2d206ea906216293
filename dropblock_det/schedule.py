"""Step -> drop probability and step -> learning rate, as pure functions.

Nothing here counts: a resumed run asks with its own global step and gets the same value as one that
was never interrupted.
"""

import bisect
import math
from collections.abc import Callable, Sequence

P_SCHEDULES: dict[str, Callable[..., float]] = {
    "linear": lambda progress, **_: progress,
    "constant": lambda progress, **_: 1.0,
    "cosine": lambda progress, **_: (1 - math.cos(math.pi * progress)) / 2,
    "early": lambda progress, cutoff, **_: float(progress < cutoff),
    "late": lambda progress, cutoff, **_: float(progress >= cutoff),
    "epochwise": lambda progress, epochs, **_: min(int(progress * epochs), epochs - 1) / max(1, epochs - 1),
}
"""Name -> share of the target ``p``, called as ``schedule(progress, cutoff=..., epochs=...)``.

``progress`` runs from 0 at the first step of a training to 1 at the last. ``linear`` (the paper's "scheduled
DropBlock", section 3) and ``cosine`` rise from 0 to 1; ``early`` is 1 until the ``cutoff``, then 0 (Liu et
al. 2023, "Dropout reduces underfitting"), ``late`` the reverse; ``epochwise`` rises by the same amount after
each epoch, from 0 in the first to 1 in the last.
"""


def p_at(progress: float, p: float, schedule: str, cutoff: float = 0.5, epochs: int = 1) -> float:
    """Returns the drop probability at a point of a training.

    Args:
        progress: The share of the training that is done, from 0 at the first step to 1 at the last.
        p: The target drop probability.
        schedule: A name in :data:`P_SCHEDULES`.
        cutoff: For ``early`` and ``late``: the progress at which they switch.
        epochs: For ``epochwise``: the training's.
    """
    return p * P_SCHEDULES[schedule](progress, cutoff=cutoff, epochs=epochs)


def scheduled_p(
    p: float, step: int, total_steps: int, schedule: str = "linear", cutoff: float = 0.5, epochs: int = 1
) -> float:
    """Returns the drop probability at an optimizer step.

    Args:
        p: The target drop probability.
        step: Optimizer steps done so far (Lightning's ``global_step``).
        total_steps: Optimizer steps of the whole training.
        schedule: A name in :data:`P_SCHEDULES`.
        cutoff: As for :func:`p_at`.
        epochs: As for :func:`p_at`.
    """
    return p_at(min(1.0, step / max(1, total_steps - 1)), p, schedule, cutoff, epochs)


def lr_factor(
    step: int,
    total_steps: float,
    schedule: str = "cosine",
    warmup_steps: int = 0,
    milestones: Sequence[float] = (),
) -> float:
    """Returns what to multiply the base learning rate with at an optimizer step.

    A linear warm-up comes first, as in torchvision's detection reference (from 1/1000).

    Args:
        step: Optimizer steps done so far.
        total_steps: Optimizer steps of the whole training; ``"constant"`` does not look at it.
        schedule: ``"constant"``, ``"cosine"`` (to 0 at the end) or ``"step"`` (a tenth at each milestone).
        warmup_steps: Steps of linear warm-up.
        milestones: For ``"step"``: shares of the training, between 0 and 1, in rising order.
    """
    warmup = 1.0 if step >= warmup_steps else 1e-3 + (1 - 1e-3) * step / warmup_steps
    progress = min(1.0, step / max(1, total_steps))
    if schedule == "cosine":
        return warmup * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "step":
        return warmup * 0.1 ** bisect.bisect_right(milestones, progress)
    assert schedule == "constant", schedule
    return warmup
