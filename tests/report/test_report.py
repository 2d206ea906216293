import csv
import io
import json
import statistics
from dataclasses import replace

import markdown_it
import msgspec
import numpy as np
import pytest
from support.invented_outcomes import with_outcomes
from support.label_runs import label_runs
from support.synthetic_runs import SETTINGS, invented_runs, write_plan

from dropblock_det.comparison.gather import Absent, gather
from dropblock_det.files import write_figure
from dropblock_det.report.figure import report_figure
from dropblock_det.report.page import render_page, write_report
from dropblock_det.report.power import detectable_difference, seeds_for_half
from dropblock_det.report.results import Evidence
from dropblock_det.report.statistics import Difference, analyse
from dropblock_det.report.tables import build_report, to_csv, to_markdown
from dropblock_det.report.words import in_seeds, interval, pairing, verdict
from dropblock_det.tasks.metric import Metric

QUALITY = Metric("quality", "quality", "higher")
LOSS = Metric("val_loss", "val_loss", "lower")
GAP = Metric("gap", "gap")


def test_verdicts():
    shown = Difference(3, 3, 0, 0.1, 0.05, 0.15, (0.02, 0.18), True, True)
    assert verdict(QUALITY, shown) == "higher: better"
    assert verdict(LOSS, shown) == "higher: worse"
    assert verdict(GAP, shown) == "higher"  # neither better nor worse by itself
    assert verdict(QUALITY, replace(shown, mean=-0.1)) == "lower: worse"
    assert verdict(QUALITY, replace(shown, shown=False)) == "no difference shown"
    assert verdict(QUALITY, None) == "no pair with the same seed"
    assert in_seeds(QUALITY, replace(shown, above=2)) == "better in 2 of 3 seeds"
    assert in_seeds(LOSS, replace(shown, above=2, below=1)) == "better in 1 of 3 seeds"
    assert in_seeds(GAP, replace(shown, above=2)) == "higher in 2 of 3 seeds"


def report_of(tmp_path, **kwargs):
    runs = gather(invented_runs(tmp_path, **kwargs))
    return runs, build_report(runs)


def test_means_and_spreads(tmp_path):
    comparison, report = report_of(tmp_path)
    result = next(result for result in report.results if result.setting == "dropout")
    records = [record for record in comparison.records if record.setting == "dropout"]
    lowest = [min(value for _, value in record.values("val_loss")) for record in records]
    assert len(lowest) == 3
    assert result.cells["best_val_loss"].mean == pytest.approx(statistics.fmean(lowest), abs=1e-12)
    assert result.cells["best_val_loss"].sd == pytest.approx(statistics.stdev(lowest), abs=1e-12)
    assert report.results[0].setting == "none"
    assert all(cell.difference is None for cell in report.results[0].cells.values())


def test_the_headline_at_the_last_epoch_answers_first(tmp_path):
    _, report = report_of(tmp_path)
    assert [*report.answers][:2] == ["mAP", "val_loss"]
    assert report.leading == ["mAP", "val_loss", "AP50", "AP75"]
    bullets = [line for line in to_markdown(report).splitlines() if line.startswith("- ")]
    assert bullets[0].startswith("- mAP: ")


def test_no_effect_claims_nothing_and_a_large_one_is_seen(tmp_path):
    _, report = report_of(tmp_path, effects={"dropblock_bs7_kp0.9": 0.08})
    metric = report.columns["mAP"].metric
    words = {r.setting: verdict(metric, r.cells["mAP"].difference) for r in report.results[1:]}
    assert words["dropblock_bs7_kp0.9"] == "higher: better"
    assert "dropblock_bs7_kp0.9 +0.0" in report.answers["mAP"]
    assert sum(text == "no difference shown" for text in words.values()) >= 4


def test_one_seed_gives_no_interval_and_says_so(tmp_path):
    _, report = report_of(tmp_path, seeds=(5,), effects={"dropout": 0.2})
    for result in report.results[1:]:
        for name in report.answers:
            difference = result.cells[name].difference
            assert (difference.low, difference.high, difference.shown) == (None, None, False)
            assert verdict(report.columns[name].metric, difference) == "one seed: no interval"
            assert result.cells[name].sd is None
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
    runs = gather(tmp_path)
    report = build_report(runs)
    assert "2 of 2 runs have no result" in to_markdown(report)
    assert "not started" in render_page(runs, report)


def test_notes_say_what_makes_runs_unequal(tmp_path):
    comparison, report = report_of(tmp_path, settings=("none", "dropout"))
    assert not [note for note in report.notes if note.startswith("Careful")]
    assert any("still improving" in note for note in report.notes) is False  # the invented runs overfit
    *records, last = comparison.records
    odd = replace(last, init_hash="x", data_hash="x", hardware={"device": "gpu"}, epochs=last.epochs[:5])
    notes = build_report(replace(comparison, records=(*records, odd))).notes
    careful = " ".join(note for note in notes if note.startswith("Careful"))
    for words in (
        "seed 2 have different data",
        "seed 2 started from different weights",
        "different hardware",
        "numbers of epochs",
    ):
        assert words in careful


def test_a_reference_that_does_not_overfit_is_said(tmp_path):
    comparison, _ = report_of(tmp_path, settings=("none", "dropout"))

    def improving(record):
        return replace(
            record, epochs=tuple(epoch | {"val_loss": 9 - epoch["epoch"]} for epoch in record.epochs)
        )

    notes = build_report(replace(comparison, records=tuple(map(improving, comparison.records)))).notes
    assert any("still improving at its last epoch in 3 of 3" in note for note in notes)


def test_an_interval_that_leaves_0_out_is_not_printed_as_0():
    tiny = Difference(2, 2, 0, 1.2e-6, 5.6e-7, 1.8e-6, None, True, True)
    assert interval(QUALITY, tiny) == "+1.2e-06 (+5.6e-07 to +1.8e-06)"
    assert interval(QUALITY, replace(tiny, low=-1e-6, shown=False)) == "+0.0000 (-0.0000 to +0.0000)"
    assert interval(QUALITY, Difference(2, 2, 0, 0.105, 0.0415, 0.1685)) == "+0.1050 (+0.0415 to +0.1685)"
    assert interval(QUALITY, Difference(1, 1, 0, 0.1)) == "+0.1000"
    percent = replace(QUALITY, scale=100, digits=1)
    assert interval(percent, Difference(2, 2, 0, 0.105, 0.04, 0.17)) == "+10.5 (+4.0 to +17.0)"


def test_what_the_comparison_could_have_shown(tmp_path):
    comparison, report = report_of(tmp_path)
    table = np.array(
        [[r.epochs[-1]["mAP"] for r in comparison.records if r.setting == s] for s in comparison.settings]
    )
    effect = analyse(table).sd * detectable_difference(7, 3)
    assert report.power["mAP"] == (
        f"mAP: with these 3 seeds a true difference of {effect:.4f} would have been found four times in "
        f"five; half of it would take {seeds_for_half(7, 3)} seeds."
    )
    assert report.power["mAP"] in to_markdown(report)
    assert "seeds" in report.pairing["mAP"] or "seed" in report.pairing["mAP"]


def test_whether_pairing_helps():
    behind = Evidence(3, 7, (), 0.01, 0.75)
    assert "correlation 0.75" in pairing(QUALITY, behind)
    assert "0.50 times as wide" in pairing(QUALITY, behind)
    assert "does not help here" in pairing(QUALITY, replace(behind, correlation=-0.1))
    assert "too few runs" in pairing(QUALITY, replace(behind, correlation=None))


def test_a_setting_that_went_astray_is_named_and_hides_no_other(tmp_path):
    comparison, _ = report_of(tmp_path, effects={"dropblock_bs7_kp0.9": 0.08})
    records = [
        replace(r, epochs=tuple(e | {"mAP": e["mAP"] * 10**r.seed} for e in r.epochs))
        if r.setting == "dropout"
        else r
        for r in comparison.records
    ]
    report = build_report(replace(comparison, records=tuple(records)))
    (note,) = [note for note in report.notes if "varies far more" in note]
    assert note.startswith("dropout varies far more between seeds than the other settings in mAP, best mAP:")
    by_setting = {result.setting: result.cells["mAP"].difference for result in report.results[1:]}
    assert not by_setting["dropout"].pooled
    assert by_setting["dropblock_bs7_kp0.9"].shown


def test_seeds_that_are_no_seeds_are_named(tmp_path):
    comparison, _ = report_of(tmp_path, settings=("none", "dropout"))
    records = [replace(r, init_hash="same") if r.setting == "dropout" else r for r in comparison.records]
    notes = build_report(replace(comparison, records=tuple(records))).notes
    assert any("seeds 0, 1, 2 of dropout started from the same weights." in note for note in notes)


def test_a_subset_for_each_seed_is_said(tmp_path):
    comparison, report = report_of(tmp_path, settings=("none", "dropout"))
    assert any("trained on the same images" in note for note in report.notes)
    records = tuple(replace(r, data_hash=f"data{r.seed}") for r in comparison.records)
    notes = build_report(replace(comparison, records=records)).notes
    assert any("training subset of its own" in note for note in notes)
    assert not any(note.startswith("Careful") for note in notes)


def test_models_that_learned_nothing_are_said_to_have(tmp_path):
    """In the place of what the comparison could have shown, which is nothing."""
    comparison, report = report_of(tmp_path, settings=("none", "dropout"))
    assert "next to nothing" not in to_markdown(report)
    little = [
        replace(record, epochs=tuple(epoch | {"mAP": epoch["mAP"] / 100} for epoch in record.epochs))
        for record in comparison.records
    ]
    report = build_report(replace(comparison, records=little))
    assert report.power["mAP"].startswith("No run reached mAP 0.01: these models learned next to nothing")
    assert report.power["mAP"] == report.power["best_mAP"]
    assert "four times in five" in report.power["val_loss"]


def test_runs_that_do_not_differ_promise_no_tiny_differences(tmp_path):
    comparison, _ = report_of(tmp_path, settings=("none", "dropout"))
    alike = [
        replace(record, epochs=tuple(epoch | {"mAP": 0.3 + record.seed * 1e-9} for epoch in record.epochs))
        for record in comparison.records
    ]
    assert "hardly differ" in build_report(replace(comparison, records=alike)).power["mAP"]


def test_csv_holds_the_unrounded_numbers(tmp_path):
    _, report = report_of(tmp_path)
    lines = list(csv.DictReader(io.StringIO(to_csv(report))))
    assert len(lines) == len(SETTINGS) * len(report.columns)
    line = next(x for x in lines if x["setting"] == "dropout" and x["column"] == "mAP")
    result = next(result for result in report.results if result.setting == "dropout")
    assert float(line["mean"]) == result.cells["mAP"].mean
    assert float(line["low"]) == result.cells["mAP"].difference.low


def test_another_task_brings_its_own_columns(tmp_path):
    comparison = gather(label_runs(tmp_path, effects={"dropout_0.25": 0.1}))
    report = build_report(comparison)
    assert [*report.columns][:4] == ["accuracy", "loss", "val_loss", "gap"]
    assert report.leading == ["accuracy", "val_loss"]
    text = to_markdown(report)
    assert (
        "- accuracy, %: higher than none (better): dropout\\_0.25 +" not in text
    )  # only what needs it is escaped
    assert "- accuracy, %: higher than none (better): dropout_0.25 +10." in text
    assert "mAP" not in text + render_page(comparison, report)


def test_other_images_are_spoken_of_where_the_runs_left_what_it_takes(tmp_path):
    write_report(with_outcomes(tmp_path / "runs"), tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "mAP on other images (these models, 60 images resampled): the difference would keep" in text
    assert "its sign for dropout +0." in text
    assert "keeps the trained models" in text
    assert "1 of 2 differences might be 0 or have the other sign" in text
    assert "\\<b\\>ship\\</b\\> | 60 | +" in text
    page = (tmp_path / "report.html").read_text()
    assert "<td>&lt;b&gt;ship&lt;/b&gt;</td><td>60</td>" in page
    line = next(
        x for x in csv.DictReader((tmp_path / "report.csv").open()) if x["column"] == "AP50" and x["low"]
    )
    assert float(line["images_low"]) > 0
    found = json.loads((tmp_path / "report.json").read_text())["images"]["metrics"]["mAP"]["dropout"]
    assert found["low"] < found["mean"] < found["high"]


def test_the_mean_of_several_epochs_says_nothing_of_other_images(tmp_path):
    report = write_report(with_outcomes(tmp_path / "runs"), tmp_path, last=3)
    assert report.images is None  # what the runs left is of their very last epoch
    assert "mean of the last 3 epochs" in (tmp_path / "report.md").read_text()


def test_late_seeds_and_subsets_that_do_not_vary_are_named(tmp_path):
    comparison, _ = report_of(tmp_path, settings=("none", "dropout"))
    comparison = replace(comparison, late_seeds=(1, 2), vary_subset=True)
    report = build_report(comparison)
    assert "3 seeds (1, 2 added after looking)" in render_page(comparison, report)
    careful = report.notes
    assert any(note.startswith("Careful: seeds 1, 2 were added when there were results") for note in careful)
    assert any("was to draw its own training subset, but all have the same data" in note for note in careful)


OUTSIDE = "<b>x</b>\n# [a](http://evil.example) `$\\frac{$` [/b] | *y*"


def test_names_from_outside_are_no_markdown(tmp_path):
    comparison, _ = report_of(tmp_path, settings=("none", "dropout"))
    records = [replace(r, setting=OUTSIDE) if r.setting == "dropout" else r for r in comparison.records]
    absent = (Absent(OUTSIDE, 7, "failed", OUTSIDE),)
    comparison = replace(
        comparison, base=OUTSIDE, settings=("none", OUTSIDE), records=tuple(records), absent=absent
    )
    report = build_report(comparison)
    text = to_markdown(report)
    page = markdown_it.MarkdownIt("gfm-like", {"linkify": False}).render(text)
    for tag in ("<b>", "<a ", "<code", "<em>"):
        assert tag not in page
    assert page.count("<h1>") == 1
    assert page.count("<tr>") == text.count("\n| ") - 3  # the lines of dashes; no name broke a row
    figure = report_figure(comparison, report)
    write_figure(tmp_path / "x.png", figure)  # a formula would stop it
    names = [text.get_text() for text in (*figure.legends[0].get_texts(), *figure.axes[1].get_yticklabels())]
    assert sum("`$\\frac{$`" in name and "\n" not in name for name in names) == 2


def test_json_is_strict(tmp_path):
    _, report = report_of(tmp_path)
    plain = msgspec.to_builtins(report.to_dict())
    assert json.loads(json.dumps(plain, allow_nan=False))["base"] == "quickstart"


def test_the_picture_is_drawn_even_of_nothing(tmp_path):
    comparison, report = report_of(tmp_path / "full", settings=("none", "dropout"))
    figure = report_figure(comparison, report)
    differences = figure.axes[1]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["none", "dropout"]
    difference = report.results[1].cells["val_loss"].difference
    assert list(differences.get_lines()[0].get_xdata()) == [difference.low, difference.high]
    write_plan(tmp_path / "empty", ("none", "x"), [0])
    comparison = gather(tmp_path / "empty")
    write_figure(tmp_path / "x.png", report_figure(comparison, build_report(comparison)))
    assert (tmp_path / "x.png").read_bytes()[1:4] == b"PNG"
