"""The recipes as they stand in the rooms' READMEs: a notebook, early stopping, other formats, ONNX."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny_run import arguments, train

from dropblock_det.datasets.coco import CocoDataModule
from dropblock_det.training.predict import load_model

ROOMS = Path(__file__).parents[1] / "dropblock_det"
README = "".join((ROOMS / room / "README.md").read_text(encoding="utf-8") for room in ("training", "inject"))
BOX = (8, 6, 28, 22)  # x1, y1, x2, y2


def recipe(name):
    return re.search(f"<!-- recipe: {name} -->\n```\\w+\n(.*?)```", README, re.DOTALL)[1]


def follow(name, **replaced):
    """Runs a recipe's Python; what it leaves."""
    code, left = recipe(name), {}
    for old, new in replaced.items():
        assert old in code
        code = code.replace(old, new)
    exec(code, left)
    return left


def test_a_notebook():
    import matplotlib as mpl

    mpl.use("agg")
    torch.manual_seed(0)
    left = follow("notebook")
    assert torch.isfinite(left["loss"])
    assert left["handle"].idle_sites == ()
    kept = left["kept"][0]
    assert 0.01 < 1 - kept.float().mean() < 0.3  # p has reached 0.1
    shown = [axes.images[0].get_array() for axes in left["plt"].gcf().axes]
    assert all(np.array_equal(image, channel) for image, channel in zip(shown, kept, strict=True))
    left["plt"].close("all")


def test_early_stopping(scenes, tmp_path, monkeypatch):
    command, train_word, *words = recipe("early stopping").replace("\\\n", " ").split()
    assert (command, train_word) == ("dropblock-det", "train")
    soon = (
        "--trainer.callbacks.patience=1",
        "--trainer.callbacks.min_delta=1",
    )  # no epoch is that much better
    words += [*arguments(scenes, tmp_path / "run", *soon, "--trainer.max_epochs=4")]
    train(words, monkeypatch)
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["status"] == "finished"
    assert len(record["epochs"]) == 2


@pytest.fixture
def yolo(tmp_path):
    """A data set in YOLO's format, and the same in Pascal VOC's."""
    pytest.importorskip("supervision")
    for folder in ("yolo/images", "yolo/labels", "voc/images", "voc/annotations"):
        for split in ("train", "val"):
            (tmp_path / folder / split).mkdir(parents=True)
    (tmp_path / "yolo" / "data.yaml").write_text("names: [cat, dog]\nnc: 2\n")
    x1, y1, x2, y2 = BOX
    for split in ("train", "val"):
        for folder in ("yolo/images", "voc/images"):
            Image.new("RGB", (40, 30), "gray").save(tmp_path / folder / split / "a.png")
        label = f"1 {(x1 + x2) / 80} {(y1 + y2) / 60} {(x2 - x1) / 40} {(y2 - y1) / 30}\n"
        (tmp_path / "yolo" / "labels" / split / "a.txt").write_text(label)
        corners = "".join(
            f"<{name}>{value}</{name}>"  # the first and the last pixel, counted from one
            for name, value in {"xmin": x1 + 1, "ymin": y1 + 1, "xmax": x2, "ymax": y2}.items()
        )
        (tmp_path / "voc" / "annotations" / split / "a.xml").write_text(
            "<annotation><filename>a.png</filename><size><width>40</width><height>30</height><depth>3</depth>"
            f"</size><object><name>dog</name><bndbox>{corners}</bndbox></object></annotation>"
        )
    return tmp_path


VOC = {
    "from_yolo": "from_pascal_voc",
    "yolo/images": "voc/images",
    "yolo/labels": "voc/annotations",
    ', "yolo/data.yaml"': "",
}


@pytest.mark.filterwarnings("ignore:OpenCV")
@pytest.mark.parametrize(("replaced", "dog"), [({}, 2), (VOC, 1)], ids=["yolo", "voc"])
def test_other_formats(replaced, dog, yolo, monkeypatch):
    monkeypatch.chdir(yolo)
    follow("other formats", **replaced)
    data = CocoDataModule("my_data", batch_size=1, num_workers=0)
    data.prepare_data()
    data.setup("fit")
    images, targets = next(iter(data.val_dataloader()))
    assert images[0].shape == (3, 30, 40)
    np.testing.assert_allclose(targets[0]["boxes"], [BOX], atol=1e-3)
    assert targets[0]["labels"].tolist() == [dog]
    assert data.categories[dog - 1]["name"] == "dog"


@pytest.fixture
def best(run, tmp_path):
    """A checkpoint that sees different things, as after a long training; after four steps all are alike."""
    checkpoint = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    detector = load_model(run / "checkpoints" / "best.ckpt", "cpu").detector
    for module in detector.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # all batches count alike
            module.reset_running_stats()
    torch.manual_seed(0)
    with torch.no_grad():
        detector.head.train()(list(detector.backbone.train()(torch.rand(4, 3, 320, 320)).values()))
        for name, weight in detector.head.regression_head.named_parameters():
            if name.endswith(".1.weight"):
                weight.mul_(0.1)
    checkpoint["state_dict"] = {f"detector.{name}": value for name, value in detector.state_dict().items()}
    torch.save(checkpoint, tmp_path / "best.ckpt")


@pytest.mark.usefixtures("best")
@pytest.mark.filterwarnings("ignore")  # the exporter's, about constants
def test_onnx_of_the_whole_detector(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    left = follow("onnx")
    for image in (left["image"], torch.rand(3, 240, 320)):  # the one that was exported, and another
        with torch.inference_mode():
            (expected,) = left["detector"]([image])
        found = left["session"].run(None, {"image": image.numpy()})
        boxes, scores, labels = map(torch.from_numpy, found)
        assert len(boxes) == len(expected["boxes"]) > 50
        torch.testing.assert_close(scores, expected["scores"], atol=1e-5, rtol=0)
        # Of two with scores alike to a rounding error either may come first.
        apart = (boxes[:, None] - expected["boxes"]).abs().amax(2)
        apart[labels[:, None] != expected["labels"]] = torch.inf
        assert apart.amin(0).max() < 1e-3
        assert apart.amin(1).max() < 1e-3
        assert len(set(labels.tolist())) > 1
