"""The wheel, installed outside the checkout and used from an empty folder; .ci/run runs this too."""

import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest
from support.tiny_run import ROOT, options

from dropblock_det.__main__ import COMMANDS
from dropblock_det.shipped import CONFIGS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: setuptools leaves files beside its sources, and takes old ones from there."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("dropblock_det", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(target), str(source)]
    subprocess.run(pip, check=True, timeout=600)
    (wheel,) = target.iterdir()
    return wheel


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Runs a program of an environment with the wheel in it, in an empty folder of its own.

    The dependencies are those of this environment, the package is not.
    """
    folder, here = tmp_path_factory.mktemp("environment"), tmp_path_factory.mktemp("empty")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    packages = sysconfig.get_path("purelib", vars={"base": str(folder)})
    with open(f"{packages}/dependencies.pth", "w") as file:
        file.write(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--python", f"{folder}/bin/python", "install", "-q", "--no-deps"]
    subprocess.run([*pip, str(wheel)], check=True, timeout=600)

    def run(program, *words):
        environment = {"PATH": f"{folder}/bin:/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
        command = [f"{folder}/bin/{program}", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=here, env=environment, timeout=600)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run.here = here
    return run


def test_everything_is_in_the_wheel(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("dropblock_det/")}
    package = ROOT / "dropblock_det"
    files = {
        path
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".md"
    }
    expected = {f"dropblock_det/{path.relative_to(package)}" for path in files | {*CONFIGS.rglob("*.yaml")}}
    assert held == expected
    assert len([name for name in held if name.endswith(".yaml")]) > 20


def test_both_ways_to_start_it_list_the_commands(installed):
    shown = installed("dropblock-det", "--help")
    assert all(f"  {name} " in shown for name in COMMANDS)
    assert installed("python", "-m", "dropblock_det", "--help") == shown
    place = installed("python", "-c", "import dropblock_det; print(dropblock_det.__file__)")
    assert str(ROOT) not in place


def test_train_and_what_its_last_lines_say(installed, tmp_path):
    words = ["train", "--config", "quickstart", *options(tmp_path / "scenes"), "--trainer.max_epochs=1"]
    shown = installed("dropblock-det", *words).splitlines()
    assert [path.name for path in installed.here.iterdir()] == ["runs"]
    (evaluate,) = (line.split()[1:] for line in shown if line.startswith("evaluate "))
    assert evaluate == ["dropblock-det", "evaluate", "runs/quickstart/checkpoints/best.ckpt"]
    assert "AP50" in installed(*evaluate, "--accelerator=cpu")


def test_compare_by_name(installed, tmp_path):
    words = ["compare", "run", "quickstart", "--settings", "detection", "--only", "none", "--seed", "0", "--"]
    installed("dropblock-det", *words, *options(tmp_path / "scenes"), "--trainer.max_epochs=1")
    assert (installed.here / "runs" / "compare_quickstart" / "report" / "report.html").exists()
