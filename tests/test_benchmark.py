"""The benchmark's bookkeeping, on a map too small to time anything."""

import csv
import re
from dataclasses import replace

import torch

from dropblock_det import benchmark, benchmark_report


def test_rows_table_and_plot(tmp_path):
    said = []
    made = benchmark.benchmark_op((1, 8, 6, 6), torch.float32, False, 7, 0.1, 3, "cpu", said.append)
    names = {row.provider for row in made}
    assert {"F.dropout", "ours, cpu", "ours, reference", "floor: a scaled copy"} <= names
    assert any(
        line.startswith("torchvision: left out, it fails here") for line in said
    )  # block 7 on a 6x6 map
    assert next(row for row in made if row.provider == "F.dropout").relative == 1
    assert all(row.q10_ms <= row.median_ms <= row.q90_ms for row in made)

    path = tmp_path / "new" / "rows.csv"
    benchmark_report.append_csv(path, made)
    later = [replace(row, relative=0.9876) if row.provider == "ours, cpu" else row for row in made]
    larger = [replace(row, shape="10x8x6x6") for row in made if row.provider != "F.dropout2d"]
    benchmark_report.append_csv(path, later + larger)
    rows = list(csv.DictReader(path.open()))
    assert len(rows) == 3 * len(made) - 1
    assert f"torch {torch.__version__.split('+')[0]}" in rows[0]["versions"]
    assert rows[0]["hardware"]
    tables = benchmark_report.markdown(path)
    assert "| | 1x8x6x6 | 10x8x6x6 |" in tables
    assert tables.count("\n| ours, cpu |") == 2  # a line of times and one of memory
    assert "\n| ours, cpu | 0.988 (" in tables  # the newest
    assert re.search(r"\n\| F.dropout2d \| \S+ \(\S+\) \|  \|\n", tables)  # not measured there
    benchmark_report.plot(path, tmp_path / "rows.png")
    assert (tmp_path / "rows.png").stat().st_size > 5000


def test_memory_counts_what_is_held_at_once():
    """1 MiB twice, the first freed before the second: the peak is one of them."""

    def work():
        for _ in range(2):
            torch.empty(2**18).fill_(1)

    assert 0.9 < benchmark.peak_memory(work, "cpu") < 1.2


def test_our_path_is_forced_and_given_back():
    x = torch.ones(1, 4, 12, 12)
    before = benchmark.dropblock.FORCED_PATH
    assert (benchmark.ours("reference", x, 0.5, 3) == 0).any()
    assert benchmark.dropblock.FORCED_PATH is before


def test_mmdetections_formulation_drops_the_expected_share():
    """2,000 planes of 400; the share's standard error is below 0.4 %, three of them are allowed."""
    torch.manual_seed(0)
    dropped = (benchmark.mmdetection(torch.ones(20, 400, 20, 20), 0.2, 5) == 0).float().mean().item()
    gamma = benchmark.reference.seed_probability(0.2, 5, 20, 20)
    assert abs(dropped / benchmark.reference.expected_drop_share(gamma, 5, 20, 20) - 1) < 0.012
