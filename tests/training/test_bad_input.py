"""What a user can get wrong on the command line: one line that names it, exit status 2, no traceback."""

import json
import math
import pickle
import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from support import tiny_run
from support.tiny_run import ROOT, start, train

from dropblock_det.errors import InputError
from dropblock_det.runs.folder import is_finished
from dropblock_det.training.evaluate import evaluate


@pytest.fixture
def coco(tmp_path):
    """A COCO folder with two training and two validation images."""
    rng = np.random.default_rng(0)
    for part in ("train2017", "val2017"):
        (tmp_path / part).mkdir()
        images = [{"id": i, "file_name": f"{i}.jpg", "width": 48, "height": 40} for i in (1, 2)]
        for image in images:
            pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / part / image["file_name"])
        annotations = [
            {"id": i, "image_id": i, "category_id": 3, "bbox": [4, 4, 20, 20], "area": 400, "iscrowd": 0}
            for i in (1, 2)
        ]
        content = {"images": images, "annotations": annotations, "categories": [{"id": 3, "name": "cat"}]}
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
    return tmp_path


def arguments(coco, *more):
    return [
        *(f"--config={ROOT}/configs/retinanet_coco.yaml", f"--data.root={coco}", f"--output={coco}/run"),
        *("--data.batch_size=2", "--data.num_workers=1", "--model.min_size=64", "--model.max_size=64"),
        *(
            "--trainer.accelerator=cpu",
            "--trainer.max_epochs=1",
            "--trainer.enable_progress_bar=false",
            *more,
        ),
    ]


def train_json(coco):
    return coco / "annotations" / "instances_train2017.json"


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def no_root(coco):
    return ["--data.root=/no/such/folder"], r"/no/such/folder: no such folder.*prepare_coco"


def no_annotations(coco):
    train_json(coco).unlink()
    return [], r"instances_train2017.json"


def truncated_json(coco):
    train_json(coco).write_text(train_json(coco).read_text()[:100])
    return [], r"instances_train2017.json.*JSON"


def no_images_key(coco):
    content = json.loads(train_json(coco).read_text())
    del content["images"]
    train_json(coco).write_text(json.dumps(content))
    return [], r"instances_train2017.json.*images"


def image_missing(coco):
    (coco / "train2017" / "2.jpg").unlink()
    return [], r"train2017/2.jpg: no such image"


def truncated_jpeg(coco):
    data = (coco / "train2017" / "2.jpg").read_bytes()
    (coco / "train2017" / "2.jpg").write_bytes(data[: len(data) // 2])
    return [], r"train2017/2.jpg"


def leaves_the_folder(coco):
    images = [{"id": i, "file_name": f"../val2017/{i}.jpg", "width": 48, "height": 40} for i in (1, 2)]
    edit(train_json(coco), images=images)
    return [], r"\.\./val2017/1.jpg"


def no_category(coco):
    edit(train_json(coco), categories=[], annotations=[])
    return [], r"instances_train2017.json.*categor"


def unknown_key(coco):
    return ["--model.learning_rate=1"], r"learning_rate"


def unknown_key_in_file(coco):
    (coco / "mine.yaml").write_text("model:\n  learning_rate: 1\n")
    return [f"--config={coco}/mine.yaml"], r"learning_rate"


def wrong_type(coco):
    return ["--model.lr=fast"], r"model.lr"


def a_class_of_another_kind(coco):
    return ["--data=torch.nn.Linear"], r"subclass of CocoDataModule"


def p_out_of_range(coco):
    return ["--regularize.regularizer=dropblock", "--regularize.p=1.5"], r"p must be .*1.5"


def no_such_site(coco):
    return ["--regularize.regularizer=dropblock", "--regularize.at=detector.backbone.boby"], r"boby.*nearest"


def unknown_weights(coco):
    return ["--model.weights_backbone=ResNet50_Weights.NOPE"], r"weights_backbone.*NOPE"


def output_is_a_file(coco):
    (coco / "taken").write_text("")
    return [f"--output={coco}/taken"], r"taken"


CASES = [
    no_root,
    no_annotations,
    truncated_json,
    no_images_key,
    image_missing,
    truncated_jpeg,
    leaves_the_folder,
    no_category,
    unknown_key,
    unknown_key_in_file,
    wrong_type,
    a_class_of_another_kind,
    p_out_of_range,
    no_such_site,
    unknown_weights,
    output_is_a_file,
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_training_says_what_is_wrong(case, coco, monkeypatch, line_of):
    more, message = case(coco)
    assert re.search(message, line_of(lambda: train(arguments(coco, *more), monkeypatch)))
    assert not list(coco.glob("run/checkpoints/*"))


# --- Settings: what a stranger's YAML file or a slip of the hand can hold ---

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
    "a logger of Lightning's": (
        {
            "trainer": {
                "logger": {
                    "class_path": "lightning.pytorch.loggers.CSVLogger",
                    "init_args": {"save_dir": "/"},
                }
            }
        },
        "logger: leave it out",
    ),
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


# --- Values: refused when they are parsed, or before the first step ---

EARLY = "--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping --trainer.callbacks.monitor=nonsense"
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
    "--data.train_size=5 --model.min_size=32 --model.max_size=32": "last batch is too small for batch norm",
    EARLY: "trainer: Early stopping conditioned on metric `nonsense` which is not available",
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


def test_the_process_ends_with_status_2_and_one_line(coco):
    truncated_jpeg(coco)
    process = start(arguments(coco), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    _, messages = process.communicate(timeout=120)
    assert process.returncode == 2
    assert messages.splitlines()[-1].startswith("error: ")
    assert "train2017/2.jpg" in messages.splitlines()[-1]
    assert "Traceback" not in messages


def not_ours(run, tmp_path):
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "bad.ckpt")
    return "not a checkpoint of dropblock_det"


def foreign_pickle(run, tmp_path):
    torch.save({"hyper_parameters": Exception("code")}, tmp_path / "bad.ckpt")
    return "not a checkpoint that is safe to load"


def truncated(run, tmp_path):
    (tmp_path / "bad.ckpt").write_bytes((run / "checkpoints" / "best.ckpt").read_bytes()[:100_000])
    return "not a whole checkpoint"


def one_bit(run, tmp_path):
    content = bytearray((run / "checkpoints" / "best.ckpt").read_bytes())
    content[len(content) // 2] ^= 16
    (tmp_path / "bad.ckpt").write_bytes(content)
    return "not a whole checkpoint .*checksum"


def other_zip(run, tmp_path):
    with zipfile.ZipFile(tmp_path / "bad.ckpt", "w") as archive:
        archive.writestr("archive/data.pkl", b"cos\nsystem\n(S'true'\ntR.")
    return "not a checkpoint that is safe to load"


def bare_pickle(run, tmp_path):
    (tmp_path / "bad.ckpt").write_bytes(pickle.dumps({"state_dict": {}}))
    return "not a whole checkpoint"


def a_folder(run, tmp_path):
    (tmp_path / "bad.ckpt").mkdir()
    return "no such checkpoint"


def a_bare_list(run, tmp_path):
    torch.save([1, 2], tmp_path / "bad.ckpt")
    return "not a checkpoint of dropblock_det"


def missing(run, tmp_path):
    return "no such checkpoint"


def other_sizes(run, tmp_path):
    content = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    key = next(iter(content["state_dict"]))
    content["state_dict"][key] = content["state_dict"][key][:1]
    torch.save(content, tmp_path / "bad.ckpt")
    return "its weights do not fit"


def other_arguments(run, tmp_path):
    content = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    content["hyper_parameters"]["depth"] = 101
    torch.save(content, tmp_path / "bad.ckpt")
    return "depth: there is no such argument"


def other_model(run, tmp_path):
    content = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    content["state_dict"].pop(next(iter(content["state_dict"])))
    torch.save(content, tmp_path / "bad.ckpt")
    return "its weights do not fit"


@pytest.mark.parametrize(
    "case",
    [
        not_ours,
        foreign_pickle,
        truncated,
        one_bit,
        other_zip,
        bare_pickle,
        a_folder,
        a_bare_list,
        missing,
        other_model,
        other_sizes,
        other_arguments,
    ],
    ids=lambda case: case.__name__,
)
def test_evaluating_a_bad_checkpoint(case, run, tmp_path):
    message = case(run, tmp_path)
    with pytest.raises(InputError, match=message) as error:
        evaluate(tmp_path / "bad.ckpt", accelerator="cpu")
    assert "bad.ckpt" in str(error.value)
    assert "\n" not in str(error.value)


def test_evaluating_on_other_categories(run, coco):
    data = {"data": coco, "images": "val2017", "annotations": "annotations/instances_val2017.json"}
    with pytest.raises(InputError, match=r"trained on 5 categories \(disk, .*has 1 categories \(cat\)"):
        evaluate(run / "checkpoints" / "best.ckpt", **data, accelerator="cpu")


def test_evaluate_ends_with_status_2(tmp_path):
    command = [sys.executable, ROOT / "tools" / "evaluate.py", tmp_path / "none.ckpt"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
