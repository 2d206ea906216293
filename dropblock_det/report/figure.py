"""The report as one picture: val_loss and the headline over the epochs, and their differences."""

from collections import defaultdict

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dropblock_det.comparison.gather import REFERENCE, Comparison
from dropblock_det.errors import printable
from dropblock_det.report.columns import VAL_LOSS
from dropblock_det.report.tables import Report
from dropblock_det.tasks.metric import Metric

# Okabe and Ito's palette, its yellow darkened; the reference is black.
PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#B8A700")


def report_figure(comparison: Comparison, report: Report) -> Figure:
    """Draws a row each for val_loss and the headline: curves with seed bands, differences from the reference.

    Args:
        comparison: the curves' records.
        report: the differences.
    """
    others = [result.setting for result in report.results if result.setting != REFERENCE]
    colours = {REFERENCE: "black"} | {s: PALETTE[n % len(PALETTE)] for n, s in enumerate(others)}
    shown = [name for name in dict.fromkeys((VAL_LOSS, report.headline)) if name in report.columns]
    figure = Figure(figsize=(11, 2.2 + 0.55 * max(4, len(others)) * len(shown)), layout="constrained")
    if not shown:
        figure.text(0.5, 0.5, "no run is finished yet", ha="center")
        return figure
    grid = figure.subplots(len(shown), 2, squeeze=False, width_ratios=[1, 1.15])
    for (curves, differences), name in zip(grid, shown, strict=True):
        metric = report.columns[name].metric
        _curves(curves, comparison, metric, colours)
        _differences(differences, report, metric, colours)
    lines = grid[0][0].get_lines()
    legend = figure.legend(
        lines, [""] * len(lines), loc="outside lower center", ncols=4, frameon=False, fontsize=9
    )
    for text, setting in zip(legend.get_texts(), colours, strict=True):
        text.set_text(printable(setting))  # given as a label, a name that begins with _ would be left out
    return figure


def _curves(axes: Axes, comparison: Comparison, metric: Metric, colours: dict[str, str]) -> None:
    for setting, colour in colours.items():
        seen: dict[int, list[float]] = defaultdict(list)
        for record in comparison.records:
            for epoch, value in record.values(metric.name) if record.setting == setting else ():
                seen[epoch + 1].append(value * metric.scale)
        epochs = sorted(seen)
        means = [sum(seen[e]) / len(seen[e]) for e in epochs]
        width = 2.2 if setting == REFERENCE else 1.5
        axes.plot(epochs, means, color=colour, linewidth=width, marker="." if len(epochs) < 8 else "")
        lows, highs = [min(seen[e]) for e in epochs], [max(seen[e]) for e in epochs]
        axes.fill_between(epochs, lows, highs, color=colour, alpha=0.1, linewidth=0)
    axes.set_title(f"{printable(metric.title)} (mean; band: lowest to highest seed)", fontsize=10)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _differences(axes: Axes, report: Report, metric: Metric, colours: dict[str, str]) -> None:
    others = [result for result in report.results if result.setting != REFERENCE]
    for height, result in enumerate(others):
        difference = result.cells[metric.name].difference
        if difference is None:
            continue
        colour, mean = colours[result.setting], difference.mean * metric.scale
        if difference.low is not None and difference.high is not None:
            ends = [difference.low * metric.scale, difference.high * metric.scale]
            axes.plot(ends, [height] * 2, color=colour, linewidth=3)
        fill = colour if difference.shown else "white"
        axes.plot(mean, height, "o", color=colour, markerfacecolor=fill, markersize=8, markeredgewidth=2)
    axes.axvline(0, color="0.4", linewidth=1)
    axes.set_yticks(range(len(others)), [printable(result.setting) for result in others], fontsize=9)
    axes.set_ylim(len(others) - 0.4, -0.6)
    better = f"; {metric.better} is better" if metric.better else ""
    title = f"{printable(metric.title)}: difference from {REFERENCE}, 95 % interval{better}"
    axes.set_title(title, fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(6))  # more would run into each other
    axes.set_xlabel("filled dot: a difference is shown", fontsize=9)
    axes.grid(alpha=0.25, axis="x")
    axes.spines[["top", "right", "left"]].set_visible(False)
