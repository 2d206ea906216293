"""The benchmark's rows as a CSV file that grows, as tables, and as a picture."""

import csv
import io
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields
from pathlib import Path
from statistics import fmean
from textwrap import wrap

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from dropblock_det.benchmark.measure import Row
from dropblock_det.errors import InputError
from dropblock_det.files import write_figure, write_text

# A row of the CSV; and the newest of each provider in each shape: [provider][shape].
Record = dict[str, str]
Newest = dict[str, dict[str, Record]]

COLUMN_NAMES = ",".join(field.name for field in fields(Row))
COLUMNS = 2  # of the picture
OURS, OTHERS = "tab:orange", "0.35"


def check_csv(path: Path) -> None:
    """Raises :class:`InputError` where rows can't be appended without harm to what is there."""
    if path.suffix != ".csv":
        raise InputError(f"{path}: the rows go to a file named .csv, and a .md and a .png beside it")
    if path.exists() and read_lines(path)[:1] != [COLUMN_NAMES]:
        raise InputError(f"{path}: no rows of this benchmark; name another file")


def read_lines(path: Path) -> list[str]:
    """The CSV's lines, or one line on why it can't be read."""
    try:
        return path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as CSV: {error}; name another file") from error


def append_csv(path: Path, made: list[Row]) -> None:
    """Appends rows, with a header when the file is new; the file is replaced whole."""
    check_csv(path)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMN_NAMES.split(","), lineterminator="\n")
    for row in made:
        writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in asdict(row).items()})
    before = path.read_text() if path.exists() else f"{COLUMN_NAMES}\n"
    write_text(path, before + text.getvalue())


def newest_rows(path: Path) -> dict[tuple[str, str, str], Newest]:
    """The newest rows of a CSV by hardware, what was measured and its setting, the fastest provider first."""
    groups: dict[tuple[str, str, str], Newest] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            group = groups.setdefault((row["hardware"], row["what"], row["setting"]), {})
            group.setdefault(row["provider"], {})[row["shape"]] = row
    return {
        key: dict(sorted(group.items(), key=lambda item: geometric_mean(item[1].values())))
        for key, group in sorted(groups.items())
    }


def geometric_mean(rows: Iterable[Record]) -> float:
    """Of the rows' ratios to the baseline."""
    return math.exp(fmean(math.log(float(row["relative"])) for row in rows))


def shapes(group: Newest) -> list[str]:
    """Those that any provider was measured with, the smallest first."""
    found = {shape for rows in group.values() for shape in rows}
    return sorted(found, key=lambda shape: (math.prod(map(int, shape.split("x"))), shape))


def markdown(path: Path) -> str:
    """The newest rows of a CSV as tables."""
    text = [
        "# Measured by tools/benchmark.py",
        "",
        "Time of forward and backward (a training step: and of the optimizer) as a multiple of a baseline's:",
        "the median of the ratios within a round, so that a slow minute of the machine slows both sides of",
        "them, and in brackets the 10 % and 90 % quantiles. The CSV beside this file has the milliseconds.",
        "",
    ]
    for (machine, what, setting), group in newest_rows(path).items():
        rows = [row for by_shape in group.values() for row in by_shape.values()]
        rounds = " or ".join(sorted({row["rounds"] for row in rows}, key=int))
        text += [f"## {what}: {setting}", ""]
        text += [f"{machine}; {'; '.join(sorted({row['versions'] for row in rows}))};"]
        text += [f"{rounds} rounds. Relative to {rows[0]['relative_to']}:", ""]
        text += table(group, relative)
        if what == "op":
            text += ["Peak memory of forward and backward beyond the input and its gradient's, MiB:", ""]
            text += table(group, lambda row: f"{float(row['peak_memory_mib']):.3g}")
    return "\n".join(text)


def relative(row: Record) -> str:
    """A cell of the table of times."""
    middle, low, high = (f"{float(row[name]):.3g}" for name in ("relative", "relative_q10", "relative_q90"))
    return f"{middle} ({low}–{high})"


def table(group: Newest, cell: Callable[[Record], str]) -> list[str]:
    """Providers down, shapes across."""
    columns = shapes(group)
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for provider, rows in group.items():
        cells = (cell(rows[shape]) if shape in rows else "" for shape in columns)
        lines.append(f"| {provider} | {' | '.join(cells)} |")
    return [*lines, ""]


def plot(path: Path, picture: Path) -> None:
    """The newest rows of a CSV, a panel per setting: a line per provider, on it a dot per shape."""
    groups = newest_rows(path)
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
            [float(row[name]) for row in places.values()]
            for name in ("relative_q10", "relative", "relative_q90")
        )
        axes.hlines(heights, low, high, color=shade, linewidth=1)
        axes.plot(middle, heights, "o", color=shade, markersize=4, label=shape)
        baseline = next(iter(places.values()))["relative_to"]
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
