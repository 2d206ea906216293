"""The table of commands: one word chooses, in a checkout and installed, and nothing is imported too early."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.the_tools import TOOLS

from dropblock_det.__main__ import COMMANDS, run
from dropblock_det.commands import MAIN, started_as
from dropblock_det.errors import InputError
from dropblock_det.shipped import CONFIGS, config_file, settings_folder


def test_help_lists_every_command_at_once():
    """Without the libraries that take seconds to import, or may not be installed."""
    program = (
        "import runpy, sys\n"
        "barred = ['torch', 'lightning', 'jsonargparse', 'rich', 'numpy', 'msgspec']\n"
        "sys.modules.update(dict.fromkeys(barred)); sys.argv[1:] = ['--help']\n"
        "runpy.run_module('dropblock_det', run_name='__main__', alter_sys=True)"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    assert re.findall(r"^  ([\w-]+)  +\S", shown.stdout, re.MULTILINE) == list(COMMANDS)


def test_version(capsys):
    run(["--version"])
    assert re.fullmatch(r"dropblock_det \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_every_command_shows_its_own_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dropblock-det"])
    for name in COMMANDS:
        with pytest.raises(SystemExit) as caught:
            run([name, "--help"])
        assert caught.value.code == 0
        assert capsys.readouterr().out.startswith(f"usage: dropblock-det {name} ")


def test_the_help_of_train_can_be_read(monkeypatch, capsys):
    """It lists Lightning's callbacks, but not torch's hundreds of modules, and says where the data's are."""
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        run(["train", "--help"])
    shown = capsys.readouterr().out
    for words in ("--model.lr LR", "--data.help lists", "lightning.pytorch.callbacks.EarlyStopping"):
        assert words in shown
    for words in ("torch.nn.Conv", "msgspec"):
        assert words not in shown


def test_every_command_has_its_script():
    for name in COMMANDS:
        text = (TOOLS / f"{name.replace('-', '_')}.py").read_text()
        assert f'main("{name}")' in text
        assert f"dropblock-det {name}" in text


@pytest.mark.parametrize("words", [["trian"], ["--config"], [""], ["__main__"]])
def test_another_word_is_one_line(words, line_of):
    assert f"{words[0]}: no such command; there are train, evaluate" in line_of(lambda: run(words))


def test_messages_name_the_command_that_works_here(monkeypatch):
    monkeypatch.chdir(TOOLS.parent)
    for program, expected in {
        "tools/train.py": "python tools/prepare_coco.py",
        str(TOOLS / "train.py"): f"python {TOOLS}/prepare_coco.py",
        "/usr/bin/dropblock-det": "dropblock-det prepare-coco",
        str(MAIN): "python -m dropblock_det prepare-coco",
        "/their/own/tools/run.py": "dropblock-det prepare-coco",
        "": "dropblock-det prepare-coco",
    }.items():
        monkeypatch.setattr(sys, "argv", [program])
        assert started_as("prepare-coco") == expected


def test_shipped_configs_are_found_by_name(tmp_path, monkeypatch):
    for name in ("quickstart", "classification/cifar10_small_cnn", "settings/dropblock_bs7_kp0.9"):
        assert config_file(name) == CONFIGS / f"{name}.yaml"
        assert config_file(name).is_file()
    assert settings_folder("detection") == CONFIGS / "settings"
    assert settings_folder(Path("classification")) == CONFIGS / "classification" / "settings"
    monkeypatch.chdir(tmp_path)
    for folder in ("quickstart", "detection", "classification"):
        (tmp_path / folder).mkdir()
    assert config_file("quickstart") == CONFIGS / "quickstart.yaml"  # no folder is a config
    assert settings_folder(None) == CONFIGS / "settings"
    assert settings_folder("classification") == Path("classification")  # what is there comes first
    (tmp_path / "quickstart").rmdir()
    (tmp_path / "quickstart").touch()
    assert config_file("quickstart") == Path("quickstart")
    assert config_file("absent.yaml") == Path("absent.yaml")  # read_yaml says that it is not there


@pytest.mark.parametrize("name", ["quickstar", "../configs/quickstart", "/etc/no", "settings/non"])
def test_another_name_lists_those_that_there_are(name):
    known = "settings/none, " if "settings" in name else "quickstart, retinanet_coco, ssdlite_small"
    with pytest.raises(
        InputError, match=rf"^{name}: no such file, and no shipped config; there are .*{known}"
    ):
        config_file(name)
    with pytest.raises(
        InputError, match=rf"^{name}: no such folder, .*; there are detection, classification$"
    ):
        settings_folder(name)
