"""Runs a base config under every setting and seed: one training process per run, safe to kill at any moment.

The state of a comparison is its files and nothing else. A run is finished when its record says so; a run in
flight goes on from its last checkpoint because the training does; and a lock on the run's folder, which lasts
as long as the training, keeps a second process off it, even when the first was killed and left its training
behind. So any number of these processes, on one machine or on a cluster's shared folder, work through one
comparison.
"""

import contextlib
import io
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from dropblock_det.comparison.plan import Run, run_folder
from dropblock_det.files import write_bytes
from dropblock_det.locks import Lock, lock_holder, take_lock
from dropblock_det.runs.folder import TRAINING_LOCK, is_finished, last_checkpoints
from dropblock_det.runs.record import Record, read_record, write_record

THUMBNAIL = 480  # pixels of the longer side
POLL_S = 0.2
LOCK_NAME = ".comparison.lock"  # besides the training's own


@dataclass
class Runner:
    """Works through the runs of a plan.

    Attributes:
        root: the comparison's folder.
        command: run -> the training program and its arguments; ``--output`` follows.
        runs: what this process is to see to, in order.
        devices: one worker for each: ``"cpu"``, a GPU's number, or ``None`` for what the config says.
        on_result: called after each run that finished or failed.
    """

    root: Path
    command: Callable[[Run], Sequence[str]]
    runs: Sequence[Run]
    devices: Sequence[str | None] = (None,)
    on_result: Callable[[Run, Record], None] = lambda run, record: None
    active: dict[int, Run] = field(default_factory=dict, init=False)  # worker -> its run
    waiting: bool = field(default=False, init=False)  # for runs that another process holds

    def __post_init__(self) -> None:
        self._pending = list(self.runs)
        self._mutex = threading.Lock()
        self._stop = threading.Event()
        self._faults: list[BaseException] = []

    @property
    def left(self) -> int:
        """Runs not yet finished or failed."""
        return len(self._pending) + len(self.active)

    def work(self, on_progress: Callable[[], None] = lambda: None) -> None:
        """Runs until nothing is left.

        On ``KeyboardInterrupt`` the trainings are ended (they go on from their checkpoints next time) before
        it is raised again.

        Args:
            on_progress: called every fifth of a second, from the calling thread: for a progress bar.
        """
        workers = [threading.Thread(target=self._worker, args=(n, d)) for n, d in enumerate(self.devices)]
        try:
            for worker in workers:
                worker.start()
            while any(worker.is_alive() for worker in workers):
                on_progress()
                self._stop.wait(POLL_S)
        finally:
            self._stop.set()
            for worker in workers:
                worker.join()
        if self._faults:
            raise self._faults[0]

    def _worker(self, number: int, device: str | None) -> None:
        try:
            while not self._stop.is_set() and (taken := self._take(number)):
                run, lock = taken
                with lock:
                    record = self._train_and_record(run, device, lock)
                with self._mutex:
                    del self.active[number]
                if record is not None:
                    self.on_result(run, record)
        except BaseException as fault:  # handed to the main thread, which raises it
            self._faults.append(fault)
            self._stop.set()

    def _take(self, number: int) -> tuple[Run, Lock] | None:
        """The next run that no other process holds; waits while all that are left are held."""
        while not self._stop.is_set():
            with self._mutex:
                for run in list(self._pending):
                    folder = run_folder(self.root, run.setting, run.seed)
                    if lock_holder(folder / TRAINING_LOCK):  # a training whose comparison was killed
                        continue
                    lock = take_lock(folder / LOCK_NAME)
                    if lock is None:
                        continue
                    self._pending.remove(run)
                    if is_finished(folder):
                        lock.release()
                        continue
                    self.active[number] = run
                    self.waiting = False
                    return run, lock
                self.waiting = bool(self._pending)
                if not self._pending:
                    return None
            self._stop.wait(POLL_S)
        return None

    def _train_and_record(self, run: Run, device: str | None, lock: Lock) -> Record | None:
        """Trains, and gives the record of what came of it; ``None`` when it was interrupted."""
        folder = run_folder(self.root, run.setting, run.seed)
        ended = self._train(run, folder, device, lock)
        if ended is None:
            return None
        record = read_record(folder) or Record(task="", metrics=(), headline="", status="running")
        if record.finished:
            keep_thumbnails(self.root, record)
            for checkpoint in last_checkpoints(folder):  # only for resuming; hundreds of MB each
                checkpoint.unlink()
        else:
            record = replace(record, setting=run.setting, seed=run.seed, status="failed", reason=ended)
            write_record(folder, record)
        return record

    def _train(self, run: Run, folder: Path, device: str | None, lock: Lock) -> str | None:
        """Trains in a process of its own; says in one line how it ended, or ``None`` when interrupted."""
        with (folder / "train.log").open("a+", encoding="utf-8", errors="replace") as log:
            log.seek(0, os.SEEK_END)
            start = log.tell()
            process = subprocess.Popen(
                [*self.command(run), "--output", str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **_device_environment(device)},
            )
            with contextlib.suppress(OSError):  # a full disk: the training's own lock follows in seconds
                lock.share(process.pid)
            status = self._wait(process)
            if status is None or -status in (signal.SIGINT, signal.SIGTERM) or status in (130, 143):
                return None
            log.seek(start)
            return _reason(log.read(), status)

    def _wait(self, process: subprocess.Popen[bytes]) -> int | None:
        """The exit status, or ``None`` after this comparison was stopped and the training with it."""
        while (status := process.poll()) is None:
            if self._stop.wait(POLL_S):
                process.terminate()
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()  # the training survives that too
                    process.wait()
                return None
        return status


def epochs_done(folder: Path) -> tuple[int, int | None]:
    """How far a training is: epochs done, and of how many (``None`` before the first is done)."""
    record = read_record(folder)
    return (len(record.epochs), record.max_epochs) if record else (0, None)


def _device_environment(device: str | None) -> dict[str, str]:
    """What makes a training see one device only; the config, and so the resumed run, stays the same."""
    if device is None:
        return {}
    if device == "cpu":
        return {"CUDA_VISIBLE_DEVICES": ""}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return {"CUDA_VISIBLE_DEVICES": visible.split(",")[int(device)] if visible else device}


def _reason(log: str, status: int) -> str:
    """One line that says why a training failed."""
    if status < 0:
        name = signal.Signals(-status).name
        return f"ended by {name}" + (" (out of memory?)" if -status == signal.SIGKILL else "")
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"error: |[\w.]*(Error|Exception|Interrupt)\b.*", line)]
    last = errors[-1] if errors else lines[-1] if lines else "it printed nothing"
    return f"{last.removeprefix('error: ')[:300]} (exit status {status})"


def keep_thumbnails(root: Path, record: Record) -> None:
    """Keeps a small copy of each image that a record shows, once for the whole comparison."""
    for sample in record.samples:
        target = root / "images" / f"{sample.id}.jpg"
        if sample.file is None or target.exists() or not Path(sample.file).is_file():
            continue
        small = io.BytesIO()
        with Image.open(sample.file) as image:
            copy = image.convert("RGB")
        copy.thumbnail((THUMBNAIL, THUMBNAIL))
        copy.save(small, "JPEG", quality=85)
        write_bytes(target, small.getvalue())
