"""Locks that keep out every process that shares a folder, on one machine or on many.

The kernel's own, flock() and fcntl(), reach no other machine on NFS mounted with ``nolock`` or
``local_lock``, on 9p and on many FUSE file systems, and fail on Lustre without ``flock``. So a lock here is a
file whose exclusive creation decides who has it; that is atomic on all of these, and is not on object stores
mounted as folders (s3fs, gcsfuse). Its holder touches it every few seconds. A holder that has died is known
at once on its own machine, and by its silence on others.
"""

import contextlib
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from dropblock_det.errors import InputError
from dropblock_det.files import is_gone, process_name, read_bytes

BEAT_S = 10.0
POLL_S = 0.1
MAX_BYTES = 4096


class Lock:
    """A lock that is held, until it is released or the process ends.

    Its file says who holds it: a line for people, then the names of processes. It is numbered: who takes over
    a dead one's creates the next number, and of several that try one alone succeeds.
    """

    def __init__(self, file: Path, path: Path) -> None:
        self.file, self.path = file, path
        self._released = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def share(self, pid: int) -> None:
        """Lets the lock outlive this process for as long as another one on this machine lives."""
        with self.file.open("a", encoding="utf-8") as file:
            file.write(f"\n{process_name(pid)}")

    def release(self) -> None:
        """Lets others have it."""
        self._released.set()
        with contextlib.suppress(OSError):  # where the disk no longer lets us, our end releases it
            self.file.unlink()

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _beat(self) -> None:
        """Shows that the holder lives; ends it, as a scheduler would, once another process has the lock."""
        while not self._released.wait(BEAT_S):
            try:
                os.utime(self.file)
            except FileNotFoundError:
                if not self._released.is_set():
                    now = lock_holder(self.path) or "another process"
                    print(f"error: {self.path}: {now} has taken it over", file=sys.stderr, flush=True)
                    os.kill(os.getpid(), signal.SIGTERM)
                return
            except OSError:  # a server that is away for a while
                continue


def take_lock(path: Path, wait: bool = False) -> Lock | None:
    """Takes a lock.

    Args:
        path: Its name; files of this name and a number stand for it, and its folder is made.
        wait: Wait for the lock, however long.

    Returns:
        The lock, to be released; None where another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while (lock := _try_to_take(path)) is None and wait:
        time.sleep(POLL_S)
    return lock


def _try_to_take(path: Path) -> Lock | None:
    left = _files(path)
    if any(map(_is_held, left)):
        return None
    own = path.with_name(f"{path.name}.{_number(left[-1]) + 1 if left else 1}")
    try:
        with own.open("x", encoding="utf-8") as file:
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n{process_name(os.getpid())}")
        # Who saw other files than we did has created another number; of two such at least one steps back.
        others = [other for other in _files(path) if other != own]
        if any(map(_is_held, others)):
            own.unlink()
            return None
    except FileExistsError:
        return None
    except BaseException as error:
        own.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = error.filename or str(own)  # a full disk's error names no file
        raise
    for other in others:
        other.unlink(missing_ok=True)
    return Lock(own, path)


def lock_holder(path: Path) -> str | None:
    """Returns who holds a lock, for a message; None where nobody does."""
    held = next(filter(_is_held, _files(path)), None)
    return next(filter(None, _content(held)), "another process") if held else None


@contextlib.contextmanager
def locked(path: Path, what: Path) -> Iterator[None]:
    """Holds a lock while something is worked on.

    Args:
        path: The lock's name; its folder is made.
        what: What is worked on, for the message.

    Raises:
        InputError: Another process holds it.
    """
    lock = take_lock(path)
    if lock is None:
        holder = lock_holder(path) or "another process"
        raise InputError(f"{what}: {holder} is working on it; wait until it ends, or give another folder")
    with lock:
        yield


def _files(path: Path) -> list[Path]:
    """The files that stand for a lock, by rising number; all but one are of the dead."""
    try:
        names = os.listdir(path.parent)
    except FileNotFoundError:
        return []
    found = (re.fullmatch(rf"{re.escape(path.name)}\.[0-9]{{1,9}}", name) for name in names)
    return sorted((path.with_name(match[0]) for match in found if match), key=_number)


def _number(file: Path) -> int:
    return int(file.suffix[1:])


def _content(file: Path) -> list[str]:
    try:
        return read_bytes(file, MAX_BYTES).decode(errors="replace").split("\n")
    except InputError:  # released, or not ours to read
        return []


def _is_held(file: Path) -> bool:
    """Whether one of its processes may live; also while its creator has not yet written who it is."""
    processes = _content(file)[1:] or [""]
    try:
        # By the file system's clock: those of two machines differ.
        with tempfile.TemporaryFile(dir=file.parent) as probe:
            silent_s = os.fstat(probe.fileno()).st_mtime - file.stat().st_mtime
    except FileNotFoundError:
        return False
    return not all(is_gone(process, silent_s) for process in processes)
