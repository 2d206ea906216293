import csv
import io
import json
import math
import os
import random
import re
import shutil
import statistics
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from support.synthetic_runs import SETTINGS, invented_record, invented_runs, write_plan

from dropblock_det.files import write_figure, write_json
from dropblock_det.report.figure import report_figure
from dropblock_det.report.page import render_page
from dropblock_det.report.statistics import FIGURES, paired_difference, t_quantile
from dropblock_det.report.tables import build_report, to_csv, to_markdown
from dropblock_det.report.words import interval, verdict
from dropblock_det.runs.record_v1 import Epoch, Record, read_comparison, run_folder


@pytest.mark.parametrize(
    ("confidence", "df", "expected"),
    # Two-sided critical values of the printed tables (Abramowitz and Stegun, table 26.10).
    [
        (0.95, 1, 12.706),
        (0.95, 2, 4.303),
        (0.95, 3, 3.182),
        (0.95, 4, 2.776),
        (0.95, 7, 2.365),
        (0.95, 10, 2.228),
        (0.95, 29, 2.045),
        (0.99, 1, 63.657),
        (0.99, 2, 9.925),
        (0.99, 5, 4.032),
        (0.50, 3, 0.765),
        (0.95, 1000, 1.962),
    ],
)
def test_t_quantile_is_the_tables(confidence, df, expected):
    assert t_quantile(confidence, df) == pytest.approx(expected, abs=6e-4)


def test_t_quantile_refuses_nonsense():
    for confidence, df in [(0.0, 3), (1.0, 3), (0.95, 0)]:
        with pytest.raises(ValueError, match="confidence must be"):
            t_quantile(confidence, df)


def test_the_interval_covers_95_percent():
    """20,000 sets of three seeds: the share that covers the truth is 0.95 +- 3 standard errors (0.0046)."""
    noise = random.Random(0)
    trials, covered = 20_000, 0
    for _ in range(trials):
        # The seed's own level is large and shared: only the pairing makes the interval this narrow.
        level = {seed: noise.gauss(0, 10) for seed in range(3)}
        reference = {seed: level[seed] + noise.gauss(0, 1) for seed in level}
        values = {seed: level[seed] + 0.5 + noise.gauss(0, 1) for seed in level}
        difference = paired_difference(values, reference)
        covered += difference.low <= 0.5 <= difference.high
    assert abs(covered / trials - 0.95) < 3 * math.sqrt(0.95 * 0.05 / trials)


def test_paired_difference_by_hand():
    difference = paired_difference(
        {0: 1.0, 1: 2.0, 2: 4.0, 9: 100.0}, {0: 0.5, 1: 1.0, 2: 2.5, 8: -100.0}, comparisons=6
    )
    assert difference.seeds == 3  # seeds in one of the two only are left out
    assert difference.mean == pytest.approx(1.0)
    half = 4.302653 * 0.5 / math.sqrt(3)
    assert (difference.low, difference.high) == pytest.approx((1 - half, 1 + half), rel=1e-6)
    assert not difference.shown
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_all_comparisons_counted_needs_more():
    values, reference = {0: 1.0, 1: 1.1, 2: 0.9}, {0: 0.5, 1: 0.45, 2: 0.6}
    alone, of_six = paired_difference(values, reference, 1), paired_difference(values, reference, 6)
    assert alone.shown
    assert alone.shown_jointly
    assert of_six.shown
    assert not of_six.shown_jointly
    assert verdict("mAP", alone) == "higher: better"
    assert verdict("mAP", of_six) == "higher: better *"
    assert verdict("val_loss", alone) == "higher: worse"
    assert verdict("gap", alone) == "higher"  # neither better nor worse by itself


def test_figures_of_a_record():
    record = Record(
        "none",
        0,
        "finished",
        epochs=(
            Epoch(0, 1, 3.0, 2.5, None, None, None, 0.0, 60.0),
            Epoch(1, 2, 2.0, 1.9, 0.2, 0.5, 0.1, 0.0, 61.0),
            Epoch(2, 3, 1.0, 2.4, 0.3, 0.4, 0.0, 0.0, 62.0),
        ),
        peak_memory_bytes=2**30,
    )
    got = {name: figure.of(record) for name, figure in FIGURES.items()}
    assert got == {
        "loss": 1.0,
        "val_loss": 1.9,
        "mAP": 0.3,
        "AP50": 0.5,
        "AP75": 0.1,
        "gap": pytest.approx(-0.1),
        "final_gap": pytest.approx(1.4),
        "wall_s": 183.0,
        "images_per_s": None,
        "peak_memory": 2**30,
        "drop_share": None,
    }
    empty = Record("none", 0, "finished")
    assert all(figure.of(empty) is None for figure in FIGURES.values())


def report_of(tmp_path, **kwargs):
    runs = read_comparison(invented_runs(tmp_path, **kwargs))
    return runs, build_report(runs)


def test_means_and_spreads(tmp_path):
    _, report = report_of(tmp_path)
    row = next(row for row in report.rows if row.setting == "dropout")
    lowest = [min(e.val_loss for e in invented_record("dropout", seed).epochs) for seed in (0, 1, 2)]
    assert row.figures["val_loss"].mean == pytest.approx(statistics.fmean(lowest), abs=1e-12)
    assert row.figures["val_loss"].sd == pytest.approx(statistics.stdev(lowest), abs=1e-12)
    assert report.rows[0].setting == "none"
    assert all(summary.difference is None for summary in report.rows[0].figures.values())


def test_no_effect_claims_nothing_and_a_large_one_is_seen(tmp_path):
    _, report = report_of(tmp_path, effects={"dropblock_bs7_kp0.9": 0.08})
    said = {row.setting: verdict("mAP", row.figures["mAP"].difference) for row in report.rows[1:]}
    assert said["dropblock_bs7_kp0.9"] == "higher: better"
    assert "dropblock_bs7_kp0.9 +0.0" in report.answers["mAP"]
    assert sum(text == "no difference shown" for text in said.values()) >= 4


def test_one_seed_gives_no_interval_and_says_so(tmp_path):
    _, report = report_of(tmp_path, seeds=(5,), effects={"dropout": 0.2})
    for row in report.rows[1:]:
        for name in report.answers:
            difference = row.figures[name].difference
            assert (difference.low, difference.high, difference.shown) == (None, None, False)
            assert verdict(name, difference) == "one seed: no interval"
            assert row.figures[name].sd is None
    text = to_markdown(report)
    assert "one seed per setting, so there is no interval" in text
    assert "±" not in text.split("## How to read it")[0].replace("Mean ± standard", "")
    assert "better:" not in text
    assert "(better)" not in text


def test_without_the_reference_nothing_is_compared(tmp_path):
    _, report = report_of(tmp_path, settings=("dropout", "spatial_dropout"))
    assert "nothing to compare yet" in report.answers["mAP"]
    assert "no pair with the same seed" in to_markdown(report)


def test_nothing_finished_yet_is_still_a_report(tmp_path):
    write_plan(tmp_path, ("none", "x"), [0])
    runs = read_comparison(tmp_path)
    report = build_report(runs)
    assert "2 of 2 runs have no result" in to_markdown(report)
    assert "not started" in render_page(runs, report)


def test_notes_say_what_makes_runs_unequal(tmp_path):
    _, report = report_of(tmp_path, settings=("none", "dropout"))
    assert not [note for note in report.notes if note.startswith("Careful")]
    assert any("still improving" in note for note in report.notes) is False  # the invented runs overfit
    path = run_folder(tmp_path, "dropout", 0) / "record.json"
    changed = json.loads(path.read_text()) | {
        "init_hash": "other",
        "data_hash": "other",
        "hardware": {"device": "gpu"},
    }
    changed["epochs"] = changed["epochs"][:5]
    path.write_text(json.dumps(changed))
    careful = " ".join(
        note for note in build_report(read_comparison(tmp_path)).notes if note.startswith("Careful")
    )
    for words in (
        "different data",
        "seed 0 started from different weights",
        "different hardware",
        "numbers of epochs",
    ):
        assert words in careful


def test_a_reference_that_does_not_overfit_is_said(tmp_path):
    invented_runs(tmp_path, settings=("none", "dropout"))
    for seed in range(3):
        path = run_folder(tmp_path, "none", seed) / "record.json"
        data = json.loads(path.read_text())
        data["epochs"] = sorted(data["epochs"], key=lambda e: -e["val_loss"])
        path.write_text(json.dumps(data))
    assert any(
        "still improving at its last epoch in 3 of 3" in n
        for n in build_report(read_comparison(tmp_path)).notes
    )


def test_an_interval_that_leaves_0_out_is_not_printed_as_0():
    tiny = paired_difference({0: 2.15e-6, 1: 2.25e-6}, {0: 1e-6, 1: 1e-6})
    assert tiny.shown
    assert interval("AP75", tiny) == "+1.2e-06 [+5.6e-07, +1.8e-06]"
    wide = paired_difference({0: 2e-6, 1: 1.5e-6}, {0: 1e-6, 1: 1e-6})
    assert interval("AP75", wide) == "+0.0000 [-0.0000, +0.0000]"  # it claims nothing
    plain = paired_difference({0: 0.2, 1: 0.21}, {0: 0.1, 1: 0.1})
    assert interval("AP75", plain) == "+0.1050 [+0.0415, +0.1685]"
    assert interval("AP75", paired_difference({0: 0.2}, {0: 0.1})) == "+0.1000"


def test_detectors_that_find_nothing_are_said_to_find_nothing(tmp_path):
    runs, report = report_of(tmp_path, settings=("none", "dropout"))
    assert not [note for note in report.notes if "next to nothing" in note]
    little = [
        replace(record, epochs=tuple(replace(e, mAP=e.mAP / 100) for e in record.epochs))
        for record in runs.records
    ]
    assert any("mAP of 0.01: these" in note for note in build_report(replace(runs, records=little)).notes)


def test_csv_holds_the_unrounded_numbers(tmp_path):
    _, report = report_of(tmp_path)
    lines = list(csv.DictReader(io.StringIO(to_csv(report))))
    assert len(lines) == len(SETTINGS) * len(FIGURES)
    line = next(x for x in lines if x["setting"] == "dropout" and x["figure"] == "mAP")
    row = next(row for row in report.rows if row.setting == "dropout")
    assert float(line["mean"]) == row.figures["mAP"].mean
    assert float(line["low"]) == row.figures["mAP"].difference.low


def test_json_is_strict(tmp_path):
    _, report = report_of(tmp_path)
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["base"] == "quickstart"


def test_the_picture_is_drawn_even_of_nothing(tmp_path):
    runs, report = report_of(tmp_path / "full", settings=("none", "dropout"))
    figure = report_figure(runs, report)
    curves, differences = figure.axes[0], figure.axes[1]
    assert [line.get_label() for line in curves.get_lines()] == ["none", "dropout"]
    low, high = (
        report.rows[1].figures["val_loss"].difference.low,
        report.rows[1].figures["val_loss"].difference.high,
    )
    assert list(differences.get_lines()[0].get_xdata()) == [low, high]
    write_plan(tmp_path / "empty", ("none", "x"), [0])
    runs = read_comparison(tmp_path / "empty")
    write_figure(tmp_path / "x.png", report_figure(runs, build_report(runs)))
    assert (tmp_path / "x.png").read_bytes()[1:4] == b"PNG"


# --- the page ----------------------------------------------------------------------------------


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.outside = []
        self.open = []

    def handle_starttag(self, tag, attrs):
        self.outside += [
            v for k, v in attrs if k in ("src", "href") and v and not v.startswith(("#", "data:"))
        ]
        if tag not in ("meta", "input", "br", "link", "img", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(tmp_path):
    runs, report = report_of(tmp_path)
    page = render_page(runs, report)
    links = Links()
    links.feed(page)
    assert links.outside == []
    assert links.open == []
    assert not re.search(r"@import|url\(|fetch\(|https?://(?!www\.w3\.org/2000/svg)", page)
    assert page.count("data:image/jpeg;base64,") == 4  # each picture once, whatever the number of settings
    assert len(page) < 2_000_000


def test_names_cannot_break_the_page(tmp_path):
    evil = "</script><script>alert(1)</script>"
    invented_runs(tmp_path, settings=("none", "a"), seeds=(0, 1))
    record = json.loads((run_folder(tmp_path, "a", 0) / "record.json").read_text()) | {"setting": evil}
    record["detections"][0]["detections"] = [{"bbox": [1, 2, 3, 4], "category": evil, "score": 0.9}]
    write_json(run_folder(tmp_path, "z", 0) / "record.json", record)
    runs = read_comparison(tmp_path)
    assert "<script>alert" not in render_page(runs, build_report(runs))


CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
    *("--virtual-time-budget=3000", "--window-size=500,900", "--dump-dom"),
]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.parametrize("seeds", [(0, 1, 2), (0,)])
def test_the_page_works_in_a_browser(tmp_path, seeds):
    """Clicks everything in a headless Chromium and reads the page back."""
    runs, report = report_of(tmp_path / "runs", seeds=seeds, effects={"dropblock_bs7_kp0.9": 0.05})
    clicks = """
    <script>
    const seen = { errors };
    const click = q => document.querySelector(q).click();
    const column = i => [...document.querySelectorAll("#table tbody tr")].map(r => r.cells[i].dataset.value);
    seen.forest = document.querySelectorAll("#forest circle").length;
    document.querySelectorAll("#table thead button")[4].click();
    seen.up = column(4).map(Number);
    document.querySelectorAll("#table thead button")[4].click();
    seen.down = column(4).map(Number);
    for (const b of document.querySelectorAll('[data-group="answer"] button')) { b.click(); }
    seen.answer = document.getElementById("answer-text").textContent;
    seen.paths = document.querySelectorAll("#curve-charts path.line").length;
    document.querySelector('[data-group="settings"] button').click();
    seen.fewer = document.querySelectorAll("#curve-charts path.line").length;
    const kinds = '[data-group="layout"] button, [data-group="ap"] button';
    for (const b of document.querySelectorAll(kinds)) b.click();
    seen.panels = document.querySelectorAll("#curve-charts > div").length;
    seen.bars = document.querySelectorAll("#gap-chart rect").length;
    seen.cards = document.querySelectorAll("#cards figure").length;
    const boxes = () => document.querySelectorAll("#cards rect").length;
    const slider = document.getElementById("score");
    const slide = value => { slider.value = value; slider.dispatchEvent(new Event("input")); };
    slide(.05); seen.manyBoxes = boxes();
    slide(.95); seen.found = document.getElementById("cards").textContent;
    document.querySelectorAll(".thumbs button")[3].click(); seen.fourth = boxes();
    click("#theme"); seen.theme = document.documentElement.dataset.theme;
    seen.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
    const said = document.createElement("pre");
    said.id = "seen"; said.textContent = JSON.stringify(seen);
    document.body.replaceChildren(said);
    </script></body>"""
    page = render_page(runs, report).replace(
        "<head>",
        "<head><script>const errors = []; addEventListener('error', e => errors.push(e.message));</script>",
    )
    (tmp_path / "page.html").write_text(page.replace("</body>", clicks))
    dom = subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path}/profile", f"file://{tmp_path}/page.html"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env=os.environ | {"HOME": str(tmp_path)},
    ).stdout
    seen = json.loads(
        re.search(r'<pre id="seen">(.*?)</pre>', dom, re.S)
        .group(1)
        .replace("&lt;", "<")
        .replace("&amp;", "&")
    )
    assert seen["errors"] == []
    assert seen["forest"] == 6
    assert seen["up"] == sorted(seen["up"])
    assert seen["down"] == sorted(seen["down"], reverse=True)
    assert seen["up"] != seen["down"]
    assert seen["answer"] == report.answers["final_gap"]
    assert (seen["paths"], seen["fewer"], seen["panels"]) == (3 * 7, 3 * 6, 6)
    assert seen["bars"] == 12  # two for each setting that is not hidden
    assert seen["cards"] == 8
    assert seen["manyBoxes"] > 0
    assert "0 of 2 found, 0 wrong" in seen["found"]
    assert "1 wrong" not in seen["found"]
    assert seen["fourth"] > 0
    assert seen["theme"] in ("dark", "light")
    assert seen["wide"] <= 0  # nothing pushes the page sideways on a narrow screen
