"""The report as one picture: val_loss and mAP over the epochs, and their differences from the reference."""

from collections import defaultdict

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dropblock_det.report.statistics import FIGURES
from dropblock_det.report.tables import Report
from dropblock_det.runs.record_v1 import REFERENCE, Comparison

# Okabe and Ito's palette, its yellow darkened; the reference is black.
PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#B8A700")
SHOWN = ("val_loss", "mAP")


def report_figure(runs: Comparison, report: Report) -> Figure:
    """Draws a row for val_loss and one for mAP: curves with seed bands, and differences from the reference.

    Args:
        runs: the curves' records.
        report: the differences.
    """
    others = [row.setting for row in report.rows if row.setting != REFERENCE]
    colours = {REFERENCE: "black"} | {s: PALETTE[n % len(PALETTE)] for n, s in enumerate(others)}
    figure = Figure(figsize=(11, 2.2 + 0.55 * max(4, len(others)) * len(SHOWN)), layout="constrained")
    grid = figure.subplots(len(SHOWN), 2, squeeze=False, width_ratios=[1, 1.15])
    for (curves, differences), name in zip(grid, SHOWN, strict=True):
        _curves(curves, runs, name, colours)
        _differences(differences, report, name, colours)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def _curves(axes: Axes, runs: Comparison, name: str, colours: dict[str, str]) -> None:
    for setting, colour in colours.items():
        seen: dict[int, list[float]] = defaultdict(list)
        for record in runs.records:
            for epoch in record.epochs if record.setting == setting else ():
                if (value := getattr(epoch, name)) is not None:
                    seen[epoch.epoch + 1].append(value)
        epochs = sorted(seen)
        means = [sum(seen[e]) / len(seen[e]) for e in epochs]
        width = 2.2 if setting == REFERENCE else 1.5
        axes.plot(
            epochs, means, color=colour, label=setting, linewidth=width, marker="." if len(epochs) < 8 else ""
        )
        lows, highs = [min(seen[e]) for e in epochs], [max(seen[e]) for e in epochs]
        axes.fill_between(epochs, lows, highs, color=colour, alpha=0.1, linewidth=0)
    axes.set_title(f"{name} (mean; band: lowest to highest seed)", fontsize=10)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _differences(axes: Axes, report: Report, name: str, colours: dict[str, str]) -> None:
    rows = [row for row in report.rows if row.setting != REFERENCE]
    for height, row in enumerate(rows):
        difference = row.figures[name].difference
        if difference is None:
            continue
        colour = colours[row.setting]
        if difference.low is not None and difference.high is not None:
            axes.plot([difference.low, difference.high], [height] * 2, color=colour, linewidth=3)
        fill = colour if difference.shown else "white"
        axes.plot(
            difference.mean, height, "o", color=colour, markerfacecolor=fill, markersize=8, markeredgewidth=2
        )
    axes.axvline(0, color="0.4", linewidth=1)
    axes.set_yticks(range(len(rows)), [row.setting for row in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    better = f"; {FIGURES[name].better} is better" if FIGURES[name].better else ""
    axes.set_title(f"{name}: difference from {REFERENCE}, 95 % interval{better}", fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(6))  # more would run into each other
    axes.set_xlabel("filled dot: the interval leaves 0 out", fontsize=9)
    axes.grid(alpha=0.25, axis="x")
    axes.spines[["top", "right", "left"]].set_visible(False)
