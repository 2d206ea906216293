"""Losses and gradients that are not finite: left out on the device, seen by the host one step later."""

import math
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Step:
    """What the host knows of an optimizer step once its figures have arrived.

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


@dataclass
class _Copy:
    """A step's figures on their way to the host."""

    number: int
    batches: list[tuple[list[int], list[str]]]
    figures: Tensor
    arrived: torch.cuda.Event | None


@dataclass
class Watch:
    """Carries the losses of each step to the host without waiting for the device.

    What is asked for while the next step is already queued has arrived long ago, and the device goes on.
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
        figures = torch.stack([left_out, *self._losses])
        on_gpu = figures.is_cuda
        copy = _Copy(number, self._batches, figures.to("cpu", non_blocking=on_gpu), None)
        if on_gpu:
            copy.arrived = torch.cuda.Event()
            copy.arrived.record()
        self._copies.append(copy)
        self._batches, self._losses = [], []

    def look(self, all_but: int) -> list[Step]:
        """Returns the steps that were not returned before, without the newest few.

        Args:
            all_but: how many: with 1 nothing waits for the device, with 0 nothing is left.
        """
        steps = []
        while len(self._copies) > all_but:
            copy = self._copies.popleft()
            if copy.arrived is not None:
                copy.arrived.synchronize()
            left_out, *values = copy.figures.tolist()
            rest = iter(values)
            batches = [(ids, {name: next(rest) for name in names}) for ids, names in copy.batches]
            steps.append(Step(copy.number, bool(left_out), batches))
        return steps
