"""Paired measurements, and the rows that they make."""

import contextlib
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from msgspec import Meta

from dropblock_det.errors import InputError

WARM_UP = 2  # rounds before those that count
HEAD_START = 4_000_000  # cycles of a GPU, about 2 ms, in which the host launches what is timed

HOST = "op: host"  # what the host takes to launch an operation: where small maps come thick, all that counts

Amount = Annotated[float, Meta(ge=0, le=1e12)]
Times = dict[str, list[float]]


@dataclass(frozen=True)
class Row:
    """One provider in one setting; milliseconds of forward and backward, or of a training step."""

    what: str
    setting: str
    shape: Annotated[str, Meta(pattern=r"^[1-9]\d{0,9}(x[1-9]\d{0,9})*$")]
    provider: str
    rounds: int
    median_ms: Amount
    q10_ms: Amount
    q90_ms: Amount
    mean_ms: Amount | None
    relative_to: str
    relative: Annotated[float, Meta(gt=0, le=1e12)]  # median of the ratios within a round
    relative_q10: Amount
    relative_q90: Amount
    relative_mean: Amount | None  # ratio of the means
    peak_memory_mib: Amount | None
    hardware: str
    versions: str
    measured: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime()))


@dataclass(frozen=True)
class Case:
    """What is timed against one another, by name, and what the rows call it.

    ``works`` is empty where the times are taken elsewhere.
    """

    what: str
    setting: str
    shape: tuple[int, ...]
    device: str
    baseline: str
    works: Mapping[str, Callable[[], Any]] = field(default_factory=dict)


def milliseconds(work: Callable[[], Any], device: str) -> tuple[float, float]:
    """What one call takes: the device, which is the time between two events on its stream, and the host.

    The GPU sleeps first, so that the host runs ahead, as it does in a training step. On an idle GPU the
    events would measure how long Python takes to launch small kernels.
    """
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(HEAD_START)
        start.record()
    begun = time.perf_counter()
    work()
    host = (time.perf_counter() - begun) * 1e3
    if device != "cuda":
        return host, host
    end.record()
    end.synchronize()
    return start.elapsed_time(end), host


def peak_memory(work: Callable[[], Any], device: str) -> float:
    """The most that one call holds beyond what was allocated before, results included, in MiB."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler chats on stderr
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    held = peak = 0
    events = profile.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Keeps so many processes busy beside what is measured inside, as a data loader's workers are."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def time_rounds(case: Case, rounds: int, on_round: Callable[[], None]) -> tuple[Times, Times]:
    """Times all works in every round, one after the other, each round starting at another one.

    Returns:
        Milliseconds of the device, and of the host.
    """
    names = list(case.works)
    device: Times = {name: [] for name in names}
    host: Times = {name: [] for name in names}
    for turn in range(-WARM_UP, rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            elapsed = milliseconds(case.works[name], case.device)
            if turn >= 0:
                device[name].append(elapsed[0])
                host[name].append(elapsed[1])
        on_round()
    return device, host


def measure(case: Case, rounds: int, on_round: Callable[[], None] = lambda: None, busy: int = 0) -> list[Row]:
    """Measures the works of a case; of an operation on a map also the memory and, on a GPU, the host's time.

    Args:
        case: What to time.
        rounds: How often each is timed.
        on_round: Called after every round.
        busy: Processes to keep busy meanwhile.
    """
    memory = {name: peak_memory(work, case.device) for name, work in case.works.items() if case.what == "op"}
    with busy_processes(busy):
        device, host = time_rounds(case, rounds, on_round)
    if busy:
        case = replace(case, setting=f"{case.setting}, {busy} busy")
    rows = rows_of(case, device, memory)
    if case.what == "op" and case.device == "cuda":
        rows += rows_of(replace(case, what=HOST), host)
    return rows


def rows_of(
    case: Case, times: Mapping[str, Sequence[float]], memory: Mapping[str, float] | None = None
) -> list[Row]:
    """A row for each provider, from its milliseconds in every round."""
    base, mean = times[case.baseline], statistics.fmean
    made = []
    for name, own in times.items():
        ratios = [a / b for a, b in zip(own, base, strict=True)]
        made.append(
            Row(case.what, case.setting, "x".join(map(str, case.shape)), name, len(own),
                statistics.median(own), *quantiles(own), mean(own),
                case.baseline, statistics.median(ratios), *quantiles(ratios), mean(own) / mean(base),
                (memory or {}).get(name), hardware(case.device), versions())
        )  # fmt: skip
    return made


def versions() -> str:
    """The versions of the packages that are measured."""
    packages = ("torch", "torchvision", "timm", "dropblock", "triton")
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return ", ".join(f"{name} {found[name]}" for name in packages if name in found)


def quantiles(values: Sequence[float]) -> tuple[float, float]:
    """The 10 % and 90 % quantiles."""
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[0], cuts[-1]


def hardware(device: str) -> str:
    """The processor that did the work; of a CPU also its threads, and malloc's settings."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    malloc = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_")]
    return ", ".join(
        [names[0] if names else platform.processor(), f"{torch.get_num_threads()} threads", *malloc]
    )


def check_memory(what: str, needed: float, device: str) -> None:
    """Raises :class:`InputError` where a measurement would not fit, before the system ends it."""
    if device == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > free:
        raise InputError(
            f"{what}: takes about {needed / 2**30:.3g} GiB, and there are {free / 2**30:.3g};"
            " give a smaller batch or size"
        )
