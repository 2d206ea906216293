from dataclasses import replace

import pytest
from support.invented_outcomes import with_outcomes
from support.label_runs import label_runs
from support.pages import clicked, in_a_browser, read_whole
from support.synthetic_runs import invented_runs

from dropblock_det.comparison.gather import Absent, gather
from dropblock_det.report.page import render_page, write_report
from dropblock_det.report.tables import build_report


def report_of(folder):
    comparison = gather(folder)
    return comparison, build_report(comparison)


@pytest.mark.parametrize("runs", [invented_runs, label_runs])
def test_the_page_is_whole_and_needs_nothing_else(tmp_path, runs):
    runs, report = report_of(runs(tmp_path))
    page = render_page(runs, report)
    read_whole(page)
    assert page.count("data:image/jpeg;base64,") == 4  # each picture once, whatever the number of settings
    assert len(page) < 2_000_000


def test_names_cannot_break_the_page(tmp_path):
    evil = "</script><script>alert(1)</script>"
    comparison = gather(invented_runs(tmp_path, settings=("none", "a"), seeds=(0, 1)))
    first = comparison.records[0]
    sample = replace(first.samples[0], predicted=(replace(first.samples[0].predicted[0], category=evil),))
    record = replace(first, setting=evil, samples=(sample,), hardware={"device": evil})
    comparison = replace(
        comparison,
        base=evil,
        settings=(*comparison.settings, evil),
        records=(*comparison.records, record),
        absent=(Absent(evil, 3, "failed", evil),),
    )
    page = render_page(comparison, build_report(comparison))
    assert "<script>alert" not in page
    assert page.count("</script>") == 2


IN_A_BROWSER = """
    const column = i => all("#table tbody tr").map(row => row.cells[i].dataset.value);
    seen.forest = all("#forest circle").length;
    seen.dotted = all("#forest line[stroke-dasharray]").length;
    seen.images = document.getElementById("images-text").textContent;
    seen.details = all("#details tr").map(row => row.cells.length);
    all("#table thead button")[4].click();
    seen.up = column(4).map(Number);
    all("#table thead button")[4].click();
    seen.down = column(4).map(Number);
    click('[data-group="metric"] button');
    seen.last = document.getElementById("answer-text").textContent;
    click('[data-group="epoch"] button');
    seen.best = document.getElementById("answer-text").textContent;
    seen.paths = all("#curve-charts path.line").length;
    all('[data-group="settings"] button')[0].click();
    seen.fewer = all("#curve-charts path.line").length;
    click('[data-group="layout"] button, [data-group="curve"] button');
    seen.panels = all("#curve-charts > div").length;
    seen.bars = all("#gap-chart rect").length;
    seen.cards = all("#cards figure").length;
    const boxes = () => all("#cards rect").length;
    const slider = document.getElementById("score");
    const slide = value => { slider.value = value; slider.dispatchEvent(new Event("input")); };
    slide(.05); seen.manyBoxes = boxes();
    slide(.95); seen.found = document.getElementById("cards").textContent;
    all(".thumbs button")[3].click(); seen.fourth = boxes();
    seen.kinds = all("[data-kind]").filter(node => node.offsetParent).map(node => node.dataset.kind);
    """


@in_a_browser
@pytest.mark.parametrize("seeds", [(0, 1, 2), (0,)])
def test_the_page_works_in_a_browser(tmp_path, seeds):
    runs, report = report_of(invented_runs(tmp_path, seeds=seeds, effects={"dropblock_bs7_kp0.9": 0.05}))
    seen = clicked(IN_A_BROWSER, tmp_path, render_page(runs, report))
    assert seen["errors"] == []
    assert (seen["forest"], seen["dotted"], seen["images"]) == (6, 0, "")
    assert len(seen["details"]) == 6
    assert seen["up"] == sorted(seen["up"])
    assert seen["down"] == sorted(seen["down"], reverse=True)
    assert seen["up"] != seen["down"]
    assert (seen["last"], seen["best"]) == (report.answers["gap"], report.answers["best_gap"])
    assert (seen["paths"], seen["fewer"], seen["panels"]) == (3 * 7, 3 * 6, 6)
    assert seen["bars"] == 12  # two for each setting that is not hidden
    assert seen["cards"] == 8
    assert seen["manyBoxes"] > 0
    assert "0 of 2 found, 0 wrong" in seen["found"]
    assert "1 wrong" not in seen["found"]
    assert seen["fourth"] > 0
    assert set(seen["kinds"]) == {"boxes"}
    assert seen["theme"] in ("dark", "light")
    assert seen["wide"] <= 0  # nothing pushes the page sideways on a narrow screen


@in_a_browser
def test_the_page_of_another_task_works_in_a_browser(tmp_path):
    runs, report = report_of(label_runs(tmp_path))
    seen = clicked(IN_A_BROWSER, tmp_path, render_page(runs, report))
    assert seen["errors"] == []
    assert seen["forest"] == 2
    assert (seen["paths"], seen["cards"], seen["manyBoxes"]) == (3 * 3, 4, 0)
    assert "✓ disc 0.80" in seen["found"]
    assert seen["kinds"] == ["label"]
    assert seen["wide"] <= 0


@in_a_browser
def test_other_images_are_on_the_page(tmp_path):
    report = write_report(with_outcomes(tmp_path / "runs"), tmp_path)
    seen = clicked(IN_A_BROWSER, tmp_path, (tmp_path / "report.html").read_text())
    assert seen["errors"] == []
    assert seen["dotted"] == 2
    assert seen["images"] == report.on_other_images("mAP") != ""
    assert seen["details"] == [6, 6]
    assert seen["wide"] <= 0
