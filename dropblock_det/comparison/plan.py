"""What is compared: ``plan.json``, and where a comparison keeps what.

::

    RUNS/plan.json                   which base config, settings, seeds and overrides belong to it
    RUNS/images/<image id>.jpg       thumbnails of the validation images that are shown
    RUNS/<setting>/seed<S>/          one training run, its record.json among the rest
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from dropblock_det.arguments import Seed
from dropblock_det.errors import InputError
from dropblock_det.files import read_json, read_yaml, write_json
from dropblock_det.locks import take_lock
from dropblock_det.runs.folder import is_finished

REFERENCE = "none"  # the setting that every other one is compared with
PLAN_NAME = "plan.json"
MAX_BYTES = 2**26
NAME = r"^\w[^/\\\x00-\x1f\x7f-\x9f\ud800-\udfff]{0,99}\Z"  # a folder's, and shown everywhere
# What a comparison sets for each run itself, or what trains nothing.
OWN = (
    "--seed_everything",
    "--config",
    "-c",
    "--output",
    "--resume",
    "--regularize",
    "--print_config",
    "--help",
    "-h",
)
SUBSET = "--data.train_subset_seed"

Setting = Annotated[str, Meta(pattern=NAME)]


@dataclass(frozen=True)
class Base:
    """The config that all runs share."""

    name: str
    config: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Attributes:
        base: the config that all runs share.
        settings: name -> the small config that makes the setting, the reference among them.
        seeds: every setting runs once with each.
        overrides: arguments that every training gets after the configs.
        announced_seeds: those that were named before the first result was there to be looked at. Empty in
            plans of older versions, which did not note it.
        vary_subset: each seed draws a training subset of its own, the same for all settings.
    """

    base: Base
    settings: dict[Setting, dict[str, Any]]
    seeds: tuple[Seed, ...]
    overrides: tuple[str, ...] = ()
    announced_seeds: tuple[Seed, ...] = ()
    vary_subset: bool = False

    @property
    def late_seeds(self) -> tuple[int, ...]:
        """The seeds that were added when there were results already."""
        return tuple(sorted({*self.seeds} - {*self.announced_seeds})) if self.announced_seeds else ()


@dataclass(frozen=True)
class Run:
    """One training: a setting with a seed."""

    setting: str
    seed: int

    def __str__(self) -> str:
        return f"{self.setting} seed {self.seed}"


def find_settings(folder: Path) -> dict[str, Path]:
    """Returns every ``*.yaml`` of a folder by its name, the reference first.

    Raises:
        InputError: There is no reference, or a name can't be a folder's.
    """
    found = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    for name, path in found.items():
        if not re.match(NAME, name):
            raise InputError(f"{str(path)!r}: its name becomes a folder's; begin it with a letter or a digit")
    if REFERENCE not in found:
        raise InputError(f"{folder}: holds no {REFERENCE}.yaml, the setting all others are compared with")
    return {REFERENCE: found[REFERENCE], **found}


def make_plan(
    base: Path,
    settings: Mapping[str, Path],
    seeds: Sequence[int],
    overrides: Sequence[str] = (),
    vary_subset: bool = False,
) -> Plan:
    """Reads the configs and checks what was asked for.

    Raises:
        InputError: a missing or broken file; no seed, one given twice or out of range; an override of what
            makes the runs differ, or no subset to vary.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise InputError(f"--seeds {' '.join(map(str, seeds))}: give at least one seed, and each one once")
    for seed in seeds:
        if not 0 <= seed < 2**32:
            raise InputError(f"seed {seed}: give whole numbers from 0 to {2**32 - 1}")
    for argument in overrides:
        name = argument.split("=")[0]
        if name.split(".")[0].rstrip("+") in OWN or (vary_subset and "subset_seed" in name):
            raise InputError(f"{name}: the comparison sets it for each run; leave it out")
    plan = Plan(
        Base(base.stem, read_yaml(base)),
        {name: read_yaml(path) for name, path in settings.items()},
        tuple(sorted(seeds)),
        tuple(overrides),
        tuple(sorted(seeds)),
        vary_subset,
    )
    if vary_subset and "train_subset" not in f"{plan.base.config.get('data')} {overrides}":
        raise InputError("--vary-subset: no subset is drawn; give data.train_subset a number of images")
    return plan


def training_arguments(plan: Plan, base: Path, settings: Mapping[str, Path], run: Run) -> list[str]:
    """The arguments of a run's training but for its folder; the plan's overrides come last."""
    words = [
        "--config",
        str(base),
        "--config",
        str(settings[run.setting]),
        "--seed_everything",
        str(run.seed),
    ]
    words += [SUBSET, str(run.seed)] if plan.vary_subset else []
    return [*words, *plan.overrides]


def read_plan(root: Path) -> Plan | None:
    """A comparison's plan, or ``None`` where none was written yet.

    Raises:
        InputError: the file is damaged.
    """
    path = root / PLAN_NAME
    if not path.exists():
        return None
    plan: Plan = read_json(path, Plan, MAX_BYTES)
    return plan


def record_plan(root: Path, plan: Plan) -> Plan:
    """Writes ``plan.json``, or adds new settings and seeds to the one that is there; returns the whole.

    Raises:
        InputError: the folder holds a comparison of another base config, other overrides, or a setting
            of the same name with other content: their results must not be mixed.
    """
    root.mkdir(parents=True, exist_ok=True)
    lock = take_lock(root / ".lock", wait=True)
    assert lock is not None
    with lock:
        if old := read_plan(root):
            shared = ("base", "overrides", "vary_subset")
            changed = [name for name in shared if getattr(old, name) != getattr(plan, name)]
            changed += [name for name, now in plan.settings.items() if old.settings.get(name, now) != now]
            if changed:
                raise InputError(
                    f"{root}: holds a comparison with another {', another '.join(changed)}; give another "
                    "--runs folder or remove this one, for results of different configs must not be mixed"
                )
            announced = {*(old.announced_seeds or old.seeds)}
            if not any(is_finished(path.parent) for path in root.glob("*/seed*/record.json")):
                announced |= {*plan.seeds}
            plan = replace(
                plan,
                settings=old.settings | plan.settings,
                seeds=tuple(sorted({*old.seeds, *plan.seeds})),
                announced_seeds=tuple(sorted(announced)),
            )
        write_json(root / PLAN_NAME, plan)
    return plan


def run_folder(root: Path, setting: str, seed: int) -> Path:
    """Where one run of a comparison lives."""
    return root / setting / f"seed{seed}"
