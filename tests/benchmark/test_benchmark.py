"""The benchmark's bookkeeping, on a map too small to time anything."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dropblock_det.__main__ import run
from dropblock_det.benchmark import cases, measure, report, tool
from dropblock_det.benchmark.figure import plot
from dropblock_det.ops import dropblock


@pytest.fixture(scope="module")
def made() -> list[measure.Row]:
    """Rows of a map on which torchvision's block 7 fails."""
    lines, rounds = [], []
    case = cases.op_case((1, 8, 6, 6), 7, 0.1, "cpu", log=lines.append)
    rows = measure.measure(case, 3, lambda: rounds.append(1), busy=1)
    assert any(line.startswith("torchvision: left out, it fails here") for line in lines)
    assert len(rounds) == 3 + measure.WARM_UP
    return rows


def test_rows(made):
    names = {row.provider for row in made}
    assert {"F.dropout", "ours, cpu", "ours, reference", "floor: a scaled copy"} <= names
    baseline = next(row for row in made if row.provider == "F.dropout")
    assert baseline.relative == baseline.relative_mean == 1
    for row in made:
        assert 0 < row.q10_ms <= row.median_ms <= row.q90_ms
        assert row.relative_mean == pytest.approx(row.mean_ms / baseline.mean_ms)
        assert row.setting == "float32 k=7 p=0.1, 1 busy"
        assert f"torch {torch.__version__.split('+')[0]}" in row.versions
        assert row.hardware


def test_rows_are_read_back_and_shown(made, tmp_path):
    path = tmp_path / "new" / "rows.csv"
    later = [replace(row, relative=0.9876) if row.provider == "ours, cpu" else row for row in made]
    larger = [replace(row, shape="10x8x6x6") for row in made if row.provider != "F.dropout2d"]
    report.write_rows(path, [*made, *later, *larger])
    rows = report.read_rows(path)
    assert len(rows) == 3 * len(made) - 1
    assert [row.provider for row in rows[: len(made)]] == [row.provider for row in made]
    assert rows[0].median_ms == pytest.approx(made[0].median_ms, rel=1e-3)
    tables = report.markdown(rows)
    assert "| | 1x8x6x6 | 10x8x6x6 |" in tables
    assert tables.count("\n| ours, cpu |") == 3  # a line of times, one of means, one of memory
    assert "\n| ours, cpu | 0.988 (" in tables  # the newest
    assert re.search(r"\n\| F.dropout2d \| \S+ \(\S+\) \|  \|\n", tables)  # not measured there
    plot(rows, tmp_path / "rows.png")
    assert (tmp_path / "rows.png").stat().st_size > 5000


def test_on_a_gpu_the_hosts_time_makes_rows_of_its_own(monkeypatch):
    monkeypatch.setattr(measure, "milliseconds", lambda work, device: (4.0, work()))
    monkeypatch.setattr(measure, "peak_memory", lambda work, device: 1.0)
    monkeypatch.setattr(measure, "hardware", lambda device: device)
    works = {"F.dropout": lambda: 0.02, "ours": lambda: 0.05}
    rows = measure.measure(measure.Case("op", "s", (1, 2), "cuda", "F.dropout", works), 3)
    assert [(row.what, row.provider, row.median_ms, row.relative) for row in rows] == [
        ("op", "F.dropout", 4.0, 1.0),
        ("op", "ours", 4.0, 1.0),
        ("op: host", "F.dropout", 0.02, 1.0),
        ("op: host", "ours", 0.05, 2.5),
    ]
    assert "## op: host: s" in report.markdown(rows)


def test_processes_are_busy_inside_and_gone_afterwards():
    def running() -> int:
        own = subprocess.run(
            ["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True, text=True
        )
        return own.stdout.count("while True: pass")

    with measure.busy_processes(2):
        assert running() == 2
    assert running() == 0


def test_a_training_step_has_every_setting():
    case = cases.train_step_case((96, 96), 2, 3, 0.1, "cpu")
    assert list(case.works) == ["none", "ours", "F.dropout", "torchvision"]
    case.works["none"]()
    case.works["ours"]()


def test_a_peer_that_fails_in_a_training_step_is_left_out():
    """torchvision's block 3 becomes 2 on the last stage's maps of 2 x 2, and it refuses even ones."""
    lines = []
    case = cases.train_step_case((64, 64), 2, 3, 0.1, "cpu", log=lines.append)
    assert list(case.works) == ["none", "ours", "F.dropout"]
    assert [line.partition(",")[0] for line in lines] == ["torchvision: left out"]


def test_compiled_the_defaults_are_one_case(monkeypatch):
    measured = []
    monkeypatch.setattr(tool, "measure_all", lambda cases, *_: measured.append(len(cases)))
    for compiled in (False, True):
        tool.train_step(compiled=compiled, device="cpu")
    assert measured == [2, 1]


def test_memory_counts_what_is_held_at_once():
    """1 MiB twice, the first freed before the second: the peak is one of them."""

    def work():
        for _ in range(2):
            torch.empty(2**18).fill_(1)

    assert 0.9 < measure.peak_memory(work, "cpu") < 1.2


def test_our_path_is_forced_and_given_back():
    x = torch.ones(1, 4, 12, 12)
    before = dropblock.FORCED_PATH
    assert (cases.ours("reference", x, 0.5, 3) == 0).any()
    assert dropblock.FORCED_PATH is before


def test_mmdetections_formulation_drops_the_expected_share():
    """2,000 planes of 400; the share's standard error is below 0.4 %, three of them are allowed."""
    torch.manual_seed(0)
    dropped = (cases.mmdetection(torch.ones(20, 400, 20, 20), 0.2, 5) == 0).float().mean().item()
    gamma = cases.reference.corner_probability(0.2, 5, 20, 20)
    assert abs(dropped / cases.reference.expected_drop_share(gamma, 5, 20, 20) - 1) < 0.012


ROW = "op,s,2x3,ours,9,1,1,1,,F.dropout,1,1,1,,,cpu,torch,now"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["op", "--rounds", "1"], ["rounds"]),
        (["op", "--batch", "2", "0"], ["batch"]),
        (["op", "--batch", "1000000000"], ["GiB", "smaller"]),
        (["op", "--stage", "5"], ["stage"]),
        (["op", "--busy", "-1"], ["busy"]),
        (["train-step", "--size", "1", "1"], ["size", "64"]),
        (["train-step", "--batch", "2147483647"], ["GiB", "smaller"]),
        (["op", "--p", "0.1"], ["--p", "--block-size"]),
        (["op", "--p", "nan", "--block-size", "7"], ["p", "nan"]),
        (["op", "--p", "1.5", "--block-size", "7"], ["p", "1.5"]),
        (["op", "--p", "0.1", "--block-size", "0"], ["block_size"]),
        (["op", "--device", "tpu"], ["device", "tpu"]),
        (["op", "--output", "rows.md"], ["rows.md", "named .csv"]),
        (["op", "--output", "of_others.csv"], ["of_others.csv", "name another file"]),
        (["op", "--output", "binary.csv"], ["binary.csv", "name another file"]),
        (["op", "--output", "folder.csv"], ["folder.csv"]),
        (["op", "--output", "garbage.csv"], ["garbage.csv", "line 3", "median_ms"]),
        (["op", "--output", "zero.csv"], ["zero.csv", "line 2", "relative"]),
        (["op", "--output", "nan.csv"], ["nan.csv", "line 2", "median_ms"]),
        (["op", "--output", "shape.csv"], ["shape.csv", "line 2", "shape"]),
        (["op", "--output", "short.csv"], ["short.csv", "line 2"]),
        (["op", "--output", "long.csv"], ["long.csv", "line 2"]),
    ],
)
def test_bad_arguments_are_one_line_before_anything_is_measured(
    arguments, words, tmp_path, monkeypatch, line_of
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tool, "measure", None)
    header = ",".join(report.COLUMN_NAMES)
    kept = {
        "of_others.csv": b"what,setting\n1,2\n",
        "binary.csv": b"\xff\xfe\x00",
        "rows.md": b"mine",
        "garbage.csv": f"{header}\n{ROW}\n{ROW.replace('9,1,1,1', '9,much,1,1')}\n".encode(),
        "zero.csv": f"{header}\n{ROW.replace('dropout,1', 'dropout,0')}\n".encode(),
        "nan.csv": f"{header}\n{ROW.replace('9,1,1,1', '9,nan,1,1')}\n".encode(),
        "shape.csv": f"{header}\n{ROW.replace('2x3', '2x')}\n".encode(),
        "short.csv": f"{header}\n{ROW.partition(',cpu')[0]}\n".encode(),
        "long.csv": f"{header}\n{ROW},more\n".encode(),
    }
    for name, content in kept.items():
        Path(name).write_bytes(content)
    Path("folder.csv").mkdir()
    line = line_of(lambda: run(["benchmark", *arguments]))
    assert all(word in line for word in words), line
    assert {name: Path(name).read_bytes() for name in kept} == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "folder.csv"])


@pytest.mark.parametrize("matplotlib", [True, False])
def test_the_tool_keeps_earlier_rows_and_writes_table_and_plot(matplotlib, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(cases.STAGES, 4, (4, 7, 9))
    if not matplotlib:
        monkeypatch.setitem(sys.modules, "dropblock_det.benchmark.figure", None)
    path = tmp_path / "rows.csv"
    arguments = ["op", "--stage", "4", "--batch", "1", "--rounds", "2", "--output", str(path)]
    for _ in range(2):
        run(["benchmark", *arguments])
    settings = ["float32 k=7 p=0.1", "float32 k=3 p=0.3"]
    rows = report.read_rows(path)
    assert [row.setting for row in rows if row.provider == "ours, cpu"] == settings * 2
    assert all(setting in path.with_suffix(".md").read_text() for setting in settings)
    assert path.with_suffix(".png").exists() == matplotlib
    output = capsys.readouterr().out
    assert "8/8" in output  # two settings of two rounds and their warming up
    assert ("no picture" in output) != matplotlib


def test_measuring_needs_no_matplotlib():
    program = "import sys; sys.modules['matplotlib'] = None; import dropblock_det.benchmark.tool"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
