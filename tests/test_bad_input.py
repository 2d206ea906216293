"""What a user can get wrong on the command line: one line that names it, exit status 2, no traceback."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import ROOT, start, train

from dropblock_det import cli
from dropblock_det.errors import InputError


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
    return [], r'instances_train2017.json.*"images"'


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


def foreign_class(coco):
    return ["--data=os.path.join"], r"subclass of CocoDataModule"


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
    *(
        no_root,
        no_annotations,
        truncated_json,
        no_images_key,
        image_missing,
        truncated_jpeg,
        leaves_the_folder,
    ),
    *(no_category, unknown_key, unknown_key_in_file, wrong_type, foreign_class, p_out_of_range, no_such_site),
    *(unknown_weights, output_is_a_file),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_training_says_what_is_wrong(case, coco, monkeypatch):
    more, message = case(coco)
    with pytest.raises(InputError, match=message) as error:
        train(arguments(coco, *more), monkeypatch)
    assert "\n" not in str(error.value)
    assert not list(coco.glob("run/checkpoints/*"))


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
    return "not a whole checkpoint that is safe to load"


def truncated(run, tmp_path):
    (tmp_path / "bad.ckpt").write_bytes((run / "checkpoints" / "best.ckpt").read_bytes()[:100_000])
    return "not a whole checkpoint that is safe to load"


def missing(run, tmp_path):
    return "no such checkpoint"


def other_model(run, tmp_path):
    content = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    content["state_dict"].pop(next(iter(content["state_dict"])))
    torch.save(content, tmp_path / "bad.ckpt")
    return "its weights do not fit"


@pytest.mark.parametrize(
    "case", [not_ours, foreign_pickle, truncated, missing, other_model], ids=lambda case: case.__name__
)
def test_evaluating_a_bad_checkpoint(case, run, tmp_path):
    message = case(run, tmp_path)
    with pytest.raises(InputError, match=message) as error:
        cli.evaluate(tmp_path / "bad.ckpt", {}, None, {"accelerator": "cpu"})
    assert "bad.ckpt" in str(error.value)
    assert "\n" not in str(error.value)


def test_evaluating_on_other_categories(run, coco):
    data = {
        "root": str(coco),
        "val_images": "val2017",
        "val_annotations": "annotations/instances_val2017.json",
    }
    with pytest.raises(InputError, match=r"trained on 5 categories \(disk, .*has 1 categories \(cat\)"):
        cli.evaluate(run / "checkpoints" / "best.ckpt", data, None, {"accelerator": "cpu"})


def test_evaluate_ends_with_status_2(tmp_path):
    command = [sys.executable, ROOT / "tools" / "evaluate.py", tmp_path / "none.ckpt"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
