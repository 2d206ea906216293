"""What a task measures: declared once, by the task; everything after it takes its columns from here."""

from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta


@dataclass(frozen=True)
class Metric:
    """A measured quantity and how it is shown.

    Attributes:
        name: its key in an epoch of the record and in the logs.
        title: heading of its column.
        better: which direction is better, or ``None``: neither.
        digits: digits after the point where it is printed.
        scale: what it is multiplied with before.
        meaning: half a sentence for somebody who meets it for the first time.
        compared: whether a report compares the settings in it.
        little: a model that does not exceed it has learned next to nothing, so comparing such models is idle.
    """

    name: str
    title: str
    better: Literal["lower", "higher"] | None = None
    digits: Annotated[int, Meta(ge=0, le=15)] = 4
    scale: Annotated[float, Meta(ge=1e-15, le=1e15)] = 1.0
    meaning: str = ""
    compared: bool = True
    little: float | None = None

    def format(self, value: float | None, sd: float | None = None) -> str:
        """Returns a value, and its standard deviation if given, scaled and rounded; ``-`` for no value."""
        if value is None:
            return "-"
        text = f"{value * self.scale:.{self.digits}f}"
        return text if sd is None else f"{text} ± {sd * self.scale:.{self.digits}f}"


LOSSES = (
    Metric("loss", "loss", meaning="training loss, with the regularizer on"),
    Metric("val_loss", "val_loss", "lower", meaning="validation loss, with the regularizer off"),
)
"""The metrics that every task has."""
