"""What the benchmark of training counts, by a clock of its own, and one measurement of a small detector."""

import sys
from types import SimpleNamespace

import pytest
import torch
from support.coco_like import make_site, unpack_site

from dropblock_det.__main__ import run
from dropblock_det.benchmark import report, training
from dropblock_det.benchmark.reference_loop import ReferenceImages, reference_batches, reference_steps
from dropblock_det.benchmark.training import OURS, REST, Blocks, Parts
from dropblock_det.datasets.coco import CocoDataModule

MOBILE = "fasterrcnn_mobilenet_v3_large_320_fpn"


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return unpack_site(make_site(train=14, val=3), tmp_path_factory.mktemp("coco"))


class Clock:
    """Stands still until it is told to go on."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_an_action_does_not_count_what_is_inside_it():
    parts = Parts()
    clock = parts.clock = Clock()
    parts.take()
    with parts.profile("[LightningModule]M.optimizer_step"):
        clock.now += 1
        with parts.profile("[Strategy]S.training_step"):
            clock.now += 2
            parts.wrapped("forward", lambda: setattr(clock, "now", clock.now + 4))()
        with parts.profile("[Strategy]S.backward"):
            clock.now += 8
        with parts.profile("[Callback]C.on_before_optimizer_step"):
            clock.now += 16
    clock.now += 32
    with parts.profile("[_TrainingEpochLoop].train_dataloader_next"):
        clock.now += 64
    taken = {"data": 64, "forward": 4, "backward": 8, "optimizer": 1}
    assert parts.take() == {**{f"ours: {name}": s for name, s in taken.items()}, REST: 2 + 16 + 32}
    assert sum(parts.take().values()) == 0


def test_a_block_lasts_from_one_end_of_a_step_to_another():
    """Ours takes 3 s a step, another training 5; the ends of epochs are in no block, nor is the warm-up."""
    clock, parts, rounds = Clock(), Parts(), []
    parts.clock = clock

    def other():
        while True:
            clock.now += 5
            yield

    blocks = Blocks({"other": other()}, 5, 2, parts, clock, lambda: rounds.append(1))
    trainer = SimpleNamespace(should_stop=False)
    for step in range(blocks.all_steps):
        if step in (0, 7):  # the second of a block
            clock.now += 1000
            blocks.on_train_epoch_start(trainer, None)
        assert not trainer.should_stop
        with parts.profile("forward"):
            clock.now += 3
        blocks.on_train_batch_end(trainer, None, None, None, step)
    assert trainer.should_stop
    assert len(rounds) == 7
    assert blocks.seconds == {OURS: [6] * 4, "other": [10] * 4}
    assert blocks.explained["ours: forward"] == [3] * training.EXPLAINED
    assert blocks.explained[REST] == [0] * training.EXPLAINED


def test_the_reference_sees_the_same_images_in_the_same_batches(coco):
    data = CocoDataModule(str(coco), batch_size=4, num_workers=0)
    loader, batches = data.train_dataloader(), reference_batches(data)
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        for images, targets in loader:
            others, truths = next(batches)
            assert [image.shape for image in others] == [image.shape for image in images]
            for image, other, target, truth in zip(images, others, targets, truths, strict=True):
                assert target["labels"].equal(truth["labels"])
                # Flipped or not: both draw for themselves.
                assert min((image - other).abs().max(), (image.flip(2) - other).abs().max()) < 0.02
    assert len(ReferenceImages(data)) == 14


@pytest.mark.parametrize("bfloat16", [False, True])
def test_the_reference_loop_trains(bfloat16, coco):
    data = CocoDataModule(str(coco), batch_size=2, num_workers=0)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(2))

        def forward(self, images, targets):
            assert torch.is_autocast_enabled("cpu") == bfloat16
            return {"a": (self.weight**2).sum(), "b": self.weight.sum()}

    model = Model()
    steps = reference_steps(model, data, "cpu", 0.1, bfloat16)
    first = next(steps)
    assert "loss: 4.0000 (4.0000)" in first
    assert "b: 2.0000" in first
    for _ in range(training.PRINT_EVERY):
        last = next(steps)
    assert last != first  # a new line
    assert (model.weight < 0.5).all()
    with torch.no_grad():
        model.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError):
        next(steps)


def test_a_small_detector_is_measured(coco, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "EXPLAINED", 2)
    monkeypatch.setitem(sys.modules, "dropblock_det.benchmark.figure", None)  # it is tested elsewhere
    path = tmp_path / "rows.csv"
    settings = {"root": coco, "name": MOBILE, "size": 64, "batch": 2, "workers": 0, "rounds": 2, "steps": 1}
    given = [f"--{name}={value}" for name, value in settings.items() if name not in ("size", "batch")]
    sizes = ["--size", "64", "--batch", "2", "--precision", "32-true", "--device", "cpu"]
    run(["benchmark", "training", *given, *sizes, "--output", str(path)])
    rows = {(row.what, row.provider): row for row in report.read_rows(path)}
    loop = "torchvision's reference loop"
    for provider in (OURS, f"{loop}, float32", f"{loop}, float32 channels_last"):
        row = rows["training", provider]
        assert row.setting == f"{MOBILE}, ours float32 channels_last"
        assert (row.shape, row.rounds, row.relative_to) == ("2x3x64", 2, OURS)
    parts = [row for (what, _), row in rows.items() if what == "training: parts of a step"]
    whole = next(row for row in parts if row.provider == "ours: a step")
    assert sum(row.mean_ms for row in parts if row is not whole) == pytest.approx(whole.mean_ms, rel=1e-3)
    forward = next(row for row in parts if row.provider == "ours: forward")
    assert 0.05 < forward.relative < 0.9
    epoch = {name: row for (what, name), row in rows.items() if what == "training: parts of an epoch"}
    names = ("its steps", "validation", "record and checkpoint")
    assert sum(epoch[f"ours: {name}"].relative for name in names) == pytest.approx(1, abs=1e-3)
    evaluation = epoch["ours: evaluating the predictions, of the validation"]
    assert 0 < evaluation.median_ms < epoch["ours: validation"].median_ms
    assert path.with_suffix(".md").read_text().count("\n## training") == 3
    assert "4/4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--root", "COCO"]),
        (["--root", "nowhere"], ["nowhere", "no such folder"]),
        (["--root", "{coco}", "--name", "yolo"], ["name", "yolo", "retinanet"]),
        (["--root", "{coco}", "--name", "ssd300_vgg16", "--size", "512"], ["min_size"]),
        (["--root", "{coco}", "--precision", "half"], ["trainer.precision"]),
        (["--root", "{coco}", "--name", MOBILE, "--batch", "8"], ["2 batches", "smaller"]),
        (["--root", "{coco}", "--batch", "1000000"], ["GiB", "smaller"]),
    ],
)
def test_bad_arguments_are_one_line_before_anything_is_measured(
    arguments, words, coco, tmp_path, monkeypatch, line_of
):
    monkeypatch.delenv("DROPBLOCK_DET_COCO", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "reference_steps", None)
    given = ["--device", "cpu"]
    words_given = [argument.format(coco=coco) for argument in arguments]
    line = line_of(lambda: run(["benchmark", "training", *given, *words_given]))
    assert all(word in line for word in words), line
    assert not list(tmp_path.iterdir())
