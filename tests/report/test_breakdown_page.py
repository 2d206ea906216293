"""A closer look as files: one page that needs nothing else, and CSV."""

import csv
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from support.pages import clicked, in_a_browser, read_whole

from dropblock_det.errors import InputError
from dropblock_det.files import MACHINE
from dropblock_det.report import breakdown as report
from dropblock_det.report.breakdown import check_folder, render_breakdown, write_breakdown
from dropblock_det.tasks.breakdown import Breakdown, Confusion, Curves, Example, Part, Table, encoded
from dropblock_det.tasks.evaluation import Mark
from dropblock_det.tasks.metric import Metric

EVIL = "</script><script>alert(1)</script>\x00\x1b[31m=1+1"
FORMULA = "=HYPERLINK(1)"


def invented(names=("ship", "tree"), curves=True):
    """Two categories, of which the second has no objects."""
    looks = np.zeros((10, 101, 2))
    looks[:, :60, 0], looks[:, :, 1] = 1 / 3, np.nan
    box = Mark(names[0], (10.0, 5.0, 20.0, 10.0))
    marks = {"found": (box,), "right": (replace(box, score=0.75),), "wrong": (replace(box, score=0.5),)}
    name, count = Metric("category", "category"), Metric("objects", "objects", digits=0, meaning="to find")
    ap = Metric("AP", "AP", "higher", meaning="average precision")
    picture = encoded(np.zeros((40, 60, 3), np.uint8))
    return Breakdown(
        answer=("It finds 2 of 3 objects.", f"Highest AP: {names[0]}."),
        values=((ap, 1 / 3), (ap, float("nan"))),
        parts={
            "objects": (Part("found", 2, "is found", True), Part("missed", 1, "is not")),
            "detections": (Part("right", 2, "is right", True), Part("wrong", 0, "is not")),
        },
        categories=Table((name, count, ap), ((names[0], 3, 1 / 3), (names[1], 0, None)), ("all", 3, 1 / 3)),
        errors=Table((name, count), ((names[0], 3), (names[1], 0))) if curves else None,
        confusion=Confusion(
            names, np.array([[1, 1, 1], [0, 0, 0], [0, 2, 0]]), "How.", ("background", "missed")
        ),
        curves=Curves(names, np.arange(0.5, 1, 0.05), np.linspace(0, 1, 101), looks, looks)
        if curves
        else None,
        images=Table((Metric("image", "image"), name), ((7, f"{names[0]}.jpg"),)),
        examples={
            "worst": (Example(f"{names[0]}.jpg", "F1 0.50", 60, 40, picture, marks),),
            "best": (),
        },
        notes=("So it is counted.",),
    )


def rows(path):
    return list(csv.reader(path.open(encoding="utf-8", newline="")))


def test_the_page_is_whole_and_needs_nothing_else():
    page = render_breakdown(invented(), "best.ckpt", "1 image")
    read_whole(page)
    assert page.count("data:image/png;base64,") == 1
    for words in ("It finds 2 of 3 objects.", "66.7 %", "0.3333", "So it is counted."):
        assert words in page


def test_names_cannot_break_the_page_nor_the_files(tmp_path):
    found = invented((EVIL, FORMULA))
    page = write_breakdown(tmp_path / "out", found, EVIL, EVIL).read_text()
    assert "<script>alert" not in page
    assert page.count("</script>") == 2
    assert "u0000" not in page
    for path in (tmp_path / "out").iterdir():
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f]", path.read_text()), path.name
    table = rows(tmp_path / "out" / "categories.csv")
    assert table[1][0] == "</script><script>alert(1)</script>\\x00\\x1b[31m=1+1"
    assert table[2][0] == f"'{FORMULA}"  # which a spreadsheet does not compute


def test_the_files_have_the_figures_unrounded(tmp_path):
    write_breakdown(tmp_path, invented(), "best.ckpt", "1 image")
    assert rows(tmp_path / "categories.csv") == [
        ["category", "objects", "AP"],
        ["ship", "3", repr(1 / 3)],
        ["tree", "0", ""],
        ["all", "3", repr(1 / 3)],
    ]
    assert rows(tmp_path / "confusion.csv") == [
        ["", "ship", "tree", "missed"],
        ["ship", "1", "1", "1"],
        ["tree", "0", "0", "0"],
        ["background", "0", "2", "0"],
    ]
    curves = rows(tmp_path / "curves.csv")
    assert len(curves) == 1 + 10 * 101  # nothing of the category without objects
    assert curves[1] == ["ship", "0.5", "0.0", repr(1 / 3), repr(1 / 3)]
    assert {path.name for path in tmp_path.iterdir()} == {*report.FILES}


def test_an_earlier_report_is_replaced_whole(tmp_path):
    check_folder(tmp_path)
    write_breakdown(tmp_path, invented(), "one", "")
    (tmp_path / f".report.html.{MACHINE}-999999999-1.x7.part").write_text("half, by a process that is gone")
    check_folder(tmp_path)
    page = write_breakdown(tmp_path, invented(curves=False), "two", "")
    assert "two" in page.read_text()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"report.html", "categories.csv", "confusion.csv", "images.csv"}
    check_folder(tmp_path)


def test_a_killed_report_is_taken_up_again(tmp_path, monkeypatch):
    (tmp_path / ".report.html.1-2-3.x7.part").write_text("half")
    check_folder(tmp_path)
    written = []

    def dies(path, text):
        if written:
            raise KeyboardInterrupt
        written.append(path)
        path.write_text(text)

    monkeypatch.setattr(report, "write_text", dies)
    with pytest.raises(KeyboardInterrupt):
        write_breakdown(tmp_path, invented(), "one", "")
    check_folder(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"photo.jpg": "x"}, "holds 'photo.jpg', no part of such a report"),
        ({"report.html": "<p>mine"}, "what it holds is no such report"),
        ({"categories.csv": "a,b"}, "what it holds is no such report"),
        ({"report.html": '<meta name="generator" content="dropblock_det comparison">'}, "is no such report"),
        ({"report.html/x": ""}, "holds 'report.html', no part"),
    ],
)
def test_a_folder_with_something_else_is_refused(content, message, tmp_path):
    for name, text in content.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=re.escape(message)):
        check_folder(tmp_path)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for name in ("file", "link"):
        with pytest.raises(InputError, match="not a folder"):
            check_folder(tmp_path / name)
    check_folder(tmp_path / "new")


def test_of_many_categories_the_most_confused_are_drawn():
    size = report.SHOWN + 20
    counts = np.diag(np.arange(size + 1))  # the first and the last don't occur
    counts[5, 7] = 3
    counts[-1, -1] = 0
    found = replace(
        invented(), confusion=Confusion(tuple(map(str, range(size))), counts, "", ("background", "missed"))
    )
    page = render_breakdown(found, "", "")
    drawn = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])["confusion"]
    assert len(drawn["categories"]) == report.SHOWN
    assert {"5", "7"} <= {*drawn["categories"]}
    assert "0" not in drawn["categories"]
    assert drawn["left_out"] == 19
    assert "19 of them" in page


IN_A_BROWSER = """
    seen.cards = all("#cards figure").length;
    seen.boxes = all("#cards rect").length;
    seen.words = all("#cards svg text").length;
    all("#cards figure")[0].click();
    seen.large = all("#cards figure.large svg text").length;
    seen.choices = all('[data-group="examples"] button').map(button => button.textContent);
    all("#categories thead button")[2].click();
    seen.sorted = [...all("#categories table")[0].tBodies[0].rows].map(row => row.cells[0].textContent);
    seen.curves = all("#curve-charts path.line").length;
    const select = document.getElementById("curve");
    select.value = 1; select.dispatchEvent(new Event("change"));
    seen.more = all("#curve-charts path.line").length;
    seen.cells = all("#matrix rect").length;
"""


@in_a_browser
def test_the_page_works_in_a_browser(tmp_path):
    seen = clicked(IN_A_BROWSER, tmp_path, render_breakdown(invented(), "best.ckpt", "1 image"))
    assert seen["errors"] == []
    assert (seen["cards"], seen["boxes"], seen["words"], seen["large"]) == (1, 6, 2, 3)
    assert seen["choices"] == ["worst"]  # there are no best ones
    assert seen["sorted"] == ["ship", "tree"]  # what has no figure is last
    assert (seen["curves"], seen["more"]) == (3, 6)
    assert seen["cells"] == 4
    assert seen["wide"] <= 0
