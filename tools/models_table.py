"""Shows data/results/models.csv, which the sweep over torchvision's builders measures, as a table to read."""

import csv
from pathlib import Path

from dropblock_det.errors import run_tool

RESULTS = Path(__file__).parents[1] / "data" / "results"


def rendered(source: Path) -> str:
    """Returns the rows as Markdown."""
    with source.open(newline="") as file:
        rows = list(csv.DictReader(file))
    libraries = ("torch", "torchvision")
    columns = [column for column in rows[0] if column not in libraries]
    lines = [columns, ["---"] * len(columns), *([row[column] for column in columns] for row in rows)]
    title = f"# {len(rows)} builders, {' and '.join(f'{name} {rows[0][name]}' for name in libraries)}"
    return "\n".join([title, "", *(f"| {' | '.join(line)} |" for line in lines), ""])


def main() -> None:
    """Makes a table to read of the sweep over torchvision's builders."""
    from dropblock_det.files import write_text

    write_text(RESULTS / "models.md", rendered(RESULTS / "models.csv"))


if __name__ == "__main__":
    run_tool(main)
