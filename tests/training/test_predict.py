"""Prediction as a user starts it, on the images of a finished tiny training."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from dropblock_det import __main__ as commands
from dropblock_det.datasets.images import read_image
from dropblock_det.errors import InputError
from dropblock_det.runs.pictures import prediction_figure
from dropblock_det.tasks.evaluation import Mark
from dropblock_det.training.evaluate import evaluate
from dropblock_det.training.predict import load_model, predict, predict_files


@pytest.fixture
def best(run):
    return run / "checkpoints" / "best.ckpt"


@pytest.fixture
def photos(scenes, run, tmp_path):
    """Three validation images, one of them in a folder below, another format, and two that are none."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    first, second, third, *_ = sorted(scenes.glob("*/val/*.png"))
    shutil.copy(first, folder / "a.png")
    shutil.copy(second, folder / "more" / "a.png")
    Image.open(third).save(folder / "c.BMP")
    (folder / "b.jpg").write_bytes(b"no image")
    (folder / ".hidden.png").write_bytes(b"left by a file manager")
    (folder / "notes.txt").write_text("no image, and not named like one")
    return folder


def results_in(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
def test_the_results_are_those_of_the_evaluation(best, scenes, tmp_path):
    evaluate(best, results=tmp_path / "evaluated.json", accelerator="cpu")
    annotations = next(scenes.glob("*/annotations/val.json"))
    names = {image["id"]: image["file_name"] for image in json.loads(annotations.read_text())["images"]}
    images = annotations.parents[1] / "val"
    assert predict_files(best, [str(images)], tmp_path / "out", score=0.0, batch_size=2, device="cpu") == []

    def by_file(rows, name_of):
        rows = sorted(rows, key=lambda row: (name_of(row), -row["score"]))
        return [(name_of(row), row["category_id"]) for row in rows], [
            [*row["bbox"], row["score"]] for row in rows
        ]

    expected = by_file(
        json.loads((tmp_path / "evaluated.json").read_text()), lambda row: names[row["image_id"]]
    )
    found = by_file(results_in(tmp_path / "out"), lambda row: row["file_name"])
    assert len(found[0]) > 20
    assert found[0] == expected[0]
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=1e-3)


def test_a_broken_image_is_named_and_the_others_are_predicted(best, photos, tmp_path, monkeypatch, capsys):
    words = [str(best), str(photos), "--output", str(tmp_path / "out"), "--score", "0.01", "--device", "cpu"]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as caught:
        commands.run(["predict", *words])
    assert caught.value.code == 1
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 2
    assert printed.err.startswith(f"skipped: {photos}/b.jpg: can't be read as an image")
    assert printed.out.startswith("3 images, ")
    written = {
        path.relative_to(tmp_path / "out").as_posix()
        for path in tmp_path.rglob("*")
        if path.is_file() and path not in before
    }
    pictures = {f"pictures/{name}.png" for name in ("a.png", "c.BMP", "more/a.png")}
    assert written == {"results.json", *pictures}
    assert all(path.read_bytes() == content for path, content in before.items())
    rows = results_in(tmp_path / "out")
    numbers = {(row["image_id"], row["file_name"]) for row in rows}
    assert numbers == {(1, "a.png"), (3, "c.BMP"), (4, "more/a.png")}
    assert min(row["score"] for row in rows) >= 0.01


def test_an_image_that_the_model_refuses_is_named(best, photos, tmp_path, monkeypatch, capsys):
    model = load_model(best, "cpu")

    def prepared(image):
        raise InputError("too thin")

    monkeypatch.setattr(type(model), "prepared", lambda self, image: prepared(image))
    assert predict_files(best, [str(photos / "a.png")], tmp_path / "out", device="cpu") == [photos / "a.png"]
    assert capsys.readouterr().err.startswith(f"skipped: {photos}/a.png: too thin\n")
    assert results_in(tmp_path / "out") == []


def test_files_folders_and_patterns_each_image_once(best, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (photos / "b.jpg").unlink()
    (photos / "a[1].png").write_bytes((photos / "a.png").read_bytes())
    given = ["photos/**/*.png", "photos/a[1].png", "photos/more", "photos/c.BMP"]
    for _ in range(2):  # its own pictures are not images of the folder
        predict_files(best, [*given, "."], photos / "out", score=0.01, device="cpu")
    pictures = sorted(p.relative_to(photos / "out/pictures").as_posix() for p in photos.glob("out/**/*.png"))
    names = ("a.png", "a[1].png", "c.BMP", "more/a.png")
    assert pictures == [f"photos/{name}.png" for name in names]
    numbers = {(row["image_id"], row["file_name"]) for row in results_in(photos / "out")}
    assert sorted(name for _, name in numbers) == [f"photos/{name}" for name in names]
    assert {number for number, _ in numbers} == {1, 2, 3, 4}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": ["missing.jpg"]}, "missing.jpg: no such image"),
        ({"images": ["*.nothing"]}, "*.nothing: no such image"),
        ({"device": "abacus"}, "--device abacus: "),
        ({"device": "meta"}, "--device meta: "),
        ({"device": "cuda:99"}, "--device cuda:99: "),
    ],
)
def test_what_cannot_begin_is_one_line(arguments, message, best, photos, tmp_path, line_of):
    given = {"images": [str(photos)], "device": "cpu", **arguments}
    assert message in line_of(lambda: predict_files(best, output=tmp_path / "out", **given))
    assert not (tmp_path / "out").exists()


def test_the_function_gives_what_the_detector_gives(best, photos):
    model = load_model(best, "cpu")
    model.precision = "32-true"  # as the detector alone; a machine with bfloat16 has trained in that
    image = read_image(photos / "a.png")
    with torch.no_grad():
        expected = model.detector([image.float() / 255])[0]
    score = float(expected["scores"].median())
    from_file, from_tensor = predict(model, [photos / "a.png", image], score, batch_size=1)
    kept = (expected["scores"] >= score) & (expected["labels"] > 0)
    assert 0 < kept.sum() < len(kept)
    for name in ("boxes", "scores", "labels"):
        assert torch.equal(from_file[name], expected[name][kept])
        assert torch.equal(from_tensor[name], expected[name][kept])
    with pytest.raises(InputError, match=r"b\.jpg: can't be read"):
        predict(model, [photos / "a.png", photos / "b.jpg"])


@pytest.mark.parametrize(("width", "height", "expected"), [(640, 480, (640, 480)), (30, 60, (240, 480))])
def test_the_picture_has_the_box_where_it_is(width, height, expected, tmp_path):
    box = (width / 4, height / 2, width / 2, height / 4)
    image = np.zeros((height, width, 3), np.uint8)
    figure = prediction_figure(image, [Mark("cat", box, 0.9)])
    figure.savefig(tmp_path / "x.png", dpi=120)
    pixels = np.asarray(Image.open(tmp_path / "x.png").convert("RGB"), dtype=int)
    assert pixels.shape[1::-1] == expected
    scale = expected[0] / width
    orange = pixels[:, :, 0] > 150
    middle = orange[:, round(scale * (box[0] + box[2] / 2))].nonzero()[0]
    assert middle.max() == pytest.approx(scale * (box[1] + box[3]), abs=2)
    across = orange[round(scale * (box[1] + box[3] / 2))].nonzero()[0]
    assert (across.min(), across.max()) == pytest.approx((scale * box[0], scale * (box[0] + box[2])), abs=2)
