"""Small and full-size stand-ins for COCO 2017: right in form, made up in content."""

import io
import json
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dropblock_det.coco_subset.choose import SPLITS

OFFICIAL = "http://images.cocodataset.org"

PEAK_MB = """
def peak_mb():
    # Begins anew with the program; ru_maxrss would start with what its parent, here pytest with torch, held.
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) / 1024
"""


def category_list(count: int) -> list[dict[str, Any]]:
    """Ids with gaps, as COCO's."""
    return [{"id": 2 * i + 1, "name": f"thing {i}", "supercategory": "things"} for i in range(count)]


def annotations(split: str, images: int, categories: int = 5, seed: int = 0) -> dict[str, Any]:
    """A whole annotation file; the last category is rare, every tenth image has no boxes."""
    rng = random.Random(f"{seed}/{split}")
    kinds = category_list(categories)
    offset = 1000 if split == "val" else 0
    entries, boxes = [], []
    for index in range(images):
        identifier = offset + 7 * index + 3
        width, height = rng.randrange(40, 80), rng.randrange(40, 80)
        name = f"{identifier:012}.jpg"
        entries.append(
            {
                "license": rng.randrange(1, 4),
                "file_name": name,
                "coco_url": f"{OFFICIAL}/{split}2017/{name}",
                "height": height,
                "width": width,
                "date_captured": "2013-11-14 11:18:45",
                "flickr_url": f"http://farm7.staticflickr.com/{identifier}_z.jpg",
                "id": identifier,
            }
        )
        for _ in range(0 if index % 10 == 9 else rng.randrange(1, 4)):
            kind = kinds[-1] if rng.random() < 1 / images else rng.choice(kinds[:-1])
            x, y, w, h = (rng.uniform(0, 20) for _ in range(4))
            boxes.append(
                {
                    "segmentation": [[x, y, x + w, y, x + w, y + h]],
                    "area": w * h * 4,
                    "iscrowd": int(rng.random() < 0.05),
                    "image_id": identifier,
                    "bbox": [x, y, w, h],
                    "category_id": kind["id"],
                    "id": offset * 100 + 5 * len(boxes) + 11,
                }
            )
    boxes[0] |= {"category_id": kinds[-1]["id"], "iscrowd": 0}
    return {
        "info": {"description": "COCO 2017 Dataset", "year": 2017},
        "licenses": [{"url": f"http://licence/{i}", "id": i, "name": f"Licence {i}"} for i in (1, 2, 3)],
        "images": entries,
        "annotations": boxes,
        "categories": kinds,
    }


def jpeg(entry: dict[str, Any]) -> bytes:
    noise = np.random.default_rng(entry["id"]).integers(
        0, 256, (entry["height"], entry["width"], 3), np.uint8
    )
    out = io.BytesIO()
    Image.fromarray(noise).save(out, "jpeg", quality=80)
    return out.getvalue()


def make_site(train: int = 40, val: int = 15, categories: int = 5) -> dict[str, bytes]:
    """What the official server holds, by path: the annotation archive and all images."""
    files = {}
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for split, count in zip(SPLITS, (train, val), strict=True):
            content = annotations(split, count, categories)
            archive.writestr(f"annotations/instances_{split}2017.json", json.dumps(content))
            archive.writestr(f"annotations/captions_{split}2017.json", "{}")
            for entry in content["images"]:
                files[f"/{split}2017/{entry['file_name']}"] = jpeg(entry)
    files["/annotations/annotations_trainval2017.zip"] = packed.getvalue()
    return files


def unpack_site(files: dict[str, bytes], folder: Path) -> Path:
    """The same as a COCO on disk."""
    for path, content in files.items():
        if path.endswith(".zip"):
            zipfile.ZipFile(io.BytesIO(content)).extractall(folder)
        else:
            target = folder / path[1:]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    return folder


def write_full_size(
    path: Path, images: int = 118_287, boxes: int = 860_001, polygons: tuple[int, int] = (8, 130)
) -> None:
    """An instances_train2017.json of full size, 0.6 GB: 80 classes, one very rare, images out of order.

    ``polygons`` is the range of numbers in a polygon; (14, 16) gives 0.24 GB.
    """
    rng = random.Random(0)
    classes = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
    weights = [1 / (rank + 1) for rank in range(79)] + [0.0002]
    ids = rng.sample(range(1, 600_000), images)
    polygons = [json.dumps([[round(rng.uniform(0, 640), 2) for _ in range(n)]]) for n in range(*polygons, 2)]
    with path.open("w") as out:
        out.write('{"info": {"year": 2017}, "licenses": [{"id": 1, "name": "Licence"}], "images": [')
        for number, identifier in enumerate(ids):
            name = f"{identifier:012}.jpg"
            entry = {
                "license": 1,
                "file_name": name,
                "coco_url": f"{OFFICIAL}/train2017/{name}",
                "height": 480,
            }
            entry |= {"width": 640, "date_captured": "2013-11-14 11:18:45", "id": identifier}
            out.write((", " if number else "") + json.dumps(entry))
        out.write('], "annotations": [')
        for number, kind in enumerate(rng.choices(classes, weights, k=boxes)):
            entry = {"area": rng.uniform(20, 90_000), "iscrowd": int(rng.random() < 0.01), "id": number + 1}
            entry |= {"image_id": rng.choice(ids), "category_id": kind, "bbox": [1.5, 2.25, 3.0, 4.0]}
            polygon = rng.choice(polygons)
            out.write((", " if number else "") + json.dumps(entry)[:-1] + f', "segmentation": {polygon}}}')
        out.write('], "categories": ' + json.dumps([{"id": i, "name": f"class {i}"} for i in classes]) + "}")


def val2017_like() -> tuple[dict[str, Any], list[dict[str, torch.Tensor]], list[dict[str, Any]]]:
    """Annotations of val2017's size, a detector's output of 100 detections per image, and the categories.

    Of the detections of an image, as many as it has objects lie beside these.
    """
    rng = np.random.default_rng(0)
    images, boxes = 5000, 36_781
    categories = [{"label": number, **kind} for number, kind in enumerate(category_list(80), start=1)]
    image = np.sort(rng.integers(0, images, boxes))
    label = rng.integers(1, 81, boxes)
    corner, side = rng.uniform(0, 400, (boxes, 2)), np.exp(rng.uniform(2, 5, (boxes, 2)))
    annotations = {
        "images": [{"id": number, "width": 640, "height": 480} for number in range(images)],
        "categories": categories,
        "annotations": [
            {
                "id": number + 1,
                "image_id": int(image[number]),
                "category_id": categories[label[number] - 1]["id"],
                "bbox": [*corner[number].tolist(), *side[number].tolist()],
                "area": float(side[number].prod()),
                "iscrowd": int(rng.random() < 0.01),
            }
            for number in range(boxes)
        ],
    }
    detections = []
    for own in np.split(np.arange(boxes), np.searchsorted(image, np.arange(1, images))):
        others = 100 - len(own)
        near = np.concatenate([corner[own], corner[own] + side[own]], axis=1)
        near += rng.normal(0, 4, near.shape)
        far = rng.uniform(0, 300, (others, 4))
        far[:, 2:] += 310
        detections.append(
            {
                "boxes": torch.tensor(np.concatenate([near, far]), dtype=torch.float32),
                "scores": torch.tensor(rng.random(100), dtype=torch.float32),
                "labels": torch.tensor(np.concatenate([label[own], rng.integers(1, 81, others)])),
            }
        )
    return annotations, detections, categories
