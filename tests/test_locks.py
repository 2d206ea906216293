import errno
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from dropblock_det import files, locks
from dropblock_det.errors import InputError
from dropblock_det.locks import lock_holder, locked, take_lock

ANOTHER = "01234567"  # machine


def python(program, *arguments, **options):
    return subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)], text=True, **options)


HOLDER = """
import pathlib, sys, time
from dropblock_det import files, locks
locks.BEAT_S = 0.05
files.MACHINE = sys.argv[2]
lock = locks.take_lock(pathlib.Path(sys.argv[1]))
print("held" if lock else locks.lock_holder(pathlib.Path(sys.argv[1])), flush=True)
time.sleep(60 if lock else 0)
"""


@pytest.fixture
def hold(tmp_path):
    """Takes the lock in another process, also as if on another machine."""
    started = []

    def hold(machine=files.MACHINE):
        process = python(HOLDER, tmp_path / "lock", machine, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def test_a_lock_keeps_others_out_and_says_who_holds_it(tmp_path):
    path = tmp_path / "room" / ".lock"
    assert lock_holder(path) is None
    with take_lock(path):
        other = python(HOLDER, path, files.MACHINE, stdout=subprocess.PIPE)
        assert re.fullmatch(rf"process {os.getpid()} on \S+\n", other.communicate()[0])
        assert take_lock(path) is None
    assert lock_holder(path) is None
    assert list(path.parent.iterdir()) == []
    take_lock(path).release()


def test_locked_leaves_nothing_and_says_who_is_at_work(tmp_path):
    with locked(tmp_path / "lock", tmp_path):
        with (
            pytest.raises(InputError, match=rf"^{tmp_path}: process {os.getpid()} on .* is working on it"),
            locked(tmp_path / "lock", tmp_path),
        ):
            pass
        assert list(tmp_path.iterdir())
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named_by_the_lock_s_file_and_leaves_none(tmp_path, monkeypatch):
    def full(pid):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as of a write: without a name

    monkeypatch.setattr(locks, "process_name", full)
    with pytest.raises(OSError, match="No space left") as caught:
        take_lock(tmp_path / "lock")
    assert caught.value.filename == str(tmp_path / "lock.1")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_holder_is_followed_at_once_and_a_stopped_one_is_not(tmp_path, hold):
    holder = hold()
    holder.send_signal(signal.SIGSTOP)
    os.utime(tmp_path / "lock.1", (0, 0))
    assert take_lock(tmp_path / "lock") is None
    holder.kill()  # and not waited for: the kernel still knows it
    while (lock := take_lock(tmp_path / "lock")) is None:
        time.sleep(0.01)
    assert [path.name for path in tmp_path.iterdir()] == ["lock.2"]
    lock.release()


def test_a_holder_on_another_machine_is_followed_after_its_silence_and_ends_if_it_lives(
    tmp_path, hold, monkeypatch
):
    path = tmp_path / "lock"
    holder = hold(ANOTHER)
    assert f"process {holder.pid} on " in lock_holder(path)
    assert take_lock(path) is None
    holder.send_signal(signal.SIGSTOP)  # as if its machine slept or were cut off
    monkeypatch.setattr(files, "SILENT_S", 0.5)
    began = time.monotonic()
    with take_lock(path, wait=True):
        assert 0.3 < time.monotonic() - began < 30
        holder.send_signal(signal.SIGCONT)
        _, messages = holder.communicate(timeout=30)
        assert holder.returncode == -signal.SIGTERM
        assert f"{path}: process {os.getpid()} on " in messages
        assert "has taken it over" in messages
        assert lock_holder(path)


def test_a_lock_lasts_as_long_as_a_process_that_shares_it(tmp_path):
    path = tmp_path / "lock"
    child = python("input()", stdin=subprocess.PIPE)
    program = (
        "import os, pathlib, sys; from dropblock_det.locks import take_lock\n"
        "take_lock(pathlib.Path(sys.argv[1])).share(int(sys.argv[2])); os._exit(1)"
    )
    python(program, path, child.pid).wait()
    assert take_lock(path) is None
    child.communicate("\n")
    take_lock(path).release()


@pytest.mark.parametrize("content", ["", "\n", "process 1 on earth\nfoolish", "\xff" * 9000])
def test_a_lock_that_says_nothing_of_use_is_held_until_it_is_old(tmp_path, content):
    file = tmp_path / "lock.7"
    file.write_text(content)
    assert take_lock(tmp_path / "lock") is None
    assert lock_holder(tmp_path / "lock")
    os.utime(file, (0, time.time() - files.SILENT_S - 5))
    take_lock(tmp_path / "lock").release()
    assert list(tmp_path.iterdir()) == []


def test_who_saw_an_older_state_of_the_folder_steps_back(tmp_path, monkeypatch):
    """It saw a dead holder's file, which one that is faster has replaced, released and taken anew."""
    path, files_of = tmp_path / "lock", locks._files
    dead = tmp_path / "lock.4"
    dead.touch()
    os.utime(dead, (0, 0))
    seen = []

    def late(asked):
        found = files_of(asked)
        if not seen:
            seen.append(found)
            dead.unlink()
            seen.append(take_lock(path))
        return found

    monkeypatch.setattr(locks, "_files", late)
    assert take_lock(path) is None
    assert seen[0] == [dead]
    assert [file.name for file in tmp_path.iterdir()] == ["lock.1"]
    seen[1].release()


RACER = """
import os, pathlib, random, sys, time
from dropblock_det import files
from dropblock_det.locks import take_lock
files.MACHINE = sys.argv[2]
folder = pathlib.Path(sys.argv[1])
for _ in range(60):
    lock = take_lock(folder / "lock", wait=True) if random.random() < 0.5 else take_lock(folder / "lock")
    if lock is None:
        continue
    with (folder / "inside").open("x"):
        time.sleep(0.001)
    (folder / "inside").unlink()
    if random.random() < 0.1:  # as if it died: nothing is heard of it again
        lock._released.set()
        os.utime(lock.file, (0, 0))
        lock.file.write_text("process 1 on another machine")
        os.utime(lock.file, (0, 0))
    else:
        lock.release()
"""


def test_never_two_have_it(tmp_path):
    """Three processes, as if on three machines, of which a holder in ten dies and is followed."""
    racers = [python(RACER, tmp_path, f"{machine:08x}", stderr=subprocess.PIPE) for machine in range(3)]
    for racer in racers:
        _, messages = racer.communicate(timeout=120)
        assert racer.returncode == 0, messages
