"""Losses and gradients that are not finite: left out by the device, reported by the host a step later."""

import math
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

DIVERGED = "the model has diverged; lower model.lr or take an earlier checkpoint"


@dataclass
class Step:
    """What the host knows of an optimizer step once its numbers have arrived.

    Attributes:
        number: of the optimizer step, from 0.
        left_out: whether its gradients were not finite, so that it changed no weight.
        batches: image ids and losses by name of each batch that it accumulated, in this process.
    """

    number: int
    left_out: bool
    batches: list[tuple[list[int], dict[str, float]]]

    @property
    def loss(self) -> float:
        """The mean over its batches."""
        return sum(sum(losses.values()) for _, losses in self.batches) / len(self.batches)

    @property
    def nonfinite(self) -> list[tuple[list[int], dict[str, float]]]:
        """The batches with a loss that is not finite."""
        return [batch for batch in self.batches if not all(map(math.isfinite, batch[1].values()))]

    def fault(self) -> str:
        """Which losses on which images are not finite, or that only the gradients are not, and what helps."""
        advice = "the last checkpoint is kept: lower model.lr, or set model.on_nonfinite=skip"
        for image_ids, losses in self.nonfinite:
            values = ", ".join(f"{name} {value}" for name, value in losses.items())
            images = ", ".join(map(str, image_ids))
            return f"the loss is not finite ({values}) on the images {images}; {advice}"
        images = ", ".join(str(image_id) for image_ids, _ in self.batches for image_id in image_ids)
        return (
            f"the gradients are not finite, though this process's losses on the images {images} are; {advice}"
        )


@dataclass
class _Copy:
    """A step's numbers on their way to the host."""

    number: int
    batches: list[tuple[list[int], list[str]]]
    numbers: Tensor
    arrived: torch.cuda.Event | None


@dataclass
class Watch:
    """Carries the losses of each step to the host without waiting for the device.

    The host reads a step's losses when the next step is queued: by then they have arrived, and the device
    has work to go on with.
    """

    _batches: list[tuple[list[int], list[str]]] = field(default_factory=list)
    _losses: list[Tensor] = field(default_factory=list)
    _copies: deque[_Copy] = field(default_factory=deque)

    def add(self, image_ids: list[int], losses: dict[str, Tensor]) -> None:
        """Takes note of a batch: scalar losses on the device."""
        self._batches.append((image_ids, list(losses)))
        self._losses += [loss.detach().float() for loss in losses.values()]

    def close(self, number: int, left_out: Tensor) -> None:
        """Ends the step that the batches since the last one belong to, and sends it to the host.

        Args:
            number: of the optimizer step.
            left_out: scalar, 1 where the step changes no weight, else 0.
        """
        numbers = torch.stack([left_out, *self._losses])
        on_gpu = numbers.is_cuda
        copy = _Copy(number, self._batches, numbers.to("cpu", non_blocking=on_gpu), None)
        if on_gpu:
            copy.arrived = torch.cuda.Event()
            copy.arrived.record()
        self._copies.append(copy)
        self._batches, self._losses = [], []

    def look(self, all_but: int) -> list[Step]:
        """Returns the steps that were not returned before, but for the newest ``all_but``.

        Args:
            all_but: with 1 nothing waits for the device, with 0 no step is left.
        """
        steps = []
        while len(self._copies) > all_but:
            copy = self._copies.popleft()
            if copy.arrived is not None:
                copy.arrived.synchronize()
            left_out, *values = copy.numbers.tolist()
            rest = iter(values)
            batches = [(ids, {name: next(rest) for name in names}) for ids, names in copy.batches]
            steps.append(Step(copy.number, bool(left_out), batches))
        return steps
