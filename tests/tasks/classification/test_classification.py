"""The classification task through the same commands as detection."""

import csv
import io
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny_run import ROOT

from dropblock_det.datasets.classification import InMemory, Labelled
from dropblock_det.datasets.images import read_image
from dropblock_det.errors import InputError
from dropblock_det.runs.record import read_record
from dropblock_det.tasks.classification.breakdown import classification_breakdown
from dropblock_det.tasks.classification.module import ClassificationModule
from dropblock_det.training import cli
from dropblock_det.training.evaluate import evaluate
from dropblock_det.training.predict import load_model, predict_files

CONFIG = ROOT / "configs" / "classification" / "cifar10_small_cnn.yaml"
CATEGORIES = [{"label": n, "id": n, "name": name} for n, name in enumerate(("dark", "bright"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two classes that differ in brightness: 24 images for training, 10 for testing."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for part, count in {"train": 12, "test": 5}.items():
        for name, level in (("bright", 200), ("dark", 40)):
            place = root / part / name
            place.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(level - 40, level + 40, (16, 16, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")
    return root


def arguments(folder, output, *more):
    return [
        *(f"--config={CONFIG}", f"--output={output}", f"--data.root={folder}", "--data.source=folder"),
        *("--data.batch_size=8", "--trainer.max_epochs=3", "--trainer.accelerator=cpu"),
        *("--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1", "--model.warmup_steps=2"),
        *("--trainer.enable_model_summary=false", "--regularize.regularizer=dropblock", "--regularize.p=0.2"),
        "--regularize.schedule=linear",
        *more,
    ]


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "one"
    cli.train(arguments(folder, output))
    return output


def test_the_record_has_the_task_s_metrics(run):
    record = read_record(run)
    assert record is not None
    assert (record.task, record.headline, record.status) == ("classification", "accuracy", "finished")
    assert [metric.name for metric in record.metrics] == ["loss", "val_loss", "accuracy"]
    assert len(record.epochs) == 3
    assert all(0 <= epoch["accuracy"] <= 1 and epoch["loss"] > 0 for epoch in record.epochs)
    # Of nine steps, means over three at a time, and over all.
    assert [epoch["p"] for epoch in record.epochs] == pytest.approx([0.025, 0.1, 0.175])
    assert record.drop_share["asked"] == pytest.approx(0.1)
    assert (
        0 < record.epochs[0]["drop_share"] < record.epochs[1]["drop_share"] < record.epochs[2]["drop_share"]
    )
    assert {sample.kind for sample in record.samples} == {"label"}
    assert len(record.samples) == 8
    assert all(Path(sample.file).is_file() for sample in record.samples)
    for picture in ("curves.png", "samples.png"):
        assert Image.open(run / picture).size[0] > 100


def test_evaluating_the_checkpoint_gives_the_same_values_and_each_class_s(run, tmp_path):
    values = evaluate(run / "checkpoints" / "best.ckpt", results=tmp_path / "results.json", accelerator="cpu")
    best = read_record(run).best("accuracy")
    assert values["accuracy"] == best["accuracy"]
    assert values["val_loss"] == pytest.approx(best["val_loss"], rel=1e-6)
    rows = json.loads((tmp_path / "results.json").read_text())
    assert sorted(row["image_id"] for row in rows) == list(range(10))
    for label, name in enumerate(("bright", "dark")):
        own = [row["predicted"] == label for row in rows if row["label"] == label]
        assert values[f"accuracy/{name}"] == pytest.approx(sum(own) / len(own))
    right = sum(row["predicted"] == row["label"] for row in rows) / len(rows)
    assert values["accuracy"] == pytest.approx(right)


def test_a_closer_look(run, tmp_path, capsys, line_of):
    best, folder = run / "checkpoints" / "best.ckpt", tmp_path / "closer"
    values = evaluate(best, report=folder, results=tmp_path / "results.json", accelerator="cpu")
    seen = json.loads((tmp_path / "results.json").read_text())
    assert f"report  {folder}/report.html" in capsys.readouterr().out
    classes, confusion, images = (
        list(csv.reader((folder / f"{name}.csv").open(newline="")))
        for name in ("categories", "confusion", "images")
    )
    assert [row[0] for row in classes] == ["class", "bright", "dark", "all"]
    for row in classes[1:3]:
        assert float(row[3]) == pytest.approx(values[f"accuracy/{row[0]}"])
    assert float(classes[3][3]) == pytest.approx(values["accuracy"])
    counts = [[sum(r["label"] == a and r["predicted"] == b for r in seen) for b in (0, 1)] for a in (0, 1)]
    assert confusion == [
        ["", "bright", "dark"],
        *([n, *map(str, c)] for n, c in zip(("bright", "dark"), counts, strict=True)),
    ]
    wrong = sum(row[4] == "0" for row in images[1:])
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == wrong
    assert f"It gives {10 - wrong} of 10 images" in page
    assert {path.name for path in folder.iterdir()} == {
        *("report.html", "categories.csv", "confusion.csv", "images.csv")
    }
    message = line_of(lambda: evaluate(best, report=folder, score=0.5, accelerator="cpu"))
    assert "--score: detectors alone" in message


def test_the_surest_errors_come_first():
    labelled = Labelled(
        torch.arange(6, dtype=torch.uint8)[:, None, None, None].expand(6, 1, 2, 3),
        torch.zeros(6),
        (),
        torch.arange(10, 16),
    )
    rows = [
        (10, 0, 0, 0.9),
        (11, 0, 1, 0.6),
        (12, 1, 0, 0.8),
        (13, 1, 1, 0.5),
        (14, 0, 0, 0.7),
        (15, 0, 1, 0.7),
    ]
    predictions = [dict(zip(("image_id", "label", "predicted", "score"), row, strict=True)) for row in rows]
    found = classification_breakdown(InMemory(labelled), predictions, ["dark", "bright"])
    (examples,) = found.examples.values()
    assert [example.title for example in examples] == ["image 12", "image 15", "image 11"]
    assert examples[0].note == "bright taken for dark (0.800)"
    picture = Image.open(io.BytesIO(examples[1].picture))
    assert (picture.size, picture.getpixel((0, 0))) == ((3, 2), (5, 5, 5))
    assert found.confusion.counts.tolist() == [[2, 2], [1, 1]]
    assert found.categories.rows == (("dark", 4, 3, 0.5, 2 / 3), ("bright", 2, 3, 0.5, 1 / 3))
    assert found.answer == (
        "It gives 3 of 6 images (50.0 %) their own class.",
        "Highest accuracy: dark (0.500); lowest: bright (0.500).",
        "Most often confused: dark is taken for bright, 2 times.",
    )


def test_stopped_and_resumed_it_ends_with_the_same_bits(run, folder, tmp_path, monkeypatch):
    output, whole_epoch = tmp_path / "stopped", ClassificationModule.on_train_epoch_start

    def dies(self):
        if self.current_epoch == 2:
            raise KeyError("killed")

    monkeypatch.setattr(ClassificationModule, "on_train_epoch_start", dies)
    with pytest.raises(KeyError, match="killed"):
        cli.train(arguments(folder, output))
    monkeypatch.setattr(ClassificationModule, "on_train_epoch_start", whole_epoch)
    cli.train(["--resume", str(output)])
    straight, resumed = (read_record(path).epochs for path in (run, output))
    for mine, other in zip(resumed, straight, strict=True):
        for name in ("loss", "val_loss", "accuracy", "p", "drop_share"):
            assert mine[name] == other[name]


def test_label_smoothing_is_in_the_loss_and_not_in_val_loss():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    batch = (images, torch.tensor([0, 1, 1, 0]), [0, 1, 2, 3])
    losses, val_losses = {}, {}
    for smoothing in (0.0, 0.1):
        torch.manual_seed(1)
        module = ClassificationModule(CATEGORIES, (3, 16, 16), label_smoothing=smoothing)
        losses[smoothing] = module.losses(batch)["cross_entropy"]
        val_losses[smoothing] = module.eval().losses_and_predictions(batch)[0]["cross_entropy"]
    assert val_losses[0.0] == val_losses[0.1]
    torch.manual_seed(1)
    module = ClassificationModule(CATEGORIES, (3, 16, 16))
    log_p = module(images).log_softmax(1)
    own = log_p[range(4), batch[1]]
    assert torch.allclose(losses[0.0], -own.mean())
    assert torch.allclose(losses[0.1], -(0.9 * own + 0.1 * log_p.mean(1)).mean(), atol=1e-6)


def test_gray_images_come_to_torchvision_s_classifiers_three_times_over():
    module = ClassificationModule(CATEGORIES, (1, 32, 32), name="resnet18").eval()
    gray = torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8)
    assert torch.equal(module(gray), module(gray.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--task=segmentation"], "task: got 'segmentation', give one of detection, classification"),
        (["--model.label_smoothing=1.5"], "model.label_smoothing: got 1.5"),
        (["--model.name=lenet"], "model.name: no classifier 'lenet'"),
        (["--model.anchor_sizes=[1]"], "anchor_sizes"),
        (["--data.source=imagenet"], "imagenet"),
        (["--data.root=/no/such"], "/no/such: no folder data set"),
        (["--trainer.overfit_batches=2"], "trainer.overfit_batches: not for images in memory"),
        (
            ["--trainer.max_epochs=null", "--trainer.max_time=00:00:00:09", "--regularize.schedule=constant"],
            "model.lr_schedule: cosine needs to know how many steps the training has",
        ),
    ],
)
def test_what_cannot_be_trained_is_one_line(folder, tmp_path, more, message):
    with pytest.raises(InputError, match=message) as caught:
        cli.train(arguments(folder, tmp_path / "run", *more))
    assert "\n" not in str(caught.value)


def test_test_images_of_another_size_are_one_line(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "images")
    for file in (tmp_path / "images" / "test").rglob("*.png"):
        Image.new("RGB", (20, 24)).save(file)
    message = "the test images have 20x24 pixels, those of the training 16x16; give a data.size for all"
    with pytest.raises(InputError, match=message):
        cli.train(arguments(tmp_path / "images", tmp_path / "run"))
    cli.train(arguments(tmp_path / "images", tmp_path / "run", "--data.size=16", "--trainer.max_epochs=1"))


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_true_precisions_train(folder, tmp_path, precision):
    more = (f"--trainer.precision={precision}", "--trainer.max_epochs=1")
    cli.train(arguments(folder, tmp_path / "run", *more))
    assert read_record(tmp_path / "run").status == "finished"


def test_predictions_that_are_not_finite_or_of_other_images_are_one_line():
    module = ClassificationModule(CATEGORIES, (3, 16, 16)).eval()
    batch = (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), torch.tensor([0, 1]), [7, 8])
    module.losses_and_predictions(batch)
    with pytest.raises(
        InputError, match="the images are 20x16 pixels with 3 channels, the model was trained on"
    ):
        module.losses_and_predictions((torch.zeros(2, 3, 16, 20, dtype=torch.uint8), *batch[1:]))
    torch.nn.init.constant_(module.classifier[-1].bias, math.inf)
    with pytest.raises(InputError, match="image 7: the predictions are not finite"):
        module.losses_and_predictions(batch)


def test_another_task_s_folder_is_not_resumed(run, folder):
    with pytest.raises(InputError, match=r"data.*not correspond to a subclass of CocoDataModule"):
        cli.train(["--resume", str(run), "--task", "detection"])


def test_predicting_gives_the_class_of_each_image(run, folder, tmp_path):
    """Also of images in another size than those of the training."""
    Image.open(folder / "test" / "dark" / "0.png").resize((40, 30)).save(tmp_path / "dark.png")
    given = [str(folder / "test" / "bright"), str(tmp_path / "dark.png")]
    assert predict_files(run / "checkpoints" / "best.ckpt", given, tmp_path / "out", 0.0, device="cpu") == []
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["image_id"] for row in rows] == [1, 2, 3, 4, 5, 6]
    model = load_model(run / "checkpoints" / "best.ckpt", "cpu")
    names = {category["id"]: category["name"] for category in model.hparams["categories"]}
    files = sorted((folder / "test" / "bright").glob("*.png"))
    half = model.precision == "bf16-mixed"  # where the machine of the test computes with it
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        scores, labels = model(torch.stack([read_image(file) for file in files])).float().softmax(1).max(1)
    assert [row["category_id"] for row in rows[:5]] == labels.tolist()
    assert [row["score"] for row in rows[:5]] == pytest.approx(scores.tolist(), abs=1e-6)
    assert {names[row["category_id"]] for row in rows} <= {"bright", "dark"}
    assert len(list((tmp_path / "out" / "pictures").rglob("*.png"))) == 6
