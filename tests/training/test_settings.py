"""Settings in a YAML file or on the command line that no training should begin with: one line says why."""

import math
import sys

import pytest
import torch
import yaml
from support import tiny_run
from support.tiny_run import ROOT, train

from dropblock_det.runs.folder import is_finished

CLASS = {"class_path": "antigravity.Class"}  # to import antigravity opens a browser
CALLING = {"class_path": "lightning.pytorch.callbacks.LambdaCallback", "init_args": {"setup": "os.system"}}
LOGGER = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "/tmp"}}
FILES = {
    "a foreign data module": ({"data": CLASS}, "antigravity.Class: not imported"),
    "a foreign logger": ({"trainer": {"logger": CLASS}}, "antigravity.Class: not imported"),
    "foreign callbacks": ({"trainer": {"callbacks": [CLASS]}}, "antigravity.Class: not imported"),
    "a foreign strategy": ({"trainer": {"strategy": CLASS}}, "antigravity.Class: not imported"),
    "a foreign plugin": ({"trainer": {"plugins": [CLASS]}}, "antigravity.Class: not imported"),
    "a foreign profiler": ({"trainer": {"profiler": CLASS}}, "antigravity.Class: not imported"),
    "a foreign augmentation": ({"data": {"init_args": {"augmentation": CLASS}}}, "antigravity.Class: not"),
    "a foreign function": ({"data": {"class_path": "os.system"}}, "os.system: not imported"),
    "a foreign function in a callback": ({"trainer": {"callbacks": [CALLING]}}, "os.system: not imported"),
    "a foreign function by way of ours": (
        {"trainer": {"callbacks": [{"class_path": "dropblock_det.training.launch.os.system"}]}},
        "system: not imported",
    ),
    "a class where a number belongs": ({"model": {"lr": CLASS}}, 'model.lr": Expected'),
    "another model": ({"model": {"class_path": "torch.nn.Linear"}}, "model"),
    "an optimizer's class": ({"optimizer": {"class_path": "torch.optim.SGD"}}, "optimizer"),
    "another place for logs": ({"trainer": {"default_root_dir": "/tmp"}}, "default_root_dir: leave it out"),
    "an unknown strategy": ({"trainer": {"strategy": "fast"}}, "invalid strategy name"),
    "devices in letters": ({"trainer": {"devices": "x"}}, "devices"),
    "no epochs": ({"trainer": {"max_epochs": 0}}, "max_epochs: got 0"),
    "epochs without end": ({"trainer": {"max_epochs": -1}}, "max_epochs: got -1"),
    "no batch to a step": ({"trainer": {"accumulate_grad_batches": 0}}, "accumulate_grad_batches: got 0"),
    "an unknown precision": ({"trainer": {"precision": "7"}}, "precision"),
    "a NaN as batch size": ({"data": {"init_args": {"batch_size": float("nan")}}}, "batch_size"),
    "an object of Python": (b"model: !!python/object/apply:os.system ['true']", "constructor for the tag"),
    "itself": (b"model: &all {others: [*all]}", "an alias of itself"),
    "many times itself": (
        b"a: &a [1,1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a]\nmodel: {lr: [*b,*b,*b,*b,*b,*b,*b]}",
        "model.lr",
    ),
    "a list": (b"- 1\n- 2\n", "not a config"),
    "nothing": (b"", "not a config"),
    "not YAML": (b"model: [1, 2", "not valid YAML"),
    "not text": (bytes(range(256)), "not valid YAML"),
    "no trainer": ({"trainer": None}, "trainer: is null"),
    "no regularizer": ({"regularize": None}, "regularize: is null"),
    "no seed": ({"seed_everything": None}, "seed_everything"),
    "nested deeply": (b"model: " + b"[" * 3000 + b"]" * 3000, "nested too deeply"),
}


@pytest.mark.parametrize("name", FILES)
def test_settings(name, tmp_path, monkeypatch, line_of):
    content, message = FILES[name]
    file = tmp_path / "mine.yaml"
    file.write_bytes(content if isinstance(content, bytes) else yaml.safe_dump(content).encode())
    args = [f"--config={ROOT}/configs/quickstart.yaml", f"--config={file}", f"--output={tmp_path}/run"]
    args += [f"--data.root={tmp_path}/scenes", "--trainer.accelerator=cpu"]
    assert message in line_of(lambda: train(args, monkeypatch))
    assert "antigravity" not in sys.modules
    assert not list(tmp_path.glob("run/checkpoints"))


EARLY = "--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping --trainer.callbacks.monitor=nonsense"
TIMER = "--trainer.callbacks+=lightning.pytorch.callbacks.Timer --trainer.callbacks.duration=00:00:00:09"
VALUES = {
    "--model.lr=-1": "model.lr: got -1.0; Expected `float` >= 0.0",
    "--model.lr=.nan": "model.lr: got nan",
    "--model.weight_decay=-1": "model.weight_decay: got -1.0",
    "--model.weight_decay=.inf": "model.weight_decay: got inf",
    "--model.min_size=0": "model.min_size: got 0",
    "--model.score_thresh=2": "model.score_thresh: got 2.0",
    "--model.anchor_sizes=[1,2,3,4,100000000000]": "model.anchor_sizes: got [1, 2, 3, 4, 100000000000]",
    "--seed_everything=-1": "seed_everything: got -1",
    "--seed_everything=5000000000": "seed_everything: got 5000000000; Expected `int` <= 4294967295",
    "--regularize.regularizer=dropblock --regularize.block_size=9223372036854775808": "block_size",
    "--data.batch_size=1000000000000": "data.batch_size: got 1000000000000",
    "--seed=5": "unrecognized arguments: --seed=5",
    "--output=": "output: got ''; give a file's or folder's name",
    "--output=/dev/null": "/dev/null: File exists",
    "--output=/dev/null/run": "/dev/null/run: Not a directory",
    f"--output={'x' * 300}": "File name too long",
    "--config=/dev/zero": "/dev/zero: not a regular file",
    "--trainer.max_epochs=99999999999999999999": "trainer.max_epochs: got 99999999999999999999",
    "--trainer.max_steps=0": "trainer.max_steps: got 0",
    "--trainer.check_val_every_n_epoch=0": "trainer.check_val_every_n_epoch: got 0",
    "--trainer.fast_dev_run=true": "trainer.fast_dev_run: leave it out",
    "--trainer.strategy=ddp_spawn": "trainer.strategy: processes that are spawned",
    "--trainer.accelerator=warp": "trainer: You selected an invalid accelerator name",
    "--trainer.max_time=x": "trainer: `Timer(duration='x')` is not a valid duration",
    "--trainer.val_check_interval=10": "trainer: `val_check_interval` (10) must be less",
    "--trainer.limit_train_batches=0.01": "trainer: You requested to check 0.01 of the `train_dataloader`",
    "--trainer.limit_val_batches=0": "trainer.limit_val_batches: leaves no validation",
    "--trainer.check_val_every_n_epoch=5": "trainer.check_val_every_n_epoch: 5, but 2 epochs",
    "--trainer.max_time=00:00:00:00": "ended at step 0, before the first validation",
    "--trainer.limit_train_batches=0": "ended at step 0, before the first validation",
    "--trainer.max_steps=1": "ended at step 1, before the first validation",
    "--data.train_size=5": "data.batch_size: 4 leaves one image for the last batch of an epoch",
    TIMER: "<Interval.step: 'step'>: a class' default, not plain data; give that argument too",
    EARLY: "trainer.callbacks: EarlyStopping monitors nonsense, which no one logs; give one of loss",
}


@pytest.mark.parametrize("options", VALUES)
def test_values(options, scenes, tmp_path, monkeypatch, line_of):
    monkeypatch.chdir(tmp_path)
    args = [*tiny_run.arguments(scenes, tmp_path / "run"), *options.split(" ")]
    if options.startswith("--config"):
        args = options.split(" ")
    assert VALUES[options] in line_of(lambda: train(args, monkeypatch))
    assert {path.name for path in tmp_path.iterdir()} <= {"run"}
    assert not is_finished(tmp_path / "run")


def test_weights_that_are_no_numbers_at_the_end(scenes, tmp_path, monkeypatch, line_of):
    """No loss follows the last step, which would not be finite."""
    step = torch.optim.AdamW.step

    def ruin(self, *args, **kwargs):
        result = step(self, *args, **kwargs)
        if next(iter(self.state.values()))["step"] == 2:
            self.param_groups[0]["params"][0].data[0] = math.nan
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", ruin)
    args = tiny_run.arguments(scenes, tmp_path / "run", "--trainer.max_epochs=1")
    assert "epoch 1: stopped, weights are no longer finite" in line_of(lambda: train(args, monkeypatch))
    assert not is_finished(tmp_path / "run")
    assert not list(tmp_path.glob("run/checkpoints/*"))
