"""What a user can get wrong on the command line: one line that names it, exit status 2, no traceback."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.tiny_run import ROOT, start, train


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
    return ["--data.root=/no/such/folder"], r"/no/such/folder: no such folder.*prepare-coco"


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


def unknown_key_of_a_class(coco):
    return ["--data.roott=x"], r"error: Parser key \"data\": Option 'roott' is not accepted; --help"


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
    unknown_key_of_a_class,
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


def test_the_process_ends_with_status_2_and_one_line(coco):
    truncated_jpeg(coco)
    process = start(arguments(coco), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    _, messages = process.communicate(timeout=120)
    assert process.returncode == 2
    assert messages.splitlines()[-1].startswith("error: ")
    assert "train2017/2.jpg" in messages.splitlines()[-1]
    assert "Traceback" not in messages


@pytest.mark.parametrize("tool", ["train", "evaluate"])
def test_ctrl_c_ends_the_imports_too(tool):
    """As soon as torch is loaded, and Lightning is not yet."""
    command = [sys.executable, ROOT / "tools" / f"{tool}.py", "none.ckpt"]
    process = subprocess.Popen(command, stdout=-1, stderr=-1, text=True)
    maps = Path(f"/proc/{process.pid}/maps")
    while "libtorch" not in maps.read_text() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "interrupted\n")
    assert process.returncode == 130
