import json

import numpy as np
import pytest
from PIL import Image


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
