"""Runs a base config under every setting and seed: one training process per run, safe to kill at any moment.

The state of a comparison is its files and nothing else. A run is finished when its record says so; a run in
flight goes on from its last checkpoint because the training does; and a lock on the run's folder, which the
training process inherits, keeps a second process off it, even when the first was killed and left its training
behind. So any number of these processes, on one machine or on a cluster's shared folder, work through one
comparison together.
"""

import fcntl
import io
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from PIL import Image

from dropblock_det.errors import InputError
from dropblock_det.files import read_json, read_yaml, write_bytes, write_json
from dropblock_det.runs.record_v1 import (
    PLAN_NAME,
    RECORD_NAME,
    REFERENCE,
    SUMMARY_NAME,
    Record,
    read_plan,
    read_record,
    record_from_run,
    run_folder,
)

THUMBNAIL = 480  # pixels of the longer side
POLL_S = 0.2


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Attributes:
        base: the config that all runs share.
        settings: name -> the small config that makes the setting, the reference among them.
        seeds: every setting runs once with each.
        overrides: arguments that every training gets after the configs.
    """

    base: Path
    settings: Mapping[str, Path]
    seeds: tuple[int, ...]
    overrides: tuple[str, ...] = ()


def make_plan(base: Path, settings: Path, seeds: Sequence[int], overrides: Sequence[str] = ()) -> Plan:
    """Takes every ``*.yaml`` of the folder ``settings`` as a setting.

    Raises:
        InputError: a missing or broken file, no ``none.yaml``, no seed, one given twice or out of range.
    """
    found = {path.stem: path for path in sorted(settings.glob("*.yaml"))}
    if REFERENCE not in found:
        raise InputError(f"{settings}: holds no {REFERENCE}.yaml, the setting all others are compared with")
    for path in (base, *found.values()):
        read_yaml(path)
    if not seeds or len(set(seeds)) < len(seeds):
        raise InputError(f"--seeds {' '.join(map(str, seeds))}: give at least one seed, and each one once")
    for seed in seeds:
        if not 0 <= seed < 2**32:
            raise InputError(f"seed {seed}: give whole numbers from 0 to {2**32 - 1}")
    return Plan(base, {REFERENCE: found[REFERENCE], **found}, tuple(seeds), tuple(overrides))


def record_plan(root: Path, plan: Plan) -> None:
    """Writes ``plan.json``, or adds new settings and seeds to the one that is there.

    Raises:
        InputError: the folder holds a comparison of another base config, other overrides, or a setting
            of the same name with other content: their results must not be mixed.
    """
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        new: dict[str, Any] = {
            "base": {"name": plan.base.stem, "config": read_yaml(plan.base)},
            "overrides": list(plan.overrides),
            "settings": {name: read_yaml(file) for name, file in plan.settings.items()},
            "seeds": sorted(plan.seeds),
        }
        old = read_plan(root)
        if old is not None:
            changed = [key for key in ("base", "overrides") if old[key] != new[key]]
            changed += [
                name for name, now in new["settings"].items() if old["settings"].get(name, now) != now
            ]
            if changed:
                raise InputError(
                    f"{root}: holds a comparison with another {', another '.join(changed)}; give another "
                    "--runs folder or remove this one, for results of different configs must not be mixed"
                )
            new["settings"] = {**old["settings"], **new["settings"]}
            new["seeds"] = sorted({*old["seeds"], *new["seeds"]})
        write_json(root / PLAN_NAME, new)


@dataclass(frozen=True)
class Run:
    """One training: a setting with a seed."""

    setting: str
    seed: int

    def __str__(self) -> str:
        return f"{self.setting} seed {self.seed}"


@dataclass
class Runner:
    """Works through the runs of a plan.

    Attributes:
        root: the comparison's folder.
        plan: what is compared.
        command: the training program and its first arguments; the configs, the seed and the folder follow.
        runs: what this process is to see to, in order.
        devices: one worker for each: ``"cpu"``, a GPU's number, or ``None`` for what the config says.
        on_record: called after each run that finished or failed.
    """

    root: Path
    plan: Plan
    command: Sequence[str]
    runs: Sequence[Run]
    devices: Sequence[str | None] = (None,)
    on_record: Callable[[Run, Record], None] = lambda run, record: None
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

    def work(self, tick: Callable[[], None] = lambda: None) -> None:
        """Runs until nothing is left.

        On ``KeyboardInterrupt`` the trainings are ended (they go on from their checkpoints next time) before
        it is raised again.

        Args:
            tick: called every fifth of a second, from the calling thread: for a progress bar.
        """
        workers = [threading.Thread(target=self._worker, args=(n, d)) for n, d in enumerate(self.devices)]
        try:
            for worker in workers:
                worker.start()
            while any(worker.is_alive() for worker in workers):
                tick()
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
                    record = self._train(run, device, lock)
                with self._mutex:
                    del self.active[number]
                if record is not None:
                    self.on_record(run, record)
        except BaseException as fault:  # handed to the main thread, which raises it
            self._faults.append(fault)
            self._stop.set()

    def _take(self, number: int) -> tuple[Run, IO[str]] | None:
        """The next run that no other process holds; waits while all that are left are held."""
        while not self._stop.is_set():
            with self._mutex:
                for run in list(self._pending):
                    folder = run_folder(self.root, run.setting, run.seed)
                    lock = _try_lock(folder)
                    if lock is None:
                        continue
                    self._pending.remove(run)
                    record = read_record(folder)
                    if record is not None and record.finished:
                        lock.close()
                        continue
                    self.active[number] = run
                    self.waiting = False
                    return run, lock
                self.waiting = bool(self._pending)
                if not self._pending:
                    return None
            self._stop.wait(POLL_S)
        return None

    def _train(self, run: Run, device: str | None, lock: IO[str]) -> Record | None:
        """Trains in a process of its own; ``None`` when it was interrupted."""
        folder = run_folder(self.root, run.setting, run.seed)
        failure = None
        if not _finished(folder):
            arguments = ["--config", str(self.plan.base), "--config", str(self.plan.settings[run.setting])]
            arguments += ["--seed_everything", str(run.seed), "--output", str(folder), *self.plan.overrides]
            with (folder / "train.log").open("a+", encoding="utf-8", errors="replace") as log:
                log.seek(0, os.SEEK_END)
                start = log.tell()
                process = subprocess.Popen(
                    [*self.command, *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **_device_environment(device)},
                    pass_fds=(lock.fileno(),),
                )
                status = self._wait(process)
                if status is None or -status in (signal.SIGINT, signal.SIGTERM) or status in (130, 143):
                    return None
                if not _finished(folder):
                    log.seek(start)
                    failure = _reason(log.read(), status)
        resolved = folder / "config.yaml"
        config = read_yaml(resolved) if resolved.exists() else {}
        record = _with_thumbnails(
            self.root, record_from_run(folder, run.setting, run.seed, config=config, failure=failure)
        )
        write_json(folder / RECORD_NAME, record.to_dict())
        if record.finished:
            for checkpoint in folder.glob(
                "checkpoints/last-*.ckpt"
            ):  # only for resuming; hundreds of MB each
                checkpoint.unlink()
        return record

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


def _try_lock(folder: Path) -> IO[str] | None:
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


def _finished(folder: Path) -> bool:
    path = folder / SUMMARY_NAME
    return path.exists() and bool(read_json(path).get("finished"))


def epochs_done(folder: Path) -> tuple[int, int | None]:
    """How far a training is: epochs done, and of how many (``None`` before the first is done)."""
    path = folder / SUMMARY_NAME
    if not path.exists():
        return 0, None
    summary = read_json(path)
    return len(summary.get("epochs", [])), summary.get("max_epochs")


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
    said = errors[-1] if errors else lines[-1] if lines else "it printed nothing"
    return f"{said.removeprefix('error: ')[:300]} (exit status {status})"


def _with_thumbnails(root: Path, record: Record) -> Record:
    """Keeps a small copy of each shown image once for the whole comparison, and drops its path."""
    kept = []
    for shown in record.detections:
        target = root / "images" / f"{shown['image_id']}.jpg"
        source = Path(shown.get("file", ""))
        if not target.exists() and source.is_file():
            small = io.BytesIO()
            with Image.open(source) as image:
                copy = image.convert("RGB")
            copy.thumbnail((THUMBNAIL, THUMBNAIL))
            copy.save(small, "JPEG", quality=85)
            write_bytes(target, small.getvalue())
        kept.append({key: value for key, value in shown.items() if key != "file"})
    return Record.from_dict(record.to_dict() | {"detections": kept})
