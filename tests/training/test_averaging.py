"""The recipe for an exponential moving average of the weights, which is Lightning's own."""

import json
import re

import pytest
import torch
from support.tiny_run import ROOT, arguments, train

from dropblock_det.training.evaluate import evaluate

README = (ROOT / "dropblock_det" / "training" / "README.md").read_text(encoding="utf-8")


def test_averaged_weights_are_validated_saved_resumed_and_evaluated(scenes, tmp_path, monkeypatch):
    """With the regularizer's callback, and every step's weights in the average."""
    recipe = re.search(r"<!-- recipe: averaged weights -->\n```bash\n(.*?)```", README, re.DOTALL)[1]
    given = re.findall(r"--trainer\.callbacks\S+", recipe)
    assert len(given) == 2
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("dropblock_det.runs.recorder.RunRecord.on_fit_end", lambda *_: None)  # not finished
        train(arguments(scenes, folder, *given), monkeypatch)
    last = folder / "checkpoints" / "last-00001.ckpt"
    straight = torch.load(last, weights_only=True)
    averaged, current = straight["state_dict"], straight["current_model_state"]
    assert [*averaged] == [*current]
    weight = "detector.backbone.features.0.0.0.weight"
    assert not torch.equal(averaged[weight], current[weight])
    assert straight["regularizers"][0]["name"] == "dropblock"

    last.unlink()
    train([f"--resume={folder}"], monkeypatch)
    resumed = torch.load(last, weights_only=True)
    for kind in ("state_dict", "current_model_state"):
        for name, value in straight[kind].items():
            assert torch.equal(value, resumed[kind][name]), name
    validated = json.loads((folder / "record.json").read_text())["epochs"][-1]
    figures = evaluate(last, accelerator="cpu")
    for name in ("val_loss", "mAP", "AP50"):
        assert figures[name] == pytest.approx(validated[name], abs=1e-6)
