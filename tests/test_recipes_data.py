"""The README's recipe for a data set of one's own, followed to the letter."""

import contextlib
import json
import re
import sys
from pathlib import Path

import torch
from jsonargparse import ArgumentParser
from PIL import Image

from dropblock_det.datasets.coco import CocoDataModule
from dropblock_det.training.allowed import allow

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_a_data_set_is_one_class(tmp_path, monkeypatch):
    code, settings = re.search(
        r"<!-- recipe: data set -->.*?```python\n(.*?)```.*?```bash\n(.*?)```", README, re.DOTALL
    ).groups()
    assert code.count("\n") + settings.count("\n") <= 10
    (tmp_path / "pedestrians.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "photos").mkdir()
    for part in ("train", "val"):
        Image.new("RGB", (40, 30), "gray").save(tmp_path / "photos" / f"{part}.png")
        content = {
            "images": [{"id": 1, "file_name": f"{part}.png", "width": 40, "height": 30}],
            "categories": [{"id": 1, "name": "person"}],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 10, 20]}],
        }
        (tmp_path / f"{part}.json").write_text(json.dumps(content))

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(CocoDataModule, "data")
    words = [word.replace("data/pedestrians", str(tmp_path)) for word in settings.split()]
    with contextlib.ExitStack() as stack:
        words = [word for word in allow(words, stack) if word.startswith("--data")]
        data = parser.instantiate(parser.parse_args([*words, "--data.num_workers=0", "--data.seed=3"])).data
    assert type(data).__name__ == "Pedestrians"
    assert (data.seed, data.batch_size) == (3, 4)
    data.prepare_data()
    data.setup("fit")
    images, targets = next(iter(data.train_dataloader()))
    assert images[0].shape == (3, 30, 40)
    assert targets[0]["labels"].tolist() == [1]
    assert torch.isfinite(images[0]).all()
    assert data.val_dataset.files == ["val.png"]
    assert data.categories == [{"label": 1, "id": 1, "name": "person"}]
    del sys.modules["pedestrians"]
