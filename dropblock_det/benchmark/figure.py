"""The benchmark's rows as a picture; measuring does without this file, and so without matplotlib."""

import math
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from dropblock_det.benchmark.measure import Row
from dropblock_det.benchmark.report import Newest, newest_rows, shapes
from dropblock_det.files import write_figure

COLUMNS = 2  # of the picture
OURS, OTHERS = "tab:orange", "0.35"


def plot(rows: Sequence[Row], picture: Path) -> None:
    """The newest rows, a panel per setting: a line per provider, on it a dot per shape."""
    groups = newest_rows(rows)
    down = math.ceil(len(groups) / COLUMNS)
    figure = Figure(figsize=(7 * COLUMNS, 4.4 * down), layout="constrained")
    panels = list(figure.subplots(down, COLUMNS, squeeze=False).flat)
    for axes, ((machine, what, setting), group) in zip(panels, groups.items(), strict=False):
        draw(axes, group)
        axes.set_title("\n".join([f"{what}: {setting}", *wrap(machine, 55)]), fontsize=9, loc="left")
    for axes in panels[len(groups) :]:
        axes.remove()
    write_figure(picture, figure)


def draw(axes: Axes, group: Newest) -> None:
    """One panel. The dots of a line lie below each other, so that their bars don't cover one another."""
    columns = shapes(group)
    baseline = ""
    for number, shape in enumerate(columns):
        shade = colormaps["viridis"](0.85 * number / max(1, len(columns) - 1))
        places = {place: rows[shape] for place, rows in enumerate(group.values()) if shape in rows}
        heights = [place + 0.7 * ((number + 0.5) / len(columns) - 0.5) for place in places]
        low, middle, high = (
            [getattr(row, name) for row in places.values()]
            for name in ("relative_q10", "relative", "relative_q90")
        )
        axes.hlines(heights, low, high, color=shade, linewidth=1)
        axes.plot(middle, heights, "o", color=shade, markersize=4, label=shape)
        baseline = next(iter(places.values())).relative_to
    axes.axvline(1, color="black", linewidth=0.8)
    left, right = axes.get_xlim()
    if right > 3 * left:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(f"time relative to {baseline} (dot: median; bar: 10 % to 90 % of rounds)", fontsize=9)
    axes.set_yticks(range(len(group)), group, fontsize=9)
    for label in axes.get_yticklabels():
        label.set_color(OURS if label.get_text().startswith("ours") else OTHERS)
    axes.invert_yaxis()
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
