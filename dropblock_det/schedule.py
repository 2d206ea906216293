"""Step -> drop probability and step -> learning rate, as pure functions.

Nothing here counts: a resumed run asks with its own global step and gets the same value as one that
was never interrupted.
"""

import bisect
import math
from collections.abc import Callable, Sequence

P_SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: progress,
    "constant": lambda progress: 1.0,
}
"""Name -> share of the target ``p`` at a training progress between 0 and 1."""


def scheduled_p(p: float, step: int, total_steps: int, schedule: str = "linear") -> float:
    """Returns the drop probability at an optimizer step.

    ``"linear"`` rises from 0 at the first step to ``p`` at the last (DropBlock paper, section 3:
    "scheduled DropBlock"); ``"constant"`` is ``p`` throughout.

    Args:
        p: The target drop probability.
        step: Optimizer steps done so far (Lightning's ``global_step``).
        total_steps: Optimizer steps of the whole training.
        schedule: A name in :data:`P_SCHEDULES`.
    """
    progress = min(1.0, step / max(1, total_steps - 1))
    return p * P_SCHEDULES[schedule](progress)


def lr_factor(
    step: int,
    total_steps: int,
    schedule: str = "cosine",
    warmup_steps: int = 0,
    milestones: Sequence[float] = (),
) -> float:
    """Returns what to multiply the base learning rate with at an optimizer step.

    A linear warm-up comes first, as in torchvision's detection reference (from 1/1000).

    Args:
        step: Optimizer steps done so far.
        total_steps: Optimizer steps of the whole training.
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
