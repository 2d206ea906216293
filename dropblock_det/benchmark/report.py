"""The benchmark's rows as a CSV file that grows, and as tables."""

import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from statistics import fmean

import msgspec

from dropblock_det.benchmark.measure import Row
from dropblock_det.errors import InputError
from dropblock_det.files import read_bytes, write_text

Newest = dict[str, dict[str, Row]]
"""The newest row of each provider in each shape: ``[provider][shape]``."""

COLUMN_NAMES = [field.name for field in fields(Row)]


def read_rows(path: Path) -> list[Row]:
    """Reads the rows of a CSV file; there are none where there is no file.

    Raises:
        InputError: It can't be read, or holds something else.
    """
    if path.suffix != ".csv":
        raise InputError(f"{path}: the rows go to a file named .csv, and a .md and a .png beside it")
    if not path.exists():
        return []
    try:
        reader = csv.DictReader(io.StringIO(read_bytes(path).decode()), strict=True)
        if reader.fieldnames != COLUMN_NAMES:
            raise InputError(f"{path}: no rows of this benchmark; name another file")
        rows = []
        for record in reader:
            known = {name: value or None for name, value in record.items()}
            rows.append(msgspec.convert(known, Row, strict=False))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not readable as CSV: {error}; name another file") from error
    except (msgspec.ValidationError, TypeError) as error:
        raise InputError(f"{path}: line {reader.line_num} is no row of this benchmark: {error}") from error
    return rows


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Writes all rows; the file is replaced whole."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMN_NAMES, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in asdict(row).items()})
    write_text(path, text.getvalue())


def newest_rows(rows: Iterable[Row]) -> dict[tuple[str, str, str], Newest]:
    """The newest rows by hardware, what was measured and its setting, the fastest provider first."""
    groups: dict[tuple[str, str, str], Newest] = {}
    for row in rows:
        group = groups.setdefault((row.hardware, row.what, row.setting), {})
        group.setdefault(row.provider, {})[row.shape] = row
    return {
        key: dict(sorted(group.items(), key=lambda item: geometric_mean(item[1].values())))
        for key, group in sorted(groups.items())
    }


def geometric_mean(rows: Iterable[Row]) -> float:
    """The geometric mean of the rows' ratios to the baseline."""
    return math.exp(fmean(math.log(row.relative) for row in rows))


def shapes(group: Newest) -> list[str]:
    """The shapes that any provider was measured with, the smallest first."""
    found = {shape for rows in group.values() for shape in rows}
    return sorted(found, key=lambda shape: (math.prod(map(int, shape.split("x"))), shape))


def markdown(rows: Sequence[Row]) -> str:
    """The newest rows as tables."""
    text = [
        "# Measured by tools/benchmark.py",
        "",
        "Time of forward and backward (a training step: and of the optimizer) as a multiple of a baseline's:",
        "the median of the ratios within a round, so that a slow minute of the machine slows both sides of",
        "them, and in brackets the 10 % and 90 % quantiles. The CSV beside this file has the milliseconds.",
        "",
    ]
    for (machine, what, setting), group in newest_rows(rows).items():
        shown = [row for by_shape in group.values() for row in by_shape.values()]
        rounds = " or ".join(map(str, sorted({row.rounds for row in shown})))
        text += [f"## {what}: {setting}", ""]
        text += [f"{machine}; {'; '.join(sorted({row.versions for row in shown}))};"]
        text += [f"{rounds} rounds. Relative to {shown[0].relative_to}:", ""]
        text += table(group, relative)
        if "busy" in setting:
            text += ["Other processes were busy, so that single calls took long; ratios of the means:", ""]
            text += table(group, lambda row: number(row.relative_mean))
        if what == "op":
            text += ["Peak memory of forward and backward beyond the input and its gradient's, MiB:", ""]
            text += table(group, lambda row: number(row.peak_memory_mib))
    return "\n".join(text)


def relative(row: Row) -> str:
    """A cell of the table of times."""
    return f"{row.relative:.3g} ({row.relative_q10:.3g}–{row.relative_q90:.3g})"


def number(value: float | None) -> str:
    """A cell; empty where nothing was measured."""
    return "" if value is None else f"{value:.3g}"


def table(group: Newest, cell: Callable[[Row], str]) -> list[str]:
    """Providers down, shapes across."""
    columns = shapes(group)
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for provider, rows in group.items():
        cells = (cell(rows[shape]) if shape in rows else "" for shape in columns)
        lines.append(f"| {provider} | {' | '.join(cells)} |")
    return [*lines, ""]
