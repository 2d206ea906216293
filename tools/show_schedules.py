"""Draws the schedules of the drop probability over a training.

python tools/show_schedules.py [--output schedules.png]
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure

from dropblock_det.commands import command
from dropblock_det.errors import InputError, run_tool
from dropblock_det.files import write_figure
from dropblock_det.schedule import P_SCHEDULES, p_at


def show_schedules(output: Path = Path("schedules.png")) -> None:
    """Draws the schedules of the drop probability over a training.

    Args:
        output: The picture; a name that ends in .png.
    """
    if output.suffix != ".png":
        raise InputError(f"--output {output}: give a name that ends in .png")
    figure = Figure(figsize=(1.6 * len(P_SCHEDULES), 1.5), layout="constrained")
    progress = [step / 500 for step in range(501)]
    for axes, name in zip(figure.subplots(1, len(P_SCHEDULES), sharey=True), P_SCHEDULES, strict=True):
        axes.plot(progress, [p_at(done, 1.0, name, epochs=8) for done in progress], color="tab:blue")
        axes.set_title(name, fontsize=10)
        axes.set_xticks([0, 1], ["start", "end"], fontsize=8)
        axes.set_yticks([0, 1], ["0", "p"], fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    write_figure(output, figure)
    print(f"wrote {output}")


if __name__ == "__main__":
    run_tool(lambda: command(show_schedules, sys.argv[1:], "show-schedules"))
