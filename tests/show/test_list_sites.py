"""The table of sites: in a terminal of any width every name can be read and copied."""

from dropblock_det.__main__ import run


def test_no_name_is_cut_in_a_narrow_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "50")
    run(["list-sites", "mobilenet_v2", "--at", "features.3", "features.*.conv.3", "--size", "64"])
    printed = capsys.readouterr().out
    assert "features.16.conv.3 │ BatchNorm2d      │ 0.1 │ " in printed
    assert "│ InvertedResidual │ 0.1 │ 24×16×16" in printed
    assert "…" not in printed
