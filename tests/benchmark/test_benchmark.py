"""The benchmark's bookkeeping, on a map too small to time anything."""

import csv
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.the_tools import tool_module

from dropblock_det.benchmark import measure as benchmark
from dropblock_det.benchmark import report as benchmark_report


def test_rows_table_and_plot(tmp_path):
    said = []
    ticks = []
    made = benchmark.benchmark_op(
        (1, 8, 6, 6), torch.float32, False, 7, 0.1, 3, "cpu", said.append, lambda: ticks.append(1)
    )
    assert len(ticks) == 3 + benchmark.WARM_UP
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
    gamma = benchmark.reference.corner_probability(0.2, 5, 20, 20)
    assert abs(dropped / benchmark.reference.expected_drop_share(gamma, 5, 20, 20) - 1) < 0.012


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rounds", "1"], ["--rounds"]),
        (["--batch", "2", "0"], ["--batch"]),
        (["--size", "0", "320"], ["--size"]),
        (["--p", "0.1"], ["--p", "--block-size"]),
        (["--p", "nan", "--block-size", "7"], ["p must be", "nan"]),
        (["--p", "0.1", "--block-size", "0"], ["block_size"]),
        (["--output", "rows.md"], ["rows.md", "named .csv"]),
        (["--output", "of_others.csv"], ["of_others.csv", "name another file"]),
        (["--output", "binary.csv"], ["binary.csv", "name another file"]),
        (["--output", "folder.csv"], ["folder.csv", "name another file"]),
    ],
)
def test_bad_arguments_are_one_line_before_anything_is_measured(
    arguments, words, tmp_path, monkeypatch, line_of
):
    monkeypatch.chdir(tmp_path)
    kept = {"of_others.csv": b"what,setting\n1,2\n", "binary.csv": b"\xff\xfe\x00", "rows.md": b"mine"}
    for name, content in kept.items():
        Path(name).write_bytes(content)
    Path("folder.csv").mkdir()
    monkeypatch.setattr("sys.argv", ["benchmark.py", "op", *arguments])
    line = line_of(tool_module("benchmark.py").main)
    assert all(word in line for word in words), line
    assert {name: Path(name).read_bytes() for name in kept} == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "folder.csv"])


def test_the_tool_keeps_earlier_rows_and_writes_table_and_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(benchmark.STAGES, 4, (4, 7, 9))
    path = tmp_path / "rows.csv"
    arguments = ["op", "--stage", "4", "--batch", "1", "--rounds", "2", "--output", str(path)]
    for _ in range(2):
        monkeypatch.setattr("sys.argv", ["benchmark.py", *arguments])
        tool_module("benchmark.py").main()
    rows = list(csv.DictReader(path.open()))
    settings = ["float32 k=7 p=0.1", "float32 k=3 p=0.3"]
    assert [row["setting"] for row in rows if row["provider"] == "ours, cpu"] == settings * 2
    assert all(setting in path.with_suffix(".md").read_text() for setting in settings)
    assert path.with_suffix(".png").stat().st_size > 5000
    assert "8/8" in capsys.readouterr().out  # two settings of two rounds and their warming up
