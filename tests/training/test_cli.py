"""Training and evaluation as a user runs them: arguments in, a run's folder out."""

import csv
import json
import os
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import yaml
from pycocotools.coco import COCO
from support.tiny_run import ROOT, arguments, start, train
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from torchvision.models.detection.ssd import SSD

from dropblock_det.commands import command
from dropblock_det.errors import InputError
from dropblock_det.files import write_bytes
from dropblock_det.runs.checkpoints import AtomicCheckpointIO, load_checkpoint
from dropblock_det.runs.folder import newest_checkpoint
from dropblock_det.shipped import FIRST
from dropblock_det.training import cli
from dropblock_det.training.evaluate import evaluate
from dropblock_det.training.launch import sole_use

FIGURES = ("loss", "val_loss", "mAP", "AP50", "AP75")


def weights(run):
    return torch.load(newest_checkpoint(run), weights_only=True)["state_dict"]


def test_a_run_leaves_its_whole_record(run):
    summary = json.loads((run / "record.json").read_text())
    assert summary["status"] == "finished"
    assert [epoch["epoch"] for epoch in summary["epochs"]] == [0, 1]
    assert all(epoch[name] is not None for epoch in summary["epochs"] for name in FIGURES)
    assert 0 < summary["drop_share"]["realised"] < summary["drop_share"]["asked"] <= 0.1
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["regularize"]["regularizer"] == "dropblock"
    assert config["data"]["init_args"]["root"] is not None
    for name in ("curves.png", "samples.png", "checkpoints/best.ckpt", "outcomes.npz"):
        assert (run / name).stat().st_size > 0
    metrics = (run / "logs" / "version_0" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {
        "loss",
        "loss_classification",
        "loss_bbox_regression",
        "val_loss",
        "mAP",
        "AP50",
        "AP75",
        "lr",
        "p",
    } <= set(metrics)
    assert list((run / "logs" / "version_0").glob("events.out.tfevents.*"))


def test_it_ends_with_the_table_and_the_next_command(run):
    output = (run / "stdout.txt").read_text()
    assert all(name in output for name in FIGURES)
    assert f"python {ROOT}/tools/evaluate.py {run}/checkpoints/best.ckpt" in output


@pytest.fixture
def two_threads():
    """Where the training had one: sums are in another order then."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_evaluating_the_checkpoint_gives_the_same_figures(run, tmp_path, capsys):
    best = max(json.loads((run / "record.json").read_text())["epochs"], key=lambda epoch: epoch["mAP"])
    best_checkpoint = run / "checkpoints" / "best.ckpt"
    figures = evaluate(best_checkpoint, results=tmp_path / "results.json", accelerator="cpu")
    for name in ("val_loss", "mAP", "AP50", "AP75"):
        assert figures[name] == pytest.approx(best[name], abs=1e-6)
    assert "AR_large" in capsys.readouterr().out
    scenes = yaml.safe_load((run / "config.yaml").read_text())["data"]["init_args"]["root"]
    COCO(next(Path(scenes).glob("*/annotations/val.json"))).loadRes(str(tmp_path / "results.json"))


def test_a_closer_look_has_the_same_figures(run, tmp_path, capsys):
    best, folder = run / "checkpoints" / "best.ckpt", tmp_path / "closer"
    figures = evaluate(best, report=folder, score=0.01, accelerator="cpu")
    assert f"report  {folder}/report.html" in capsys.readouterr().out
    with (folder / "categories.csv").open(newline="") as file:
        *categories, total = csv.DictReader(file)
    for name, figure in (("AP", "mAP"), ("AP50", "AP50"), ("AR", "AR_100")):  # logged as float32
        assert float(total[name]) == pytest.approx(figures[figure], rel=1e-6)
    known = [float(row["AP"]) for row in categories if row["AP"]]
    assert sum(known) / len(known) == pytest.approx(figures["mAP"], rel=1e-6)
    assert "score of 0.01 or more" in (folder / "report.html").read_text()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    evaluate(best, report=folder, score=0.01, accelerator="cpu")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": 0.5}, "--score: where --report counts detections; give --report too"),
        ({"report": "runs"}, "no part of such a report; give another folder"),
        ({"report": "new", "results": "new/x.json"}, "x.json: in the report's folder"),
        ({"report": "new", "score": 1.5}, "score: got 1.5"),
    ],
)
def test_a_closer_look_that_cannot_begin_is_one_line(options, message, run, tmp_path, line_of):
    names = {"new": tmp_path / "new", "runs": run, "new/x.json": tmp_path / "new" / "x.json"}
    options = {name: names.get(value, value) for name, value in options.items()}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    best = str(run / "checkpoints" / "best.ckpt")
    assert message in line_of(lambda: command(evaluate, [best, "--accelerator", "cpu", *words], "evaluate"))
    assert not list(tmp_path.iterdir())


def test_its_weights_load_into_plain_torchvision(run):
    checkpoint = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    state = {key.removeprefix("detector."): value for key, value in checkpoint["state_dict"].items()}
    names = checkpoint["hyper_parameters"]["categories"]
    stock = ssdlite320_mobilenet_v3_large(weights_backbone=None, num_classes=len(names) + 1)
    assert stock.load_state_dict(state, strict=True)


def test_a_finished_run_is_left_alone(run, scenes, tmp_path, monkeypatch, capsys):
    """Also where it was moved to, and without the checkpoints that only a resume needs."""
    shutil.copytree(run, tmp_path / "moved", ignore=shutil.ignore_patterns("last-*"))
    before = (run / "record.json").read_bytes()
    train(arguments(scenes, tmp_path / "moved"), monkeypatch)
    assert (tmp_path / "moved" / "record.json").read_bytes() == before
    assert "val_loss" in capsys.readouterr().out


def test_other_settings_in_the_same_folder_are_refused(run, scenes, monkeypatch):
    for args in (arguments(scenes, run), ["--resume", str(run)], [f"--resume={run}"]):
        with pytest.raises(InputError, match=r"model.lr: 0.001 before, 0.1 now"):
            train([*args, "--model.lr=0.1"], monkeypatch)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file, so {} has no run to resume"),
        (b"model: [1, 2", "{}/config.yaml: not valid YAML ("),
        (b"\xff\xfe\x00", "{}/config.yaml: not valid YAML ("),
        (b"- 1", "{}/config.yaml: not a config: "),
    ],
)
def test_a_folder_without_a_run_is_not_resumed(content, message, tmp_path, line_of):
    if content is not None:
        (tmp_path / "config.yaml").write_bytes(content)
    assert message.format(tmp_path) in line_of(lambda: cli.train(["--resume", str(tmp_path)]))
    assert "--resume: expected one argument" in line_of(lambda: cli.train(["--resume"]))


@pytest.mark.parametrize("record", ["[]", "{}", "{", '{"finished": true}'])
def test_a_broken_record_is_named(record, run, tmp_path, line_of, monkeypatch):
    shutil.copy(run / "config.yaml", tmp_path)
    (tmp_path / "record.json").write_text(record)
    assert "record.json: not " in line_of(lambda: train(["--resume", str(tmp_path)], monkeypatch))


def test_shorter_ways_to_say_things(run):
    short = ["--on-nonfinite=skip", "--model.lr", "0.1"]
    expected = "detection", [f"--config={FIRST}", "--model.on_nonfinite=skip", *short[1:]]
    assert cli.spelled_out(short) == expected
    given = ["--config", str(run / "config.yaml"), "--on-nonfinite", "skip"]
    assert cli.spelled_out(given)[1] == [*given[:2], "--model.on_nonfinite", "skip"]
    assert cli.spelled_out(["--trainer.devices=2", "--resume", str(run)])[1] == [
        *(f"--config={run}/config.yaml", "--trainer.devices=2", f"--output={run}")
    ]


def test_a_run_is_resumed_in_its_own_folder(run, tmp_path, line_of):
    resume = ["--resume", str(run), "--output", str(tmp_path / "other")]
    assert f"--resume goes on in {run} itself" in line_of(lambda: cli.train(resume))
    assert not (tmp_path / "other").exists()
    assert cli.spelled_out(["--resume", str(run), f"--output={run}"])[1][-1] == f"--output={run}"


def test_a_folder_in_use_is_left_alone(scenes, tmp_path, line_of, monkeypatch):
    """A second start names the first."""
    folder = tmp_path / "run"
    with sole_use(folder):
        message = line_of(lambda: train(arguments(scenes, folder), monkeypatch))
        assert f"{folder}: process {os.getpid()} on " in message
        assert "is working on it" in message
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"])
def test_one_of_several_processes_locks_the_folder(name, tmp_path, monkeypatch):
    with sole_use(tmp_path):
        monkeypatch.setenv(name, "1")
        with sole_use(tmp_path):
            pass


def test_a_foreign_config_is_not_overwritten(scenes, tmp_path, line_of, monkeypatch):
    (tmp_path / "config.yaml").write_text("mine: 1\n")
    assert "holds a run with other settings" in line_of(
        lambda: train(arguments(scenes, tmp_path), monkeypatch)
    )
    assert (tmp_path / "config.yaml").read_text() == "mine: 1\n"


def test_without_the_best_checkpoint_it_is_not_named(run, scenes, tmp_path, monkeypatch, capsys):
    shutil.copytree(run, tmp_path / "moved", ignore=shutil.ignore_patterns("*.ckpt"))
    train(arguments(scenes, tmp_path / "moved"), monkeypatch)
    printed = capsys.readouterr().out
    assert "val_loss" in printed
    assert ".ckpt" not in printed


DIES_WHILE_WRITING = """
import io, os, signal, sys, torch
from dropblock_det.runs.checkpoints import AtomicCheckpointIO, load_checkpoint
from dropblock_det.training import cli
whole, save_checkpoint = torch.save, AtomicCheckpointIO.save_checkpoint

def noting_the_path(self, checkpoint, path, **options):
    global name
    name = str(path)
    save_checkpoint(self, checkpoint, path, **options)

def save(checkpoint, file):
    if checkpoint["epoch"] == 1 and "last" in name:
        content = io.BytesIO()
        whole(checkpoint, content)
        file.write(content.getvalue()[: len(content.getvalue()) // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    whole(checkpoint, file)

torch.save, AtomicCheckpointIO.save_checkpoint = save, noting_the_path
cli.train(sys.argv[1:])
"""


def test_killed_and_resumed_it_ends_with_the_same_bits(run, scenes, tmp_path):
    """SIGKILL in the middle of writing the second checkpoint; a broken one lies in the way too."""
    folder = tmp_path / "killed"
    program = ("-c", DIES_WHILE_WRITING)
    dying = start(arguments(scenes, folder), program, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, messages = dying.communicate(timeout=300)
    assert dying.returncode == -signal.SIGKILL, messages
    half, *written = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert half.startswith("..last.ckpt.")
    assert written == ["best.ckpt", "last-00000.ckpt"]
    assert newest_checkpoint(folder).name == "last-00000.ckpt"
    (folder / "checkpoints" / "last-00009.ckpt").write_bytes(b"half a checkpoint")
    again = start([f"--resume={folder}"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    _, messages = again.communicate(timeout=300)
    assert again.returncode == 0, messages
    assert "skipped: " in messages
    assert "last-00009.ckpt: not a whole checkpoint" in messages
    assert not (folder / "checkpoints" / half).exists()
    straight, resumed = (json.loads((path / "record.json").read_text())["epochs"] for path in (run, folder))
    for mine, other in zip(resumed, straight, strict=True):
        assert {name: mine[name] for name in (*FIGURES, "p", "drop_share")} == {
            name: other[name] for name in (*FIGURES, "p", "drop_share")
        }
    expected = weights(run)
    assert not (folder / "checkpoints" / "last-00009.ckpt").exists()
    assert all(torch.equal(value, expected[key]) for key, value in weights(folder).items())


@pytest.mark.parametrize(
    ("sent", "status", "message"),
    [
        (signal.SIGTERM, 143, f"stopped; python {ROOT / 'tools' / 'train.py'} --resume"),
        (signal.SIGKILL, 2, "error: a process that loads images was killed: out of memory?"),
    ],
)
def test_what_befalls_a_process_that_loads_images(sent, status, message, scenes, tmp_path):
    """A scheduler's SIGTERM comes to all processes, and theirs may be the first that is noticed."""
    more = "--data.num_workers=1", "--trainer.max_epochs=500"
    process = start(
        arguments(scenes, tmp_path / "run", *more), stdout=subprocess.DEVNULL, stderr=-1, text=True
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not list(tmp_path.glob("run/checkpoints/last-*")):
        assert process.poll() is None
        time.sleep(0.1)
    os.kill(int(children.read_text().split()[0]), sent)
    _, messages = process.communicate(timeout=120)
    assert process.returncode == status, messages
    assert messages.splitlines()[-1].startswith(message)
    assert "Traceback" not in messages


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_by_a_signal_it_says_how_to_go_on(sent, status, scenes, tmp_path, monkeypatch, capsys):
    """compare.py starts the run again where it sees these statuses; 0 would be a run that ended well."""
    stock, handler = SSD.compute_loss, signal.getsignal(signal.SIGINT)

    def compute_loss(self, *args):
        if self.training:
            os.kill(os.getpid(), sent)
        return stock(self, *args)

    monkeypatch.setattr(SSD, "compute_loss", compute_loss)
    try:
        with pytest.raises(SystemExit) as caught:
            train(arguments(scenes, tmp_path / "run"), monkeypatch)
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores it from the first on
    assert caught.value.code == status
    assert capsys.readouterr().err.endswith(
        f"stopped; dropblock-det train --resume {tmp_path}/run goes on from the last epoch\n"
    )
    assert not (tmp_path / "run" / "record.json").exists()


@pytest.mark.parametrize("damage", ["truncated", "one bit", "empty"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(damage, tmp_path, capsys):
    files = [tmp_path / "checkpoints" / f"last-{epoch:05d}.ckpt" for epoch in range(2)]
    for file in files:
        AtomicCheckpointIO().save_checkpoint({"state_dict": {"weight": torch.rand(10_000)}}, file)
    content = bytearray(files[1].read_bytes())
    if damage == "one bit":
        content[len(content) // 2] ^= 16  # in the middle of the weights, where torch.load does not notice
    files[1].write_bytes({"truncated": content[:-100], "one bit": content, "empty": b""}[damage])
    assert newest_checkpoint(tmp_path) == files[0]
    assert f"skipped: {files[1]}: not a whole checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("results", "trainer", "message"),
    [
        (".", {}, "not a regular file, so it is not replaced"),
        ("/dev/null", {}, "/dev/null: not a regular file, so it is not replaced"),
        ("link", {}, "link: not a regular file, so it is not replaced"),
        ("the checkpoint", {}, "is read by the same command, so it is not replaced"),
        ("the annotations", {}, "is read by the same command, so it is not replaced"),
        ("an image", {}, "is read by the same command, so it is not replaced"),
        ("x.json", {"accelerator": "nonsense"}, "trainer: You selected an invalid accelerator name"),
        ("x.json", {"devices": 0}, "trainer: `Trainer(devices=0)` value is not"),
    ],
)
def test_evaluation_that_cannot_begin_is_one_line(results, trainer, message, run, tmp_path, line_of):
    best = run / "checkpoints" / "best.ckpt"
    data = load_checkpoint(best)["validation_data"]
    annotations = Path(data["root"]) / data["val_annotations"]
    image = next((Path(data["root"]) / data["val_images"]).iterdir())
    (tmp_path / "link").symlink_to(tmp_path / "target")
    read = {"the checkpoint": best, "the annotations": annotations, "an image": image}
    path = read.get(results, tmp_path / results)
    before = [file.stat() for file in read.values()]
    assert message in line_of(lambda: evaluate(best, results=path, **{"accelerator": "cpu", **trainer}))
    assert [file.stat() for file in read.values()] == before
    assert [file.name for file in tmp_path.iterdir()] == ["link"]
    assert Path("/dev/null").is_char_device()


def test_the_figures_are_printed_before_the_results_are_written(run, tmp_path, capsys):
    """A disk that is full at the end does not take the figures with it."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"Not a directory|File exists"):
        evaluate(run / "checkpoints" / "best.ckpt", results=tmp_path / "file" / "x.json", accelerator="cpu")
    assert "AR_large" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content", [b"x" * 2**22, {"weight": torch.zeros(2**20)}], ids=["bytes", "checkpoint"]
)
def test_a_full_disk_is_one_line_and_leaves_nothing(content, tmp_path, line_of):
    """The limit on a file's size stands for it."""
    path, before = tmp_path / "x.ckpt", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        if isinstance(content, bytes):
            line = line_of(lambda: write_bytes(path, content))
        else:
            line = line_of(lambda: AtomicCheckpointIO().save_checkpoint(content, path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"error: {path}: File too large (make room and start again" in line
    assert list(tmp_path.iterdir()) == []
