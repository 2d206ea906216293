"""What ``--trainer.precision auto`` becomes, on machines of all kinds, and where it is written down."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from support.tiny_run import ROOT, train

from dropblock_det.training.precision import resolve_precision

PLAIN, AVX, AMX = {}, {"avx512_bf16": True}, {"amx_bf16": True, "avx512_bf16": False}
TURING, AMPERE, HOPPER = (7, 5), (8, 0), (9, 0)


@pytest.mark.parametrize(
    ("accelerator", "devices", "cpu", "gpus", "mps", "expected"),
    [
        ("cpu", "auto", AVX, [], False, "bf16-mixed"),
        ("cpu", 2, AMX, [], False, "bf16-mixed"),
        ("cpu", "auto", PLAIN, [], False, "32-true"),
        ("auto", "auto", AVX, [], False, "bf16-mixed"),
        ("auto", "auto", AVX, [TURING], False, "32-true"),  # that of the GPU, which it really uses
        ("cpu", "auto", AVX, [TURING], False, "bf16-mixed"),
        ("cpu", "auto", PLAIN, [HOPPER], False, "32-true"),
        ("auto", "auto", PLAIN, [AMPERE], False, "bf16-mixed"),
        ("gpu", 1, PLAIN, [HOPPER, TURING], False, "bf16-mixed"),
        ("gpu", "1,", PLAIN, [HOPPER, TURING], False, "32-true"),
        ("cuda", [0, 1], PLAIN, [HOPPER, TURING], False, "32-true"),
        ("cuda", -1, PLAIN, [HOPPER, HOPPER], False, "bf16-mixed"),
        ("cuda", [5], AVX, [HOPPER], False, "32-true"),  # which the trainer refuses
        ("auto", "auto", AVX, [], True, "32-true"),
        ("mps", 1, AVX, [], True, "32-true"),
        ("gpu", 1, AVX, [], True, "32-true"),
        ("tpu", 1, AVX, [], False, "32-true"),
    ],
)
def test_auto(accelerator, devices, cpu, gpus, mps, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: gpus[number])
    monkeypatch.setattr("lightning.fabric.accelerators.cuda.num_cuda_devices", lambda: len(gpus))
    assert resolve_precision(accelerator, devices) == expected


def test_every_shipped_config_asks_for_it():
    configs = [*(ROOT / "configs").glob("*.yaml"), *(ROOT / "configs/classification").glob("*.yaml")]
    assert len(configs) == 9
    assert all(yaml.safe_load(file.read_text())["trainer"]["precision"] == "auto" for file in configs)


def test_a_run_keeps_the_precision_that_it_began_with(tmp_path, monkeypatch, capsys, line_of):
    """On a machine of another kind it goes on in its own, or is refused: it never changes silently."""
    # A small classifier: without hardware for it, a detector takes minutes in bfloat16.
    for part in ("train", "test"):
        for name, color in (("dark", 40), ("bright", 200)):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            Image.new("RGB", (16, 16), (color,) * 3).save(tmp_path / "images" / part / name / "0.png")
    config = ROOT / "configs" / "classification" / "cifar10_small_cnn.yaml"
    settings = [f"--config={config}", "--data.source=folder", f"--data.root={tmp_path / 'images'}"]
    settings += ["--trainer.max_epochs=2", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]

    def written(folder: Path) -> set[str]:
        record = json.loads((folder / "record.json").read_text())
        checkpoint = torch.load(folder / "checkpoints" / "last-00001.ckpt", weights_only=True)
        config = yaml.safe_load((folder / "config.yaml").read_text())
        return {
            config["trainer"]["precision"],
            record["config"]["trainer"]["precision"],
            checkpoint["precision"],
        }

    folder = tmp_path / "run"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: AVX)
    with monkeypatch.context() as patch:
        patch.setattr("dropblock_det.runs.recorder.RunRecord.on_fit_end", lambda *_: None)  # not finished
        train([*settings, f"--output={folder}"], monkeypatch)
    assert "cpu, in bf16-mixed." in capsys.readouterr().out
    assert written(folder) == {"bf16-mixed"}
    (folder / "checkpoints" / "last-00001.ckpt").unlink()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: PLAIN)
    line = line_of(lambda: train([*settings, f"--output={folder}"], monkeypatch))
    assert "trainer.precision: 'bf16-mixed' before, '32-true' now" in line
    train([f"--resume={folder}"], monkeypatch)
    assert "epochs 2 to 2, cpu, in bf16-mixed." in capsys.readouterr().out
    assert written(folder) == {"bf16-mixed"}
