"""Loggers, callbacks and regularizers of one's own, from modules that the command line allows."""

import contextlib
import sys

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from jsonargparse._common import parsing_settings
from lightning.pytorch.loggers import MLFlowLogger
from support.tiny_run import arguments, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dropblock_det.comparison.plan import Run, make_plan, training_arguments
from dropblock_det.training.allowed import allow
from dropblock_det.training.evaluate import evaluate
from dropblock_det.training.loggers import show_picture

THEIRS = """
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

SEEN = []


class Notes(Callback):
    def on_train_end(self, trainer, pl_module):
        SEEN.append(("trained", sum(type(module) is Noise for module in pl_module.modules())))


class Noise(torch.nn.Module):
    def __init__(self, p: float = 0.5):
        super().__init__()
        self.p = p

    def forward(self, x):
        return x + self.p * torch.randn_like(x) if self.training else x


class Keeps(CSVLogger):
    def log_hyperparams(self, params=None):
        SEEN.append(("settings", params))

    def log_metrics(self, metrics, step=None):
        SEEN.append(("metrics", metrics))

    def log_image(self, key, images, step=None):
        SEEN.append(("picture", key, images, step))


class Refuses(CSVLogger):
    def __init__(self):
        raise RuntimeError("the server is not there")
"""


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """A folder to work in, with a package of their own; the module's name."""
    (tmp_path / "my_project").mkdir()
    (tmp_path / "my_project" / "__init__.py").touch()
    (tmp_path / "my_project" / "parts.py").write_text(THEIRS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "my_project.parts"
    for name in ("my_project", "my_project.parts"):
        sys.modules.pop(name, None)


def of_their_own(scenes, folder):
    return [
        *arguments(scenes, folder, "--trainer.max_epochs=1"),
        "--trainer.callbacks+=my_project.parts.Notes",
        *("--trainer.logger+=my_project.parts.Keeps", "--trainer.logger.save_dir=elsewhere"),
        *("--regularize.regularizer=my_project.parts.Noise", "--regularize.regularizer.p=0.25"),
    ]


def test_what_is_allowed_is_used_and_gets_everything(theirs, scenes, tmp_path, monkeypatch, line_of, capsys):
    folder = tmp_path / "run"
    words = of_their_own(scenes, folder)
    line = line_of(lambda: train(words, monkeypatch))
    assert "my_project.parts.N" in line
    assert "or of a module that --allow MODULE names on the command line" in line
    assert theirs not in sys.modules
    train([*words, "--allow", "my_project"], monkeypatch)
    seen = sys.modules[theirs].SEEN
    assert next(each[1] for each in seen if each[0] == "trained") > 20
    kinds = {kind for kind, *_ in seen}
    assert kinds == {"trained", "settings", "metrics", "picture"}
    settings = next(each[1] for each in seen if each[0] == "settings" and "regularize" in each[1])
    assert settings["regularize"]["regularizer"]["init_args"]["p"] == 0.25
    assert settings == yaml.safe_load((folder / "config.yaml").read_text())
    logged = {name for kind, *rest in seen if kind == "metrics" for name in rest[0]}
    assert {"loss", "val_loss", "mAP", "p"} <= logged
    pictures = [each[1:] for each in seen if each[0] == "picture"]
    assert pictures == [(name, [str(folder / f"{name}.png")], 2) for name in ("curves", "samples")]
    board = EventAccumulator(str(folder / "logs" / "version_0"), {"images": 0}).Reload()
    assert set(board.Tags()["images"]) == {"curves", "samples"}
    assert (folder / "logs" / "version_0" / "metrics.csv").exists()

    # The permission is this process's: neither the run's folder nor its checkpoint gives it.
    assert "--allow" not in (folder / "config.yaml").read_text()
    assert "not imported" in line_of(lambda: train(["--resume", str(folder)], monkeypatch))
    train(["--resume", str(folder), "--allow=my_project.parts"], monkeypatch)
    capsys.readouterr()
    best = folder / "checkpoints" / "best.ckpt"
    assert evaluate(best, accelerator="cpu")["val_loss"] > 0
    assert "trained with Noise, which a checkpoint does not hold" in line_of(
        lambda: evaluate(best, samples=2, accelerator="cpu")
    )


def test_a_config_cannot_allow_anything(theirs, scenes, tmp_path, line_of, monkeypatch):
    (tmp_path / "mine.yaml").write_text(f"allow: [{theirs}]\n")
    words = ["--config=quickstart", "--config=mine.yaml", *arguments(scenes, tmp_path / "run")]
    message = "allow: not a setting; give --allow MODULE on the command line"
    assert message in line_of(lambda: train(words, monkeypatch))
    (tmp_path / "mine.yaml").write_text(
        f"allow: [{theirs}]\ntrainer: {{callbacks: [{{class_path: {theirs}.Notes}}]}}\n"
    )
    assert "not imported" in line_of(lambda: train(words, monkeypatch))
    assert theirs not in sys.modules


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--allow"], "expected one argument; give a module, such as my_project.callbacks"),
        (
            ["--allow", "no_such_project"],
            "--allow no_such_project: no such module here or ",
        ),
        (["--allow", "my_project.none.parts"], "--allow my_project.none.parts: no such module"),
        (["--allow", "my_project/parts.py"], "--allow my_project/parts.py: no such module"),
        (["--allow", ""], "--allow : no such module"),
        (["--allow", "jsonargparse"], "--allow: Import paths under 'jsonargparse' can't be allowed"),
    ],
)
def test_only_a_module_can_be_allowed(words, message, theirs, line_of):
    with contextlib.ExitStack() as stack:
        assert message in line_of(lambda: allow(words, stack))


def test_a_package_covers_its_modules_and_a_module_no_others(theirs, monkeypatch):
    # jsonargparse keeps what tests before were allowed and then denied, and the more exact entry decides.
    verdicts = {
        path: known for path, known in parsing_settings["import_path_verdicts"].items() if path != theirs
    }
    monkeypatch.setitem(parsing_settings, "import_path_verdicts", verdicts)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(torch.nn.Module, "layer")
    words = ["--layer=my_project.parts.Noise"]
    for name, works in (("my_project", True), (theirs, True), ("json", False)):
        with contextlib.ExitStack() as stack:
            assert allow(["--allow", name, *words, f"--allow={name}"], stack) == words
            with contextlib.nullcontext() if works else pytest.raises(Exception, match="is not allowed"):
                parser.parse_args(words)
        with pytest.raises(Exception, match="is not allowed"):  # taken back
            parser.parse_args(words)


def test_a_comparison_hands_it_on_to_its_trainings(tmp_path):
    (tmp_path / "base.yaml").write_text("{}")
    plan = make_plan(tmp_path / "base.yaml", {"none": tmp_path / "base.yaml"}, [0], ["--allow", "my_project"])
    settings = {"none": tmp_path / "none.yaml"}
    assert training_arguments(plan, tmp_path / "base.yaml", settings, Run("none", 0))[-2:] == [
        "--allow",
        "my_project",
    ]


@pytest.mark.parametrize("name", ["WandbLogger", "MLFlowLogger", "CometLogger"])
def test_a_missing_package_is_one_line(name, scenes, tmp_path, line_of, monkeypatch):
    logger = f"lightning.pytorch.loggers.{name}"
    package = {"WandbLogger": "wandb", "MLFlowLogger": "mlflow", "CometLogger": "comet-ml"}[name]
    monkeypatch.setattr(f"lightning.pytorch.loggers.{package.split('-')[0]}._{package.split('-')[0].upper()}"
                        "_AVAILABLE", Missing(package))  # fmt: skip
    words = arguments(scenes, tmp_path / "run", f"--trainer.logger+={logger}")
    line = line_of(lambda: train(words, monkeypatch))
    assert line == f"error: a package is not installed: pip install -U '{package}>=1'\n"


class Missing(str):
    """What Lightning has for a package that is not there."""

    def __bool__(self):
        return False

    def __str__(self):
        return f"Requirement '{self[:]}>=1' not met. HINT: Try running `pip install -U '{self[:]}>=1'`"


def test_a_logger_that_cannot_be_made_is_one_line(theirs, scenes, tmp_path, line_of, monkeypatch):
    words = arguments(scenes, tmp_path / "run", f"--allow={theirs}", f"--trainer.logger+={theirs}.Refuses")
    line = line_of(lambda: train(words, monkeypatch))
    assert line == "error: trainer: a class can't be made: the server is not there\n"


def test_mlflow_gets_pictures_as_files(tmp_path, monkeypatch):
    """By Lightning's class, without its server: what is called is MlflowClient's log_artifact."""
    called = []

    class Client:
        def log_artifact(self, run_id, path):
            called.append((run_id, path))

    monkeypatch.setattr(MLFlowLogger, "__init__", lambda self: None)
    monkeypatch.setattr(MLFlowLogger, "experiment", Client())
    monkeypatch.setattr(MLFlowLogger, "run_id", "r1")
    show_picture(MLFlowLogger(), tmp_path / "curves.png", 3)
    assert called == [("r1", str(tmp_path / "curves.png"))]


@pytest.mark.parametrize(
    ("monitor", "refused"),
    [("val_mAP", True), ("map", True), ("", True), ("val_loss", False), ("AP_small", False),
     ("val_loss_classification", False), ("drop_share/detector.backbone.0", False)],
)  # fmt: skip
def test_an_unknown_monitor_is_refused_before_the_training(monitor, refused, scenes, tmp_path, monkeypatch):
    from dropblock_det.errors import InputError
    from dropblock_det.training import cli

    early = "--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping"
    words = arguments(scenes, tmp_path / "run", early, f"--trainer.callbacks.monitor={monitor}")
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with contextlib.ExitStack() as stack:
        if refused:
            message = f"EarlyStopping monitors {monitor}, which no one logs; give one of loss"
            stack.enter_context(pytest.raises(InputError, match=message))
        cli.command_line(words, stack)
