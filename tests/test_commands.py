"""A tool's command line, and how a tool ends: in one process, for every tool is made of this."""

import errno
import os
import subprocess
import sys
import urllib.error
from pathlib import Path
from typing import Annotated, Literal

import pytest
from msgspec import Meta
from rich.table import Table

from dropblock_det.arguments import Count, Rate, Seed, checked_arguments
from dropblock_det.commands import PlainConsole, command
from dropblock_det.errors import InputError, run_tool


def measure(
    folder: Path,
    seeds: list[Seed] = [0, 1],  # noqa: B006
    size: tuple[Count, Count] | None = None,
    lr: Rate = 0.1,
    dry_run: bool = False,
    kind: Literal["fast", "exact"] = "fast",
    output: Path | None = None,
) -> dict[str, object]:
    """Measures.

    Args:
        folder: Where it lies.
        seeds: Which.
        size: Height and width.
        lr: How fast.
        dry_run: Do nothing.
        kind: How.
        output: Where to.
    """
    return dict(locals())


def test_a_signature_is_a_command_line():
    given = command(
        measure,
        ["here", "--seeds", "3", "4", "--size", "5", "6", "--dry-run", "--output", "there"],
        "measure",
    )
    assert given == {
        **{"folder": Path("here"), "seeds": [3, 4], "size": (5, 6), "lr": 0.1},
        **{"dry_run": True, "kind": "fast", "output": Path("there")},
    }
    assert command({"measure": measure}, ["measure", "x"], "tool")["seeds"] == [0, 1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "folder"),
        ([""], "folder: got ''; give a file's or folder's name"),
        (["a\0b"], "folder: got 'a\\x00b'; no name holds a NUL byte"),
        (["x", "--seeds", "-1"], "seeds: got [-1]; Expected `int` >= 0"),
        (["x", "--seeds", "5000000000"], "seeds: got [5000000000]; Expected `int` <= 4294967295"),
        (["x", "--seeds", "x"], "seeds"),
        (["x", "--lr", ".nan"], "lr: got nan; Expected `float` >= 0.0"),
        (["x", "--size", "1"], "size: expected 2 arguments"),
        (["x", "--size", "0", "1"], "size: got [0, 1]; Expected `int` >= 1"),
        (["x", "--size", "1", str(2**70)], "Expected `int` <= 2147483647"),
        (["x", "--kind", "slow"], "slow"),
        (["x", "--kin", "fast"], "--kin"),
        (["x", "y"], "y"),
        (["x\x1b[31m", "y\x1b[31m"], "y\\x1b[31m"),
    ],
)
def test_what_does_not_fit_is_one_line(words, message, line_of):
    assert message in line_of(lambda: command(measure, words, "measure"))


def test_a_wrong_command_is_one_line(line_of):
    assert "three" in line_of(lambda: command({"one": measure, "two": measure}, ["three", "x"], "tool"))


def test_arguments_are_checked_where_they_come_from():
    def function(a: Annotated[int, Meta(ge=0)] = 0) -> None: ...

    assert checked_arguments(function, {"a": 3}) == {"a": 3}
    with pytest.raises(InputError, match=r"model\.b: there is no such argument"):
        checked_arguments(function, {"b": 3}, "model.")
    with pytest.raises(InputError, match=r"x.ckpt: a: got '1{99}\.\.\.; Expected `int`, got `str`"):
        checked_arguments(function, {"a": "1" * 10**6}, "x.ckpt: ")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device (make room"),
        (OSError(errno.EROFS, "Read-only file system", "/a/b"), "/a/b: Read-only file system (choose"),
        (OSError(errno.ELOOP, "Too many levels of symbolic links", "/a"), "its links lead in a circle"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300), "x: File name too long (check"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"), "a/b: Not a directory"),
        (PermissionError(errno.EACCES, "Permission denied", "a\x1b[31m\nb"), "a\\x1b[31m\\nb: Perm"),
        (urllib.error.URLError(OSError(-3, "Temporary failure in name resolution")), "name resolution"),
    ],
)  # fmt: skip
def test_what_the_machine_refuses_is_one_line(error, line, line_of):
    def main():
        raise error

    assert line in line_of(main)


def test_a_package_that_is_not_installed_is_one_line(line_of, monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning", None)

    def main():
        import lightning  # noqa: F401

    assert 'lightning is not installed; pip install "dropblock_det[train]"' in line_of(main)


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_tool(lambda: 1 / 0)


def test_ctrl_c_is_status_130(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        run_tool(main)
    assert caught.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    ("shell", "status", "out", "err"),
    [
        ("PYTHONIOENCODING=ascii {}", 0, "2 \\xd7\n", ""),
        ("{} >&-", 0, "", ""),
        ("{} fails 2>&-", 2, "", ""),
        ("{} fails 2>/dev/full", 2, "", ""),
        ("{} fails <&- >&-", 2, "", "error: 3 \\xd7\n"),
    ],
)
def test_whatever_the_streams_are(shell, status, out, err):
    code = """if True:
        import sys
        from dropblock_det.commands import PlainConsole
        from dropblock_det.errors import InputError, run_tool

        def main():
            if "fails" in sys.argv:
                raise InputError("3 \\xd7")
            PlainConsole().print("2 \\xd7")

        run_tool(main)"""
    command = ["bash", "-c", shell.format('"$0" -c "$1"'), sys.executable, code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (status, out, err.encode().decode("unicode_escape"))


@pytest.mark.parametrize(
    ("behind", "status", "printed"),
    [
        ("full", 2, "error: No space left on device (make room and start again; what is there is kept)\n"),
        ("closed", 141, ""),
    ],
)
@pytest.mark.parametrize("show", ["print", "PlainConsole().print"])
def test_output_that_cannot_be_written(show, behind, status, printed):
    code = "from dropblock_det.commands import PlainConsole; from dropblock_det.errors import run_tool; "
    code += f"run_tool(lambda: {show}('x' * 100_000))"
    if behind == "full":
        with Path("/dev/full").open("w") as out:
            done = subprocess.run([sys.executable, "-c", code], stdout=out, stderr=-1, text=True, check=False)
    else:
        reading, writing = os.pipe()
        os.close(reading)
        done = subprocess.run([sys.executable, "-c", code], stdout=writing, stderr=-1, text=True, check=False)
        os.close(writing)
    assert (done.returncode, done.stderr) == (status, printed)


def test_nothing_is_read_as_markup(capsys):
    table = Table("a[/b]c", title="[/i] :smile: \x1b[31m")
    table.add_row("[bold]x[/]\a")
    console = PlainConsole(width=60)
    console.print(table)
    console.print("[/b] and\n\x1b]0;title\a", style="red")
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    for text in ("a[/b]c", "[/i] :smile: \\x1b[31m", "[bold]x[/]\\x07", "[/b] and\n", "\\x1b]0;title\\x07"):
        assert text in printed
