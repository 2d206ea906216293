"""What a newcomer sees: calm, what is trained on what, how long it takes, and an epoch's line in a log."""

import contextlib
import json
import logging
import re
import sys
import warnings
from types import SimpleNamespace

import pytest
from lightning.pytorch import Callback
from support.tiny_run import ROOT, arguments, train
from support.toy_task import train_toy

from dropblock_det.training import terminal


@contextlib.contextmanager
def heard():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


def without(args, *names):
    return [arg for arg in args if not arg.startswith(names)]


def test_by_default_it_is_calm_and_says_what_it_does(scenes, tmp_path, monkeypatch, capsys, caplog):
    folder = tmp_path / "run"
    args = without(
        arguments(scenes, folder), "--trainer.enable_model_summary", "--trainer.enable_progress_bar"
    )
    monkeypatch.setattr(terminal, "STEPS", 1)
    with heard() as warned:
        train([*args, "--regularize.p=0.25"], monkeypatch)
    printed = capsys.readouterr()
    assert printed.err == ""
    assert caplog.messages == []
    assert [str(w.message) for w in warned if not issubclass(w.category, DeprecationWarning)] == []
    assert "FLOPs" not in printed.out
    first, second, third, *lines = printed.out.splitlines()
    assert re.fullmatch(
        r"Training ssdlite320_mobilenet_v3_large \(2\.3 million parameters; dropblock with p 0\.25 at \d+ "
        rf"sites\) on 8 images of {scenes}\S*, 2 batches an epoch, "
        r"validating on 5 images; epochs 1 to 2, cpu, in (bf16-mixed|32-true)\.",
        first,
    )
    resume = f"dropblock-det train --resume {folder}"
    assert second == f"Results go to {folder}. After Ctrl-C, {resume} goes on from the last epoch."
    assert re.fullmatch(r"The training steps will take about \d+ s, validation comes on top\.", third)
    epochs = json.loads((folder / "record.json").read_text())["epochs"]
    shown = [line for line in lines if line.startswith("epoch ")]
    assert len(shown) == 2
    for number, (line, epoch) in enumerate(zip(shown, epochs, strict=True), start=1):
        assert line.startswith(
            f"epoch {number}/2  loss {epoch['loss']:.4f}  val_loss {epoch['val_loss']:.4f}  "
        )
        assert f"mAP {epoch['mAP']:.4f}" in line
    assert re.search(r"  \d+ s, about \d+ s left$", shown[0])
    assert re.search(r"  \d+ s$", shown[1])


@pytest.mark.slow
def test_verbose_shows_all_and_is_no_setting(scenes, tmp_path, monkeypatch, capsys, caplog):
    folder = tmp_path / "run"
    args = without(arguments(scenes, folder), "--trainer.enable_model_summary")
    with heard() as warned:
        train([*args, "--trainer.max_epochs=1", "--verbose"], monkeypatch)
    printed = capsys.readouterr()
    for words in ("💡 Tip", "GPU available", "`max_epochs=1` reached"):
        assert any(words in message for message in caplog.messages)
    assert any("Experiment logs directory" in str(w.message) for w in warned)
    assert "FLOPs" in printed.out
    assert "verbose:" not in (folder / "config.yaml").read_text()
    train([*args, "--trainer.max_epochs=1"], monkeypatch)  # finished, with the same settings


def test_verbose_in_a_config_is_refused(scenes, tmp_path, line_of, monkeypatch):
    (tmp_path / "mine.yaml").write_text("verbose: true\n")
    given = [f"--config={path}" for path in (ROOT / "configs" / "quickstart.yaml", tmp_path / "mine.yaml")]
    line = line_of(lambda: train([*given, *arguments(scenes, tmp_path / "run")], monkeypatch))
    assert "verbose: not a setting; give --verbose on the command line" in line


def test_nothing_else_is_hidden(capsys, caplog):
    """Words about the data or the settings, of Lightning, torch or ours."""
    spoken = (
        "The 'train_dataloader' does not have many workers which may be a bottleneck.",
        "the block covers the map, so that whole channels are dropped at layer4",
        "Detected call of `lr_scheduler.step()` before `optimizer.step()`.",
        "Found 2 module(s) in eval mode at the start of training.",
        "`Trainer.fit` stopped: `max_time=00:00:01` reached",
        "The seed is set to 3",
    )
    hidden = (
        "Checkpoint directory x exists and is not empty.",
        "💡 Tip: buy this",
        "This DataLoader will create 4 worker processes in total. Our suggested max number of worker is 2",
        "The number of training batches (2) is smaller than the logging interval Trainer(...)",
    )
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    with heard() as warned, terminal.calm():
        for words in (*spoken, *hidden):
            warnings.warn(words, UserWarning, stacklevel=1)
            log.info(words)
    assert [str(w.message) for w in warned] == list(spoken)
    assert caplog.messages == list(spoken)
    with heard() as warned:
        warnings.warn("💡 Tip: as before", UserWarning, stacklevel=1)
        log.info("💡 Tip: as before")
    assert len(warned) == 1
    assert caplog.messages[-1] == "💡 Tip: as before"


@pytest.mark.parametrize(
    ("step_s", "steps", "words"), [(0.3, 21, "54 s"), (6.0, 3, "20 min"), (60.0, 2, "3.3 h")]
)
def test_after_the_first_steps_it_says_how_long(step_s, steps, words, monkeypatch, capsys):
    """The first, which also warms up, is not counted: 20 more or ten seconds are enough."""
    now = [0.0]
    monkeypatch.setattr(terminal, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    trainer = SimpleNamespace(
        estimated_stepping_batches=100, global_step=0, accumulate_grad_batches=2, is_global_zero=True
    )
    story = terminal.Story(SimpleNamespace(), lines=True)
    for batch in range(100):
        now[0] += step_s if batch else 1000.0
        trainer.global_step = (batch + 1) // 2
        story.on_train_batch_end(trainer, None, None, None, batch)
        printed = capsys.readouterr().out
        if batch + 1 == steps:
            assert printed == f"The training steps will take about {words}, validation comes on top.\n"
        else:
            assert printed == ""


def test_a_bar_only_in_a_terminal(monkeypatch):
    assert not terminal.shows_a_bar(None)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert terminal.shows_a_bar(None)
    assert terminal.shows_a_bar(True)
    assert not terminal.shows_a_bar(False)


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (89, "89 s"), (91, "2 min"), (5300, "88 min"), (9000, "2.5 h")]
)
def test_durations(seconds, words):
    assert terminal.duration(seconds) == words


def test_the_bar_shows_a_loss_that_has_arrived(tmp_path, capsys):
    """That of a step may still be on its way; the last of an epoch has arrived when the next begins."""
    shown, losses = [], []

    class Noted(terminal.Bar):
        def get_metrics(self, trainer, pl_module):
            shown.append(super().get_metrics(trainer, pl_module))
            return shown[-1]

    class Losses(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append(float(outputs["loss"]))

    train_toy(tmp_path / "run", [0.5, 0.5], Noted(), Losses(), bar=True)
    assert "loss" not in shown[0]
    assert shown[-1]["loss"] in losses
    assert {"data_wait_s", "quality", "val_loss"} <= shown[-1].keys()
    assert "v_num" not in shown[-1]
    assert re.findall(r"Epoch \S+", capsys.readouterr().out)[-1] == "Epoch 2/2"
