"""Reading what may come from anyone, writing whole files, taking a lock."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from dropblock_det import files
from dropblock_det.errors import InputError
from dropblock_det.files import read_json, read_yaml, whole_file, write_bytes, write_json


@dataclass
class Point:
    x: int
    y: float = 0.0


def one_line(caught, path):
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b'{"x": 1', "not valid JSON"),
        (b'{"x": 1, "y": NaN}', "not valid JSON"),
        ('{"x": 1}'.encode("utf-16"), "not valid JSON"),
        (b'{"x": 1, "u": "\\ud800"}', "not valid JSON"),
        (b'{"x": ' + b"9" * 10_000 + b"}", "not "),
        (b'{"u": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"y": 1}', "missing required field `x`"),
        (b'{"x": "1"}', r"Expected `int`, got `str` - at `\$.x`"),
        (b"[1]", "Expected `object`, got `array`"),
    ],
)
def test_json_that_is_not_what_it_should_be(tmp_path, content, message):
    path = tmp_path / "point.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_json(path, Point)
    one_line(caught, path)


def test_json_comes_with_its_type_and_perhaps_a_byte_order_mark(tmp_path):
    path = tmp_path / "point.json"
    path.write_bytes(b'\xef\xbb\xbf{"x": 3, "unknown": null}')
    assert read_json(path, Point) == Point(3)
    write_json(path, Point(4, 0.5))
    assert read_json(path) == {"x": 4, "y": 0.5}


# Forty lines of which each holds the one before twice.
BILLIONS = b"a0: &a0 [x, x]\n" + b"".join(
    b"a%d: &a%d [*a%d, *a%d]\n" % (n, n, n - 1, n - 1) for n in range(1, 40)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1", "not valid YAML"),
        (b"\xff\xfe\x00", "not valid YAML"),
        (b"- 1", "not a config"),
        (b"? [1]\n: 2", "not valid YAML"),
        (b"a: {b: 1, c: 2, b: 3}", r"not valid YAML \('b' is given twice .*line 1"),
        (b"[" * 5000, "nested too deeply|not valid YAML"),
        (b"a: &a\n  b: *a", "alias of itself"),
        (BILLIONS, "more than 100000 values"),
        (b"a: !!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)  # fmt: skip
def test_yaml_that_is_not_what_it_should_be(tmp_path, content, message):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_yaml(path)
    one_line(caught, path)


def test_only_regular_files_of_bounded_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (tmp_path / "pipe", "not a regular file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "none", "there is no such file"),
        (tmp_path / "n\0l", "not a file's name"),
        (tmp_path / ("n" * 300), "File name too long"),
    ):
        with pytest.raises(InputError, match=message):
            files.read_bytes(path)
    (tmp_path / "large").write_bytes(bytes(11))
    assert files.read_bytes(tmp_path / "large", 11) == bytes(11)
    with pytest.raises(InputError, match="more than the 10 that are read"):
        files.read_bytes(tmp_path / "large", 10)
    with pytest.raises(InputError, match="not a regular file"):
        files.read_bytes("/dev/null")


def test_only_regular_files_are_replaced(tmp_path):
    kept = tmp_path / "kept"
    kept.write_bytes(b"old")
    (tmp_path / "link").symlink_to(kept)
    (tmp_path / "dangling").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("link", "dangling", "pipe", "folder"):
        with pytest.raises(InputError, match=f"{name}: not a regular file, so it is not replaced"):
            write_bytes(tmp_path / name, b"new")
    assert kept.read_bytes() == b"old"
    write_bytes(kept, b"new")
    assert kept.read_bytes() == b"new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "folder", "kept", "link", "pipe"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder that no one may write to")
def test_a_refusal_names_the_file_that_is_asked_for():
    with pytest.raises(OSError, match="No such file") as caught:
        write_bytes(Path("/proc/self/x.json"), b"")
    assert caught.value.filename == "/proc/self/x.json"


def test_a_failure_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file"
    write_bytes(path, b"old")
    with pytest.raises(TypeError), whole_file(path) as file:
        file.writelines([b"half", None])
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_writer_left_is_removed_by_the_next_but_not_a_living_one_s(tmp_path):
    path = tmp_path / "fi[l]e"
    program = (
        "import os, signal, sys, pathlib; from dropblock_det.files import whole_file\n"
        "with whole_file(pathlib.Path(sys.argv[1])) as file:\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    with whole_file(path) as first:
        assert not left.exists()
        first.write(b"first")
        write_bytes(path, b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_what_another_machine_left_is_removed_once_it_is_old(tmp_path):
    path = tmp_path / "file"
    fresh, old = (tmp_path / f".file.0123abcd-7-{birth}.x.part" for birth in (1, 2))
    for left in (fresh, old):
        left.touch()
    os.utime(old, (0, time.time() - 1000))
    write_bytes(path, b"new")
    assert {*tmp_path.iterdir()} == {path, fresh}
